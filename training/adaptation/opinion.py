"""What a critic thinks of a fixed picture, by which a run that goes on notices another model, VAE, prompt or term."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...guidance.combination import Guidance
from ...guidance.distillation.critic import Critic
from ...guidance.distillation.objective import Objective
from ...guidance.errors import first_line
from ...guidance.networks.stylegan2 import StyleGAN2
from ...guidance.schedules import as_weight
from ...guidance.terms import BASE, Source
from ..engine.memory import is_memory_problem
from ..engine.settings import ConfigProblem
from ..prior.same_prior import check_difference, relative_difference

Encode = Callable[[Tensor], Tensor]

# Another VAE's, model's or prompt's opinion of a fixed picture differs by far more; on another device or in half
# precision it differs by about a thousandth, and where there is little noise, by what bf16 rounds the picture under it.
SAME_OPINION, ROUNDING = 0.02, 2.0**-8
PROBE_SEED = 20
OTHERS = ("source prompt", "unwanted prompt")  # what some methods ask for beside the guidance


def fixed_picture(generator: StyleGAN2, device: torch.device | str) -> Tensor:
    """A picture [1, 3, H, W] of colour ramps in -1..1, of the generator's size."""
    sides = (generator.config.width, generator.config.height)
    across, down = torch.meshgrid(*(torch.linspace(-1, 1, side, device=device) for side in sides), indexing="xy")
    return torch.stack([across, down, -across * down])[None]


def opinion(
    objective: Objective, encode: Encode, generator: StyleGAN2, device: torch.device | str
) -> dict[str, Tensor]:
    """What the critic makes of a picture of the generator's size, on the CPU.

    Its `latents`, and what each of the critic's sources predicts at the least, a middle and the largest timestep, of
    those that act there: "base at timestep 10". One source at a time, because guidance enlarges their last bits. Raises
    ConfigProblem, in one sentence, where VAE, diffusion model and conditioning do not fit each other.
    """
    side = generator.config.resolution
    cannot = f"resolution: expected images of {side} px that the VAE can encode, found that it cannot"
    with _told(cannot, "set another resolution, or connect another VAE"), torch.no_grad():
        latents = encode(fixed_picture(generator, device)).float()
    if latents.ndim != 4 or not bool(latents.isfinite().all()):
        found = f"latents of shape {list(latents.shape)}" if latents.ndim != 4 else "NaN or infinity in its latents"
        raise ConfigProblem(f"vae: expected finite latents [B, C, h, w] of an image, found {found}; use another VAE.")
    cannot = f"base: expected a diffusion model that can judge latents {list(latents.shape)}, found that it cannot"
    with _told(cannot, "use a model, VAE and text encoder that belong together"):
        return {"latents": latents.cpu(), **_predictions(objective, latents)}


@contextmanager
def _told(cannot: str, remedy: str) -> Iterator[None]:
    """Raise ConfigProblem for what goes wrong within the block, short of memory."""
    try:
        yield
    except (RuntimeError, ValueError) as problem:
        if is_memory_problem(problem):
            raise
        raise ConfigProblem(f"{cannot} ({first_line(problem)}); {remedy}.") from problem


@torch.no_grad()
def _predictions(objective: Objective, z: Tensor) -> dict[str, Tensor]:
    critic, timesteps = objective.critic, objective.timesteps
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(PROBE_SEED)).to(z)
    asked = list(dict.fromkeys((timesteps.t_min, (timesteps.t_min + timesteps.t_max) // 2, timesteps.t_max)))
    levels = [float(critic.schedule.sigma(float(step))) for step in asked]
    plans = [critic.guidance.at(level, critic.percent_to_sigma, keep_base=True) for level in levels]
    found: dict[str, Tensor] = {}
    for name, source in _sources(critic).items():
        steps = [step for step, plan in zip(asked, plans) if name in OTHERS or source in plan.needed]
        if steps:
            t = torch.tensor(steps)
            z_t = critic.noisy(z.expand(len(t), -1, -1, -1), noise.expand(len(t), -1, -1, -1), t)
            made = critic.noise_prediction(source, z_t, t).cpu().split(1)
            found |= {f"{name} at timestep {step}": prediction for step, prediction in zip(steps, made)}
    return found


def check_opinion(objective: Objective, now: Mapping[str, Tensor], state: Mapping[str, Any], source: str) -> list[str]:
    """Raise ConfigProblem where a run began with other terms, or with a critic of another opinion.

    Smaller differences of the opinion come back as warnings. state: a checkpoint's; source: its file.
    """
    terms, before = describe_terms(objective.critic.guidance), state["terms"]
    if _nameless(terms) != _nameless(before):
        is_now, was = (json.dumps(found, ensure_ascii=False) for found in (terms, before))
        raise ConfigProblem(
            f"{source}: expected a run with the same guidance terms, found that they were {was} and are {is_now}; use "
            "the earlier ones, or start a new run."
        )
    warnings = []
    for name, earlier in state["origin"].items():
        if name not in now:
            continue  # of what the method does not ask for
        difference = relative_difference(now[name], earlier)
        _, at, t = name.partition(" at timestep ")
        largest = SAME_OPINION + (ROUNDING / objective.critic.schedule.sigma(float(t)) if at else 0.0)
        what = "diffusion model, VAE, prompts and terms"
        warnings += check_difference(difference, largest, what, name, source)
    return warnings


def _sources(critic: Critic) -> dict[str, Source]:
    """All that a critic can ask, by its part; a graph's terms and a configuration's may be called otherwise."""
    guidance = critic.guidance
    found = {"base": guidance.base} | {f"term {at}": term.source for at, term in enumerate(guidance.terms, 1)}
    others = (None if critic.source is None else critic.source.terms[-1].source, critic.unwanted)
    return found | {name: source for name, source in zip(OTHERS, others) if source is not None}


def describe_terms(guidance: Guidance) -> list[dict[str, Any]]:
    """The terms of a guidance as plain values: name, weight (`Weight.to_json`), reference, and shaping if any."""
    return [
        {"name": term.name, "weight": as_weight(term.weight).to_json(), "reference": term.reference or BASE}
        | ({"shaping": repr(term.shaping)} if term.shaping is not None else {})
        for term in guidance.terms
    ]


def _nameless(terms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Described terms that go by their places, which a graph and a configuration have in common."""
    places = {term["name"]: place for place, term in enumerate(terms, 1)}
    return [{**term, "name": None, "reference": places.get(term["reference"])} for term in terms]
