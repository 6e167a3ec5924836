"""The learner of a domain model: a UNet, images as latents, and the denoising loss.

What a step draws comes from `BatchPlan` and per-sample generators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...guidance.diffusion import PREDICTION_TYPES, NoiseSchedule
from ...guidance.errors import Problem
from ...guidance.files import DTYPES
from ...guidance.networks.unet import UNet
from ..data.latent_dataset import LatentDataset, Sample
from ..data.problems import BadImage, DataProblem
from ..engine.learner import Learner
from ..engine.optimizers import build_optimizer
from ..engine.processes import OneProcess, check_batch
from ..engine.randomness import BatchPlan, Draw
from ..engine.settings import ConfigProblem
from ..prior.prior import ImageSize
from ..prior.same_prior import check_same_prior
from .config import TrainConfig
from .losses import abar_at, add_noise, draw_noise, draw_timestep, min_snr_weight, sample_losses, target_of


@dataclass(frozen=True)
class Pass:
    """What one forward pass of this process sees, on the CPU."""

    latents: Tensor  # [B, C, h, w]
    noise: Tensor  # [B, C, h, w]
    timesteps: Tensor  # [B]
    conditioning: dict[str, Tensor]


class DomainLearner(Learner[TrainConfig]):
    """Trains those parameters of `unet` that require gradients, on `dataset`, from step 0 or from a loaded state.

    schedule, prediction_type: the prior's noise. conditioning(sizes) -> what the UNet takes beside x and t (`context`,
    `y`) for images of these sizes; None: nothing. prior: content hash of the prior, traits: its other parts
    (`prior_traits`), both kept with the state. The UNet is moved to the processes' device. Raises ConfigProblem for
    batches that cannot be split over the processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        unet: nn.Module,
        dataset: LatentDataset,
        schedule: NoiseSchedule,
        prediction_type: str,
        conditioning: Callable[[Sequence[ImageSize]], dict[str, Tensor]] | None = None,
        *,
        prior: str = "",
        traits: Mapping[str, Any] | None = None,
        processes: OneProcess | None = None,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise Problem(f"Prediction type must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")
        processes = processes or OneProcess(config.device)
        check_batch(config.batch_size, processes.world)
        check_same_images(dataset, processes)
        self.dataset, self.schedule, self.prediction_type = dataset, schedule, prediction_type
        self.conditioning = conditioning or (lambda sizes: {})
        self.prior, self.traits = prior, dict(traits or {})
        self.plan = BatchPlan(config.seed, list(dataset.groups.values()), config.batch_size, config.accumulation)
        self.unet = unet.to(processes.device).train()
        if isinstance(self.unet, UNet):
            self.unet.gradient_checkpointing = config.gradient_checkpointing
        parameters = {name: weight for name, weight in self.unet.named_parameters() if weight.requires_grad}
        if not parameters:
            raise Problem("Learner: expected a UNet with parameters that require gradients, found none.")
        optimizer = build_optimizer(config, parameters.values(), config.optimizer, config.weight_decay)
        super().__init__(config, parameters, optimizer, processes, scaled=config.precision == "fp16")
        self.dtype = DTYPES[config.precision if config.precision != "auto" else "fp32"]
        self._model = processes.wrap(self.unet)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[list[Pass]]] | None = None

    def close(self) -> None:
        """Let the loading thread go."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    # ---- one step

    def backward(self) -> Tensor:
        return self.backward_over(self._passes(self.step), self._losses, self._model, self.config.global_batch)

    def share_gradients(self) -> None:
        """Nothing to do: DistributedDataParallel shares them in the backward pass."""

    def names_at(self, step: int) -> list[str]:
        return [self.dataset.name_of(draw.index) for draw in self.plan.batch_for(step)]

    def _losses(self, batch: Pass) -> Tensor:
        """Weighted loss of each sample of a pass [B]."""
        latents, noise = (part.to(self.device, non_blocking=True) for part in (batch.latents, batch.noise))
        timesteps = batch.timesteps.to(self.device)
        conditioning = {name: value.to(self.device) for name, value in batch.conditioning.items()}
        abar = abar_at(self.schedule, timesteps)
        noisy = add_noise(latents, noise, abar)
        half = torch.autocast(self.device.type, self.dtype) if self.dtype is not torch.float32 else nullcontext()
        with half:
            output = self._model(noisy, timesteps, **conditioning)
        weight = min_snr_weight(self.prediction_type, abar, self.config.min_snr_gamma)
        return sample_losses(output, target_of(self.prediction_type, latents, noise, abar), weight)

    def _passes(self, step: int) -> list[Pass]:
        """The passes of a step; those of the next one are loaded while this one computes."""
        ahead, self._ahead = self._ahead, None
        passes = ahead[1].result() if ahead is not None and ahead[0] == step else self._load_passes(step)
        if step + 1 < self.config.steps:
            self._ahead = (step + 1, self._loader.submit(self._load_passes, step + 1))
        return passes

    def _load_passes(self, step: int) -> list[Pass]:
        size, share = self.config.batch_size, self.config.batch_size // self.processes.world
        draws, first = self.plan.batch_for(step), self.processes.rank * share
        return [self._load_pass(draws[start + first : start + first + share]) for start in range(0, len(draws), size)]

    def _load_pass(self, draws: Sequence[Draw]) -> Pass:
        config, latents, noise, timesteps, sizes = self.config, [], [], [], []
        for draw in draws:
            sample = drawn(self.dataset, draw.index, draw.generator(config.seed, "data"))
            generator = draw.generator(config.seed, "noise")
            timesteps.append(draw_timestep(generator, len(self.schedule), config.noisy_share))
            noise.append(draw_noise(generator, tuple(sample.latent.shape), config.noise_offset))
            latents.append(sample.latent.float())
            sizes.append(ImageSize(sample.original, sample.crop, sample.size))
        return Pass(torch.stack(latents), torch.stack(noise), torch.tensor(timesteps), self.conditioning(sizes))

    # ---- what there is to keep

    def own_state(self) -> dict[str, Any]:
        return {"prior": self.prior, "traits": self.traits, "dataset": dataset_state(self.dataset)}

    def check_own_state(self, state: Mapping[str, Any], source: str) -> list[str]:
        """As `Learner.check_own_state`: another prior, VAE, noise or text is refused, other images are a warning.

        Also refused: other images when no step is left to learn them.
        """
        if state["prior"] != self.prior:
            raise ConfigProblem(
                f"{source}: expected a run from the same prior, found one from another checkpoint (content "
                f"{state['prior'][:12] or 'unknown'} instead of {self.prior[:12] or 'unknown'}); use that one."
            )
        warnings = check_same_prior(self.traits, state.get("traits") or {}, source)
        is_finished = int(state["step"]) >= self.config.steps
        return warnings + check_dataset(state["dataset"], self.dataset, is_finished, source)


# ---- the images, of every kind of run that learns from some


def check_same_images(dataset: LatentDataset, processes: OneProcess) -> None:
    """Raise DataProblem where the processes have different images.

    Each has read them by itself; other numbering in one would mix batches up without a word.
    """
    if len(set(processes.each(int(dataset.content_hash[:12], 16)))) > 1:
        raise DataProblem(
            f"Expected all {processes.world} processes to train on the same images, found "
            f"{' and '.join(map(str, processes.each(len(dataset))))} images with different content; see that "
            "all can read the same files, and start again."
        )


def drawn(dataset: LatentDataset, index: int, generator: torch.Generator) -> Sample:
    """`LatentDataset.draw`, whose errors name the image: it was good when the run began. Raises DataProblem."""
    try:
        return dataset.draw(index, generator)
    except BadImage as problem:
        name = dataset.name_of(index)
        told = str(problem) if name in str(problem) else f"{name}: {problem}"
        raise DataProblem(told) from problem


def dataset_state(dataset: LatentDataset) -> dict[str, Any]:
    """What a checkpoint says about the images."""
    return {"hash": dataset.content_hash, "images": len(dataset)}


def check_dataset(before: Mapping[str, Any], dataset: LatentDataset, is_finished: bool, source: str) -> list[str]:
    """Other images than those of `dataset_state` in `source`, as a warning; refused when no step is left for them."""
    if before["hash"] == dataset.content_hash:
        return []
    changed = f"({before['images']} then, now {len(dataset)})"
    if is_finished:
        # Its finished file would claim to have learned images that it never saw.
        raise ConfigProblem(
            f"{source}: expected the images that this run learned, found that it is finished and they changed "
            f"since {changed}; raise steps to learn those of now too, choose another name for a new run, or "
            "bring the earlier ones back."
        )
    return [
        f"the images changed since {source} was written {changed}; the run goes on with those of now, and its "
        "weights will differ from an uninterrupted run's."
    ]
