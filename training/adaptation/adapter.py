"""The adapter: a generator that moves where a critic's objective leads it (arXiv 2212.04473).

Latents and noise come from generators keyed by the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor

from ...guidance.distillation.layer_selection import select_layers
from ...guidance.distillation.methods import METHODS
from ...guidance.distillation.objective import Draws, NotFinite, Objective, Report
from ...guidance.networks.stylegan2 import StyleGAN2, class_labels
from ..engine.average import swapped
from ..engine.learner import Learner
from ..engine.optimizers import EPS
from ..engine.processes import OneProcess, check_batch
from ..engine.randomness import sample_generator
from ..engine.settings import ConfigProblem
from .config import AdaptConfig
from .layers import layer_of, trained_names
from .opinion import Encode, check_opinion, describe_terms, opinion


class Adapter(Learner[AdaptConfig]):
    """Moves a copy of `source` where an objective leads it, from step 0 or from a loaded state.

    encode: images [B, 3, H, W] as the generator gives them -> latents of the critic, differentiable. The generators
    (`generator`, which learns, and `frozen`) are copies on the processes' device. Raises ConfigProblem for settings
    that do not fit the generator or the number of processes, and for a critic that cannot judge its images.
    """

    def __init__(
        self,
        config: AdaptConfig,
        source: StyleGAN2,
        objective: Objective,
        encode: Encode,
        *,
        processes: OneProcess | None = None,
    ) -> None:
        processes = processes or OneProcess(config.device)
        check_generator(config, source, processes.world)
        self.objective, self.encode = objective, encode
        self.source_hash = generator_hash(source)
        self.frozen = deepcopy(source).to(processes.device, torch.float32).eval().requires_grad_(False)
        self.generator = deepcopy(source).to(processes.device, torch.float32).eval()
        self.generator.gradient_checkpointing = config.gradient_checkpointing
        self.origin = opinion(objective, encode, self.frozen, processes.device)
        names = trained_names(self.generator, config.train, config.freeze_bias)
        for name, weight in self.generator.named_parameters():
            weight.requires_grad_(name in names)
        parameters = {name: weight for name, weight in self.generator.named_parameters() if weight.requires_grad}
        if not parameters:
            raise ConfigProblem(f"train: expected a generator with {config.train} to train, found none; train all.")
        optimizer = torch.optim.Adam(parameters.values(), config.learning_rate, config.betas, EPS)
        super().__init__(config, parameters, optimizer, processes)
        self._report, self._chosen, self._timesteps = Report(), (), ""  # of the step that is being taken

    # ---- one step

    def backward(self) -> Tensor:
        draws = self._draws()
        self._timesteps = ", ".join(map(str, draws.t.tolist()))
        self._report, self._chosen = Report(), ()
        try:
            if self.config.layers:  # the same in all processes, which must choose alike
                self._chosen = self._choose(draws.t[:1])
            self._report = self._distil(self._share(draws))
        except NotFinite:
            return torch.tensor(float("nan"))
        return torch.tensor(self._report.loss.get(self.objective.method.name, 0.0) / self.processes.world)

    def accept(self) -> Mapping[str, float]:
        report = self.objective.train_method(self._report)
        self._let_learn(None)
        parts = {"t": sum(report.timesteps) / max(1, len(report.timesteps))} | dict(report.loss)
        parts |= {f"norm {name}": value for name, value in report.gradient_norm.items()}
        parts |= {f"clamped {name}": value for name, value in report.clamped.items()}
        return parts | {f"trained {name}": 1.0 for name in self._chosen}

    def culprit(self, what: str) -> str:
        return f"the gradient at the timesteps {self._timesteps}"

    def _draws(self) -> Draws:
        """The step's timesteps and noise, of the whole batch, so that they do not depend on how it is split."""
        like = torch.empty((self.config.batch_size, *self.origin["latents"].shape[1:]))
        return self.objective.draw(like, self.step, self.config.steps, self._randomness("noise"))

    def _share(self, draws: Draws) -> Draws:
        """This process' part of a batch's draws."""
        # Terms of one noise must go on sharing one tensor.
        parts = {id(noise): noise[self._mine].to(self.device) for noise in draws.noise.values()}
        return Draws(draws.t[self._mine], {name: parts[id(noise)] for name, noise in draws.noise.items()})

    def _distil(self, draws: Draws) -> Report:
        """The objective's gradient on what trains, for this process' share of the batch."""
        config, objective = self.config, self.objective
        z, c = self._latents("latents", config.batch_size)
        z, c = z[self._mine], None if c is None else c[self._mine]
        learns_mapping = any(name.startswith("mapping.") for name in self.parameters)
        with torch.no_grad():
            before = self.frozen.map(z, c, config.truncation)
            frozen = self._images(self.frozen, before, self.processes.rank) if objective.needs_frozen else None
        ws = self.generator.map(z, c, config.truncation) if learns_mapping else before
        images = self._images(self.generator, ws, self.processes.rank)
        return objective.backward(
            images,
            frozen,
            self.encode,
            step=self.step,
            steps=config.steps,
            generator=self._randomness("method", self.processes.rank),
            draws=draws,
            wait=True,  # a second critic learns once the gradient is known to be sound
        )

    def _choose(self, t: Tensor) -> tuple[str, ...]:
        """Layer selection, anew at every step: only the chosen layers' parameters learn in it."""
        z, c = self._latents("selection", 1)
        with torch.no_grad():
            ws = self.frozen.map(z, c, self.config.truncation)
        self._let_learn(())  # the selection asks for the gradient of styles alone
        chosen = select_layers(
            cast(StyleGAN2, _WithNoise(self, self.generator)),
            ws,
            self.objective,
            self.encode,
            self.config.layers,
            step=self.step,
            steps=self.config.steps,
            randomness=self._randomness("selection noise"),
            t=t,
            frozen=cast(StyleGAN2, _WithNoise(self, self.frozen)),
            among=[layer_of(name) for name in self.parameters],
        )
        self._let_learn(chosen)
        return chosen

    def _let_learn(self, layers: Sequence[str] | None) -> None:
        """Let the trained parameters of these layers learn, None: all of them."""
        for name, weight in self.parameters.items():
            weight.requires_grad_(layers is None or layer_of(name) in layers)

    def _images(self, generator: StyleGAN2, ws: Tensor, index: int) -> Tensor:
        # The trained and the frozen generator see the same noise inputs.
        images = generator.synthesize(ws, self.config.noise, self._randomness("inputs", index))
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images

    def _latents(self, stream: str, count: int) -> tuple[Tensor, Tensor | None]:
        """z [count, z_dim] and labels [count, c_dim] or None, each sample's from its own key."""
        generators = [self._randomness(stream, index) for index in range(count)]
        about, label = self.generator.config, self.config.label
        z = torch.stack([torch.randn(about.z_dim, generator=own) for own in generators]).to(self.device)
        if not about.c_dim:
            return z, None
        classes = [int(torch.randint(about.c_dim, (), generator=own)) if label < 0 else label for own in generators]
        return z, class_labels(classes, about.c_dim).to(self.device)

    def _randomness(self, stream: str, index: int = 0) -> torch.Generator:
        return sample_generator(self.config.seed, self.step, index, stream)

    @property
    def _mine(self) -> slice:
        share = self.config.batch_size // self.processes.world
        return slice(self.processes.rank * share, (self.processes.rank + 1) * share)

    # ---- what there is to keep

    @contextmanager
    def shown(self) -> Iterator[StyleGAN2]:
        """The generator as it would be finished now, and back again exactly."""
        mean_style = cast(Tensor, self.generator.mapping.w_avg)
        before = mean_style.clone()
        with swapped(self.parameters, self.values()):
            try:
                if self._mapping_moved():
                    with torch.no_grad():
                        mean_style.copy_(self.generator.mean_style())
                yield self.generator
            finally:
                with torch.no_grad():
                    mean_style.copy_(before)

    def _mapping_moved(self) -> bool:
        """Whether the mean style is another: with layers chosen, the mapping is never trained."""
        was = dict(self.frozen.named_parameters())
        mapping = (name for name in self.parameters if name.startswith("mapping."))
        return any(not torch.equal(self.parameters[name].data, was[name]) for name in mapping)

    def own_state(self) -> dict[str, Any]:
        return {
            "generator": self.source_hash,
            "origin": self.origin,
            "terms": describe_terms(self.objective.critic.guidance),
            "objective": self.objective.state_dict(),
        }

    def check_own_state(self, state: Mapping[str, Any], source: str) -> list[str]:
        """As `Learner.check_own_state`: another generator, other terms, another opinion of the critic are refused."""
        if state["generator"] != self.source_hash:
            raise ConfigProblem(
                f"{source}: expected a run from the same generator, found one that adapts another (content "
                f"{state['generator'][:12]} instead of {self.source_hash[:12]}); use that one, or start a new run."
            )
        return check_opinion(self.objective, self.origin, state, source)

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])


