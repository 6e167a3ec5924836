"""`adapt` as a whole on a generator of nothing: what it leaves behind, and every way it can end or go on."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from indomain_guidance.guidance.errors import Problem
from indomain_guidance.guidance.files import (
    DomainMetadata,
    FileProblem,
    GeneratorMetadata,
    LoadedGenerator,
    read_generator,
    write_domain_file,
    write_generator,
)
from indomain_guidance.training.adaptation.adapt import adapt
from indomain_guidance.training.adaptation.critic import latent_encoder, open_critic
from indomain_guidance.training.engine.checkpoints import checkpoint_path, find_checkpoints, load_checkpoint
from indomain_guidance.training.engine.events import Failed, Finished, Sampled, Saved, Started, Step, Stopped, Warned
from indomain_guidance.training.engine.learner import NonFiniteLoss
from indomain_guidance.training.engine.lock import locked
from indomain_guidance.training.engine.log import read_log
from indomain_guidance.training.engine.settings import ConfigProblem
from indomain_guidance.training.prior.text_encoders import Text
from PIL import Image


@pytest.fixture
def run(tiny_adaptation, tmp_path):
    """Adapts quietly in the test's folder; (result, events)."""

    def go(resume="auto", should_stop=lambda: False, listener=lambda event: None, dry_run=False, parts=None, **changes):
        events = []

        def tell(event):
            events.append(event)
            listener(event)

        given = {
            "generator": tiny_adaptation.tiny_generator(),
            "critic": tiny_adaptation.tiny_critic(),
            "encode": tiny_adaptation.shrink,
            **(parts or {}),
        }
        config = tiny_adaptation.tiny_config(tmp_path, **changes)
        result = adapt(config, resume=resume, listener=tell, should_stop=should_stop, dry_run=dry_run, **given)
        return result, events

    return go


@pytest.fixture
def base(tiny_run):
    """A prior with random weights that knows any prompt by its length."""
    base = tiny_run.tiny_base()
    generator = torch.Generator().manual_seed(4)
    for weight in base.unet.values():
        if weight.ndim > 1 and not bool(weight.any()):  # as training would begin; here text must matter
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))

    def encode(prompts):
        width = base.config.context_dim
        return Text(
            torch.cat(
                [torch.randn(1, 7, width, generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
            )
        )

    base.text_encoder = encode
    return base


def by_base(base, **more):
    """Parts of a run that is judged by a base instead of a critic, at 32 px or more."""
    return {"critic": None, "encode": None, "base": base, **more}


def stop_after(step):
    """(should_stop, listener) of somebody who asks to stop once a step is reported."""
    seen = []
    return (lambda: step in seen), (lambda event: seen.append(event.step) if isinstance(event, Step) else None)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def changed(before, after):
    """The names of the tensors that differ."""
    return {name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])}


def test_a_generator_becomes_another(run, tmp_path, tiny_adaptation):
    source = tiny_adaptation.tiny_generator()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    result, events = run(
        steps=6,
        sample_every=2,
        ema=0.5,
        directional=0.5,
        export_to=str(tmp_path / "models"),
        licence="CC0-1.0",
        sample_count=3,
        parts={"generator": source},
    )
    out = tmp_path / "run"
    assert (result.status, result.step, result.run) == ("finished", 6, out)
    assert result.path == tmp_path / "models" / "moved.safetensors"
    assert result.samples == out / "samples" / "step-000006.png" and result.plot == out / "loss.png"
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "log.jsonl",
        "loss.png",
        "samples",
        "checkpoints",
        "moved.safetensors",
        ".lock",
    }
    with Image.open(result.samples) as image:
        assert image.width > 3 * 128 and image.height > 2 * 128  # the source and what became of it
    assert [event.step for event in events if isinstance(event, Saved)] == [2, 4, 6]
    assert [event.step for event in events if isinstance(event, Sampled)] == [0, 2, 4, 6]
    assert isinstance(events[0], Started) and isinstance(events[-1], Finished)
    steps = [event for event in events if isinstance(event, Step)]
    assert [event.step for event in steps] == list(range(1, 7))
    assert all(10 <= event.parts["t"] <= 500 for event in steps)
    assert {"sds", "directional", "norm image", "clamped sds"} <= set(steps[0].parts)
    logged = [event for event in read_log(out / "log.jsonl") if isinstance(event, Step)]
    assert [event.parts for event in logged] == [event.parts for event in steps]

    assert same(before, source.state_dict())  # the caller's own is left alone
    loaded = read_generator(result.path)
    assert (loaded.metadata.name, loaded.metadata.licence) == ("moved", "CC0-1.0")
    (stage,) = loaded.metadata.history
    assert (stage["prompt"], stage["steps"], stage["method"]) == ("a colour", 6, "sds")
    assert json.loads(loaded.metadata.extra["training"])["directional"] == 0.5
    average = load_checkpoint(checkpoint_path(out, 6))["average"]
    assert changed(source, loaded.generator) == set(stage["trained"])
    for name, value in loaded.generator.state_dict().items():
        if name in stage["trained"]:
            assert torch.equal(value, average[f"average.{name}"])


