"""The adapter: a generator, a critic's objective, and one optimizer step after the other (arXiv 2212.04473).

A step is a pure function of (configuration, generator, critic, step, state): latents and noise come from generators
keyed by the step, so that a run that was killed and resumed repeats the very same steps.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ...guidance.combination import Guidance
from ...guidance.distillation.critic import Critic
from ...guidance.distillation.layer_selection import select_layers
from ...guidance.distillation.methods import METHODS
from ...guidance.distillation.objective import Draws, NotFinite, Objective, Report
from ...guidance.networks.stylegan2 import StyleGAN2
from ...guidance.terms import BASE, Source
from ..engine.average import WeightAverage
from ..engine.checkpoints import machine_facts
from ..engine.engine import NonFiniteLoss, Outcome, check_same_run, take_over, warn_of_other_facts
from ..engine.optimizers import rate_at, set_rate
from ..engine.processes import OneProcess, check_batch
from ..engine.randomness import sample_generator
from ..engine.settings import ConfigProblem
from ..prior.same_prior import relative_difference
from .config import AdaptConfig

Encode = Callable[[Tensor], Tensor]

# Parameters by what `AdaptConfig.train` calls them; names are NVIDIA's.
TRAINED = {
    "convolutions": re.compile(r"synthesis\.b4\.const|synthesis\.b\d+\.conv[01]\..*"),
    # The released code means to train the learned constant, but its filter passes over it; of the convolutions it takes
    # those from 8 px on, without the biases after them.
    "released": re.compile(r"synthesis\.b(?!4\.)\d+\.conv[01]\.(?!bias$).*"),
    "synthesis": re.compile(r"synthesis\..*"),
    "all": re.compile(r".*"),
}
# Another VAE's, model's or prompt's opinion of a fixed picture differs by far more; on another device or in half
# precision it differs by about a thousandth, and where there is little noise, by what bf16 rounds the picture under it.
SAME_OPINION, ROUNDING = 0.02, 2.0**-8
PROBE_SEED = 20
OTHERS = ("source prompt", "unwanted prompt")  # what some methods ask for beside the guidance


class Adapter:
    """Moves a copy of `source` where an objective leads it, from step 0 or from a loaded state.

    encode: images [B, 3, H, W] as the generator gives them -> latents of the critic, differentiable. origin: what the
    critic thinks of a fixed picture (`opinion`, asked here unless given), to know it again when a run goes on. The
    generators are copies on the processes' device. Raises ConfigProblem for settings that do not fit the generator or
    the number of processes.

    intact: False while weights, average and step do not belong together, for who wants to save after an exception.
    """

    def __init__(
        self,
        config: AdaptConfig,
        source: StyleGAN2,
        objective: Objective,
        encode: Encode,
        *,
        origin: Mapping[str, Tensor] | None = None,
        processes: OneProcess | None = None,
    ) -> None:
        self.processes = processes or OneProcess(config.device)
        self.config, self.objective = config, objective
        self.device = self.processes.device
        check_generator(config, source, self.processes.world)
        self.step, self.intact = 0, True
        self.source_hash = generator_hash(source)
        self.frozen = deepcopy(source).to(self.device, torch.float32).eval().requires_grad_(False)
        self.generator = deepcopy(source).to(self.device, torch.float32).eval()
        self.generator.gradient_checkpointing = config.gradient_checkpointing
        self.encode = encode
        self.origin = dict(origin or opinion(objective, encode, fixed_picture(self.frozen, self.device)))
        names = trained_names(self.generator, config.train, config.freeze_bias)
        for name, one in self.generator.named_parameters():
            one.requires_grad_(name in names)
        self.parameters = {name: one for name, one in self.generator.named_parameters() if one.requires_grad}
        if not self.parameters:
            raise ConfigProblem(f"train: expected a generator with {config.train} to train, found none; train all.")
        self.optimizer = torch.optim.Adam(
            self.parameters.values(), lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps
        )
        self.average = WeightAverage(self.parameters, config.ema) if config.ema else None

    # ---- one step

    def take_step(self, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """One optimizer step. should_stop is asked once and shared, so that all processes stop after the same step.

        Raises NonFiniteLoss before anything is changed.
        """
        config, rate = self.config, rate_at(self.config, self.step)
        set_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        draws = self._draws()
        report, chosen, broken = Report(), None, 0.0
        try:
            # The same in all processes, which must choose alike.
            chosen = self._choose(draws.t[:1]) if config.layers else None
            report = self._distil(self._share(draws))
        except NotFinite:
            broken = 1.0
        loss = report.loss.get(self.objective.method.name, 0.0)
        sums = self.processes.total(torch.tensor([loss, float(should_stop()), broken], device=self.device))
        world = self.processes.world
        self._share_gradients(float(sums[2]) > 0)
        with_gradient = [one for one in self.parameters.values() if one.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(with_gradient, config.clip or math.inf)) if with_gradient else 0.0
        loss, stop, broken = float(sums[0]) / world, bool(sums[1]), float(sums[2]) > 0
        if broken or not math.isfinite(norm) or not math.isfinite(loss):
            self.optimizer.zero_grad(set_to_none=True)
            at = ", ".join(map(str, draws.t.tolist()))
            raise NonFiniteLoss(f"the gradient at the timesteps {at}", self.step + 1, ())
        report = self.objective.train_method(report)
        self.intact = False
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        self.step += 1
        self.intact = True
        self.optimizer.zero_grad(set_to_none=True)  # grids and checkpoints, which may come now, have no use for them
        self._let_learn(None)
        return Outcome(self.step, loss, norm, rate, stop, _parts(report, chosen))

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
        randomness = self._randomness("method", self.processes.rank)
        return objective.backward(
            images,
            frozen,
            self.encode,
            step=self.step,
            steps=config.steps,
            generator=randomness,
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
            _Chooses(self, self.generator),
            ws,
            self.objective,
            self.encode,
            self.config.layers,
            step=self.step,
            steps=self.config.steps,
            randomness=self._randomness("selection noise"),
            t=t,
            frozen=_Chooses(self, self.frozen),
            among=[_layer_of(name) for name in self.parameters],
        )
        self._let_learn(chosen)
        return chosen

    def _let_learn(self, layers: Sequence[str] | None) -> None:
        """Let the trained parameters of these layers learn, None: all of them."""
        for name, one in self.parameters.items():
            one.requires_grad_(layers is None or _layer_of(name) in layers)

    def _images(self, generator: StyleGAN2, ws: Tensor, index: int) -> Tensor:
        # The trained and the frozen generator see the same noise inputs.
        images = generator.synthesize(ws, self.config.noise, self._randomness("inputs", index))
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images

    def _latents(self, stream: str, count: int) -> tuple[Tensor, Tensor | None]:
        """z [count, z_dim] and labels [count, c_dim] or None, each sample's from its own key."""
        generators = [sample_generator(self.config.seed, self.step, index, stream) for index in range(count)]
        config = self.generator.config
        z = torch.stack([torch.randn(config.z_dim, generator=one) for one in generators])
        if not config.c_dim:
            return z.to(self.device), None
        classes = [
            int(torch.randint(config.c_dim, (), generator=one)) if self.config.label < 0 else self.config.label
            for one in generators
        ]
        return z.to(self.device), torch.eye(config.c_dim)[classes].to(self.device)

    def _randomness(self, stream: str, index: int = 0) -> torch.Generator:
        return sample_generator(self.config.seed, self.step, index, stream)

    @property
    def _mine(self) -> slice:
        share = self.config.batch_size // self.processes.world
        return slice(self.processes.rank * share, (self.processes.rank + 1) * share)

    def _share_gradients(self, broken: bool) -> None:
        """The mean of all processes' gradients in each of them."""
        if self.processes.world == 1 or broken:
            return
        for one in self.parameters.values():
            if one.requires_grad:  # the same in all processes
                own = one.grad if one.grad is not None else torch.zeros_like(one)
                one.grad = self.processes.total(own) / self.processes.world

    # ---- what there is to keep

    def values(self) -> dict[str, Tensor]:
        """What a finished generator would hold, by parameter name: the average where one is kept, else the weights."""
        if self.average is not None:
            return self.average.average
        return {name: one.detach() for name, one in self.parameters.items()}

    @contextmanager
    def shown(self) -> Iterator[StyleGAN2]:
        """The generator as it would be finished now, and back again exactly."""
        before = {name: one.data for name, one in self.parameters.items()}
        centre = self.generator.mapping.w_avg.clone()
        try:
            for name, value in self.values().items():
                self.parameters[name].data = value.to(self.parameters[name])
            if self._mapping_moved():
                with torch.no_grad():
                    self.generator.mapping.w_avg.copy_(self.generator.mean_style())
            yield self.generator
        finally:
            for name, value in before.items():
                self.parameters[name].data = value
            with torch.no_grad():
                self.generator.mapping.w_avg.copy_(centre)

    def _mapping_moved(self) -> bool:
        """Whether the mean style is another: with layers chosen, the mapping is never trained."""
        was = dict(self.frozen.named_parameters())
        mapping = (name for name in self.parameters if name.startswith("mapping."))
        return any(not torch.equal(self.parameters[name].data, was[name]) for name in mapping)

    def has_finite_weights(self) -> bool:
        """Whether the trained weights and their average are free of NaN and infinity."""
        tensors = [one.detach() for one in self.parameters.values()]
        tensors += list(self.average.average.values()) if self.average is not None else []
        return all(bool(one.isfinite().all()) for one in tensors)

    def names_at(self, step: int) -> list[str]:
        """No step has images that could be named."""
        return []

    def facts(self) -> dict[str, str]:
        """`machine_facts` of this run, and the precision of its critic; auto where the critic was given."""
        return {**machine_facts(self.device, self.processes.world), "precision": self.config.precision}

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on bit for bit (see `load`)."""
        return {
            "step": self.step,
            "config": self.config.to_dict(),
            "prior": "",
            "dataset": {},
            "generator": self.source_hash,
            "origin": self.origin,
            "terms": describe_terms(self.objective.critic.guidance),
            "facts": self.facts(),
            "weights": {name: one.detach() for name, one in self.parameters.items()},
            "average": None if self.average is None else self.average.state(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "scaler": None,
        }

    def load(self, state: Mapping[str, Any], source: str = "checkpoint") -> list[str]:
        """Go on from a state; returns what makes the continuation other than bit-identical, as warnings.

        Raises ConfigProblem when the state belongs to another configuration, generator or critic.
        """
        check_same_run(self.config, state, source)
        if state["generator"] != self.source_hash:
            raise ConfigProblem(
                f"{source}: expected a run from the same generator, found one that adapts another (content "
                f"{state['generator'][:12]} instead of {self.source_hash[:12]}); use that one, or start a new run."
            )
        self._check_terms(state, source)
        warnings = []
        for name, before in state["origin"].items():
            if name not in self.origin:
                continue  # of what the method does not ask for
            difference = relative_difference(self.origin[name], before)
            if difference > self._tolerated(name):
                raise ConfigProblem(
                    f"{source}: expected a run with the same diffusion model, VAE, prompts and terms, found one whose "
                    f"{name} differs for the same picture; use those that the run began with, or start a new run."
                )
            if difference > 0:
                warnings.append(
                    f"the critic's {name} differs by {difference:.1e} from when {source} was written; the run goes on, "
                    "but its weights can differ from an uninterrupted run's in their last bits."
                )
        warnings += warn_of_other_facts(state, self.facts(), source)
        self.intact = False
        take_over(state, source, self.parameters, self.optimizer, self.average)
        self.objective.load_state_dict(state["objective"])
        self.step = int(state["step"])
        self.intact = True
        return warnings

    def _check_terms(self, state: Mapping[str, Any], source: str) -> None:
        """Raise ConfigProblem for other weights or references than a state's, where it says them."""
        now = describe_terms(self.objective.critic.guidance)
        before = state["terms"]
        if _nameless(now) != _nameless(before):
            was, now = (json.dumps(one, ensure_ascii=False) for one in (before, now))
            raise ConfigProblem(
                f"{source}: expected a run with the same guidance terms, found that they were {was} and are {now}; use "
                "the earlier ones, or start a new run."
            )

    def _tolerated(self, name: str) -> float:
        """How far an opinion may lie from a state's of the same name."""
        _, at, t = name.partition(" at timestep ")
        return SAME_OPINION + (ROUNDING / self.objective.critic.schedule.sigma(float(t)) if at else 0.0)


