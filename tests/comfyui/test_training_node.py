"""Train Domain UNet inside ComfyUI's process, under inference mode as ComfyUI runs nodes."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow

SIGMAS = torch.tensor([9.0, 0.7])
CONTEXT = 24


def module(name: str):
    return importlib.import_module(f"indomain_guidance.{name}")


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def world(comfyui, tmp_path, monkeypatch):
    """ComfyUI's folders in a folder of this test's own, and the modules under test."""
    folder_paths, loading = importlib.import_module("folder_paths"), module("nodes.comfy_internals.models.loading")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(
        folder_paths,
        "folder_names_and_paths",
        {
            **folder_paths.folder_names_and_paths,
            "checkpoints": ([str(tmp_path / "models" / "checkpoints")], {".safetensors"}),
            "loras": ([str(tmp_path / "models" / "loras")], {".safetensors"}),
        },
    )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    domain_unets = module("nodes.comfy_internals.models.folders").DOMAIN_UNETS
    monkeypatch.setattr(domain_unets, "shipped", tmp_path / "shipped")
    domain_unets.register()
    for kind in ("input", "output", "temp", "user"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return SimpleNamespace(
        tmp=tmp_path,
        folder_paths=folder_paths,
        loading=loading,
        nodes=module("nodes.training"),
        prior=module("nodes.comfy_internals.runs.prior"),
        pictures=module("nodes.comfy_internals.runs.pictures"),
    )


@pytest.fixture
def train(world):
    """Runs the node on the mini world: a few steps, few images, no previews unless asked."""

    def run(**inputs):
        options = {"held_out_share": 0.0, "validate_every": 0, "warmup": 0, **inputs.pop("options", {})}
        values = {
            "name": "made",
            "checkpoint": "mini_world",
            "image_folder": "",
            "form": "cached",
            "steps": 3,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "resolution": 64,
            "sample_every": 0,
            "seed": 0,
            "resume": "auto",
            "options": options,
            **inputs,
        }
        with torch.inference_mode():
            lists = {
                name: value if name == "images" else [value] for name, value in values.items() if value is not None
            }
            out = world.nodes.TrainDomainUNet.execute(**lists)
        model, samples, loss, path = out.result
        return SimpleNamespace(model=model, samples=samples, loss=loss, path=path, ui=out.ui)

    return run


@pytest.fixture
def pictures():
    """Six coloured pictures as an IMAGE batch, made under inference mode as ComfyUI's nodes make them."""
    with torch.inference_mode():
        return torch.rand(6, 64, 64, 3, generator=torch.Generator().manual_seed(0))


def weights_of(path) -> dict[str, torch.Tensor]:
    return module("guidance.files").read_domain_file(path)[0]


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- the export -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(comfyui):
    """A CLIP of the tiny priors' text width, with random weights."""
    text, mini_world = module("guidance.networks.text_encoder"), module("nodes.comfy_internals.models.mini_world")
    config = text.TextEncoderConfig(width=CONTEXT, layers=2, heads=4, mlp_width=48)
    torch.manual_seed(4)
    weights = {
        key: value + 0.3 * torch.randn_like(value) for key, value in text.TextEncoder(config).state_dict().items()
    }
    table = "text_model.embeddings.token_embedding.weight"
    weights[table] = weights[table][:2]
    return mini_world.build_clip(weights, {"config": json.dumps(config.to_dict()), "token_ids": "[49406]"})


@pytest.fixture(scope="module")
def mini(comfyui):
    """(MODEL, CLIP, VAE) of the mini world, loaded under inference mode."""
    with torch.inference_mode():
        return module("nodes.comfy_internals.models.loading").load_mini_world()


@torch.inference_mode()
def core_eps(comfyui, model, x, context):
    comfyui.model_management.load_models_gpu([model])
    x0 = model.model.apply_model(x, SIGMAS, c_crossattn=context, transformer_options={})
    return (x - x0) / SIGMAS[:, None, None, None]


@pytest.mark.parametrize("lora", [False, True])
def test_an_exported_model_predicts_what_core_predicts(comfyui, tiny, clip, mini, world, lora):
    prior = tiny.lora(tiny.prior(), seed=8, contains="attn") if lora else tiny.prior()
    with torch.inference_mode(), world.loading.ordinary_tensors():
        base = world.prior.prior_of_models(prior, clip, mini[2], ["a cat", "a cat", ""])
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 4
    t = base.schedule.timestep(SIGMAS, nearest=True)
    scaled = x / (SIGMAS.square() + 1).sqrt()[:, None, None, None]
    for prompt in ("", "a cat"):
        context = base.encode_text([prompt]).context.expand(2, -1, -1)
        with torch.no_grad():
            ours = base.load_unet()(scaled, t, context=context)
        with torch.inference_mode():
            expected = clip.encode_from_tokens(clip.tokenize(prompt)).expand(2, -1, -1)
        assert error(ours, core_eps(comfyui, prior, x, expected)) < 2e-5