def test_it_goes_where_the_critic_wants_it(run, tiny_adaptation):
    """Against a Gaussian critic, whose score is known, the pictures' mean colour moves to the wanted one."""
    result, _ = run(steps=60, batch_size=4, learning_rate=0.005, ema=0.0, checkpoint_every=0)
    z = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    wanted = torch.tensor(tiny_adaptation.TARGET)

    def distance(generator):
        with torch.no_grad():
            return float((tiny_adaptation.shrink(generator(z).clamp(-1, 1)).mean((0, 2, 3)) - wanted).norm())

    before, after = distance(tiny_adaptation.tiny_generator()), distance(read_generator(result.path).generator)
    assert before > 0.8 and after < 0.35 * before, (before, after)


@pytest.mark.parametrize(
    "train, expected",
    [
        ("convolutions", lambda name: name == "synthesis.b4.const" or ".conv" in name),
        ("released", lambda name: ".conv" in name and ".b4." not in name),
        ("synthesis", lambda name: name.startswith("synthesis.")),
        ("all", lambda name: True),
    ],
)
@pytest.mark.parametrize("freeze_bias", [True, False])
def test_the_report_names_exactly_what_trains(run, tiny_adaptation, train, expected, freeze_bias):
    source = tiny_adaptation.tiny_generator()
    result, events = run(steps=1, train=train, freeze_bias=freeze_bias, ema=0.0, checkpoint_every=0)
    names = {
        name
        for name, _ in source.named_parameters()
        if expected(name)
        and not (freeze_bias and name.endswith(".bias"))
        and not (train == "released" and name.endswith((".conv0.bias", ".conv1.bias")))
    }
    moved = changed(source, read_generator(result.path).generator)
    if train == "all":
        moved.discard("mapping.w_avg")  # measured anew, since it is the mapping's
    assert moved == names
    count = sum(one.numel() for name, one in source.named_parameters() if name in names)
    total = sum(one.numel() for one in source.parameters())
    told = events[0].estimate
    tensors = len(list(source.parameters()))
    assert f"trains {len(names)} of {tensors} tensors, {count:,} of {total:,} parameters" in told


def test_layer_selection_trains_the_chosen_layers_only(run, tiny_adaptation):
    source = tiny_adaptation.tiny_generator()
    result, events = run(steps=1, layers=1, ema=0.0, train="synthesis", checkpoint_every=0)
    (stage,) = read_generator(result.path).metadata.history
    assert "synthesis.b4.conv1.weight" in stage["trained"] and "synthesis.b4.const" not in stage["trained"]
    (step,) = [event for event in events if isinstance(event, Step)]
    chosen = {name.removeprefix("trained ") for name in step.parts if name.startswith("trained ")}
    assert 1 <= len(chosen) <= 2 and len({source.ws_index[name] for name in chosen}) == 1
    moved = changed(source, read_generator(result.path).generator)
    assert moved and {".".join(name.split(".")[1:3]) for name in moved} == chosen


def test_layer_selection_passes_over_layers_of_which_nothing_trains(run, monkeypatch):
    """`released` leaves b4.conv1 as it is: chosen alone, it would leave the step without a gradient."""
    from indomain_guidance.guidance.distillation import layer_selection

    def coarsest_first(synthesize, ws, gradient):
        return torch.arange(ws.shape[1], 0, -1).float()

    monkeypatch.setattr(layer_selection, "rank_layers", coarsest_first)
    result, events = run(steps=1, layers=1, train="released", checkpoint_every=0)
    (step,) = [event for event in events if isinstance(event, Step)]
    assert result.status == "finished" and [name for name in step.parts if "trained" in name] == ["trained b8.conv0"]


