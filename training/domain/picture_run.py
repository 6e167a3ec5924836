"""What runs that learn from pictures share: where these come from, what is told of them, the held-out ones."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ..data.latent_dataset import LatentDataset
from ..data.patterns import expanded
from ..data.preparing import Callbacks, open_dataset
from ..data.problems import Cancelled, DataProblem
from ..data.sources import find_images
from ..data.walking import Watch
from ..engine.events import LOSS, Event, Listener, Preparing, Validated
from ..engine.memory import is_memory_problem
from ..engine.processes import check_batch
from ..engine.reports import Report
from ..engine.run import Run
from ..engine.settings import ConfigProblem
from ..engine.tracing import size_text
from ..prior.prior import ImageSize, Prior
from .estimate import Estimate
from .picture_settings import PictureSettings
from .trainee import Trainee

if TYPE_CHECKING:
    from PIL.Image import Image

    from ...guidance.networks.unet import UNet

HOPELESS = 2.0  # times the memory there is; estimates are within a factor of 1.5
SMALL = 0.75  # of the side in pixels that the prior was made for
Images = Sequence[Tensor] | Tensor | None
Pictured = TypeVar("Pictured", bound=PictureSettings)
# (UNet with the averaged weights, latents, what SDXL is told of each, what stands for each) -> (mean, by timestep).
Measure = Callable[["UNet", list[Tensor], list[ImageSize], list[str]], tuple[float, dict[int, float]]]


class PictureRun(Run[Pictured], ABC):
    """A run of a trainee on pictures. prior: an opened one instead of the settings'; images: beside their folders."""

    prior: Prior
    trainee: Trainee
    learner: Any  # the kind of run says which
    needs: Estimate | None = None  # known in the first process

    def __init__(
        self, config: Pictured, listener: Listener, should_stop: Callable[[], bool], prior: Prior | None, images: Images
    ) -> None:
        super().__init__(config, listener, should_stop)
        self.given, self.images = prior, images

    def check(self) -> None:
        check_batch(self.config.batch_size, self.processes.world)
        for folder in self.config.data:
            # Nothing there, or somebody asked to stop: told when images are looked for.
            with suppress(DataProblem, Cancelled):
                if os.path.realpath(self.folder) in map(os.path.realpath, expanded(folder, self._watch())):
                    raise ConfigProblem(
                        f"output: expected a folder of the run's own, found {self.folder}, the folder of images, which "
                        "would learn its own sample grids; choose another output."
                    )

    def _watch(self) -> Watch:
        return Watch(self.should_stop, self.config.within or None)

    def settle(self, state: Mapping[str, Any] | None) -> None:
        super().settle(state)
        if not self.config.validate_every:
            # Nobody looks at them: a new run learns from all images, one that goes on from those of before.
            share = 0.0 if state is None else type(self.config).from_mapping(state["config"]).held_out_share
            self.config = self.config.with_changes(held_out_share=share)

    def count_images(self) -> int:
        """How many there are before any is read; fewer where somebody asks to stop. Raises DataProblem for none."""
        given, count = [self.images] if isinstance(self.images, Tensor) else self.images or (), 0
        with suppress(Cancelled):
            count = len(find_images(self.config.data, self._watch())) if self.config.data else 0
        return count + sum(len(batch) if batch.ndim == 4 else 1 for batch in given)

    def remark(self, start: int) -> None:
        config, needs, native = self.config, self.needs, self.prior.native_resolution
        if start >= config.steps or needs is None:
            return
        if self.prior.zero_snr and config.min_snr_gamma:
            self.warn(
                "min_snr_gamma gives the last, image-free noise level of a zero-SNR model next to no weight: the "
                "overall brightness is learned from the levels before it; 0 weighs all levels alike."
            )
        if native is not None and config.resolution < SMALL * native:
            self.warn(
                f"{self.prior.name} was made for images of {native} px, and this run learns them at "
                f"{config.resolution} px, where its pictures are poor; set resolution to {native} unless that is meant."
            )
        too_much = needs.available is not None and needs.peak > HOPELESS * needs.available
        if too_much and self.processes.device.type == "cpu":
            # Other devices say that memory ran out; here the system would kill the process, and whatever else it holds
            # (ComfyUI), without a word.
            raise ConfigProblem(
                f"Expected a run that fits into memory, found that it needs about {size_text(needs.peak)} with "
                f"batch_size {config.batch_size} at resolution {config.resolution}. {needs.advice}"
            )

    def open_pictures(self) -> LatentDataset | None:
        """The images as latents, in every process; None when somebody asked to stop meanwhile."""
        dataset = None
        callbacks = Callbacks(
            progress=lambda done, total: self.tell(Preparing("encoding images", done, total)),
            should_stop=self.should_stop,
            warn=self.warn,
        )
        try:
            with self.prior.autoencoder_on(self.processes.device), suppress(Cancelled):
                turns = {"turn": self.processes.rank, "turns": self.processes.world}
                dataset = open_dataset(self.config, self.prior, self.images, callbacks, **turns)
        except (RuntimeError, MemoryError) as problem:
            if not is_memory_problem(problem):
                raise
            # The traceback holds the pictures that did not fit.
            raise DataProblem(
                f"Encoding the images ran out of memory at {self.config.resolution} px; set caching_batch to 1 (it "
                "counts on GPUs alone), close other programs that use the device, or train at a lower resolution."
            ) from problem.with_traceback(None)
        if self.processes.anywhere(dataset is None) or dataset is None:
            return None
        for note in dataset.notes:
            self.warn(note)
        return dataset

    # ---- what is reported

    @property
    def batch(self) -> int:
        """What this process has memory for."""
        return max(1, self.config.batch_size // self.processes.world)

    def held_out_report(self, held_out: LatentDataset | None, measure: Measure, what: str = LOSS) -> Report:
        """A report of what `measure` finds on held-out images, with the averaged weights; what: the number's name."""
        count, factor = 0 if held_out is None or not self.config.validate_every else len(held_out), self.prior.factor
        latents, sizes, keys = [], [], []
        for index in range(count if self.processes.is_main else 0):
            assert held_out is not None
            latents.append(held_out.mean(index))
            pixels = (latents[-1].shape[-2] * factor, latents[-1].shape[-1] * factor)
            sizes.append(ImageSize(*held_out.size_of(index), pixels))
            keys.append(held_out.content_of(index))

        def validate(step: int) -> Event | None:
            with self.trainee.using(self.learner.values()) as unet:
                mean, levels = measure(unet, latents, sizes, keys)
            return Validated(step, mean, {str(t): value for t, value in levels.items()}, what) if levels else None

        return Report(self.config.validate_every if count else 0, validate, lambda step: step in self.curve.held_out)

    def grid_report(self, draw: Callable[[UNet, str], Image | None]) -> Report:
        """A report of grids that `draw` makes of a UNet with the averaged weights, under a title."""

        def at(step: int) -> Image | None:
            with self.trainee.using(self.learner.values()) as unet:
                return draw(unet, f"{self.config.name}, step {step}")

        return self.sample_report(at)
