"""`train` as a whole on a prior of nothing: what it leaves behind, and every way a run can end or go on."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import sys
import tarfile
import weakref
import zlib
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from indomain_guidance.guidance.errors import Problem
from indomain_guidance.guidance.files import FileProblem, read_domain_file
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.null_text import load_unet
from indomain_guidance.training.data.check import check_data
from indomain_guidance.training.data.latent_dataset import LatentDataset
from indomain_guidance.training.data.problems import BadImage, DataProblem
from indomain_guidance.training.data.remarks import remarks
from indomain_guidance.training.domain.learner import DomainLearner
from indomain_guidance.training.domain.train import _begun, train
from indomain_guidance.training.engine.checkpoints import (
    checkpoint_path,
    find_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from indomain_guidance.training.engine.events import (
    Failed,
    Finished,
    Preparing,
    Sampled,
    Saved,
    Started,
    Step,
    Stopped,
    Validated,
    Warned,
)
from indomain_guidance.training.engine.learner import NonFiniteLoss
from indomain_guidance.training.engine.lock import locked
from indomain_guidance.training.engine.log import read_log
from indomain_guidance.training.engine.processes import OneProcess
from indomain_guidance.training.engine.settings import ConfigProblem
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tiny_run):
    return tiny_run.tiny_base()


@pytest.fixture
def folder(tiny_run, tmp_path):
    tiny_run.draw_images(tmp_path / "images", 12)
    return tmp_path


@pytest.fixture
def run(tiny_run, folder, base):
    """Trains quietly in the folder; (result, events)."""

    def go(
        resume="auto",
        should_stop=lambda: False,
        listener=lambda event: None,
        base=base,
        images=None,
        dry_run=False,
        **changes,
    ):
        events = []

        def tell(event):
            events.append(event)
            listener(event)

        fields = {"steps": 4, "sample_every": 0, "validate_every": 0, "warmup": 0, **changes}
        config = tiny_run.tiny_config(folder, **fields)
        result = train(
            config, resume=resume, base=base, images=images, listener=tell, should_stop=should_stop, dry_run=dry_run
        )
        return result, events

    return go


def kinds(events):
    return [type(event) for event in events]


def stop_after(step):
    """(should_stop, listener) of somebody who asks to stop once a step is reported."""
    seen = []
    return (lambda: step in seen), (lambda event: seen.append(event.step) if isinstance(event, Step) else None)


def weights(path):
    return load_checkpoint(path)["weights"]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_folder_of_images_becomes_a_domain_file(run, folder, base):
    result, events = run(
        steps=6,
        sample_every=3,
        validate_every=3,
        checkpoint_every=2,
        export_to=str(folder / "models"),
        ema=0.5,
        licence="CC0-1.0",
    )
    out = folder / "run"
    assert (result.status, result.step, result.run) == ("finished", 6, out)
    assert result.path == folder / "models" / "circles.safetensors" and result.path.exists()
    assert result.samples == out / "samples" / "step-000006.png" and result.plot == out / "loss.png"
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "log.jsonl",
        "loss.png",
        "samples",
        "checkpoints",
        "circles.safetensors",
        ".lock",
    }
    for path in (result.samples, result.plot):
        with Image.open(path) as image:
            assert image.width > 100
    assert [step for step, _ in find_checkpoints(out)] == [4, 6]
    assert [event.step for event in events if isinstance(event, Validated)] == [0, 3, 6]
    assert [event.step for event in events if isinstance(event, Sampled)] == [0, 3, 6]
    assert [event.step for event in events if isinstance(event, Saved)] == [2, 4, 6]
    assert kinds(events)[0] is Started and kinds(events)[-1] is Finished
    assert events[0].images == 12 and "memory" in events[0].estimate
    assert [event for event in events if isinstance(event, Preparing)][-1].done == 12
    assert json.loads((out / "config.json").read_text())["steps"] == 6
    assert [type(event) for event in read_log(out / "log.jsonl")].count(Step) == 6

    state_dict, metadata = read_domain_file(result.path)
    assert metadata.null_text == "cached" and metadata.prior_hash == base.prior_hash
    assert (metadata.steps, metadata.ema, metadata.resolution, metadata.licence) == (6, 0.5, 64, "CC0-1.0")
    assert metadata.dataset_size in (10, 11) and metadata.domain_name == "circles"
    state = load_checkpoint(checkpoint_path(out, 6))
    for name, weight in state_dict.items():
        assert torch.equal(weight, state["average"][f"average.{name}"])
    unet = load_unet(state_dict, metadata.config)
    with torch.no_grad():
        assert bool(unet(torch.randn(1, 4, 8, 8), torch.tensor([500])).isfinite().all())


def test_stopped_it_saves_and_goes_on_to_the_same_bits(run, folder):
    whole, _ = run(output=str(folder / "whole"))
    should_stop, listener = stop_after(1)
    stopped, events = run(should_stop=should_stop, listener=listener, checkpoint_every=0)
    # Asked after step 1 was reported; the next question comes at the end of step 2.
    assert (stopped.status, stopped.step, stopped.path) == ("stopped", 2, None)
    assert events[-1] == Stopped(2, str(checkpoint_path(folder / "run", 2)))
    finished, events = run(resume=True)
    assert finished.status == "finished" and events[0].step == 2
    assert [event.step for event in events if isinstance(event, Step)] == [3, 4]
    assert same(*(weights(checkpoint_path(folder / name, 4)) for name in ("whole", "run")))
    assert whole.step == finished.step


def test_a_checkpoint_is_saved_when_the_last_one_is_too_old(run, folder, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("indomain_guidance.training.engine.saving.time.monotonic", lambda: now[0])

    def pass_time(event):
        if isinstance(event, Step):
            now[0] += 24.0  # seconds a step

    def saved(**changes):
        _, events = run(steps=8, checkpoint_every=0, keep_checkpoints=9, listener=pass_time, **changes)
        return [event.step for event in events if isinstance(event, Saved)]

    assert saved(output=str(folder / "timed"), checkpoint_minutes=1.0) == [3, 6, 8]
    assert saved(output=str(folder / "by_steps"), checkpoint_minutes=0.0) == [8]


def test_no_sample_grid_is_given_to_who_wants_none(run):
    assert run(sample_every=2)[0].samples is not None
    assert run(steps=5)[0].samples is None


def test_stopping_before_the_first_step_leaves_nothing_to_resume(run, folder):
    stopped, events = run(should_stop=lambda: True)
    assert (stopped.status, stopped.step) == ("stopped", 0) and events[-1] == Stopped(0, "")
    assert find_checkpoints(folder / "run") == []


def test_an_exception_of_the_listener_ends_the_run_but_loses_no_step(run, folder):
    class Cancelled(Exception):
        pass

    def cancel(event):
        if isinstance(event, Step) and event.step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(listener=cancel, checkpoint_every=0)
    assert [step for step, _ in find_checkpoints(folder / "run")] == [3]


def test_a_finished_run_is_finished_and_can_be_made_longer(run, folder):
    run()
    again, events = run()
    assert again.status == "finished" and again.step == 4 and not [e for e in events if isinstance(e, Step)]
    longer, events = run(steps=6, schedule="cosine")
    assert longer.step == 6 and [event.step for event in events if isinstance(event, Step)] == [5, 6]
    with pytest.raises(ConfigProblem, match="at most 5 steps, found one that has done 6; .* was kept .4, 6.,"):
        run(steps=5)


def test_a_stage_that_was_kept_becomes_the_model_and_later_ones_stay(run, folder):
    run(keep_checkpoints=9, checkpoint_every=2)
    kept = {path: path.read_bytes() for _, path in find_checkpoints(folder / "run")}
    assert len(kept) == 2
    stage, events = run(steps=2, keep_checkpoints=1)
    assert (stage.status, stage.step) == ("finished", 2) and not [e for e in events if isinstance(e, Step)]
    assert any("has done 4" in event.text and "step 2" in event.text for event in events if isinstance(event, Warned))
    state_dict, metadata = read_domain_file(stage.path)
    average = load_checkpoint(checkpoint_path(folder / "run", 2))["average"]
    assert metadata.steps == 2
    assert all(torch.equal(weight, average[f"average.{name}"]) for name, weight in state_dict.items())
    assert {path: path.read_bytes() for _, path in find_checkpoints(folder / "run")} == kept
    assert run()[0].step == 4
    checkpoint_path(folder / "run", 2).write_bytes(b"")
    with pytest.raises(ConfigProblem, match="was kept .4.,"):
        run(steps=2)


def test_resume_is_what_the_caller_says(run, folder):
    with pytest.raises(ConfigProblem, match="expected a checkpoint to go on from, found none; .* resume auto"):
        run(resume=True)
    run(steps=2)
    with pytest.raises(ConfigProblem, match="found its checkpoints .*step 2"):
        run(resume=False)
    with pytest.raises(ConfigProblem, match="seed was 0 and is 1"):
        run(seed=1)
    with pytest.raises(ConfigProblem, match="expected True, False or 'auto'"):
        run(resume="yes")


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(run, folder):
    run()
    last = checkpoint_path(folder / "run", 4)
    expected = weights(last)
    expected = {name: one.clone() for name, one in expected.items()}
    last.write_bytes(last.read_bytes()[:-1000])
    result, events = run()
    named = [event.text for event in events if isinstance(event, Warned) and "step-000004.ckpt" in event.text]
    assert len(named) == 1 and "cut off" in named[0]
    assert [event.step for event in events if isinstance(event, Step)] == [3, 4] and result.step == 4
    assert same(weights(last), expected)
    for _, path in find_checkpoints(folder / "run"):
        path.write_bytes(b"")
    for resume in (True, "auto"):
        with pytest.raises(ConfigProblem, match="damaged checkpoints only"):
            run(resume=resume)


def test_settings_in_a_checkpoint_that_make_no_sense_are_told_with_its_name(run, folder):
    run(steps=2)
    path = checkpoint_path(folder / "run", 2)
    state = load_checkpoint(path)
    save_checkpoint(
        path,
        {
            **state,
            "config": {**state["config"], "log_every": float("nan")},
            "weights": {name: one.clone() for name, one in state["weights"].items()},
        },
    )
    with pytest.raises(ConfigProblem, match="step-000002.ckpt: log_every: expected a number, found nan"):
        run(steps=2, precision="auto")


def test_a_run_of_another_version_is_not_begun_anew(run, folder):
    run(steps=2)
    path = checkpoint_path(folder / "run", 2)
    save_checkpoint(path, {**load_checkpoint(path), "version": 2})
    before = path.read_bytes()
    for dry_run in (False, True):
        with pytest.raises(FileProblem, match="version 1, found 2"):
            run(dry_run=dry_run)
    assert path.read_bytes() == before


def test_other_circumstances_warn(run, folder):
    run(steps=2)
    path = checkpoint_path(folder / "run", 2)
    state = load_checkpoint(path)
    save_checkpoint(path, {**state, "facts": {**state["facts"], "torch": "1.0"}, "weights": dict(state["weights"])})
    Image.new("RGB", (64, 64), "red").save(folder / "images" / "new.png")
    _, events = run()
    warnings = [event.text for event in events if isinstance(event, Warned)]
    assert any("torch 1.0 ->" in text for text in warnings)
    assert any("the images changed since" in text and "12 then, now 13" in text for text in warnings)


def test_a_finished_run_does_not_pass_for_one_on_other_images(run, folder, tiny_run):
    finished, _ = run(steps=2)
    before, settings = finished.path.read_bytes(), (folder / "run" / "config.json").read_bytes()
    tiny_run.draw_images(folder / "others", 9, sizes=((48, 96),))
    with pytest.raises(ConfigProblem, match=r"finished and they changed.*raise steps .* another name"):
        run(steps=2, data=(str(folder / "others"),))
    assert finished.path.read_bytes() == before and (folder / "run" / "config.json").read_bytes() == settings
    assert run(steps=2)[0].status == "finished"
    longer, events = run(steps=3, data=(str(folder / "others"),))
    assert longer.step == 3 and any("goes on with those of now" in e.text for e in events if isinstance(e, Warned))
    assert read_domain_file(longer.path)[1].dataset_size == 9


@pytest.mark.parametrize("done", [0, 1])
def test_a_loss_that_is_not_finite_names_weights_that_are_there(run, folder, monkeypatch, done):
    real = DomainLearner.take_step

    def fails(self, should_stop):
        if self.step == done:
            raise NonFiniteLoss("the loss", done + 1, ["circle-1.png"])
        return real(self, should_stop)

    monkeypatch.setattr(DomainLearner, "take_step", fails)
    with pytest.raises(NonFiniteLoss) as caught:
        run(checkpoint_every=0)
    found, said = find_checkpoints(folder / "run"), str(caught.value)
    assert "lower the learning rate" in said
    if done:
        assert f"of step 1, are in {found[0][1]};" in said and "another name" in said
    else:
        assert found == [] and "nothing was learned" in said
        assert "checkpoints" not in said and "another name" not in said


def test_a_run_among_its_images_does_not_learn_its_own_pictures(run, folder):
    fields = {"steps": 2, "sample_every": 1, "validate_every": 1, "output": str(folder / "images" / "runs" / "circles")}
    stopped, _ = run(**fields, should_stop=(asked := stop_after(1))[0], listener=asked[1])
    assert stopped.status == "stopped" and stopped.samples.exists() and stopped.plot.exists()
    for _ in range(2):  # it goes on, and is finished
        result, events = run(**fields)
        assert result.status == "finished" and events[0].images == 12
        assert not any("the images changed" in event.text for event in events if isinstance(event, Warned))


def test_another_prior_is_refused(run, tiny_run):
    run(steps=2)
    other = tiny_run.tiny_base()
    other.unet["out.2.bias"] = other.unet["out.2.bias"] + 1
    with pytest.raises(ConfigProblem, match="same prior"):
        run(base=other)


def test_other_parts_of_the_prior_are_refused(run, base, tiny_run):
    run(steps=2)
    vae = tiny_run.tiny_base()
    with torch.no_grad():
        for parameter in vae.autoencoder.parameters():
            parameter.neg_()
    with pytest.raises(ConfigProblem, match="same VAE"):
        run(base=vae)
    with pytest.raises(ConfigProblem, match="expected a run whose prior predicts v_prediction, found epsilon"):
        run(base=replace(base, prediction_type="v_prediction"))

    def encoded(change):
        return replace(base, null_context=replace(base.null_context, tensor=change(base.null_context.tensor)))

    with pytest.raises(ConfigProblem, match="same text encoder"):
        run(base=encoded(lambda tensor: tensor * 1.05))
    _, events = run(base=encoded(lambda tensor: tensor * (1 + 1e-6)))
    assert any("text encoder: context now and in" in event.text for event in events if isinstance(event, Warned))


def test_a_vae_that_is_rounded_otherwise_is_the_same(run, tiny_run):
    """ComfyUI holds the VAE of a file in bf16 where the device has it."""
    run(steps=2)
    rounded = tiny_run.tiny_base()
    rounded.autoencoder.to(torch.bfloat16).float()
    assert rounded.vae_id != tiny_run.tiny_base().vae_id
    _, events = run(base=rounded)
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert any("VAE: latents now and in" in text for text in warned)


@pytest.mark.parametrize("place", ["grid", "image"])
def test_any_failure_leaves_the_last_step_and_says_what_it_was(run, folder, monkeypatch, place):
    if place == "grid":

        def broken(self, *args, **options):
            raise torch.OutOfMemoryError("no memory\nfor a grid")

        monkeypatch.setattr("indomain_guidance.training.domain.previews.Preview._prior", broken)
        with pytest.raises(torch.OutOfMemoryError):
            run(output=str(folder / "begun"), sample_every=2)  # at step 0 nothing is lost
        monkeypatch.setattr(
            "indomain_guidance.training.engine.reports.is_due", lambda step, every, steps: every and step == 2
        )
        kind, text, done = torch.OutOfMemoryError, "no memory for a grid", 2
    else:
        real, calls = LatentDataset.draw, []

        def broken(self, index, generator):
            calls.append(index)
            if len(calls) > 6:  # two a step
                raise BadImage("unreadable", "cannot be read")
            return real(self, index, generator)

        monkeypatch.setattr(LatentDataset, "draw", broken)
        kind, text, done = DataProblem, r"circle-\d+.png: cannot be read", 3
    with pytest.raises(kind) as caught:
        run(sample_every=2 if place == "grid" else 0, checkpoint_every=0)
    assert re.search(text, " ".join(str(caught.value).split()))
    assert [step for step, _ in find_checkpoints(folder / "run")] == [done]
    last = read_log(folder / "run" / "log.jsonl")[-1]
    assert isinstance(last, Failed) and last.step == done and re.search(text, last.text)


def test_a_step_that_runs_out_of_memory_is_forgotten_before_the_last_one_is_saved(run, folder, monkeypatch):
    held, seen = [], []

    def broken(self, one):
        if self.step < 2:
            return losses(self, one)
        activations = torch.zeros(3, requires_grad=True)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("no memory for a step")

    def save(path, state):
        seen.append(held[-1]() is None if held else None)
        if disk_full:
            raise FileProblem("the disk is full")
        return save_checkpoint(path, state)

    losses, disk_full = DomainLearner._losses, False
    monkeypatch.setattr(DomainLearner, "_losses", broken)
    monkeypatch.setattr("indomain_guidance.training.engine.saving.save_checkpoint", save)
    with pytest.raises(torch.OutOfMemoryError):
        run(checkpoint_every=0)
    assert seen == [True] and [step for step, _ in find_checkpoints(folder / "run")] == [2]
    disk_full, events = True, []
    with pytest.raises(torch.OutOfMemoryError):
        run(checkpoint_every=0, output=str(folder / "full"), listener=events.append)
    told = "the steps after 0 could not be saved: the disk is full"
    assert events[-1] == Warned(told)
    assert [type(event) for event in read_log(folder / "full" / "log.jsonl")[-2:]] == [Warned, Failed]


def test_images_that_do_not_fit_into_memory_name_their_own_option(run, monkeypatch):
    def full(*args, **callbacks):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("indomain_guidance.training.domain.picture_run.open_dataset", full)
    with pytest.raises(DataProblem, match="Encoding the images .* at 64 px; set caching_batch to 1"):
        run()


def test_measuring_the_prior_is_reported_and_can_be_stopped(run, folder):
    seen = []

    def listener(event):
        if isinstance(event, Preparing) and event.what == "measuring the prior":
            seen.append((event.done, event.total))

    result, events = run(form="constant", should_stop=lambda: len(seen) == 3, listener=listener)
    assert (result.status, result.step) == ("stopped", 0) and events[-1] == Stopped(0, "")
    assert seen == [(1, 56), (2, 56), (3, 56)] and find_checkpoints(folder / "run") == []


def test_a_run_goes_on_without_validating(run, folder):
    run(steps=2, validate_every=2)
    whole, _ = run(steps=4, validate_every=2, output=str(folder / "whole"))
    blind, events = run(steps=3, validate_every=0)
    assert not [event for event in events if isinstance(event, Validated)]
    assert not [event for event in events if isinstance(event, Warned) and "images changed" in event.text]
    again, events = run(steps=4, validate_every=2)
    assert [event.step for event in events if isinstance(event, Validated)] == [4]
    assert read_domain_file(again.path)[1].dataset_hash == read_domain_file(whole.path)[1].dataset_hash
    all_of_them, _ = run(steps=2, validate_every=0, output=str(folder / "all"))
    assert read_domain_file(all_of_them.path)[1].dataset_size == 12


def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(run, folder, monkeypatch):
    real = DomainLearner._losses
    calls = []

    def broken(self, one):
        calls.append(1)
        return real(self, one) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(DomainLearner, "_losses", broken)
    with pytest.raises(NonFiniteLoss) as caught:
        run(checkpoint_every=0, schedule="constant")
    text = str(caught.value)
    assert "at step 3" in text and "circle-" in text and ".png" in text
    assert "last good weights, of step 2, are in" in text and "step-000002.ckpt" in text
    kept = weights(checkpoint_path(folder / "run", 2))
    monkeypatch.undo()
    run(output=str(folder / "good"), checkpoint_every=1, steps=2, schedule="constant")
    assert same(kept, weights(checkpoint_path(folder / "good", 2)))


def test_weights_that_are_not_finite_never_replace_a_checkpoint(run, folder, monkeypatch):
    real = DomainLearner.take_step

    def explode(self, should_stop):
        outcome = real(self, should_stop)
        if outcome.step == 4:
            with torch.no_grad():
                next(iter(self.parameters.values())).fill_(math.inf)
        return outcome

    monkeypatch.setattr(DomainLearner, "take_step", explode)
    with pytest.raises(NonFiniteLoss, match=r"the weights became NaN .* at step 4 .*step-000002\.ckpt"):
        run()
    assert [step for step, _ in find_checkpoints(folder / "run")] == [2]
    assert not (folder / "run" / "circles.safetensors").exists()


def test_what_lies_there_is_named_before_it_is_replaced(run, folder):
    models = folder / "models"
    models.mkdir()
    (models / "circles.safetensors").write_bytes(b"old")
    (models / f".circles.safetensors.{'0af' * 10}12.tmp").write_bytes(b"half")
    _, events = run(steps=1, export_to=str(models))
    assert any("will be replaced" in event.text for event in events if isinstance(event, Warned))
    assert (models / "circles.safetensors").stat().st_size > 1000
    assert [path.name for path in models.iterdir()] == ["circles.safetensors"]
    shutil.rmtree(folder / "run" / "checkpoints")  # nothing says any more that the run is finished
    _, events = run(steps=1)
    told = f"{folder / 'run' / 'circles.safetensors'} is there already and will be replaced"
    assert any(event.text.startswith(told) for event in events if isinstance(event, Warned))


def test_reports_that_a_killed_run_did_not_come_to_are_made_up_for(run, folder):
    """Checkpoint first, then held-out loss and samples: killed in between, they are due when the run goes on."""
    changes = {"steps": 4, "sample_every": 2, "validate_every": 2, "checkpoint_every": 2}
    fields = {name: value for name, value in changes.items() if name != "steps"}
    run(steps=2, **fields)
    grid = folder / "run" / "samples" / "step-000002.png"
    before = grid.read_bytes()
    grid.unlink()
    _, events = run(**changes)
    assert [event.step for event in events if isinstance(event, Sampled)] == [2, 4]
    assert [event.step for event in events if isinstance(event, Validated)] == [4]
    assert grid.read_bytes() == before
    last = folder / "run" / "samples" / "step-000004.png"
    before = last.read_bytes()
    last.unlink()
    again, events = run(**changes)
    assert [event.step for event in events if isinstance(event, Sampled)] == [4]
    assert not [event for event in events if isinstance(event, (Step, Validated))]
    assert last.read_bytes() == before and again.samples == last


def test_a_dry_run_resolves_estimates_and_writes_nothing(run, folder):
    before = sorted(folder.rglob("*"))
    result, events = run(dry_run=True, precision="auto")
    assert result.status == "dry_run" and result.path is None
    assert kinds(events) == [Started] and events[0].config["precision"] == "fp32" and events[0].images == 12
    assert "per checkpoint" in events[0].estimate
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "changes", [{"sample_prompts": ("", "a cat"), "sample_every": 8}, {"form": "full", "caption": "a cat"}]
)
def test_prompts_that_cannot_be_encoded_are_refused_before_the_images(run, changes, monkeypatch):
    """In every process, so that none waits for one that has failed; and by a dry run."""
    told, processes = [], OneProcess("cpu")
    monkeypatch.setattr("indomain_guidance.training.engine.run.open_processes", lambda device: processes)
    for rank, dry_run in ((0, True), (0, False), (1, False)):
        processes.rank = rank
        with pytest.raises(ValueError, match="expected a tokenizer to encode the prompt 'a cat'"):
            run(dry_run=dry_run, listener=told.append, steps=1, **changes)
    assert not any(isinstance(event, Preparing) for event in told)


@pytest.mark.parametrize(
    "changes", [{"validate_every": 1, "held_out_share": 0.5}, {"sample_every": 1, "sample_count": 4}]
)
def test_of_several_processes_none_holds_the_batch_of_all(run, monkeypatch, changes):
    """Validation and grids, which the first one makes alone, need no more memory than its share of a step."""

    class Two(OneProcess):
        world = 2

        def total(self, values):  # the other one does the same
            return values.sum().repeat(2) if values.dtype is torch.int64 else 2 * values

    real, batches = UNet.forward, []

    def forward(self, x, *args, **more):
        batches.append(len(x))
        return real(self, x, *args, **more)

    monkeypatch.setattr("indomain_guidance.training.engine.run.open_processes", lambda device: Two("cpu"))
    monkeypatch.setattr(UNet, "forward", forward)
    assert run(steps=1, batch_size=2, checkpoint_every=0, **changes)[0].status == "finished"
    assert max(batches) == 1


@pytest.mark.parametrize("latent_format, expected", [("mini_world", False), ("sd15", True), ("tiny", False)])
def test_a_resolution_far_below_the_priors_own_warns(run, base, latent_format, expected):
    """Of 64 px: the miniature's own, one eighth of Stable Diffusion's, and one of a family that nobody knows."""
    _, events = run(dry_run=True, base=replace(base, latent_format=latent_format))
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert any("512 px" in text and "resolution" in text for text in warned) is expected


def test_a_dry_run_looks_at_the_run_that_it_would_go_on_with(run, folder):
    run(steps=2)
    before = sorted(folder.rglob("*"))
    _, events = run(dry_run=True)
    assert (events[0].step, events[0].steps) == (2, 4)
    with pytest.raises(ConfigProblem, match="seed was 0 and is 1"):
        run(dry_run=True, seed=1)
    with pytest.raises(ConfigProblem, match="at most 1 steps, found one that has done 2"):
        run(dry_run=True, steps=1)
    assert sorted(folder.rglob("*")) == before


def test_a_warm_up_longer_than_the_run_is_named(run):
    def warned(**changes):
        return any(
            "lower warmup" in event.text for event in run(dry_run=True, **changes)[1] if isinstance(event, Warned)
        )

    assert warned(warmup=8) and warned(warmup=4) and not warned(warmup=3)


def test_it_trains_on_a_zero_snr_schedule(run, base):
    zero = replace(base, prediction_type="v_prediction", zero_snr=True)
    result, events = run(base=zero, validate_every=2)
    assert result.status == "finished" and math.isfinite(result.loss)
    assert all(math.isfinite(event.loss) for event in events if isinstance(event, Validated))
    assert any("min_snr_gamma" in event.text for event in events if isinstance(event, Warned))
    assert read_domain_file(result.path)[1].zero_snr


def test_images_in_memory_and_bad_files(run, folder):
    (folder / "images" / "broken.png").write_bytes(b"nothing")
    picture = torch.rand(2, 80, 64, 3, generator=torch.Generator().manual_seed(0))
    _, events = run(images=[picture], steps=1)
    assert events[0].images == 15
    assert any(
        "1 images cannot be used" in event.text and "broken.png" in event.text
        for event in events
        if isinstance(event, Warned)
    )
    result, events = run(data=(), images=picture, steps=1, output=str(folder / "memory"))
    assert result.status == "finished" and events[0].images == 2
    with pytest.raises(DataProblem):
        run(data=str(folder / "images" / "none"), output=str(folder / "empty"))


def test_what_is_left_out_and_cut_away_is_told_at_the_start_in_the_words_of_check_data(run, folder):
    images = folder / "images"
    Image.new("RGB", (400, 64)).save(images / "pano.png")
    (images / "huge.png").write_bytes(huge_png(13377, 13377))
    (images / "circle-0.txt").write_text("a circle"), (images / "photo.heic").write_bytes(b"x")
    _, events = run(steps=1)
    said = [event.text for event in events if isinstance(event, Warned)]
    config = events[0].config
    report = check_data(
        [images],
        resolution=config["resolution"],
        buckets=config["buckets"],
        bucket_step=config["bucket_step"],
        bucket_max_ratio=config["bucket_max_ratio"],
    )
    notes = remarks(report.ignored, report.cropped, report.ok)
    assert len(notes) == 2 and all(note in said and note in report.to_text() for note in notes)
    assert any("1 images cannot be used and are left out (1 too large): huge.png has" in text for text in said)


def huge_png(width: int, height: int) -> bytes:
    """An RGB picture that would take 700 MiB, in 60 bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")