def test_layers_are_chosen_anew_in_every_step(run):
    _, events = run(steps=12, layers=1, checkpoint_every=0)
    chosen = [
        frozenset(name for name in event.parts if name.startswith("trained "))
        for event in events
        if isinstance(event, Step)
    ]
    assert len(set(chosen)) > 1


VARIANTS = {
    "sds": {},
    "layers": {"layers": 1, "ema": 0.0},
    "all": {"train": "all", "noise": "random", "schedule": "constant"},
    "sgf": {"mode": "sgf", "directional": 1.0, "reconstruction": 1.0},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_stopped_it_saves_and_goes_on_to_the_same_bits(run, tmp_path, changes):
    whole, _ = run(output=str(tmp_path / "whole"), sample_every=2, sample_count=1, **changes)
    should_stop, listener = stop_after(1)
    changes = {"sample_every": 2, "sample_count": 1, **changes}
    stopped, events = run(should_stop=should_stop, listener=listener, **{**changes, "checkpoint_every": 0})
    # Asked after step 1 was reported; the next question comes at the end of step 2.
    assert (stopped.status, stopped.step, stopped.path) == ("stopped", 2, None)
    assert events[-1] == Stopped(2, str(checkpoint_path(tmp_path / "run", 2)))
    finished, events = run(resume=True, **changes)
    assert finished.status == "finished" and events[0].step == 2
    assert not [event for event in events if isinstance(event, Warned)]
    states = [load_checkpoint(checkpoint_path(tmp_path / name, 4)) for name in ("whole", "run")]
    assert same(states[0]["weights"], states[1]["weights"])
    assert same(*(read_generator(one.path).generator.state_dict() for one in (whole, finished)))
    assert whole.samples.read_bytes() == finished.samples.read_bytes()


def test_a_critic_with_a_state_of_its_own_goes_on_too(run, tmp_path, base):
    changes = {"method": "vsd", "scale": 5.0, "steps": 3, "checkpoint_every": 1, "ema": 0.0}
    whole, _ = run(output=str(tmp_path / "whole"), parts=by_base(base), **changes)
    should_stop, listener = stop_after(1)
    run(should_stop=should_stop, listener=listener, parts=by_base(base), **changes)
    finished, _ = run(resume=True, parts=by_base(base), **changes)
    assert same(*(read_generator(one.path).generator.state_dict() for one in (whole, finished)))
    states = [load_checkpoint(checkpoint_path(tmp_path / name, 3))["objective"]["state"] for name in ("whole", "run")]
    assert states[0] and same(*states)


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bits(tiny_adaptation, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def command(folder):
        changes = json.dumps({"steps": 24, "checkpoint_every": 3, "directional": 0.5})
        script = str(tiny_adaptation.__file__)
        return [sys.executable, str(tiny_adaptation.ROOT / "training" / "bootstrap.py"), script, str(folder), changes]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, stdout=subprocess.DEVNULL)
    for at in (5, 13):
        with subprocess.Popen(command(killed), stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "step" and event["step"] >= at:
                    process.kill()
                    break
            process.stdout.read()
    subprocess.run(command(killed), check=True, stdout=subprocess.DEVNULL)
    results = [folder / "run" / "moved.safetensors" for folder in (whole, killed)]
    assert same(*(read_generator(path).generator.state_dict() for path in results))
    assert not list((killed / "run").rglob("*.tmp"))


@pytest.mark.slow
def test_two_processes_adapt_like_one(tiny_adaptation, two_processes, tmp_path, monkeypatch):
    """The same global batch, layer selection included: the losses agree within 1e-4."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def command(folder):
        changes = json.dumps({"steps": 12, "batch_size": 4, "directional": 0.5, "layers": 3})
        script = str(tiny_adaptation.__file__)
        return [str(tiny_adaptation.ROOT / "training" / "bootstrap.py"), script, str(folder), changes]

    subprocess.run([sys.executable, *command(tmp_path / "one")], check=True, stdout=subprocess.DEVNULL)
    ran = subprocess.run([*two_processes, *command(tmp_path / "two")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    logs = [read_log(tmp_path / name / "run" / "log.jsonl") for name in ("one", "two")]
    one, two = ([event for event in log if isinstance(event, Step)] for log in logs)
    assert len(one) == len(two) == 12 and ran.stdout.count('"event": "finished"') == 1
    for left, right in zip(one, two):
        assert {name for name in left.parts if "trained" in name} == {name for name in right.parts if "trained" in name}
    assert max(abs(a.loss - b.loss) / a.loss for a, b in zip(one, two)) < 1e-4


@pytest.mark.parametrize("layers, good", [(0, 3), (1, 5)], ids=["step", "selection"])
def test_a_gradient_that_is_not_finite_stops_with_the_last_good_weights(run, tmp_path, tiny_adaptation, layers, good):
    calls = []

    def broken(images):
        calls.append(1)
        return tiny_adaptation.shrink(images) * (math.nan if len(calls) > good else 1.0)  # one to begin with

    with pytest.raises(NonFiniteLoss) as caught:
        run(parts={"encode": broken}, checkpoint_every=0, layers=layers)
    text = str(caught.value)
    assert "at step 3" in text and "at the timesteps" in text and "learning_rate" in text
    assert "last good weights, of step 2, are in" in text and "step-000002.ckpt" in text
    assert [step for step, _ in find_checkpoints(tmp_path / "run")] == [2]
    assert isinstance(read_log(tmp_path / "run" / "log.jsonl")[-1], Failed)
    kept = load_checkpoint(checkpoint_path(tmp_path / "run", 2))["weights"]
    run(output=str(tmp_path / "good"), steps=4, layers=layers)
    good = load_checkpoint(checkpoint_path(tmp_path / "good", 2))["weights"]
    assert same(kept, good)


def test_a_gradient_that_overflows_on_its_way_through_the_generator_teaches_no_second_critic(
    run, tmp_path, base, monkeypatch
):
    changes = {"method": "vsd", "scale": 5.0, "steps": 3, "ema": 0.0}
    run(output=str(tmp_path / "whole"), parts=by_base(base), checkpoint_every=1, **changes)
    norm, calls = torch.nn.utils.clip_grad_norm_, []

    def overflows(*args):
        calls.append(1)
        return norm(*args) * (math.inf if len(calls) == 2 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflows)
    with pytest.raises(NonFiniteLoss, match="at step 2"):
        run(parts=by_base(base), checkpoint_every=0, **changes)
    whole, kept = (load_checkpoint(checkpoint_path(tmp_path / name, 1)) for name in ("whole", "run"))
    assert same(whole["weights"], kept["weights"]) and same(whole["objective"]["state"], kept["objective"]["state"])


def test_any_failure_leaves_the_last_step(run, tmp_path):
    class Cancelled(Exception):
        pass

    def cancel(event):
        if isinstance(event, Step) and event.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(listener=cancel, checkpoint_every=0)
    assert [step for step, _ in find_checkpoints(tmp_path / "run")] == [3]


def test_a_critic_that_is_given_has_its_own_precision(run, base, tmp_path, tiny_adaptation):
    """The field is for models that a run opens; without them it neither stands in the files nor hinders a run."""
    run(steps=1, precision="fp32")
    result, events = run(steps=2, precision="bf16")
    assert not [event for event in events if isinstance(event, Warned)]
    states = [load_checkpoint(checkpoint_path(tmp_path / "run", step)) for step in (1, 2)]
    assert [(one["config"]["precision"], one["facts"]["precision"]) for one in states] == [("auto", "auto")] * 2
    assert json.loads(read_generator(result.path).metadata.extra["training"])["precision"] == "auto"
    # Opened by the run, the models have the configuration's; and each way goes on with what the other began.
    changes = {"output": str(tmp_path / "opened"), "scale": 5.0, "t_max": 100, "resolution": 32}
    run(steps=1, parts=by_base(base), precision="fp32", **changes)
    with pytest.raises(ConfigProblem, match="precision was 'fp32' and is 'bf16'"):
        run(steps=2, parts=by_base(base), precision="bf16", **changes)
    critic = open_critic(tiny_adaptation.tiny_config(tmp_path, **changes), base, 32, "cpu")
    given = {"critic": critic, "encode": latent_encoder(base, 32)}
    for step, parts, precision in ((2, given, "auto"), (3, by_base(base), "fp32")):
        _, events = run(steps=step, parts=parts, precision="fp32", **changes)
        assert load_checkpoint(checkpoint_path(tmp_path / "opened", step))["facts"]["precision"] == precision
        (warned,) = (event.text for event in events if isinstance(event, Warned))
        assert f"-> {precision})" in warned


def test_a_run_goes_on_only_with_what_it_began_with(run, tiny_adaptation, tmp_path, tiny_run):
    run(steps=2)
    with pytest.raises(ConfigProblem, match="same generator"):
        run(parts={"generator": tiny_adaptation.tiny_generator(1)})
    with pytest.raises(
        ConfigProblem, match="same diffusion model, .* and terms, found one whose term 1 at timestep 10 "
    ):
        run(parts={"critic": tiny_adaptation.tiny_critic((0.5, -0.6, 0.2))})
    with pytest.raises(ConfigProblem, match='terms, found that they were .*"weight": 1.0.* and are .*"weight": 2.0'):
        run(parts={"critic": tiny_adaptation.tiny_critic(scale=2.0)})
    with pytest.raises(ConfigProblem, match="found one whose latents"):
        run(parts={"encode": lambda images: 0.9 * tiny_adaptation.shrink(images)})
    _, events = run(steps=3, parts={"encode": lambda images: (1 + 1e-6) * tiny_adaptation.shrink(images)})
    assert any("differ by" in event.text for event in events if isinstance(event, Warned))
    for changes, told in [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"method": "csd"}, "method was 'sds'"),
        ({"scale": 2.0}, "scale was 1.0 and is 2.0"),
    ]:
        with pytest.raises(ConfigProblem, match=told):
            run(**changes)
    with pytest.raises(ConfigProblem, match="found its checkpoints"):
        run(resume=False)
    with pytest.raises(ConfigProblem, match="found none"):
        run(resume=True, output=str(tmp_path / "new"))
    with locked(tmp_path / "run"), pytest.raises(FileProblem, match="another process is training"):
        run()
    other = tiny_run.tiny_config(tmp_path, output=str(tmp_path / "run"))
    with pytest.raises(ConfigProblem, match="kind: expected training, settings of `indomain train`, found .adaptation"):
        from indomain_guidance.training.domain.train import train

        train(other, base=tiny_run.tiny_base())


def test_a_try_that_was_killed_before_its_first_checkpoint_leaves_nothing_in_the_next_ones_pictures(run, tmp_path):
    clean, _ = run(sample_every=3, steps=4)
    expected = clean.samples.read_bytes()
    shutil.rmtree(tmp_path / "run")
    run(sample_every=1, steps=6, learning_rate=0.1)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    result, _ = run(sample_every=3, steps=4)
    assert result.samples.name == "step-000004.png" and result.samples.read_bytes() == expected


def test_finished_it_can_be_made_longer(run):
    run(steps=2)
    again, events = run(steps=2)
    assert again.status == "finished" and not [event for event in events if isinstance(event, Step)]
    longer, events = run(steps=3)
    assert longer.step == 3 and [event.step for event in events if isinstance(event, Step)] == [3]


def test_a_stage_that_was_kept_becomes_the_generator_and_later_ones_stay(run, tmp_path):
    run(steps=6, sample_every=2)
    kept = {path: path.read_bytes() for _, path in find_checkpoints(tmp_path / "run")}
    stage, events = run(steps=4, sample_every=2, keep_checkpoints=1)
    assert (stage.status, stage.step) == ("finished", 4) and stage.samples.name == "step-000004.png"
    assert not [event for event in events if isinstance(event, (Step, Sampled))]
    assert any("has done 6" in event.text and "step 4" in event.text for event in events if isinstance(event, Warned))
    loaded = read_generator(stage.path)
    (stage,) = loaded.metadata.history
    average, values = load_checkpoint(checkpoint_path(tmp_path / "run", 4))["average"], loaded.generator.state_dict()
    assert stage["steps"] == 4
    assert all(torch.equal(values[name], average[f"average.{name}"]) for name in stage["trained"])
    assert {path: path.read_bytes() for _, path in find_checkpoints(tmp_path / "run")} == kept
    with pytest.raises(ConfigProblem, match="at most 5 steps, found one that has done 6; .* was kept .2, 4, 6.,"):
        run(steps=5)
    assert run(steps=7)[0].step == 7


def test_a_generator_of_any_file_name_can_be_adapted(run, tiny_adaptation, tmp_path):
    named = GeneratorMetadata(name="caf\udce9")  # of a file whose name is not UTF-8
    given = LoadedGenerator(tiny_adaptation.tiny_generator(), named)
    result, _ = run(steps=1, generator="/old/caf\udce9.pkl", parts={"generator": given})
    made = read_generator(result.path).metadata
    assert made.history[0]["parent"] == "caf\udce9"
    assert json.loads(made.extra["training"])["generator"] == "caf\udce9.pkl"


def test_a_dry_run_tells_what_trains_and_writes_nothing(run, tmp_path, base):
    result, events = run(dry_run=True, parts=by_base(base), precision="auto")
    assert result.status == "dry_run" and [type(event) for event in events] == [Started]
    told = events[0].estimate
    assert "trains 16 of 42 tensors" in told and "judged by tiny (0.8 M parameters) at 16 px" in told
    assert events[0].config["precision"] == "fp32" and not list(tmp_path.iterdir())


def test_prompts_that_cannot_be_encoded_are_refused_by_a_dry_run_too(run, base):
    base.text_encoder = None
    for changes in (
        {},
        {"negative": "a cat", "prompt": "", "domain": "x"},
        {"source_prompt": "a cat", "method": "bridge"},
    ):
        fields = {"prompt": "a cat", **changes}
        with pytest.raises(ValueError, match="expected a tokenizer to encode the prompt 'a cat'"):
            run(dry_run=True, parts=by_base(base), **fields)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_domain_model_that_cannot_judge_is_refused_before_the_run_begins(run, base, tmp_path, dry_run):
    def domain(latent_format, **extra):
        made = DomainMetadata(base.config, latent_format=latent_format, extra=extra)
        return str(write_domain_file(tmp_path / f"{latent_format}.safetensors", base.unet, made))

    def adapt_to(path):
        run(parts=by_base(base), dry_run=dry_run, prompt="", domain=path, output=str(tmp_path / "made"))

    base.text_encoder = None
    with pytest.raises(ValueError, match="expected a tokenizer to encode the prompt 'a circle'"):
        adapt_to(domain("tiny", training='{"caption": "a circle"}'))
    with pytest.raises(FileProblem, match="other.safetensors: expected a domain model for the latent space 'tiny'"):
        adapt_to(domain("other"))
    with pytest.raises(FileProblem, match="missing.safetensors"):
        adapt_to(str(tmp_path / "missing.safetensors"))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_base_judges_with_prompt_negative_and_source(run, base, tmp_path):
    for method, more in [
        ("sds", {"negative": "grey"}),
        ("csd", {}),
        ("nfsd", {"negative": "blurry pictures"}),
        ("ism", {"t_max": 100}),
        ("dds", {"source_prompt": "a picture of it"}),
        ("bridge", {"source_prompt": "a picture of it"}),
    ]:
        parts, output = by_base(base), str(tmp_path / method)
        more |= {"scale": 5.0, "steps": 1, "output": output, "resolution": 32}
        result, events = run(method=method, parts=parts, **more)
        assert result.status == "finished" and math.isfinite(result.loss), method
        assert [event for event in events if isinstance(event, Step)][0].gradient_norm > 0
    for changes, told in [
        ({"prompt": ""}, "prompt: expected"),
        ({"method": "bridge"}, "source_prompt: expected"),
        ({"method": "nfsd"}, "negative: expected"),
    ]:
        with pytest.raises(ConfigProblem, match=told):
            run(output=str(tmp_path / "none"), parts=by_base(base), **changes)
    assert not (tmp_path / "none" / "checkpoints").exists()


def test_perceptual_distance_of_the_vaes_own_features(run, base, tmp_path):
    changes = {"features": "latents", "resolution": 32, "output": str(tmp_path / "latents")}
    _, events = run(steps=1, perceptual=0.5, parts=by_base(base), **changes)
    assert "perceptual" in [event for event in events if isinstance(event, Step)][0].parts


def test_parts_that_do_not_fit_are_told_in_a_sentence(run, base, tiny_run, tiny_adaptation):
    def wide(images):
        return tiny_adaptation.shrink(images).repeat(1, 3, 1, 1)[:, :8]

    from indomain_guidance.guidance.diffusion import Denoiser
    from indomain_guidance.guidance.distillation.critic import Critic

    prior = Denoiser(base.load_unet(), base.schedule)

    def critic(width):
        return Critic.cfg(prior, {"context": torch.zeros(1, 7, width)}, {"context": torch.ones(1, 7, width)}, 5.0)

    def four(images):
        return torch.cat([tiny_adaptation.shrink(images), tiny_adaptation.shrink(images)[:, :1]], 1)

    with pytest.raises(
        ConfigProblem, match=r"judge latents \[1, 8, .*expected a latent \[B, 4, .*that belong together"
    ):
        run(parts={"critic": critic(32), "encode": wide})
    with pytest.raises(ConfigProblem, match="judge latents .*expected encoded text .*32.*48"):
        run(parts={"critic": critic(48), "encode": four})
    with pytest.raises(ConfigProblem, match="vae: expected finite latents"):
        run(parts={"encode": lambda images: tiny_adaptation.shrink(images) / 0})
    with pytest.raises(ConfigProblem, match="resolution: expected a multiple of 8 px|resolution: .*multiple of"):
        run(parts=by_base(base), resolution=20)
    with pytest.raises(ValueError, match="a critic and its encode together"):
        run(parts={"encode": None})
    with pytest.raises(ConfigProblem, match="label: expected a generator with a class 3, found an unconditional"):
        run(label=3)


def test_memory_that_runs_out_is_no_misfit(run, tiny_adaptation):
    def full(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run(parts={"encode": full})


def test_conditional_and_grey_generators(run, tiny_adaptation, tmp_path):
    for label in (-1, 2):
        result, _ = run(
            steps=1,
            label=label,
            sample_every=1,
            output=str(tmp_path / str(label)),
            parts={"generator": tiny_adaptation.tiny_generator(c_dim=3)},
        )
        assert result.status == "finished" and result.samples.exists()
    result, _ = run(
        steps=1,
        sample_every=1,
        output=str(tmp_path / "grey"),
        parts={"generator": tiny_adaptation.tiny_generator(img_channels=1)},
    )
    assert result.status == "finished"
    with pytest.raises(ConfigProblem, match="colour or grey images, found 96 channels"):
        run(output=str(tmp_path / "planes"), parts={"generator": tiny_adaptation.tiny_generator(img_channels=96)})


def test_from_a_file_and_in_inference_mode(run, tiny_adaptation, tmp_path):
    """As ComfyUI calls its nodes."""
    path = write_generator(tmp_path / "source.safetensors", tiny_adaptation.tiny_generator())
    with torch.inference_mode():
        generator = tiny_adaptation.tiny_generator()
        assert run(steps=1, parts={"generator": None}, generator=str(path))[0].status == "finished"
        assert run(steps=1, parts={"generator": generator}, output=str(tmp_path / "b"))[0].status == "finished"
    with pytest.raises(FileProblem, match="none.safetensors"):
        missing = str(tmp_path / "none.safetensors")
        run(steps=1, parts={"generator": None}, generator=missing, output=str(tmp_path / "c"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label": 3}, "label: expected a generator with a class 3"),
        ({"resume": True}, "expected a checkpoint to go on from"),
        ({"parts": {"generator": None}, "generator": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"batch_size": 4096, "method": "dds"}, "source"),
    ],
)
def test_a_refused_adaptation_leaves_no_folder(run, tmp_path, changes, message):
    with pytest.raises(Problem, match=message):
        run(output=str(tmp_path / "runs" / "new"), **changes)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "new").mkdir(parents=True)
    with pytest.raises(Problem, match=message):
        run(output=str(tmp_path / "runs" / "new"), **changes)
    assert (tmp_path / "runs" / "new").is_dir()


@pytest.mark.parametrize(
    "t_schedule, schedule, moved",
    [
        ("falling", "constant", ["the largest timestep was 10 and is 177"]),
        ("annealed", "cosine", ["the learning rate was", "the largest timestep was 10 and is 177"]),
        ("uniform", "linear", ["the learning rate was"]),
        ("uniform", "constant", []),
    ],
)
def test_another_number_of_steps_is_told_before_the_first(run, t_schedule, schedule, moved):
    settings = {"t_schedule": t_schedule, "schedule": schedule, "t_min": 10, "t_max": 400, "directional": 0.0}
    run(steps=4, **settings)
    _, events = run(steps=8, **settings)
    told = [event.text for event in events if isinstance(event, Warned) and "steps was 4 and is 8" in event.text]
    assert len(told) == bool(moved) and all(what in told[0] for what in moved)
    assert sum("was" in text.split("so that")[1] for text in told) == bool(moved)
    assert [type(event) for event in events].index(Step) > (0 if moved else -1)
