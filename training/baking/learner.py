"""The learner of a baking: the prior's UNet, which learns to predict what the guidance predicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...guidance.files import DTYPES
from ..domain.learner import check_dataset, check_same_images, dataset_state
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
        if states.dataset is not None:
            check_same_images(states.dataset, processes)
        parameters = trainee.named_trainable()
        optimizer = build_optimizer(config, parameters.values(), weight_decay=config.weight_decay)
        super().__init__(config, parameters, optimizer, processes, scaled=config.precision == "fp16")
        self.dtype = DTYPES[config.precision]
        self._model = processes.wrap(trainee.unet)

    def backward(self) -> Tensor:
        return self.backward_over(self.states.batches(self.step), self._losses, self._model, self.config.batch_size)

    def share_gradients(self) -> None:
        """Nothing to do: DistributedDataParallel shares them in the backward pass."""

    def names_at(self, step: int) -> list[str]:
        return self.states.names_at(step)

    def _losses(self, batch: Batch) -> Tensor:
        """Weighted squared distance to the teacher's output of each latent of a batch [B]."""
        noisy, timesteps = batch.noisy.to(self.device), batch.timesteps.to(self.device)
        empty, prompted = self.states.texts.pair(batch.sizes, batch.places, self.device)
        target = self.teacher.target(noisy, timesteps, empty, prompted, batch.sizes)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            output = self._model(noisy, timesteps, **prompted)
        abar = abar_at(self.teacher.prior.schedule, timesteps)
        weight = min_snr_weight(self.teacher.prior.prediction_type, abar, self.config.min_snr_gamma)
        return sample_losses(output, target, weight)

    # ---- what there is to keep

    def own_state(self) -> dict[str, Any]:
        prior, dataset = self.teacher.prior, self.states.dataset
        return {
            "prior": prior.prior_hash,
            "traits": prior_traits(prior, None),
            "guidance": json.dumps([term.facts for term in self.teacher.terms], sort_keys=True),
            "prompts": hashlib.sha256(repr(self.states.prompts).encode()).hexdigest(),
            "dataset": None if dataset is None else dataset_state(dataset),
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
        if self.states.dataset is not None:
            is_finished = int(state["step"]) >= self.config.steps
            warnings += check_dataset(state["dataset"], self.states.dataset, is_finished, source)
        return warnings