def test_a_shard_that_ends_early_is_reported(run, folder):
    with tarfile.open(folder / "images" / "more.tar", "w") as shard:
        for number in range(3):
            shard.add(folder / "images" / f"circle-{number}.png", f"{number}.png")
        whole = shard.offset
    os.truncate(folder / "images" / "more.tar", whole)  # cut between two members
    _, events = run(steps=1)
    assert events[0].images == 15
    told = "1 folders, shards or links could not be read to their end"
    assert any(told in event.text and "after 3 members" in event.text for event in events if isinstance(event, Warned))


def test_one_run_at_a_time(run, folder):
    with locked(folder / "run"), pytest.raises(FileProblem, match="another process is training"):
        run()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"form": "constant"},
        {"form": "full", "caption": ""},
        {"train": "self_attention", "form": "constant"},
        {"train": "low_rank", "rank": 2, "ema": 0.0},
        {"train": "low_rank", "rank": 2, "form": "full"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_form_and_part_trains_resumes_and_is_written(run, folder, changes):
    whole, _ = run(output=str(folder / "whole"), **changes)
    should_stop, listener = stop_after(1)
    run(should_stop=should_stop, listener=listener, **changes)
    result, _ = run(resume=True, **changes)
    assert same(*(weights(checkpoint_path(folder / name, 4)) for name in ("whole", "run")))
    if changes.get("form") != "full":
        (left, metadata), (right, _) = (read_domain_file(one.path) for one in (whole, result))
        assert same(left, right) and metadata.null_text == changes.get("form", "cached")
        assert bool(metadata.null_text_error) == (changes.get("form") == "constant")


def test_v_prediction(run, base):
    result, _ = run(base=replace(base, prediction_type="v_prediction"), steps=2)
    _, metadata = read_domain_file(result.path)
    assert metadata.prediction_type == "v_prediction"


def test_what_is_written_for_tensorboard(run, folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tensorboard=True, steps=2, sample_every=2, validate_every=1)
    written = EventAccumulator(str(folder / "run" / "tensorboard"))
    written.Reload()
    assert [one.step for one in written.Scalars("train/loss")] == [1, 2]
    assert [one.step for one in written.Scalars("held_out/loss")] == [0, 1, 2]
    assert [one.step for one in written.Images("samples")] == [0, 2]


def test_it_trains_in_inference_mode(run):
    """As ComfyUI calls its nodes."""
    with torch.inference_mode():
        assert run(steps=1)[0].status == "finished"


# ------------------------------------------------------------------------------------- refused before anything is done


def refused(run, folder, message, **changes):
    """Both the dry run and the run refuse, and neither reads an image nor leaves a run behind."""
    for dry_run in (True, False):
        seen = []
        with pytest.raises(ConfigProblem, match=message):
            run(dry_run=dry_run, listener=seen.append, **changes)
        assert Preparing not in kinds(seen) and not (folder / "cache").exists(), dry_run
        assert not (folder / "run" / "checkpoints").exists()


def test_a_run_among_its_images_is_refused(run, folder):
    """It would learn its own sample grids when it goes on."""
    before = sorted(path.name for path in (folder / "images").iterdir())
    refused(run, folder, "output: expected a folder of the run's own", output=str(folder / "images"))
    refused(run, folder, "output: expected", output=str(folder / "images"), data=(str(folder / "ima*"),))
    assert sorted(path.name for path in (folder / "images").iterdir()) == before
    assert run(output=str(folder / "images" / "run"), steps=1)[0].status == "finished"


@pytest.mark.parametrize("package", [None, ModuleType("bitsandbytes")])  # not there; there, and broken
def test_an_optimizer_that_is_not_installed_is_refused_before_images_are_encoded(run, folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    refused(run, folder, "optimizer: adamw8bit needs the package bitsandbytes", optimizer="adamw8bit")


def test_a_run_that_no_memory_holds_is_refused_by_what_is_to_blame(run, folder, monkeypatch):
    for available, message in (
        (2**20, "needs about .* with batch_size 2 .*whatever the batch: try train self_attention or low_rank"),
        (2**26, "needs about .* with batch_size 4096 .* available: try gradient_checkpointing, batch_size 1"),
    ):
        monkeypatch.setattr(
            "indomain_guidance.training.domain.estimate.free_bytes", lambda device, bytes=available: bytes
        )
        batch = 2 if available == 2**20 else 4096
        refused(run, folder, message, batch_size=batch)


# ---- refusals, and other numbers of steps ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": ("nowhere",)}, "nowhere"),
        ({"resume": True}, "expected a checkpoint to go on from"),
        ({"form": "full", "caption": "a circle"}, "prompt"),
        ({"base": None}, "tiny: expected"),
        ({"export_to": os.path.join(__file__, "below")}, "export_to: expected a folder, found .*test_train.py"),
        ({"min_side": 8000}, "image"),
    ],
)
def test_a_refused_run_leaves_no_folder(run, folder, changes, message):
    before = sorted(path.name for path in folder.rglob("*") if "cache" not in path.parts)
    with pytest.raises(Problem, match=message):
        run(**{"output": str(folder / "runs" / "new"), **changes})
    assert sorted(path.name for path in folder.rglob("*") if "cache" not in path.parts) == before
    (folder / "runs" / "new").mkdir(parents=True)
    (folder / "runs" / "new" / "config.json").write_text("of somebody")
    with pytest.raises(Problem, match=message):
        run(**{"output": str(folder / "runs" / "new"), **changes})
    if "min_side" not in changes:  # which is found out once the run has begun to read
        assert (folder / "runs" / "new" / "config.json").read_text() == "of somebody"
    assert (folder / "runs" / "new").is_dir()


