"""Adapt Generator inside ComfyUI's process, under inference mode as ComfyUI runs nodes."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow


def module(name: str):
    return importlib.import_module(f"indomain_guidance.{name}")


def tiny_generator(seed: int = 0, resolution: int = 16):
    network = module("guidance.networks.stylegan2")
    channels = (8,) * (resolution.bit_length() - 2)
    config = network.GeneratorConfig(resolution, channels, z_dim=8, w_dim=8, mapping_layers=2)
    return network.random_generator(config, seed).eval().requires_grad_(False)


@pytest.fixture
def world(comfyui, tmp_path, monkeypatch):
    """ComfyUI's folders in a folder of this test's own, and the modules under test."""
    folder_paths = importlib.import_module("folder_paths")
    generators = module("nodes.comfy_internals.models.generators")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    generator_files = module("nodes.comfy_internals.models.folders").GENERATORS
    monkeypatch.setattr(generator_files, "shipped", tmp_path / "shipped")
    folder_paths.folder_names_and_paths.pop("generators", None)
    generator_files.register()
    for kind in ("input", "output", "temp"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return SimpleNamespace(
        tmp=tmp_path,
        nodes=module("nodes.adapting"),
        internals=module("nodes.comfy_internals.runs.adapting"),
        generators=generators,
        files=module("guidance.files"),
    )


@pytest.fixture
def source(world):
    metadata = world.files.GeneratorMetadata(name="digits", licence="CC0")
    return world.generators.GraphGenerator(tiny_generator(), metadata, str(world.tmp / "digits.safetensors"))


@pytest.fixture(scope="module")
def mini(comfyui):
    """(MODEL, VAE, positive, negative, encode) of the mini world, made under inference mode."""
    with torch.inference_mode():
        model, clip, vae = module("nodes.comfy_internals.models.loading").load_mini_world()

        def encode(text):
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))

        return SimpleNamespace(model=model, vae=vae, positive=encode("a red seven"), negative=encode(""), encode=encode)


@pytest.fixture
def adapt(world, mini, source):
    """Runs the node on the mini world: a few steps, no previews unless asked."""

    def run(**inputs):
        options = {"t_max": 600, "sample_count": 2, **inputs.pop("options", {})}
        values = {
            "generator": source,
            "model": mini.model,
            "vae": mini.vae,
            "positive": mini.positive,
            "negative": mini.negative,
            "name": "made",
            "method": "sds",
            "scale": 7.5,
            "directional": 0.5,
            "reconstruction": 0.0,
            "steps": 2,
            "batch_size": 2,
            "learning_rate": 0.002,
            "layers": 0,
            "sample_every": 0,
            "seed": 0,
            "resume": "auto",
            "options": options,
            **inputs,
        }
        with torch.inference_mode():
            out = world.nodes.AdaptGenerator.execute(**values)
        generator, samples, loss, path = out.result
        return SimpleNamespace(generator=generator, samples=samples, loss=loss, path=path, ui=out.ui)

    return run


def weights(one) -> dict[str, torch.Tensor]:
    return one.generator.state_dict()


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log_of(world, name: str) -> list:
    return module("training.engine.log").read_log(world.tmp / "output" / "generator_adaptation" / name / "log.jsonl")


# ---- inputs -----------------------------------------------------------------------------------------------------


def test_every_field_of_the_configuration_has_one_place(world):
    from indomain_guidance.training.adaptation.config import AdaptConfig

    main = {entry.id: entry for entry in world.nodes.AdaptGenerator.define_schema().inputs}
    options = {entry.id: entry for entry in world.nodes.GeneratorAdaptOptions.define_schema().inputs}
    fields = {field.name: field for field in dataclasses.fields(AdaptConfig)}
    places = [*world.nodes.ON_THE_NODE, *options, *world.nodes.DECIDED_HERE]
    assert sorted(places) == sorted(fields) and set(world.nodes.ON_THE_NODE) <= set(main)
    for name, entry in [*options.items(), *((name, main[name]) for name in world.nodes.ON_THE_NODE)]:
        assert name == "name" or entry.default == fields[name].default, name
        assert fields[name].metadata["help"][1:] in entry.tooltip
    assert all(entry.tooltip for entry in main.values())


# Published widgets keep their places: saved graphs store values by position.
SETTINGS_OF_THE_OPTIONS_NODE = (
    *("mode", "t_min", "t_max", "t_schedule", "weighting", "perceptual", "features", "normalize_directional"),
    *("latent_clamp", "image_quantile", "way_back", "gradient_checkpointing", "train", "freeze_bias", "truncation"),
    *("noise", "label", "resolution", "schedule", "warmup", "clip", "ema", "checkpoint_every", "checkpoint_minutes"),
    *("keep_checkpoints", "sample_count", "log_every", "tensorboard", "file_dtype", "licence"),
)


def test_options_of_methods_are_the_last_widgets_in_the_order_of_the_methods(world):
    from indomain_guidance.guidance.distillation.methods import METHODS
    from indomain_guidance.guidance.options import options_of

    names = [entry.id for entry in world.nodes.GeneratorAdaptOptions.define_schema().inputs]
    of_methods = [f"{name}_{own.name}" for name, method in METHODS.items() for own in options_of(method)]
    assert names == [*SETTINGS_OF_THE_OPTIONS_NODE, *of_methods]
    assert of_methods[:3] == ["sds_normalize", "vsd_rank", "vsd_learning_rate"]


def test_default_options_are_the_adaptations_own(world):
    from indomain_guidance.training.adaptation.config import AdaptConfig

    schema = world.nodes.GeneratorAdaptOptions.define_schema()
    (options,) = world.nodes.GeneratorAdaptOptions.execute(
        **{entry.id: entry.default for entry in schema.inputs}
    ).result
    assert AdaptConfig(generator="x", base="y", **options) == AdaptConfig(generator="x", base="y")


def moved(conditioning, share: float) -> list:
    """A CONDITIONING whose context lies this share of its norm away."""
    (context, options), *_ = conditioning
    noise = torch.randn(context.shape, generator=torch.Generator().manual_seed(3))
    return [[context.clone() + share * context.norm() / noise.norm() * noise, options]]


@pytest.mark.parametrize("name", ["domain", "vae", "tokenizer", "output", "export_to", "generator", "base", "device"])
def test_a_prompt_cannot_put_paths_where_the_options_node_is_connected(world, adapt, name):
    with pytest.raises(ValueError, match=f"expected what In-Domain Adapt Options gives, found '{name}'"):
        adapt(options={name: str(world.tmp / "elsewhere")})
    assert not any((world.tmp / "output").rglob("*"))


# ---- adapting ---------------------------------------------------------------------------------------------------


def test_a_prompt_makes_an_adapted_generator_and_leaves_its_source(comfyui, world, adapt, source, mini):
    before, prior = {k: v.clone() for k, v in weights(source).items()}, mini.model.model.diffusion_model.state_dict()
    prior = {key: value.clone() for key, value in prior.items()}
    made = adapt(sample_every=2)
    assert made.path == str(world.tmp / "models" / "generators" / "made.safetensors")
    assert not same_bits(weights(made.generator), before) and same_bits(weights(source), before)
    assert same_bits(mini.model.model.diffusion_model.state_dict(), prior)
    stored = made.generator.metadata
    assert (stored.name, stored.licence, stored.history[-1]["parent"]) == ("made", "CC0", "digits")
    assert stored.history[-1]["steps"] == 2 and stored.history[-1]["method"] == "sds"
    assert str(world.tmp) not in json.dumps(dict(stored.extra))
    assert made.samples.ndim == 4 and made.samples.std() > 0.01 and made.loss.ndim == 4
    assert len(made.ui["images"]) == 2 and made.ui["text"] == (made.path,)
    kinds = [type(event).__name__ for event in log_of(world, "made")]
    assert kinds[0] == "Started" and kinds[-1] == "Finished" and kinds.count("Sampled") == 2


@pytest.mark.parametrize("method", ["csd", "nfsd", "dds", "bridge", "ism", "vsd"])
def test_every_method_runs(adapt, mini, method):
    with torch.inference_mode():
        source, unwanted = mini.encode("a white digit"), mini.encode("a blue digit")
    adapt(method=method, steps=1, source=source, unwanted=unwanted, directional=0.0, reconstruction=0.5)


def test_what_a_method_does_not_ask_for_does_not_bind_a_run(adapt, mini):
    with torch.inference_mode():
        source, unwanted = mini.encode("a white digit"), mini.encode("a blue digit")
    adapt(steps=1, source=source, unwanted=unwanted)
    adapt(steps=2)
    adapt(name="dds", method="dds", steps=1, source=source)
    with pytest.raises(ValueError, match="expected a run with the same diffusion model, VAE, prompts and terms"):
        adapt(name="dds", method="dds", steps=2, source=unwanted)


SDXL = {"adm_in_channels": 2816, "num_classes": "sequential", "model_channels": 64}


@pytest.mark.parametrize(
    "family, prediction, unet",
    [("SD15", "EPS", {}), ("SD20", "V_PREDICTION", {"model_channels": 64}), ("SDXL", "EPS", SDXL)],
)
def test_models_of_every_family_judge(adapt, tiny, family, prediction, unet):
    with torch.inference_mode():
        model = tiny.lora(tiny.prior(family=family, prediction=prediction, **unet), seed=8)
        pooled = {"pooled_output": torch.randn(1, 1280)} if family == "SDXL" else {}
        positive, negative = tiny.conditioning(1, **pooled), tiny.conditioning(2, **pooled)
    inputs = {"model": model, "steps": 1, "options": {"resolution": 64, "t_max": 300}}
    adapt(positive=positive, negative=negative, **inputs)
    if family == "SDXL":
        with pytest.raises(
            ValueError, match="expected a positive conditioning with a pooled vector, as the SDXL model"
        ):
            adapt(positive=tiny.conditioning(1), negative=negative, **inputs)


@pytest.mark.parametrize(
    "family, prediction, context, side",
    [
        ("SD15", "EPS", 768, 512),
        ("SD15", "V_PREDICTION", 768, 512),
        ("SD20", "EPS", 1024, 512),
        ("SD20", "V_PREDICTION", 1024, 768),
        ("SDXL", "EPS", 2048, 1024),
        ("SDXL", "V_PREDICTION", 2048, 1024),
    ],
)
def test_a_family_is_judged_at_the_size_it_was_made_for(tiny, mini, family, prediction, context, side):
    native_side = module("nodes.comfy_internals.runs.critic").native_side
    unet = {"context_dim": context, "model_channels": 64, **(SDXL if family == "SDXL" else {})}
    assert native_side(tiny.prior(family=family, prediction=prediction, **unet)) == side
    assert native_side(mini.model) == 64


def test_more_judges_layer_selection_and_the_released_mode(world, adapt, mini, caplog):
    domain = module("nodes.comfy_internals.models.loading").load_domain_unet(
        str(module("nodes.comfy_internals.models.folders").DOMAIN_UNETS.shipped / "mini-handwriting.safetensors")
    )
    term = module("nodes.comfy_internals.guiding.guider").Term("domain", domain, None, 1.0)
    # A configuration has no word for a shaped one, so it must not name it as if it were plain.
    named = module("nodes.comfy_internals.runs.adapting").domain_of
    shaped = dataclasses.replace(term, shaping=module("guidance.frequency").Bands(1.0, 0.0, 1.0))
    assert named((term,))[1] == 1.0 and named((shaped,)) is None
    hooked = mini.model.clone()
    hooked.set_model_sampler_cfg_function(lambda args: args["uncond"])
    made = adapt(terms=(term,), model=hooked, layers=2, options={"mode": "sgf", "train": "released"})
    assert any("sampler_cfg_function" in text for text in made.ui["text"])
    config = json.loads((world.tmp / "output" / "generator_adaptation" / "made" / "config.json").read_text())
    assert config["domain"].endswith("mini-handwriting.safetensors") and config["domain_weight"] == 1.0


def test_cancel_saves_and_the_next_run_ends_with_the_same_bits(comfyui, adapt, world, cancelled_at):
    whole = adapt(name="whole", steps=6)
    with cancelled_at(2, of=6) as seen:
        with pytest.raises(comfyui.model_management.InterruptProcessingException):
            adapt(name="parts", steps=6)
        assert 2 <= seen[-1] < 6 and not comfyui.model_management.processing_interrupted()
    assert [event.step for event in log_of(world, "parts") if type(event).__name__ == "Stopped"] == [seen[-1]]
    assert not (world.tmp / "models" / "generators" / "parts.safetensors").exists()
    parts = adapt(name="parts", steps=6, resume="continue")
    assert same_bits(weights(parts.generator), weights(whole.generator))


def test_a_cancel_in_the_last_step_ends_the_prompt_behind_the_finished_run(comfyui, adapt, cancelled_at):
    """What was made is returned and its file written; ComfyUI asks before its next node."""
    with cancelled_at(3, of=3):
        made = adapt(name="late", steps=3)
        assert Path(made.path).is_file() and comfyui.model_management.processing_interrupted()


# A critic's first opinions take 2 calls.
@pytest.mark.parametrize("where, at", [("critic", 5), ("encoder", 4)])
def test_a_cancel_in_the_middle_of_a_step_lets_it_be_finished(comfyui, adapt, world, monkeypatch, where, at):
    """Core's layers raise a cancel wherever they are; the run goes on from whole steps only."""
    whole = adapt(name="whole", steps=4)
    critic = module("nodes.comfy_internals.runs.critic")
    interrupt = comfyui.model_management.interrupt_current_processing
    calls = []

    def interrupted(call):
        def wrapped(*args):
            calls.append(1)
            if len(calls) == at:
                interrupt()
            return call(*args)

        return wrapped

    with monkeypatch.context() as patch:
        if where == "critic":
            patch.setattr(critic.Predictions, "_denoise", interrupted(critic.Predictions._denoise))
        else:
            make = critic.gradient_encoder

            def made(*args):
                encoder = make(*args)
                return dataclasses.replace(encoder, encode=interrupted(encoder.encode))

            patch.setattr(critic, "gradient_encoder", made)
        with pytest.raises(comfyui.model_management.InterruptProcessingException):
            adapt(name="parts", steps=4)
    events = log_of(world, "parts")
    assert type(events[-1]).__name__ == "Stopped" and 1 <= events[-1].step < 4
    assert same_bits(weights(adapt(name="parts", steps=4).generator), weights(whole.generator))


