"""Variational score distillation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GuidanceError
from ..options import option
from ..terms import Source
from .context import Context
from .critic import Critic
from .low_rank import LowRankAddition
from .method import Method

_ADAMS = ("step", "exp_avg", "exp_avg_sq")  # what torch's Adam keeps for each tensor


@dataclass(eq=False)
class VSD(Method):
    """Variational score distillation (ProlificDreamer, arXiv 2305.16213, eq. 9): e(z_t) - e_phi(z_t).

    e_phi is the critic's own network with a low-rank addition that learns, beside the generator, to predict the noise
    on the generator's images: min_phi |e_phi(z_t) - noise|^2 (algorithm 1). Where it is perfect, the gradient is the
    difference of two scores and vanishes when the generator's distribution is the guidance's. Nominal scales (7.5).

    source: the (model, conditioning) of e_phi, a model whose `unet` is a torch module. rank: see `LowRankAddition`.
    learning_rate: Adam's, 1e-4 as published. seed: of the first addition. Before the first update e_phi is the source's
    own prediction. Raises GuidanceError for a model without such a module, and for values out of range.
    """

    source: Source
    rank: int = option(4, "rank of the second critic's additions", min=1, max=256)
    learning_rate: float = option(1e-4, "learning rate of the second critic", min=1e-12, max=1.0)
    seed: int = 0

    name = "vsd"
    needs = frozenset({"e"})
    learns = True

    def __post_init__(self) -> None:
        network = getattr(self.source.model, "unet", None)
        if not isinstance(network, nn.Module):
            raise GuidanceError("Expected VSD to be given the network of its critic, a torch module, got none.")
        if not self.learning_rate > 0:
            raise GuidanceError(f"Expected VSD's learning rate to be above 0, got {self.learning_rate}.")
        self.addition = LowRankAddition(network, self.rank, seed=self.seed)
        self._tensors = self.addition.tensors()
        self._optimizer = torch.optim.Adam(list(self._tensors.values()), lr=self.learning_rate)

    @classmethod
    def of(cls, critic: Critic, seed: int, **options: Any) -> VSD:
        """For a critic: e_phi is its last term's model on that term's conditioning."""
        return cls(critic.guidance.terms[-1].source, seed=seed, **options)

    def gradient(self, context: Context) -> Tensor:
        """e(z_t) - e_phi(z_t)."""
        with torch.no_grad(), self.addition.attached():
            own = context.critic.noise_prediction(self.source, context.z_t, context.t)
        return context.prediction.e - own

    def step(self, context: Context) -> dict[str, float]:
        """Train phi once on the generator's latents, at fresh timesteps over all the schedule and fresh noise."""
        critic, z, generator = context.critic, context.z, context.generator
        device = generator.device if generator is not None else z.device
        t = torch.randint(0, len(critic.schedule), (len(z),), generator=generator, device=device).to(z.device)
        noise = torch.randn(z.shape, generator=generator, device=device).to(z)
        z_t = critic.noisy(z, noise, t)
        with torch.enable_grad(), self.addition.attached():
            # Summed, not averaged, on the way back through the network: a half-precision one would lose it.
            loss = (critic.noise_prediction(self.source, z_t, t) - noise).square().sum()
            gradients = torch.autograd.grad(loss, list(self._tensors.values()), allow_unused=True)
        # An overflow in half precision costs this update, not the run.
        if all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients):
            for tensor, gradient in zip(self._tensors.values(), gradients):
                tensor.grad = None if gradient is None else gradient / z.numel()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return {"vsd_critic": float(loss.detach()) / z.numel()}

    def parameters(self) -> Iterable[Tensor]:
        return self._tensors.values()

    def state_dict(self) -> dict[str, Tensor]:
        """The addition and Adam's state, one flat mapping of tensors."""
        state = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        for name, tensor in self._tensors.items():
            for key, value in self._optimizer.state.get(tensor, {}).items():
                state[f"{name}.{key}"] = torch.as_tensor(value).detach().clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises GuidanceError for the state of another network or rank."""
        for name, tensor in self._tensors.items():
            if name not in state or state[name].shape != tensor.shape:
                raise GuidanceError(f"Expected the state of a low-rank critic with {name} {list(tensor.shape)}.")
        self._optimizer.state.clear()
        for name, tensor in self._tensors.items():
            tensor.data.copy_(state[name])
            if all(f"{name}.{key}" in state for key in _ADAMS):
                self._optimizer.state[tensor] = {
                    key: state[f"{name}.{key}"].clone().to("cpu" if key == "step" else tensor.device) for key in _ADAMS
                }