def test_a_run_that_memory_cannot_hold_leaves_no_folder(run, folder, monkeypatch):
    monkeypatch.setattr("indomain_guidance.training.domain.estimate.free_bytes", lambda device: 2**20)
    with pytest.raises(Problem, match="fits into memory"):
        run(output=str(folder / "runs" / "new"))
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("start", [3, torch.zeros(3), {"constants": 0.5}, {"null_text_error": {"a": "x"}}])
def test_what_a_run_began_with_is_checked(start):
    with pytest.raises(FileProblem, match="a.ckpt: expected a checkpoint of this trainer, found other"):
        _begun({"start": start}, "a.ckpt")


def test_what_others_put_into_a_refused_runs_folder_stays(run, folder):
    cache = folder / "run" / "cache"

    def listener(event):
        if isinstance(event, Started):
            cache.mkdir()
            (cache / "latents").write_text("hours of work")

    with pytest.raises(Problem, match="image"):
        run(min_side=8000, listener=listener)
    assert sorted(path.name for path in (folder / "run").iterdir()) == [".lock", "cache"]


def test_a_run_that_failed_in_its_first_step_keeps_its_log(run, folder, monkeypatch):
    real = DomainLearner._losses
    monkeypatch.setattr(DomainLearner, "_losses", lambda self, one: real(self, one) * math.nan)
    with pytest.raises(NonFiniteLoss):
        run()
    assert isinstance(read_log(folder / "run" / "log.jsonl")[-1], Failed)