class _Chooses:
    """A generator as layer selection sees it: with the step's noise inputs."""

    def __init__(self, adapter: Adapter, generator: StyleGAN2) -> None:
        self._adapter, self._generator = adapter, generator
        self.style_layers, self.ws_index = generator.style_layers, generator.ws_index
        self.synthesis = generator.synthesis

    def synthesize(self, ws: Tensor) -> Tensor:
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


def trained_names(generator: StyleGAN2, train: str, freeze_bias: bool) -> tuple[str, ...]:
    """The parameters that learn, by their names in files, in order; `train` as in `AdaptConfig`."""
    return tuple(
        name
        for name, _ in generator.named_parameters()
        if TRAINED[train].fullmatch(name) and not (freeze_bias and name.endswith(".bias"))
    )


def _layer_of(name: str) -> str:
    """The layer of a parameter as `Generator.style_layers` calls it; of others, what none of these is called."""
    return ".".join(name.removeprefix("synthesis.").split(".")[:2])


def learning_names(generator: StyleGAN2, names: Sequence[str], layers: int = 0) -> tuple[str, ...]:
    """Those of `names` that a step can change: with layer selection only what belongs to a style layer."""
    return tuple(name for name in names if not layers or _layer_of(name) in generator.style_layers)


def describe_trained(generator: StyleGAN2, names: Sequence[str], layers: int = 0) -> str:
    """Exactly which tensors learn, and how many numbers they hold, for people."""
    names = learning_names(generator, names, layers)
    sizes = {name: one.numel() for name, one in generator.named_parameters()}
    learns, total = sum(sizes[name] for name in names), sum(sizes.values())
    count = f"trains {len(names)} of {len(sizes)} tensors, {learns:,} of {total:,} parameters"
    text = f"{count}: {', '.join(_grouped(names))}"
    if layers:
        text += f"; in each step those of the {layers} styles that matter most"
    still = [name for name in sizes if name not in set(names)]
    return text + (f"\nleft as they are: {', '.join(_grouped(still))}" if still else "")


