"""The learner: a UNet, images as latents, and one optimizer step after the other.

A step is a pure function of (configuration, dataset, step, state): what it draws comes from `BatchPlan` and per-sample
generators, so a run that was killed and resumed repeats the very same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from ...guidance.diffusion import PREDICTION_TYPES, NoiseSchedule
from ...guidance.errors import Problem
from ...guidance.files import DTYPES
from ..data import BadImage, DataProblem, Sample
from ..engine.average import WeightAverage
from ..engine.checkpoints import machine_facts
from ..engine.engine import NonFiniteLoss, Outcome, check_same_run, take_over, warn_of_other_facts
from ..engine.optimizers import build_optimizer, rate_at, set_rate
from ..engine.processes import OneProcess, check_batch
from ..engine.randomness import Batch, BatchPlan, Draw
from ..engine.settings import ConfigProblem
from ..prior.prior import ImageSize
from ..prior.same_prior import check_same_prior
from .config import TrainConfig
from .losses import abar_at, add_noise, draw_noise, draw_timestep, min_snr_weight, sample_losses, target_of

# A loss scale this small means that fp16 overflows whatever the scale.
SMALLEST_SCALE = 2.0**-14


class LatentSource(Protocol):
    """What the learner needs of a dataset; `data.LatentDataset` is one."""

    content_hash: str

    def __len__(self) -> int: ...

    @property
    def groups(self) -> Mapping[tuple[int, int], Sequence[int]]: ...

    def draw(self, index: int, generator: Generator) -> Sample: ...

    def name_of(self, index: int) -> str: ...


@dataclass(frozen=True)
class Pass:
    """What one forward pass of this process sees, on the CPU."""

    latents: Tensor  # [B, C, h, w]
    noise: Tensor  # [B, C, h, w]
    timesteps: Tensor  # [B]
    conditioning: dict[str, Tensor]


class Learner:
    """Trains those parameters of `unet` that require gradients, on `dataset`, from step 0 or from a loaded state.

    schedule, prediction_type: the prior's noise. conditioning(sizes) -> what the UNet takes beside x and t (`context`,
    `y`) for images of these sizes; None: nothing. prior: content hash of the prior, traits: its other parts
    (`prior_traits`), both kept with the state. The UNet is moved to the processes' device. Raises ConfigProblem for
    batches that cannot be split over the processes.

    intact: False while weights, average and step do not belong together, for who wants to save after an exception.
    """

    def __init__(
        self,
        config: TrainConfig,
        unet: nn.Module,
        dataset: LatentSource,
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
        self.processes = processes or OneProcess(config.device)
        check_batch(config.batch_size, self.processes.world)
        # Each process has read the images by itself; other numbering in one would mix batches up without a word.
        if len(set(self.processes.each(int(dataset.content_hash[:12], 16)))) > 1:
            raise DataProblem(
                f"Expected all {self.processes.world} processes to train on the same images, found "
                f"{' and '.join(map(str, self.processes.each(len(dataset))))} images with different content; see that "
                "all can read the same files, and start again."
            )
        self.config, self.dataset, self.schedule, self.prediction_type = config, dataset, schedule, prediction_type
        self.conditioning = conditioning or (lambda sizes: {})
        self.prior, self.traits, self.step, self.intact = prior, dict(traits or {}), 0, True
        self.plan = BatchPlan(config.seed, list(dataset.groups.values()), config.batch_size, config.accumulation)
        self.device = self.processes.device
        self.unet = unet.to(self.device).train()
        if hasattr(self.unet, "gradient_checkpointing"):
            self.unet.gradient_checkpointing = config.gradient_checkpointing
        self.parameters = {name: one for name, one in self.unet.named_parameters() if one.requires_grad}
        if not self.parameters:
            raise Problem("Learner: expected a UNet with parameters that require gradients, found none.")
        self.optimizer = build_optimizer(config, self.parameters.values())
        self.average = WeightAverage(self.parameters, config.ema) if config.ema else None
        precision = config.precision if config.precision != "auto" else "fp32"
        self.dtype = DTYPES[precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._model = self.processes.wrap(self.unet)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[list[Pass]]] | None = None

    def close(self) -> None:
        """Let the loading thread go."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Learner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def values(self) -> dict[str, Tensor]:
        """What a finished model would hold, by parameter name: the average where one is kept, else the weights."""
        if self.average is not None:
            return self.average.average
        return {name: one.detach() for name, one in self.parameters.items()}

    def take_step(self, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """One optimizer step. should_stop is asked once and shared, so that all processes stop after the same step.

        Raises NonFiniteLoss before anything is changed.
        """
        config, rate = self.config, rate_at(self.config, self.step)
        passes = self._passes(self.step)
        set_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, device=self.device)
        for number, one in enumerate(passes):
            last = number == len(passes) - 1
            with nullcontext() if last else self.processes.accumulating(self._model):
                loss = self._losses(one).sum() / config.global_batch
                # Several processes average their gradients: times their number that is the sum.
                self.scaler.scale(loss * self.processes.world).backward()
            sums[0] += loss.detach()
        sums[1] = float(should_stop())
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.parameters.values())
        norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
        total = self.processes.total(sums)
        loss, stop, norm = torch.stack([total[0], total[1], norm.float()]).tolist()  # one wait for the device
        # A finite loss with an infinite gradient is what the scaler is for: it skips the step and lowers its scale.
        skipped = self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
        if not math.isfinite(loss) or not (math.isfinite(norm) or skipped and self.scaler.get_scale() > SMALLEST_SCALE):
            what = "the loss" if not math.isfinite(loss) else "the gradient"
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteLoss(what, self.step + 1, self.names_at(self.step))
        self.intact = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and not skipped:
            self.average.update()
        self.step += 1
        self.intact = True
        self.optimizer.zero_grad(set_to_none=True)  # grids and checkpoints, which may come now, have no use for them
        return Outcome(self.step, loss, norm, rate, bool(stop))

    def names(self, batch: Batch) -> list[str]:
        """The images of a batch, for messages."""
        return [self.dataset.name_of(index) for index in batch.indices]

    def names_at(self, step: int) -> list[str]:
        """The images of the batch of optimizer step `step`, counted from 0."""
        return self.names(self.plan.batch_for(step))

    def has_finite_weights(self) -> bool:
        """Whether the trained weights and their average are free of NaN and infinity."""
        tensors = [one.detach() for one in self.parameters.values()]
        tensors += list(self.average.average.values()) if self.average is not None else []
        return all(bool(one.isfinite().all()) for one in tensors)

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit (see `load`)."""
        epoch, position = self.plan.place(self.step)
        return {
            "step": self.step,
            "config": self.config.to_dict(),
            "prior": self.prior,
            "traits": self.traits,
            "dataset": {"hash": self.dataset.content_hash, "images": len(self.dataset)},
            "position": {"epoch": epoch, "batch": position},
            "schedule": {"rate": rate_at(self.config, self.step)},
            "facts": self.facts(),
            "weights": {name: one.detach() for name, one in self.parameters.items()},
            "average": None if self.average is None else self.average.state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
        }

    def facts(self) -> dict[str, str]:
        """`machine_facts` of this run, and the precision it computes in."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {**machine_facts(self.device, self.processes.world), "precision": names[self.dtype]}

    def load(self, state: Mapping[str, Any], source: str = "checkpoint") -> list[str]:
        """Go on from a state; returns what makes the continuation other than bit-identical, as warnings.

        Raises ConfigProblem when the state belongs to another configuration, prior, VAE, noise or text, and when no
        step is left to learn images that changed.
        """
        check_same_run(self.config, state, source)
        if state["prior"] != self.prior:
            raise ConfigProblem(
                f"{source}: expected a run from the same prior, found one from another checkpoint (content "
                f"{state['prior'][:12] or 'unknown'} instead of {self.prior[:12] or 'unknown'}); use that one."
            )
        warnings = check_same_prior(self.traits, state.get("traits") or {}, source)
        if state["dataset"]["hash"] != self.dataset.content_hash:
            changed = f"({state['dataset']['images']} then, now {len(self.dataset)})"
            if int(state["step"]) >= self.config.steps:
                # Its finished file would claim to have learned images that it never saw.
                raise ConfigProblem(
                    f"{source}: expected the images that this run learned, found that it is finished and they changed "
                    f"since {changed}; raise steps to learn those of now too, choose another name for a new run, or "
                    "bring the earlier ones back."
                )
            warnings.append(
                f"the images changed since {source} was written {changed}; the run goes on with those of now, and its "
                "weights will differ from an uninterrupted run's."
            )
        warnings += warn_of_other_facts(state, self.facts(), source)
        self.intact = False
        take_over(state, source, self.parameters, self.optimizer, self.average)
        if self.scaler.is_enabled() and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step = int(state["step"])
        self.intact = True
        return warnings

    def _losses(self, one: Pass) -> Tensor:
        """Weighted loss of each sample of a pass [B]."""
        latents, noise = (part.to(self.device, non_blocking=True) for part in (one.latents, one.noise))
        timesteps = one.timesteps.to(self.device)
        conditioning = {name: value.to(self.device) for name, value in one.conditioning.items()}
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
        passes = ahead[1].result() if ahead is not None and ahead[0] == step else self._load(step)
        if step + 1 < self.config.steps:
            self._ahead = (step + 1, self._loader.submit(self._load, step + 1))
        return passes

    def _load(self, step: int) -> list[Pass]:
        size, share = self.config.batch_size, self.config.batch_size // self.processes.world
        draws, first = self.plan.batch_for(step).draws, self.processes.rank * share
        return [self._load_pass(draws[start + first : start + first + share]) for start in range(0, len(draws), size)]

    def _load_pass(self, draws: Sequence[Draw]) -> Pass:
        config, latents, noise, timesteps, sizes = self.config, [], [], [], []
        for draw in draws:
            try:
                sample = self.dataset.draw(draw.index, draw.generator(config.seed, "data"))
            except BadImage as problem:  # it was good when the run began; its reason alone names no file
                name = self.dataset.name_of(draw.index)
                told = str(problem) if name in str(problem) else f"{name}: {problem}"
                raise DataProblem(told) from problem
            generator = draw.generator(config.seed, "noise")
            timesteps.append(draw_timestep(generator, len(self.schedule), config.noisy_share))
            noise.append(draw_noise(generator, tuple(sample.latent.shape), config.noise_offset))
            latents.append(sample.latent.float())
            sizes.append(ImageSize(sample.original, sample.crop, sample.size))
        return Pass(torch.stack(latents), torch.stack(noise), torch.tensor(timesteps), self.conditioning(sizes))
