"""The estimate of an adaptation's memory against what a step really keeps."""

from __future__ import annotations

from dataclasses import replace

import torch
from indomain_guidance.training.adaptation.estimate import estimate_adaptation


def kept_by(run) -> int:
    """Bytes that autograd keeps of `run()`, one count per storage."""
    kept = {}

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result, own = run()
    pointers = {one.untyped_storage().data_ptr() for module in own for one in (*module.parameters(), *module.buffers())}
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in pointers)


def test_activations_are_what_a_step_keeps(tiny_adaptation, tiny_run, tmp_path):
    base, generator = tiny_run.tiny_base(), tiny_adaptation.tiny_generator().requires_grad_(True)
    config = tiny_adaptation.tiny_config(tmp_path, batch_size=2)
    found = estimate_adaptation(config, generator, 100, base, 64)

    def step():
        images = generator.synthesize(torch.randn(2, generator.num_ws, 8))
        large = torch.zeros(2, 3, 64, 64, requires_grad=True)
        return images.sum() + base.autoencoder.encode(large)[0].sum(), (generator, base.autoencoder)

    real = kept_by(step)
    assert abs(found.parts["activations"] - real) < 0.05 * real, (found.parts["activations"], real)
    assert (
        found.parts["gradients, optimizer and average"] == 4 * 100 * 4
        and found.peak > found.parts["models"] + found.parts["activations"]
    )
    assert "activations" in found.to_text()


def test_what_does_not_fit_gets_advice(tiny_adaptation, tiny_run, tmp_path):
    config, base = tiny_adaptation.tiny_config(tmp_path), tiny_run.tiny_base()
    found = estimate_adaptation(config, tiny_adaptation.tiny_generator(), 1, base, 64)
    assert "batch_size 1" in replace(found, available=found.peak - 1).to_text()
    assert "batch_size" not in replace(found, available=2 * found.peak).to_text()
    assert "available" not in replace(found, available=None).to_text()


def test_checkpointing_and_smaller_batches_need_less(tiny_adaptation, tiny_run, tmp_path):
    def activations(**changes):
        config = tiny_adaptation.tiny_config(tmp_path, **changes)
        return estimate_adaptation(config, tiny_adaptation.tiny_generator(), 1, tiny_run.tiny_base(), 64).parts[
            "activations"
        ]

    assert activations(gradient_checkpointing=True) < activations()
    assert activations(batch_size=1) < 0.6 * activations(batch_size=2)