def test_exported_weights_can_be_trained(tiny, clip, mini, world):
    with torch.inference_mode():
        inside = tiny.prior()
        with world.loading.ordinary_tensors():
            base = world.prior.prior_of_models(inside, clip, mini[2], [])
    unet = base.load_unet().requires_grad_(True)
    unet(torch.randn(1, 4, 8, 8), torch.tensor([5.0]), context=base.null_context.tensor).square().mean().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_exported_vae_encodes_as_cores(mini, world):
    prior, clip, vae = mini
    with torch.inference_mode(), world.loading.ordinary_tensors():
        base = world.prior.prior_of_models(prior, clip, vae, [])
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = vae.encode(images)
    mean, _ = base.encode(images.permute(0, 3, 1, 2) * 2 - 1)
    assert error(mean, expected * base.latent_scale) < 1e-4
    # The same autoencoder as the mini world's own file: cached latents are shared with runs from there.
    own = module("training.prior.opening").open_mini_world()
    assert base.latent_scale == own.latent_scale and base.autoencoder.config == own.autoencoder.config
    assert base.vae_id == own.vae_id


def test_prediction_and_patches_are_the_models(tiny, clip, mini, world):
    prior = tiny.prior(prediction="V_PREDICTION", zero_snr=True)
    with world.loading.ordinary_tensors():
        base = world.prior.prior_of_models(prior, clip, mini[2], [])
    assert (base.prediction_type, base.zero_snr, base.latent_format) == ("v_prediction", True, "sd15")


def test_a_vae_of_another_kind_is_refused(tiny, clip, mini, world):
    other = copy.copy(mini[2])
    other.first_stage_model = None
    with pytest.raises(ValueError, match="Train Domain UNet: expected the VAE.*found no VAE"):
        world.prior.prior_of_models(tiny.prior(), clip, other, [])
    other.first_stage_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="expected the VAE.*found Linear"):
        world.prior.prior_of_models(tiny.prior(), clip, other, [])


def test_errors_of_the_export_name_this_node(tiny, clip, mini, world):
    domain = tiny.cached_domain(tiny.prior(), torch.randn(1, 77, CONTEXT))
    with pytest.raises(ValueError, match="Train Domain UNet: expected a model that takes text"):
        world.prior.prior_of_models(domain, clip, mini[2], [])


# ---- inputs -----------------------------------------------------------------------------------------------------


def test_every_field_of_the_configuration_has_one_place(world):
    from indomain_guidance.training.domain.config import TrainConfig

    main = {entry.id: entry for entry in world.nodes.TrainDomainUNet.define_schema().inputs}
    options = {entry.id: entry for entry in world.nodes.DomainTrainingOptions.define_schema().inputs}
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    places = [*world.nodes.ON_THE_NODE, *options, *world.nodes.DECIDED_HERE]
    assert sorted(places) == sorted(fields) and set(world.nodes.ON_THE_NODE) <= set(main)
    for name, entry in [*options.items(), *((name, main[name]) for name in world.nodes.ON_THE_NODE)]:
        default = fields[name].default
        assert name == "name" or entry.default == ("" if default == () else default), name
        assert fields[name].metadata["help"][1:] in entry.tooltip


def test_default_options_are_the_trainers_own(world):
    from indomain_guidance.training.domain.config import TrainConfig

    schema = world.nodes.DomainTrainingOptions.define_schema()
    (options,) = world.nodes.DomainTrainingOptions.execute(
        **{entry.id: entry.default for entry in schema.inputs}
    ).result
    assert TrainConfig(base="mini_world", **options) == TrainConfig(base="mini_world")
    (options,) = world.nodes.DomainTrainingOptions.execute(sample_prompts=" a cat \n\n a dog").result
    assert options == {"sample_prompts": ("a cat", "a dog")}


