"""What every learner does: one optimizer step after the other, and a state to go on from bit for bit.

A learner's step must be a pure function of (settings, data, step, state): what it draws comes from generators keyed by
the step (`randomness`), so that a run that was killed and resumed repeats the very same steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from ...guidance.errors import Problem
from .average import WeightAverage
from .checkpoints import different_facts, machine_facts
from .optimizers import rate_at, restore
from .processes import OneProcess
from .run_settings import RunSettings
from .settings import ConfigProblem

# A loss scale this small means that fp16 overflows whatever the scale.
SMALLEST_SCALE = 2.0**-14
Config = TypeVar("Config", bound=RunSettings)


@dataclass(frozen=True)
class Outcome:
    """One finished step: the loss of its global batch, gradient norm before clipping, learning rate.

    stop: whether somebody asked to stop. parts: what else there is to log, by name; see `events.Step`.
    """

    step: int
    loss: float
    gradient_norm: float
    rate: float
    stop: bool
    parts: Mapping[str, float] = field(default_factory=dict)


class NonFiniteLoss(Problem):
    """The loss or its gradient became NaN or infinite; the weights are those before the step.

    step: the step that failed, counted from 1. names: the images of its batch, none where there are no images. advice:
    what was kept, what to do.
    """

    def __init__(self, what: str, step: int, names: Sequence[str], advice: str = "") -> None:
        self.what, self.step, self.names = what, step, tuple(names)
        shown = ", ".join(dict.fromkeys(names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        super().__init__(
            f"Training stopped: {what} became NaN or infinite at step {step}"
            + (f" on the batch {shown}" if shown else "")
            + (f"; {advice}" if advice else ".")
        )


class Learner(ABC, Generic[Config]):
    """Trains `parameters` with `optimizer`; a subclass computes a step's gradients (`backward`).

    scaled: whether gradients are computed in fp16 and need a scaled loss. step: finished steps. intact: False while
    weights, average and step do not belong together, for callers that want to save after an exception.
    """

    def __init__(
        self,
        config: Config,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        processes: OneProcess,
        *,
        scaled: bool = False,
    ) -> None:
        self.config, self.processes, self.device = config, processes, processes.device
        self.parameters, self.optimizer = dict(parameters), optimizer
        self.average = WeightAverage(self.parameters, config.ema) if config.ema else None
        self.scaler = GradScaler(self.device.type, enabled=scaled)
        self.step, self.intact = 0, True

    # ---- what a learner must say, and may

    @abstractmethod
    def backward(self) -> Tensor:
        """Add the gradients of the step on this process's share of the batch; its share of the loss, as a scalar.

        NaN where there is none. The loss must be scaled by `scaler` before its backward pass.
        """

    def backward_over(
        self, passes: Sequence[Any], losses: Callable[[Any], Tensor], model: nn.Module, count: int
    ) -> Tensor:
        """`backward` of a step of several passes; losses(one of them): those of its samples [B].

        model: as `OneProcess.wrap` gave it; its gradients are shared in the last pass. count: samples of the global
        batch, over which the loss is a mean.
        """
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(passes):
            last = number == len(passes) - 1
            with nullcontext() if last else self.processes.accumulating(model):
                loss = losses(batch).sum() / count
                # Several processes average their gradients: times their number that is the sum.
                self.scaler.scale(loss * self.processes.world).backward()
            total += loss.detach()
        return total

    def share_gradients(self) -> None:
        """Bring the mean of all processes' gradients into each of them."""
        if self.processes.world > 1:
            for parameter in self.parameters.values():
                if parameter.requires_grad:  # the same in all processes
                    own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                    parameter.grad = self.processes.total(own) / self.processes.world

    def accept(self) -> Mapping[str, float]:
        """Called once the step's gradients are known to be finite, before the optimizer; what else there is to log."""
        return {}

    def culprit(self, what: str) -> str:
        """Where a loss or gradient (`what`) that is not finite arose, for the message."""
        return what

    def names_at(self, step: int) -> list[str]:
        """The images of the batch of step `step` (0 is the first), for messages; none where there are none."""
        return []

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside `state`'s own fields."""
        return {}

    def check_own_state(self, state: Mapping[str, Any], source: str) -> list[str]:
        """Warnings about a state of other data or models; raises ConfigProblem where a run must not go on from it."""
        return []

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `own_state` kept."""

    # ---- one step

    def take_step(self, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """One optimizer step. should_stop is asked once and shared, so that all processes stop after the same step.

        Raises NonFiniteLoss before anything is changed.
        """
        rate = rate_at(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        share = self.backward().detach().float().to(self.device)
        sums = self.processes.total(torch.stack([share, torch.tensor(float(should_stop()), device=self.device)]))
        self.share_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip or math.inf)
        # One wait for the device.
        loss, stop, norm = torch.stack([sums[0], sums[1], norm.float().to(self.device)]).tolist()
        # A finite loss with an infinite gradient is what the scaler is for: it skips the step and lowers its scale.
        skipped = self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm)
        if not math.isfinite(loss) or not (math.isfinite(norm) or skipped and self.scaler.get_scale() > SMALLEST_SCALE):
            self.optimizer.zero_grad(set_to_none=True)
            what = self.culprit("the gradient" if math.isfinite(loss) else "the loss")
            raise NonFiniteLoss(what, self.step + 1, self.names_at(self.step))
        parts = self.accept()
        self.intact = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and not skipped:
            self.average.update()
        self.step += 1
        self.intact = True
        self.optimizer.zero_grad(set_to_none=True)  # grids and checkpoints, which may come now, have no use for them
        return Outcome(self.step, loss, norm, rate, bool(stop), parts)

    # ---- what there is to keep

    def values(self) -> dict[str, Tensor]:
        """What a finished file would hold, by parameter name: the average where one is kept, else the weights."""
        if self.average is not None:
            return self.average.average
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def has_finite_weights(self) -> bool:
        """Whether the trained weights and their average are free of NaN and infinity."""
        averaged = {} if self.average is None else self.average.average
        tensors = [*self.parameters.values(), *averaged.values()]
        return all(bool(tensor.detach().isfinite().all()) for tensor in tensors)

    def facts(self) -> dict[str, str]:
        """`machine_facts` of this run, and the precision it computes in."""
        return {**machine_facts(self.device, self.processes.world), "precision": self.config.precision}

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit (see `load`)."""
        return {
            "step": self.step,
            "config": self.config.to_dict(),
            "facts": self.facts(),
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "average": None if self.average is None else self.average.state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            **self.own_state(),
        }

    def load(self, state: Mapping[str, Any], source: str = "checkpoint") -> list[str]:
        """Go on from a state; returns what makes the continuation other than bit-identical, as warnings.

        Raises ConfigProblem when the state belongs to other settings, models or a network of other weights, or is no
        learner's of this kind.
        """
        check_same_settings(self.config, state, source)
        try:
            warnings = self.check_own_state(state, source)
            changed = different_facts(state["facts"], self.facts())
            if changed:
                warnings.append(
                    f"{source} was written under other circumstances ({changed}); the run goes on, but its weights can "
                    "differ from an uninterrupted run's in their last bits."
                )
            self.intact = False
            self._take_over(state, source)
            self.load_own_state(state)
        except Problem:
            raise
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ConfigProblem(
                f"{source}: expected a checkpoint that this trainer wrote, found one of other parts ({error!r}); move "
                "it away to go on from an earlier one."
            ) from error
        self.step = int(state["step"])
        self.intact = True
        return warnings

    @torch.no_grad()
    def _take_over(self, state: Mapping[str, Any], source: str) -> None:
        """Copy weights, optimizer and average out of a state, whose tensors may lie in a file."""
        weights = state["weights"]
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        if shapes != {name: tensor.shape for name, tensor in weights.items()}:
            raise ConfigProblem(f"{source}: expected weights of the same network, found others; start a new run.")
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        restore(self.optimizer, state["optimizer"])
        if self.average is not None:
            self.average.load(state["average"])
        if self.scaler.is_enabled() and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])


def check_same_settings(config: RunSettings, state: Mapping[str, Any], source: str) -> None:
    """Raise ConfigProblem, naming the fields, when a state was trained with other settings that change the numbers."""
    different = config.differences(type(config).from_mapping(state["config"], source))
    if different:
        listed = ", ".join(f"{name} was {old!r} and is {new!r}" for name, (new, old) in different.items())
        raise ConfigProblem(
            f"{source}: expected a run of the same configuration, but {listed}; use the earlier values, or another "
            "name or output folder for a new run."
        )
