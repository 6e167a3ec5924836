"""Room for training: core's models are unloaded although some that nobody holds wait to be collected."""

import gc

import pytest


@pytest.fixture
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_models_that_are_collected_amid_unloading_end_nothing(comfyui, internals, tiny, without_collector):
    from indomain_guidance.nodes.comfy_internals.runs.execution import free_memory

    management, patcher_extension = comfyui.model_management, comfyui.patcher_extension
    management.unload_all_models()
    kept, forgotten = tiny.prior(seed=1), tiny.prior(seed=2)
    # As any allocation may, while core walks along its list.
    kept.add_callback(patcher_extension.CallbacksMP.ON_DETACH, lambda *_: gc.collect())
    forgotten.attachments["itself"] = forgotten  # only the collector finds it
    management.load_models_gpu([forgotten])
    management.load_models_gpu([kept])
    del forgotten
    free_memory()
    assert not management.current_loaded_models