def test_images_become_files_that_say_the_same(world, tmp_path):
    batch = torch.rand(3, 8, 12, 3)
    folder = world.pictures.write_images([batch, batch[:1], torch.rand(1, 8, 8, 4)], tmp_path)
    files = sorted(folder.glob("*.png"))
    assert len(files) == 4  # one of them twice
    stored = [np.asarray(Image.open(file)) for file in files]
    expected = [(image * 255).round().to(torch.uint8).numpy() for image in batch]
    assert all(any(np.array_equal(image, other) for other in stored) for image in expected)
    assert sorted(image.shape for image in stored) == [(8, 8, 4), (8, 12, 3), (8, 12, 3), (8, 12, 3)]
    assert world.pictures.write_images([batch, batch[:1]], tmp_path) != folder
    with pytest.raises(ValueError, match="finite"):
        world.pictures.write_images([torch.full((1, 4, 4, 3), float("nan"))], tmp_path)


def test_folders_are_found_in_the_input_folder_or_anywhere(world):
    (world.tmp / "input" / "faces").mkdir()
    (world.tmp / "elsewhere").mkdir()
    paths = world.pictures.resolve_data(f' faces ;"{world.tmp / "elsewhere"}"')
    assert paths == (str(world.tmp / "input" / "faces"), str(world.tmp / "elsewhere"))
    with pytest.raises(ValueError, match="nothing at .*nowhere"):
        world.pictures.resolve_data("nowhere")


def test_the_cache_of_node_outputs_notices_new_images(world):
    folder = world.tmp / "input" / "faces"
    folder.mkdir()
    fingerprint = world.nodes.TrainDomainUNet.fingerprint_inputs
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    one = fingerprint(image_folder=["faces"], name=["x"])
    Image.new("RGB", (9, 9)).save(folder / "one.png")
    assert len({one, fingerprint(image_folder=["faces"]), fingerprint(image_folder=[""])}) == 3
    assert fingerprint(image_folder=[None]) == fingerprint()


def test_the_cache_of_node_outputs_looks_behind_links_as_training_does(world):
    folder, elsewhere = world.tmp / "input" / "linked", world.tmp / "far"
    folder.mkdir(), elsewhere.mkdir()
    try:
        os.symlink(elsewhere, folder / "more", target_is_directory=True)
        os.symlink(folder, elsewhere / "back", target_is_directory=True)
    except OSError:
        pytest.skip("no links here")
    fingerprint = world.nodes.TrainDomainUNet.fingerprint_inputs
    before = fingerprint(image_folder=["linked"])
    Image.new("RGB", (8, 8)).save(elsewhere / "one.png")
    assert fingerprint(image_folder=["linked"]) != before


def test_what_is_shown_of_a_cancelled_run_says_what_was_saved_and_where(world):
    from indomain_guidance.training.engine.events import Stopped

    describe = module("nodes.comfy_internals.progress").describe
    assert describe(Stopped(0, "")) == "stopped before the first step; nothing was trained"
    shown = "stopped and saved at step 7 in /runs/x/step-7; run again to continue"
    assert describe(Stopped(7, "/runs/x/step-7")) == shown


def test_latents_lie_where_no_prompt_says_and_no_client_reads(world, train, pictures):
    train(images=[pictures], steps=1)
    assert any((world.tmp / "user" / "__indomain_guidance" / "latents").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "name", ["cache", "vae", "tokenizer", "output", "export_to", "data", "base", "within", "device"]
)
def test_a_prompt_cannot_put_paths_where_the_options_node_is_connected(world, train, pictures, name):
    there = world.tmp / "elsewhere"
    with pytest.raises(ValueError, match=f"expected what In-Domain Training Options gives, found '{name}'"):
        train(images=[pictures], steps=1, options={name: str(there)})
    assert not there.exists() and not any((world.tmp / "output").rglob("*"))


@pytest.mark.parametrize("options", ["text", 7, ["a"], True])
def test_only_options_are_options(world, train, pictures, options):
    with pytest.raises(ValueError, match="connect In-Domain Training Options, or nothing"):
        module("nodes.widgets").given_options(options, (), "In-Domain Training Options")


def test_the_cache_of_node_outputs_notices_new_shards(comfyui, world):
    fingerprint = world.nodes.TrainDomainUNet.fingerprint_inputs
    for number in range(2):
        (world.tmp / "input" / f"shard-{number}.tar").write_bytes(b"0" * 512)
    pattern = ["shard-{0..1}.tar"]
    before = fingerprint(image_folder=pattern)
    assert fingerprint(image_folder=pattern) == before
    (world.tmp / "input" / "shard-1.tar").write_bytes(b"1" * 1024)
    assert fingerprint(image_folder=pattern) != before
    # A cancel ends the walk through the folder and is still there when the node's turn comes.
    comfyui.model_management.interrupt_current_processing()
    try:
        assert fingerprint(image_folder=[str(world.tmp)]) == ""
        assert comfyui.model_management.processing_interrupted()
    finally:
        comfyui.model_management.interrupt_current_processing(False)


