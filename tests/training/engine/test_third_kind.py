"""A kind of run that the engine has never heard of: a mosaic of a few colours is fitted to a picture.

This is all that a new kind of run needs: its settings, its learner and its run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from indomain_guidance.guidance.files.atomic import replacing
from indomain_guidance.training.engine.checkpoints import find_checkpoints, latest_checkpoint
from indomain_guidance.training.engine.events import Finished, Sampled, Saved, Started, Step, Stopped, describe
from indomain_guidance.training.engine.folder import has_saved
from indomain_guidance.training.engine.grids import grid
from indomain_guidance.training.engine.learner import Learner, NonFiniteLoss
from indomain_guidance.training.engine.log import read_log
from indomain_guidance.training.engine.memory import memory_problem
from indomain_guidance.training.engine.optimizers import build_optimizer
from indomain_guidance.training.engine.processes import OneProcess
from indomain_guidance.training.engine.randomness import sample_generator
from indomain_guidance.training.engine.reports import Report
from indomain_guidance.training.engine.run import Run
from indomain_guidance.training.engine.run_settings import RunSettings
from indomain_guidance.training.engine.settings import ConfigProblem, changed, option
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class MosaicConfig(RunSettings):
    """Which picture, and of how many tiles."""

    kind: ClassVar[str] = "mosaic"
    command: ClassVar[str] = "indomain mosaic"
    required: ClassVar[dict[str, tuple[str, str]]] = {"picture": ("a PNG file", "the picture to copy")}

    picture: str = option("", "what", "the picture to copy", path=True, model=True, free=True)
    tiles: int = option(4, "what", "tiles along each side", min=1, max=64)
    steps: int = changed(RunSettings, "steps", 12)
    learning_rate: float = changed(RunSettings, "learning_rate", 0.1)

    @property
    def memory_advice(self) -> str:
        return f"The mosaic of {self.tiles} tiles did not fit into memory; use fewer tiles."


class MosaicLearner(Learner[MosaicConfig]):
    """Colours [1, 3, tiles, tiles] that learn to look like `target` [1, 3, H, W] in 0..1, at a few pixels a step."""

    def __init__(self, config: MosaicConfig, target: Tensor, processes: OneProcess) -> None:
        colours = nn.Parameter(torch.full((1, 3, config.tiles, config.tiles), 0.5))
        super().__init__(config, {"colours": colours}, build_optimizer(config, [colours]), processes)
        self.colours, self.target = colours, target

    def picture(self, colours: Tensor) -> Tensor:
        return F.interpolate(colours, size=self.target.shape[-2:], mode="nearest")

    def backward(self) -> Tensor:
        drawn = sample_generator(self.config.seed, self.step, 0, "pixels")
        seen = torch.rand(self.target.shape[-2:], generator=drawn) < 0.5
        loss = (self.picture(self.colours) - self.target)[..., seen].square().mean()
        loss.backward()
        return loss

    def accept(self) -> Mapping[str, float]:
        return {"brightness": float(self.colours.detach().mean())}

    def own_state(self) -> dict[str, Any]:
        return {"picture": hashlib.sha256(self.target.numpy().tobytes()).hexdigest()}

    def check_own_state(self, state: Mapping[str, Any], source: str) -> list[str]:
        if state["picture"] != self.own_state()["picture"]:
            raise ConfigProblem(f"{source}: expected a mosaic of the same picture, found one of another.")
        return []


class MosaicRun(Run[MosaicConfig]):
    """One mosaic."""

    target: Tensor
    learner: MosaicLearner

    def open(self) -> Sequence[str]:
        with Image.open(self.config.picture) as image:
            values = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        self.target = torch.from_numpy(values).permute(2, 0, 1)[None].contiguous()
        return ["the picture is small"]

    def announce(self, start: int) -> tuple[int, str]:
        return 1, f"trains {3 * self.config.tiles**2} numbers"

    def make_learner(self, stack: ExitStack, state: Mapping[str, Any] | None) -> MosaicLearner:
        self.learner = MosaicLearner(self.config, self.target, self.processes)
        return self.learner

    def make_reports(self) -> list[Report]:
        def draw(step: int) -> Image.Image:
            picture = self.learner.picture(self.learner.values()["colours"])
            return grid([picture * 2 - 1], [f"step {step}"], ["mosaic"])

        return [self.sample_report(draw)]

    def write(self, places: Sequence[Path]) -> None:
        for place in places:
            with replacing(place) as file:
                file.write(save({"colours": self.learner.values()["colours"].contiguous()}))


@pytest.fixture
def mosaic(tmp_path):
    """Runs a mosaic in a folder of its name; (result, events). stop: the step after which it is asked to stop."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((16, 16), Image.Resampling.NEAREST).save(tmp_path / "picture.png")

    def run(name="mosaic", resume="auto", stop=None, dry_run=False, **changes):
        values = {
            "picture": str(tmp_path / "picture.png"),
            "name": name,
            "output": str(tmp_path / name),
            "device": "cpu",
            "checkpoint_every": 4,
            "sample_every": 6,
            "log_every": 1,
            **changes,
        }
        events: list[Any] = []
        asked = lambda: any(isinstance(event, Step) and event.step == stop for event in events)  # noqa: E731
        result = MosaicRun(MosaicConfig(**values), events.append, asked)(resume, dry_run)
        return result, events

    return run