class _WithNoise:
    """A generator as layer selection sees it: with the step's noise inputs."""

    def __init__(self, adapter: Adapter, generator: StyleGAN2) -> None:
        self._adapter, self._generator = adapter, generator
        self.style_layers: Sequence[str] = generator.style_layers
        self.ws_index: dict[str, int] = generator.ws_index

    def synthesize(self, ws: Tensor, *args: Any, **more: Any) -> Tensor:
        return self._adapter._images(self._generator, ws, 0)


def check_generator(config: AdaptConfig, generator: StyleGAN2, world: int = 1) -> None:
    """Raise ConfigProblem where a configuration does not fit a generator or the number of processes."""
    about = generator.config
    if about.img_channels not in (1, 3):
        raise ConfigProblem(
            f"generator: expected one that makes colour or grey images, found {about.img_channels} channels (EG3D's "
            "planes?); use a generator of images."
        )
    if about.height != about.width:
        raise ConfigProblem(
            f"generator: expected one of square images, as the critic is shown them, found {about.width} x "
            f"{about.height} px; others can be drawn and blended but not adapted."
        )
    if config.label >= 0 and config.label >= about.c_dim:
        found = f"{about.c_dim} classes" if about.c_dim else "an unconditional one"
        raise ConfigProblem(
            f"label: expected a generator with a class {config.label}, found {found}; -1 takes all alike."
        )
    if config.noise == "random" and not about.use_noise:
        raise ConfigProblem("noise: expected a generator with noise inputs, found one without; choose const.")
    check_batch(config.batch_size, world)
    if METHODS[config.method].learns and world > 1:
        raise ConfigProblem(
            f"method: expected one that trains nothing of its own for {world} processes, found {config.method}; start "
            "one process."
        )


def generator_hash(generator: StyleGAN2) -> str:
    """SHA-256 over architecture and weights in fp32, which names a generator."""
    digest = hashlib.sha256(generator.config.to_json().encode())
    for key, tensor in sorted(generator.state_dict().items()):
        digest.update(f"{key} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