def test_mini_world_images_are_files_and_a_batch(world):
    folder, batch = world.nodes.MiniWorldImages.execute("handwriting", 5, 0).result
    assert batch.shape == (5, 64, 64, 3) and batch.min() >= 0 and batch.max() <= 1
    assert len(list((world.tmp / "input").glob("mini_world/*/*.png"))) == 5
    assert world.pictures.resolve_data(folder) == (folder,)


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["cached", "constant"])
def test_connected_prior_becomes_a_domain_model(comfyui, mini, train, pictures, world, form):
    prior, clip, vae = mini
    made = train(
        checkpoint="connected",
        model=prior,
        clip=clip,
        vae=vae,
        images=[pictures],
        form=form,
        sample_every=3,
        options={"sample_count": 2, "sample_steps": 2, "sample_prompts": ("a red seven",)},
    )
    assert made.path == str(world.tmp / "models" / "domain_unets" / "made.safetensors")
    info = module("nodes.comfy_internals.models.text_free").domain_info(made.model)
    assert (info.form, info.metadata.steps, info.metadata.latent_format) == (form, 3, "mini_world")
    prior_weights = prior.model.diffusion_model.state_dict()
    assert info.metadata.prior_hash == module("guidance.files").prior_content_hash(prior_weights)
    assert made.samples.ndim == 4 and made.samples.shape[-1] == 3 and made.samples.std() > 0.01
    assert made.loss.ndim == 4 and len(made.ui["images"]) == 2 and made.ui["text"] == (made.path,)
    # Trained: not what the untrained form of the same prior says.
    start = train(checkpoint="mini_world", images=[pictures], form=form, name="start", steps=1, learning_rate=0.0)
    before, after = weights_of(start.path), weights_of(made.path)
    assert sum(not torch.equal(after[key], weight) for key, weight in before.items()) > 50


def test_the_same_run_from_inputs_and_from_the_name_is_the_same(mini, train, pictures):
    prior, clip, vae = mini
    by_name = train(images=[pictures], name="by_name")
    connected = train(images=[pictures], name="connected", checkpoint="connected", model=prior, clip=clip, vae=vae)
    ours, theirs = weights_of(by_name.path), weights_of(connected.path)
    assert ours.keys() == theirs.keys()
    # Core's text encoder rounds otherwise than ours; three steps at this rate change the weights by some percent.
    assert error(*(torch.cat([made[key].float().flatten() for key in ours]) for made in (theirs, ours))) < 2e-3


def test_cancel_saves_and_the_next_run_ends_with_the_same_bits(comfyui, train, pictures, world, cancelled_at):
    whole = train(images=[pictures], name="whole", steps=6)
    with cancelled_at(2, of=6) as seen:
        with pytest.raises(comfyui.model_management.InterruptProcessingException):
            train(images=[pictures], name="parts", steps=6)
        assert 2 <= seen[-1] < 6 and not comfyui.model_management.processing_interrupted()
    events = module("training.engine.log").read_log(world.tmp / "output" / "domain_training" / "parts" / "log.jsonl")
    assert [event.step for event in events if type(event).__name__ == "Stopped"] == [seen[-1]]
    assert not (world.tmp / "models" / "domain_unets" / "parts.safetensors").exists()
    parts = train(images=[pictures], name="parts", steps=6, resume="continue")
    assert same_bits(weights_of(parts.path), weights_of(whole.path))


def test_a_cancel_in_the_last_step_ends_the_prompt_behind_the_run(comfyui, train, pictures, cancelled_at):
    """What was made is returned and its file written; ComfyUI asks before its next node."""
    with cancelled_at(3, of=3):
        made = train(images=[pictures], name="late", steps=3)
        assert Path(made.path).is_file() and comfyui.model_management.processing_interrupted()


def test_a_stop_that_nobody_cancelled_is_no_success(train, pictures, world, monkeypatch):
    older = train(images=[pictures])
    stopped = module("training.domain.train").Result("stopped", 4, None, world.tmp / "run")
    monkeypatch.setattr(module("training.domain.train"), "train", lambda *args, **more: stopped)
    with pytest.raises(ValueError, match="stopped at step 4 and saved in .*run; run again"):
        train(images=[pictures], steps=9)
    assert module("guidance.files").read_domain_file(older.path)[1].steps == 3


