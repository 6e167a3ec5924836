"""The learner of a baking: the prior's UNet, which learns to predict what the guidance predicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...guidance.files import DTYPES
from ..domain.losses import abar_at, min_snr_weight, sample_losses
from ..domain.trainee import Trainee
from ..engine.learner import Learner
from ..engine.optimizers import build_optimizer
from ..engine.processes import OneProcess
from ..engine.settings import ConfigProblem
from ..prior.same_prior import check_same_prior, prior_traits
from .config import BakeConfig
from .states import Batch, States
from .teacher import Teacher


class BakeLearner(Learner[BakeConfig]):
    """Trains those parameters of a trainee that require gradients to match `teacher` on `states`."""

    def __init__(
        self, config: BakeConfig, trainee: Trainee, teacher: Teacher, states: States, processes: OneProcess
    ) -> None:
        self.trainee, self.teacher, self.states = trainee, teacher, states
        parameters = trainee.named_trainable()
        optimizer = build_optimizer(config, parameters.values(), weight_decay=config.weight_decay)
        super().__init__(config, parameters, optimizer, processes, scaled=config.precision == "fp16")
        self.dtype = DTYPES[config.precision]
        self._model = processes.wrap(trainee.unet)

    def backward(self) -> Tensor:
        batches, total = self.states.batches(self.step), torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.processes.accumulating(self._model):
                loss = self._losses(batch).sum() / self.config.batch_size
                # Several processes average their gradients: times their number that is the sum.
                self.scaler.scale(loss * self.processes.world).backward()
            total += loss.detach()
        return total

    def share_gradients(self) -> None:
        """Nothing to do: DistributedDataParallel shares them in the backward pass."""

    def _losses(self, batch: Batch) -> Tensor:
        """Weighted squared distance to the teacher's output of each latent of a batch [B]."""
        noisy, timesteps = batch.noisy.to(self.device), batch.timesteps.to(self.device)
        empty, prompted = self.conditionings(batch)
        target = self.teacher.target(noisy, timesteps, empty, prompted, batch.sizes)
        half = torch.autocast(self.device.type, self.dtype) if self.dtype is not torch.float32 else nullcontext()
        with half:
            output = self._model(noisy, timesteps, **prompted)
        abar = abar_at(self.teacher.prior.schedule, timesteps)
        weight = min_snr_weight(self.teacher.prior.prediction_type, abar, self.config.min_snr_gamma)
        return sample_losses(output, target, weight)

    def conditionings(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the prior takes for a batch at the empty prompt and at each latent's own; one object where all agree."""
        texts = self.states.texts
        empty = texts.conditioning(batch.sizes, torch.zeros_like(batch.places), self.device)
        if not bool(batch.places.any()):
            return empty, empty
        return empty, texts.conditioning(batch.sizes, batch.places, self.device)

    # ---- what there is to keep

    def own_state(self) -> dict[str, Any]:
        prior, dataset = self.teacher.prior, self.states.dataset
        return {
            "prior": prior.prior_hash,
            "traits": prior_traits(prior, None),
            "guidance": json.dumps([term.facts for term in self.teacher.terms], sort_keys=True),
            "prompts": hashlib.sha256(repr(self.states.prompts).encode()).hexdigest(),
            "dataset": "" if dataset is None else dataset.content_hash,
        }

    def check_own_state(self, state: Mapping[str, Any], source: str) -> list[str]:
        """As `Learner.check_own_state`: another prior, guidance or prompts are refused, other pictures warned of."""
        own = self.own_state()
        for name, what in {"prior": "prior", "guidance": "domain model and terms", "prompts": "prompts"}.items():
            if state[name] != own[name]:
                raise ConfigProblem(
                    f"{source}: expected a run with the same {what}, found one with others; use those, or choose "
                    "another name for a new run."
                )
        warnings = check_same_prior(own["traits"], state.get("traits") or {}, source)
        if state["dataset"] != own["dataset"]:
            warnings.append(
                f"the pictures changed since {source} was written; the run goes on with those of now, and its weights "
                "will differ from an uninterrupted run's."
            )
        return warnings