def bits(folder):
    """The finished file's numbers and the last checkpoint's, as bytes."""
    _, state = latest_checkpoint(folder)
    (file,) = folder.glob("*.safetensors")
    moments = [
        value for own in state["optimizer"]["state"].values() for value in own.values() if isinstance(value, Tensor)
    ]
    tensors = [load_file(file)["colours"], *state["weights"].values(), *moments]
    return [tensor.numpy().tobytes() for tensor in tensors] + [state["average"]["average.colours"].numpy().tobytes()]


def test_it_learns_logs_saves_and_writes_its_file(mosaic, tmp_path):
    result, events = mosaic(export_to=str(tmp_path / "shared"))
    assert result.status == "finished" and result.path == tmp_path / "shared" / "mosaic.safetensors"
    assert load_file(result.path)["colours"].shape == (1, 3, 4, 4)
    steps = [event for event in events if isinstance(event, Step)]
    assert [event.step for event in steps] == list(range(1, 13)) and steps[-1].loss < steps[0].loss
    assert 0 < steps[-1].parts["brightness"] < 1
    assert [event.step for event in events if isinstance(event, Saved)] == [4, 8, 12]
    assert [event.step for event in events if isinstance(event, Sampled)] == [0, 6, 12]
    assert isinstance(events[-1], Finished) and result.samples.name == "step-000012.png" and result.plot.is_file()
    (started,) = [event for event in events if isinstance(event, Started)]
    assert describe(started) == f"mosaic starts in {result.run}: 1 images, 12 steps\ntrains 48 numbers"
    assert [type(event) for event in read_log(result.run / "log.jsonl")][-1] is Finished
    assert has_saved(result.run, result.path.stem)
    settings = MosaicConfig.read(result.run / "config.json")
    assert (settings.kind, settings.tiles, settings.precision) == ("mosaic", 4, "fp32")
    assert memory_problem(MemoryError(), settings) == "The mosaic of 4 tiles did not fit into memory; use fewer tiles."


def test_stopped_and_resumed_it_ends_with_the_same_bits(mosaic, tmp_path):
    mosaic("whole")
    stopped, events = mosaic("parts", stop=6)
    assert stopped.status == "stopped" and isinstance(events[-1], Stopped) and find_checkpoints(stopped.run)[-1][0] == 6
    resumed, events = mosaic("parts", resume=True)
    assert [event.step for event in events if isinstance(event, Step)] == list(range(7, 13))
    assert resumed.status == "finished" and bits(tmp_path / "whole") == bits(tmp_path / "parts")


def test_it_goes_on_only_with_what_it_began_with(mosaic, tmp_path):
    mosaic(stop=3)
    with pytest.raises(ConfigProblem, match="expected a run of the same configuration, but tiles was 4 and is 8"):
        mosaic(tiles=8)
    with pytest.raises(ConfigProblem, match="found its checkpoints"):
        mosaic(resume=False)
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.png")
    with pytest.raises(ConfigProblem, match="expected a mosaic of the same picture"):
        mosaic()
    with pytest.raises(ConfigProblem, match="kind: expected mosaic, .* found 'training'"):
        MosaicConfig.from_mapping({"kind": "training", "picture": "x"})


def test_numbers_that_are_not_finite_end_it_with_its_advice(mosaic, monkeypatch):
    backward = MosaicLearner.backward
    monkeypatch.setattr(MosaicLearner, "backward", lambda own: backward(own) * (float("nan") if own.step == 5 else 1))
    with pytest.raises(NonFiniteLoss, match=r"the loss became NaN .* at step 6; the last good weights, of step 5, .*"):
        mosaic()


def test_a_dry_run_and_a_refused_one_leave_nothing(mosaic, tmp_path):
    result, events = mosaic(dry_run=True)
    assert result.status == "dry_run" and not result.run.exists() and isinstance(events[-1], Started)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigProblem, match="export_to: expected a folder"):
        mosaic(export_to=str(tmp_path / "file"))
    assert not (tmp_path / "mosaic").exists()