@pytest.mark.parametrize("schedule, warned", [("cosine", True), ("linear", True), ("constant", False)])
def test_another_number_of_steps_is_told_with_both_rates_before_the_first(run, schedule, warned):
    _, events = run(steps=6, schedule=schedule, learning_rate=4e-4)
    last = [event.rate for event in events if isinstance(event, Step)][-1]
    for dry_run in (True, False):
        result, events = run(steps=12, schedule=schedule, learning_rate=4e-4, dry_run=dry_run)
        told = [event.text for event in events if isinstance(event, Warned) and "learning rate was" in event.text]
        assert len(told) == warned
    rates = [event.rate for event in events if isinstance(event, Step)]
    assert result.step == 12 and len(rates) == 6 and (rates[0] != last) == warned
    if warned:
        assert kinds(events).index(Warned) < kinds(events).index(Step)
        assert "steps was 6 and is 12" in told[0]
        assert (
            f"the learning rate was {last:.3g} and is {rates[0]:.3g}" in told[0] and "from step 6 to step 7" in told[0]
        )


def test_the_same_number_of_steps_is_told_nothing(run):
    should_stop, listener = stop_after(3)
    run(steps=6, schedule="cosine", should_stop=should_stop, listener=listener)
    _, events = run(steps=6, schedule="cosine")
    assert not [event for event in events if isinstance(event, Warned) and "learning rate" in event.text]