def test_samples_are_skipped_downstream_when_there_are_none(comfyui, train, pictures):
    made = train(images=[pictures])
    assert type(made.samples).__name__ == "ExecutionBlocker"
    assert isinstance(made.loss, torch.Tensor)


def test_the_prior_stays_as_it_was(comfyui, mini, train, pictures):
    prior, clip, vae = mini
    before = {key: value.clone() for key, value in prior.model.diffusion_model.state_dict().items()}
    train(checkpoint="connected", model=prior, clip=clip, vae=vae, images=[pictures], learning_rate=1e-2)
    assert same_bits(before, prior.model.diffusion_model.state_dict())


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_what_is_missing_or_too_much_is_named(mini, train, pictures, world):
    for inputs, words in (
        ({"images": None}, "expected images to train on, found none"),
        ({"images": [pictures], "image_folder": str(world.tmp)}, "found both"),
        ({"images": [pictures], "checkpoint": "connected"}, "found no model, no clip, no vae"),
        ({"images": [pictures], "checkpoint": "connected", "model": mini[0], "clip": mini[1]}, "found no vae"),
        ({"images": [pictures], "model": mini[0]}, "found both .'mini_world' and model"),
        ({"images": [pictures], "checkpoint": "absent.safetensors"}, "a file named 'absent.safetensors'"),
        ({"images": [pictures], "checkpoint": "../../etc/passwd"}, "a file named .../../etc/passwd. in"),
        ({"images": [pictures], "resume": "perhaps"}, "resume to be one of auto, continue, new"),
        ({"images": [pictures], "name": "../outside"}, "plain file name"),
        ({"images": [pictures], "resolution": 65}, "multiple of 8"),
    ):
        with pytest.raises(ValueError, match=words):
            train(**inputs)
    assert not list(world.tmp.rglob("outside*")) and not (world.tmp / "output" / "domain_training").exists()


def test_a_prediction_that_is_not_the_connected_models_is_refused(mini, train, pictures):
    connected = {"checkpoint": "connected", **dict(zip(("model", "clip", "vae"), mini))}
    with pytest.raises(ValueError, match="expected prediction auto or epsilon.*found v_prediction"):
        train(images=[pictures], options={"prediction": "v_prediction"}, **connected)
    train(images=[pictures], steps=1, options={"prediction": "epsilon"}, **connected)


def test_a_failed_first_try_gives_no_claim_to_a_file(train, pictures, world):
    mine = world.tmp / "models" / "loras" / "made.safetensors"
    mine.parent.mkdir(parents=True, exist_ok=True)
    module("guidance.files.safetensors_file").write_safetensors(mine, {"lora_unet.alpha": torch.ones(1)}, {})
    kept = mine.read_bytes()
    with pytest.raises(ValueError):
        train(images=[pictures], resume="continue")
    assert not (world.tmp / "output" / "domain_training" / "made").exists()  # nor the images that were written for it
    (world.tmp / "output" / "domain_training" / "made").mkdir(parents=True)
    with pytest.raises(ValueError):
        train(images=[pictures], resume="continue")
    assert (world.tmp / "output" / "domain_training" / "made").is_dir()
    with pytest.raises(ValueError, match="made.safetensors.*another name"):
        train(images=[pictures], form="full", options={"train": "low_rank", "rank": 2})
    assert mine.read_bytes() == kept
    # Its own file is a run's to replace, also without checkpoints.
    train(images=[pictures], name="own", steps=1)
    for path in (world.tmp / "output" / "domain_training" / "own" / "checkpoints").iterdir():
        path.unlink()
    train(images=[pictures], name="own", steps=1)


def test_another_runs_model_is_not_replaced(train, pictures, world):
    first = train(images=[pictures])
    kept = open(first.path, "rb").read()  # noqa: SIM115
    (world.tmp / "output" / "domain_training" / "made").rename(world.tmp / "moved")
    with pytest.raises(ValueError, match="made.safetensors.*another name"):
        train(images=[pictures])
    assert open(first.path, "rb").read() == kept  # noqa: SIM115


def test_running_out_of_memory_is_one_sentence(train, pictures, monkeypatch):
    learner = module("training.domain.learner")

    def step(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(learner, "sample_losses", step)
    with pytest.raises(ValueError, match="out of memory with batch size 2 at 64 px.*smaller batch"):
        train(images=[pictures])