def test_a_cancel_does_not_hold_what_it_interrupted(comfyui):
    """While the step is done once more, the first try's tensors are gone."""
    progress, kept = module("nodes.comfy_internals.progress").RunProgress(), []
    interruption = comfyui.model_management.InterruptProcessingException

    def step():
        if not kept:
            activations = torch.zeros(3)
            kept.append(weakref.ref(activations))
            raise interruption
        return kept[0]()

    assert module("nodes.comfy_internals.guiding.predictions").to_the_end(step, progress.cancel)() is None
    assert progress.should_stop()
    with pytest.raises(interruption):
        progress.raise_if_cancelled()


def test_the_texts_behind_conditionings_are_found(world, monkeypatch):
    prompt = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["0", 1], "text": " a red\nseven "}},
        "2": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["1", 0]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["0", 1], "text": ["9", 0]}},
        "4": {
            "class_type": "InDomainAdaptGenerator",
            "inputs": {"positive": ["1", 0], "negative": ["2", 0], "source": ["3", 0], "name": "x", "steps": 2},
        },
    }
    monkeypatch.setattr(world.internals, "get_executing_context", lambda: SimpleNamespace(node_id="4"))
    assert world.internals.prompt_texts(prompt) == {"positive": "a red seven"}
    monkeypatch.setattr(world.internals, "get_executing_context", lambda: None)
    assert world.internals.prompt_texts(prompt) == world.internals.prompt_texts(None) == {}


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named_in_one_sentence(world, adapt, mini):
    narrow = [[torch.zeros(1, 77, 12), {}]]
    empty = copy.copy(mini.vae)
    empty.first_stage_model = None
    for inputs, words in (
        ({"positive": narrow}, "positive conditioning of width 128.*found width 12"),
        ({"vae": empty}, "expected the VAE .* found no VAE"),
        ({"method": "dds"}, "what the generator makes now, which the method dds .* connect one to source"),
        ({"method": "nfsd"}, "what images should not be.*which the method nfsd .* connect one to unwanted"),
        ({"name": "../outside"}, "plain file name"),
        ({"resume": "perhaps"}, "resume to be one of auto, continue, new"),
        ({"resume": "continue"}, "expected a checkpoint to go on from, found none; to begin anew set resume auto"),
        ({"options": {"resolution": 60}}, "multiple of 8"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            adapt(**inputs)
        assert "\n" not in str(caught.value)
    term = module("nodes.comfy_internals.guiding.guider").Term("other", None, mini.negative, 1.0)
    shaped = dataclasses.replace(term, shaping=module("guidance.frequency").Bands(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="'other': expected a term as Guidance Term makes it, found one changed by"):
        adapt(terms=(shaped,))
    assert not list(world.tmp.rglob("outside*"))


def test_another_conditioning_is_another_run(adapt, mini):
    adapt(steps=1)
    with torch.inference_mode():
        other = mini.encode("a blue three")
    with pytest.raises(ValueError, match="prompts and terms, found one whose term 1 at timestep"):
        adapt(positive=other)


def test_a_run_goes_on_wherever_its_texts_stand_and_whoever_encodes_them(adapt, mini, world, monkeypatch):
    """A text that now comes through a link is not seen any more; another attention moves the last bits."""
    texts = {"positive": "a red seven", "source": "a digit"}
    monkeypatch.setattr(world.internals, "prompt_texts", lambda prompt: texts)
    with torch.inference_mode():
        source, other = mini.encode("a white digit"), mini.encode("a blue digit")
        inputs = {"method": "dds", "source": source, "options": {"t_max": 300}}
        first = adapt(steps=1, **inputs)
        assert first.generator.metadata.history[-1]["prompt"] == "a red seven"
        monkeypatch.setattr(world.internals, "prompt_texts", lambda prompt: {})
        inputs |= {"positive": moved(mini.positive, 1e-3), "source": moved(source, 1e-3)}
        made = adapt(steps=2, **inputs)
        assert any("term 1 at timestep 10 now and in" in text for text in made.ui["text"])
        with pytest.raises(ValueError, match="prompts and terms, found one whose source"):
            adapt(steps=3, **{**inputs, "source": other})


def test_other_terms_are_another_run_and_stand_in_the_finished_file(adapt, mini, world):
    loading, schedules = module("nodes.comfy_internals.models.loading"), module("guidance.schedules")
    term_input = module("nodes.comfy_internals.guiding.guider").Term
    with torch.inference_mode():
        blue = mini.encode("a blue seven")
    domain = loading.load_domain_unet(
        str(module("nodes.comfy_internals.models.folders").DOMAIN_UNETS.shipped / "mini-handwriting.safetensors")
    )

    def terms(weight, model=domain, start=0.5, name="hand"):
        return (
            term_input(name, model, None, schedules.Interval(weight, start, 1.0)),
            term_input("blue", None, blue, 0.5, reference=name),
        )

    made = adapt(steps=1, terms=terms(1.5))
    hand, other, prompt = made.generator.metadata.history[-1]["terms"]
    assert hand["name"] == "hand" and hand["weight"]["value"] == 1.5 and other["reference"] == "hand"
    assert (prompt["name"], prompt["weight"]) == ("prompt", 7.5)
    told = json.loads(made.generator.metadata.extra["training"])["domain"]
    assert told == "connected: mini-handwriting.safetensors, PlainUNetConfig"
    for changed in (terms(1.4), terms(1.5, start=0.51), terms(1.5)[:1]):
        with pytest.raises(ValueError, match="expected a run with the same guidance terms, found that they were"):
            adapt(steps=2, terms=changed)
    with pytest.raises(ValueError, match="found one whose term 1 at timestep"):
        adapt(steps=2, terms=terms(1.5, model=mini.model))
    adapt(steps=2, terms=terms(1.5, name="script"))


def test_no_file_of_somebody_elses_is_replaced(adapt, world):
    mine = world.tmp / "models" / "generators" / "made.safetensors"
    world.files.write_generator(mine, tiny_generator(9))
    kept = mine.read_bytes()
    with pytest.raises(ValueError, match="made.safetensors: expected no file under this name.*another name"):
        adapt()
    assert mine.read_bytes() == kept
    # Its own file is a run's to replace, also without checkpoints.
    adapt(name="own", steps=1)
    for path in (world.tmp / "output" / "generator_adaptation" / "own" / "checkpoints").iterdir():
        path.unlink()
    adapt(name="own", steps=1)


def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_last_good_weights(adapt, world, mini, monkeypatch):
    critic = module("nodes.comfy_internals.runs.critic")
    denoise, calls = critic.Predictions.denoise_many, []

    def broken(self, jobs):
        calls.append(1)
        made = denoise(self, jobs)
        return [one * float("nan") for one in made] if len(calls) > 5 else made

    monkeypatch.setattr(critic.Predictions, "denoise_many", broken)
    with pytest.raises(ValueError, match="became NaN or infinite at step .*the last good weights, of step"):
        adapt(steps=20)
    assert list((world.tmp / "output" / "generator_adaptation" / "made" / "checkpoints").glob("*.ckpt"))
    assert not (world.tmp / "models" / "generators" / "made.safetensors").exists()


def test_memory_that_runs_out_is_one_sentence(comfyui, adapt, monkeypatch):
    critic = module("nodes.comfy_internals.runs.critic")

    def full(self, jobs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(critic.Predictions, "denoise_many", full)
    with pytest.raises(ValueError, match="Adapting ran out of memory with batch size 2; use a smaller batch size"):
        adapt()
