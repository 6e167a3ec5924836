"""Whole bakings: what they write, that they go on to the same bits, and what they refuse before anything is encoded."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, add_lora, read_domain_file, read_lora
from indomain_guidance.guidance.null_text import load_unet
from indomain_guidance.training.baking import bake as module
from indomain_guidance.training.baking.bake import bake
from indomain_guidance.training.data.problems import DataProblem
from indomain_guidance.training.domain import picture_run
from indomain_guidance.training.engine.checkpoints import find_checkpoints, latest_checkpoint
from indomain_guidance.training.engine.events import Preparing, Sampled, Step, Stopped, Validated, Warned
from indomain_guidance.training.engine.learner import NonFiniteLoss
from indomain_guidance.training.engine.log import read_log
from indomain_guidance.training.engine.settings import ConfigProblem

from .. import tiny_baking
from ..tiny_run import ROOT, draw_images, fingerprint
from .conftest import domain_of, unet_of

TINY = Path(tiny_baking.__file__)
EVERY_STATE = ("pictures", "own", "trajectories")


def run(config, base, domain, stop=None, **more):
    """(result, events); stop: the step after which it is asked to stop, so that it takes one more."""
    events = []
    asked = lambda: any(isinstance(event, Step) and event.step == stop for event in events)  # noqa: E731
    return bake(config, base=base, domain=domain, listener=events.append, should_stop=asked, **more), events


def test_it_learns_and_writes_a_lora_that_is_its_module(settings, base, domain, monkeypatch):
    learners = []
    learner = module.BakeLearner
    monkeypatch.setattr(module, "BakeLearner", lambda *parts: learners.append(learner(*parts)) or learners[0])
    config = settings(steps=30, validate_every=30, held_out_share=0.3, sample_every=30, sample_steps=2)
    result, events = run(config, base, domain)
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    first, last = (event.loss for event in events if isinstance(event, Validated))
    assert first == pytest.approx(1.0, abs=1e-3) and last < 0.8  # the share of the guidance that is still missing
    assert len([event for event in events if isinstance(event, Sampled)]) == 2 and result.samples.is_file()
    lora, metadata = read_lora(result.path)
    assert metadata["prior_hash"] == base.prior_hash and metadata["ss_steps"] == "30"
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([100, 900]), {"context": base.null_context.tensor}
    with torch.no_grad():
        merged = load_unet(add_lora(base.unet, lora, base.config), base.config)(x, t, **cond)
        with learners[0].trainee.using(learners[0].values()) as unet:
            expected = unet(x, t, **cond)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, unet_of(base)(x, t, **cond), atol=1e-3)


@pytest.mark.parametrize("states", [("pictures",), EVERY_STATE], ids=["pictures", "every state"])
def test_stopped_and_resumed_it_ends_with_the_same_bits(states, settings, base, domain):
    whole, _ = run(settings("whole", states=states), base, domain)
    stopped, events = run(settings("parts", states=states), base, domain, stop=2)
    assert (stopped.status, find_checkpoints(stopped.run)[-1][0]) == ("stopped", 3) and isinstance(events[-1], Stopped)
    resumed, events = run(settings("parts", states=states), base, domain, resume=True)
    assert [event.step for event in events if isinstance(event, Step)] == [4, 5, 6]
    # What the prior drew for the run is kept, and not drawn again.
    assert not [event for event in events if isinstance(event, Preparing) and event.what.startswith("drawing")]
    whole, parts = fingerprint(whole.run), fingerprint(resumed.run)
    assert whole.pop("file") and parts.pop("file") and whole == parts
    assert set(whole) == {"weights", "average", "optimizer"}


@pytest.mark.parametrize("kind", ["own", "trajectories"])
def test_stopped_while_it_draws_it_draws_the_same_later(kind, settings, base, domain):
    config = settings(states=(kind,), own_count=9)
    events = []
    drawing = lambda: any(isinstance(event, Preparing) and event.what.startswith("drawing") for event in events)  # noqa: E731
    stopped = bake(config, base=base, domain=domain, listener=events.append, should_stop=drawing)
    assert (stopped.status, stopped.step) == ("stopped", 0)
    run(config, base, domain)
    run(settings("whole", states=(kind,), own_count=9), base, domain)
    parts, whole = fingerprint(config.run_folder), fingerprint(settings("whole").run_folder)
    assert parts["weights"] == whole["weights"]


def test_all_weights_are_a_whole_unet(settings, base, domain):
    result, _ = run(settings(train="all", learning_rate=1e-3, steps=2), base, domain)
    weights, metadata = read_domain_file(result.path)
    assert metadata.null_text == "none" and metadata.steps == 2 and metadata.prior_hash == base.prior_hash
    assert weights.keys() == base.unet.keys()
    assert any(not torch.equal(weights[key], base.unet[key]) for key in weights)


def test_half_precision_learns_nearly_the_same(settings, base, domain):
    wide, half = (
        [event.loss for event in run(settings(name, precision=name), base, domain)[1] if isinstance(event, Step)]
        for name in ("fp32", "bf16")
    )
    assert half == pytest.approx(wide, rel=0.1) and half != wide


def test_it_goes_on_only_with_what_it_began_with(settings, base, domain):
    run(settings(), base, domain, stop=2)
    with pytest.raises(ConfigProblem, match="expected a run with the same domain model and terms"):
        run(settings(), base, domain_of(base, seed=8))
    with pytest.raises(ConfigProblem, match="prompt_list was .* and is "):
        run(settings(prompt_list=("a circle",)), base, domain)
    with pytest.raises(ConfigProblem, match="domain_weight was 1.5 and is 2.0"):
        run(settings(domain_weight=2.0), base, domain)


def test_prompts_of_a_file_are_those_that_it_began_with(settings, base, domain, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a circle\n")
    run(settings(prompt_list=(), prompt_file=str(file)), base, domain, stop=2)
    file.write_text("a circle\ntwo circles\n")
    with pytest.raises(ConfigProblem, match="expected a run with the same prompts, found one with others"):
        run(settings(prompt_list=(), prompt_file=str(file)), base, domain)


def test_it_goes_on_without_validating_on_the_pictures_it_began_with(settings, base, domain):
    """Those held out stay so, and nobody is told that the pictures changed."""
    run(settings(validate_every=2, held_out_share=0.3), base, domain, stop=1)
    before = latest_checkpoint(settings().run_folder)[1]["dataset"]
    _, events = run(settings(validate_every=0, held_out_share=0.3), base, domain)
    assert not [event for event in events if isinstance(event, (Warned, Validated))]
    assert latest_checkpoint(settings().run_folder)[1]["dataset"] == before and before["images"] < 14


def test_other_pictures_are_told_and_refused_once_it_is_finished(settings, base, domain, tmp_path):
    run(settings(steps=2), base, domain)
    next((tmp_path / "images").iterdir()).unlink()
    with pytest.raises(ConfigProblem, match=r"it is finished and they changed since \(14 then, now 13\)"):
        run(settings(steps=2), base, domain)
    # More steps are another learning rate, which is told as well.
    _, events = run(settings(steps=4), base, domain)
    assert [event.text for event in events if isinstance(event, Warned) and "the images changed" in event.text]


def test_a_batch_that_is_not_finite_names_its_pictures(settings, base, domain, monkeypatch):
    losses = module.BakeLearner._losses
    monkeypatch.setattr(module.BakeLearner, "_losses", lambda self, batch: losses(self, batch) * float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"at step 1 on the batch circle-\d+.png"):
        run(settings(), base, domain)


def test_pictures_that_do_not_fit_into_memory_are_one_sentence(settings, base, domain, monkeypatch):
    def full(*parts, **more):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(picture_run, "open_dataset", full)
    with pytest.raises(DataProblem, match="Encoding the images ran out of memory at 64 px"):
        run(settings(), base, domain)


def test_it_does_not_begin_where_memory_cannot_hold_it(settings, base, domain, monkeypatch):
    monkeypatch.setattr("indomain_guidance.training.baking.estimate.free_bytes", lambda device: 2**20)
    with pytest.raises(ConfigProblem, match="fits into memory, .* with batch_size 4 at resolution 64. This is more"):
        run(settings(), base, domain)


@pytest.mark.slow
def test_two_processes_bake_like_one(two_processes, tmp_path, monkeypatch):
    """The same states in shares of two shapes: the losses agree within 1e-4."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    draw_images(tmp_path / "images")

    def command(name):
        changes = json.dumps({"run": name, "steps": 8, "batch_size": 6, "states": EVERY_STATE})
        return [str(ROOT / "training" / "bootstrap.py"), str(TINY), str(tmp_path), changes]

    subprocess.run([sys.executable, *command("one")], check=True, stdout=subprocess.DEVNULL)
    ran = subprocess.run([*two_processes, *command("two")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count('"event": "finished"') == 1
    one, two = (
        [event.loss for event in read_log(tmp_path / name / "log.jsonl") if isinstance(event, Step)]
        for name in ("one", "two")
    )
    assert len(one) == 8 and two == pytest.approx(one, rel=1e-4)


def test_a_dry_run_says_what_it_needs_and_leaves_nothing(settings, base, domain):
    config = settings()
    result, events = run(config, base, domain, dry_run=True)
    assert result.status == "dry_run" and not config.run_folder.exists()
    assert "matched at 2 prompts and the empty one\ntrains " in events[-1].estimate


def test_an_image_tensor_takes_the_place_of_a_folder(settings, base, domain):
    images = torch.rand(3, 64, 64, 3)
    result, _ = run(settings(data=(), steps=1), base, domain, images=images)
    assert result.status == "finished"


def refusals(prior):
    """(what is refused, changed settings, changed domain model)."""
    weights, metadata = domain_of(prior)
    change = lambda **facts: (weights, dataclasses.replace(metadata, **facts))  # noqa: E731
    return {
        "expected a domain model of the prior tiny, found one of another checkpoint": ({}, change(prior_hash="0" * 64)),
        "expected a domain model for the latent space 'tiny', found one for 'sdxl'": ({}, change(latent_format="sdxl")),
        "data: expected folders of pictures to noise, found none": ({"data": ()}, None),
        "to name linear layers or convolutions of the network, found none": ({"layers": "*.norm9"}, None),
        "found out.0, which takes none": ({"layers": "out.0"}, None),
        "expected one of the prompts that were encoded": ({"prompt_list": ("never seen",), "states": ("own",)}, None),
        "output: expected a folder of the run's own, found .*, the folder of images": ({"output": "images"}, None),
        "domain_weight: expected a guidance to bake in, found no weight but 0": ({"domain_weight": 0}, None),
        "control_weight: expected another number than 1": ({**ALONE, "control_weight": 1}, None),
        "target: expected prompts .* found none": ({**ALONE, "prompt_list": ()}, None),
        "target: expected prompts .* found an empty_share of 1": ({**ALONE, "empty_share": 1}, None),
        "terms: Expected terms with different names, got 'domain' twice": ({"terms": [{"name": "domain"}]}, None),
        "terms: Term 'x' refers to 'y', which is none of": ({"terms": [{"name": "x", "reference": "y"}]}, None),
        "terms: .*cycle": ({"terms": [{"name": "x", "reference": "y"}, {"name": "y", "reference": "x"}]}, None),
        "terms: Expected a term to have a name other than 'base'": ({"terms": [{"name": "base"}]}, None),
        "expected a model file, found nothing at this path": ({"terms": [{"name": "x", "model": "gone.ckpt"}]}, None),
    }


ALONE = {"domain": "", "target": "guided"}


@pytest.mark.parametrize("message", range(16))
def test_what_cannot_work_is_refused_before_anything_is_encoded(message, settings, base, domain, monkeypatch, tmp_path):
    words, (changes, other) = list(refusals(base).items())[message]
    monkeypatch.setattr(picture_run, "open_dataset", lambda *parts, **more: pytest.fail("pictures were encoded"))
    monkeypatch.setattr(module, "draw_own", lambda *parts, **more: pytest.fail("samples were drawn"))
    if "terms" in changes:
        file = tmp_path / "terms.json"
        file.write_text(json.dumps({"terms": [{"weight": 0.5, **term} for term in changes["terms"]]}))
        changes = {"terms": str(file)}
    if "output" in changes:
        changes = {"output": str(tmp_path / "images")}
    config = settings(**changes)
    there = config.run_folder.exists()
    with pytest.raises((ConfigProblem, FileProblem, ValueError), match=words):
        run(config, base, None if "domain" in changes else other or domain)
    assert config.run_folder.exists() == there


def test_settings_that_make_no_sense_are_refused(settings):
    for changes, words in (
        ({"domain": "", "terms": ""}, "domain: expected a domain model or a file of terms, found neither"),
        ({"domain_start": 0.5, "domain_end": 0.5}, "domain_start: expected less than domain_end"),
        ({"states": ()}, "states: expected some of pictures, own, trajectories, found none"),
        ({"states": ("dreams",)}, "states: expected some of .*, found 'dreams'"),
        ({"states": ("own", "own")}, "states: expected each kind once"),
        ({"states": EVERY_STATE, "batch_size": 2}, "batch_size: expected at least 3"),
        ({"domain_weight": float("nan")}, "domain_weight: expected a number, found nan"),
        ({"domain_weight": float("inf")}, "domain_weight: expected a number from -100.0 to 100.0, found inf"),
    ):
        with pytest.raises(ConfigProblem, match=words):
            settings(**changes)


def test_guided_bakes_the_prompt_alone_too(settings, base):
    result, events = run(settings(domain="", target="guided", control_weight=4.0), base, None)
    assert result.status == "finished" and not [event for event in events if isinstance(event, Warned)]