def _grouped(names: Sequence[str]) -> list[str]:
    """Names with what one layer holds in braces: synthesis.b8.conv0.{weight, affine.weight}."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        # mapping.fc0 and synthesis.b8.conv0 are layers; synthesis.b4.const is a tensor by itself.
        at = min(3 if parts[0] == "synthesis" else 2, len(parts) - 1)
        groups.setdefault(".".join(parts[:at]), []).append(".".join(parts[at:]))
    return [
        f"{layer}.{tensors[0]}" if len(tensors) == 1 else f"{layer}.{{{', '.join(tensors)}}}"
        for layer, tensors in groups.items()
    ]


def generator_hash(generator: StyleGAN2) -> str:
    """SHA-256 over architecture and weights in fp32, which names a generator."""
    digest = hashlib.sha256(generator.config.to_json().encode())
    for key, tensor in sorted(generator.state_dict().items()):
        digest.update(f"{key} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def fixed_picture(generator: StyleGAN2, device: torch.device | str) -> Tensor:
    """A picture [1, 3, H, W] of colour ramps in -1..1, of the generator's size."""
    sides = (generator.config.width, generator.config.height)
    across, down = torch.meshgrid(*(torch.linspace(-1, 1, side, device=device) for side in sides), indexing="xy")
    return torch.stack([across, down, -across * down])[None]


@torch.no_grad()
def opinion(objective: Objective, encode: Encode, picture: Tensor) -> dict[str, Tensor]:
    """What the critic makes of a picture, on the CPU: its `latents`, and what each of the critic's sources predicts.

    At the least, a middle and the largest timestep, of those that act there: "base at timestep 10". One source at a
    time, because guidance enlarges their last bits.
    """
    critic, timesteps, sources = objective.critic, objective.timesteps, _sources(objective.critic)
    z = encode(picture).float()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(PROBE_SEED)).to(z)
    asked = list(dict.fromkeys((timesteps.t_min, (timesteps.t_min + timesteps.t_max) // 2, timesteps.t_max)))
    levels = [critic.schedule.sigma(float(step)) for step in asked]
    plans = [critic.guidance.at(level, critic.percent_to_sigma, keep_base=True) for level in levels]
    found = {"latents": z.cpu()}
    for name, source in sources.items():
        steps = [step for step, plan in zip(asked, plans) if name in OTHERS or source in plan.needed]
        if steps:
            t = torch.tensor(steps)
            z_t = critic.noisy(z.expand(len(t), -1, -1, -1), noise.expand(len(t), -1, -1, -1), t)
            made = critic.noise_prediction(source, z_t, t).cpu().split(1)
            found |= {f"{name} at timestep {step}": one for step, one in zip(steps, made)}
    return found


def _sources(critic: Critic) -> dict[str, Source]:
    """All that a critic can ask, by its part; a graph's terms and a configuration's may be called otherwise."""
    guidance = critic.guidance
    found = {"base": guidance.base} | {f"term {at}": term.source for at, term in enumerate(guidance.terms, 1)}
    others = (None if critic.source is None else critic.source.terms[-1].source, critic.unwanted)
    return found | {name: one for name, one in zip(OTHERS, others) if one is not None}


def describe_terms(guidance: Guidance) -> list[dict[str, Any]]:
    """The terms of a guidance as plain values: name, weight (`Weight.to_json`), reference, and shaping if any."""
    return [
        {"name": term.name, "weight": term.weight.to_json(), "reference": term.reference or BASE}
        | ({"shaping": repr(term.shaping)} if term.shaping is not None else {})
        for term in guidance.terms
    ]


def _nameless(terms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Described terms that go by their places, which a graph and a configuration have in common."""
    places = {term["name"]: place for place, term in enumerate(terms, 1)}
    return [{**term, "name": None, "reference": places.get(term["reference"])} for term in terms]


def _parts(report: Report, chosen: Sequence[str] | None) -> dict[str, float]:
    parts: dict[str, float] = {"t": sum(report.timesteps) / max(1, len(report.timesteps))}
    parts |= dict(report.loss)
    parts |= {f"norm {name}": value for name, value in report.gradient_norm.items()}
    parts |= {f"clamped {name}": value for name, value in report.clamped.items()}
    return parts | {f"trained {name}": 1.0 for name in chosen or ()}
