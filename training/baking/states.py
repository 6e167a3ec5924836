"""Noisy latents to match a guidance on: noised pictures, the prior's own samples, and states of guided sampling.

Drawing is a function of (seed, step) alone, so that a run that goes on repeats the very same steps. What the prior
draws itself is drawn once, when the run begins, and kept in the run's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...guidance.files import FileProblem, read_metadata, read_state_dict, write_safetensors
from ...guidance.presets import cfg
from ...guidance.sampling import sample, sigmas_uniform
from ..data.latent_dataset import LatentDataset
from ..data.problems import Cancelled
from ..domain.learner import drawn
from ..domain.losses import abar_at, add_noise, draw_noise, draw_timestep
from ..domain.previews import METHOD
from ..engine.randomness import BatchPlan, sample_generator
from ..prior.prior import ImageSize, Prior
from .config import BakeConfig
from .prompts import EncodedTexts
from .teacher import Teacher

OWN_SCALE = 3.0  # of the prior's classifier-free guidance, which draws its own samples


@dataclass(frozen=True)
class Batch:
    """Latents of one shape to be matched, on the CPU.

    noisy [B, C, h, w] of unit variance at whole timesteps [B]; places [B]: which prompt each is matched at, 0 the empty
    one; sizes: what SDXL is told.
    """

    noisy: Tensor
    timesteps: Tensor
    places: Tensor
    sizes: tuple[ImageSize, ...]

    @classmethod
    def joined(cls, parts: Sequence[Batch]) -> list[Batch]:
        """The parts in as few batches as their shapes allow."""
        shapes: dict[torch.Size, list[Batch]] = {}
        for part in parts:
            shapes.setdefault(part.noisy.shape[1:], []).append(part)
        return [
            cls(
                torch.cat([part.noisy for part in some]),
                torch.cat([part.timesteps for part in some]),
                torch.cat([part.places for part in some]),
                tuple(size for part in some for size in part.sizes),
            )
            for some in shapes.values()
        ]

    def split(self, size: int) -> list[Batch]:
        """The same in batches of at most so many latents."""
        starts = range(0, len(self.noisy), size)
        return [
            Batch(
                self.noisy[at : at + size],
                self.timesteps[at : at + size],
                self.places[at : at + size],
                self.sizes[at : at + size],
            )
            for at in starts
        ]


@dataclass(frozen=True, eq=False)
class OwnSamples:
    """What the prior drew. latents: scaled samples [N, C, h, w] ("own") or states of unit variance ("trajectories").

    places [N]: the prompt of each; timesteps [N]: whole ones of states, -1 for samples; size: in pixels.
    """

    latents: Tensor
    places: Tensor
    timesteps: Tensor
    size: ImageSize


class States:
    """All states of a run: `batches(step)` are those of one process's share of a step.

    dataset: the pictures, None without; own: by kind. texts: the prompts. Of one step every kind has an equal part.
    """

    def __init__(
        self,
        config: BakeConfig,
        prior: Prior,
        texts: EncodedTexts,
        dataset: LatentDataset | None,
        own: Mapping[str, OwnSamples],
        prompts: Sequence[str] = (),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.config, self.prior, self.texts, self.dataset, self.own = config, prior, texts, dataset, own
        self.prompts, self.rank, self.world = tuple(prompts), rank, world
        share, rest = divmod(config.batch_size, len(config.states))
        self._plans: dict[str, BatchPlan] = {}
        for number, kind in enumerate(config.states):
            groups = self._groups(kind)
            self._plans[kind] = BatchPlan(config.seed + number, groups, share + (number < rest))

    def _groups(self, kind: str) -> list[list[int]]:
        if kind == "pictures":
            assert self.dataset is not None
            return list(self.dataset.groups.values())
        return [list(range(len(self.own[kind].latents)))]

    def batches(self, step: int) -> list[Batch]:
        """What this process matches at optimizer step `step` (0 is the first)."""
        return Batch.joined(list(self._parts(step)))

    def _parts(self, step: int) -> Iterator[Batch]:
        position = 0
        for kind, plan in self._plans.items():
            found = []
            for draw in plan.batch_for(step):
                if position % self.world == self.rank:
                    generator = draw.generator(self.config.seed, f"match/{kind}")
                    found.append(self._draw(kind, draw.index, generator))
                position += 1
            if found:
                noisy, timesteps, places, sizes = zip(*found)
                yield Batch(torch.stack(noisy), torch.tensor(timesteps), torch.tensor(places), sizes)

    def names_at(self, step: int) -> list[str]:
        """The pictures of a step, as messages call them."""
        dataset, plan = self.dataset, self._plans.get("pictures")
        return [] if dataset is None or plan is None else [dataset.name_of(draw.index) for draw in plan.batch_for(step)]

    def _draw(self, kind: str, index: int, generator: torch.Generator) -> tuple[Tensor, int, int, ImageSize]:
        """(noisy latent [C, h, w], timestep, place of its prompt, size) of one state."""
        config, schedule = self.config, self.prior.schedule
        emptied = float(torch.rand((), generator=generator)) < config.empty_share or not len(self.texts)
        if kind == "pictures":
            assert self.dataset is not None
            place = 0 if emptied else int(torch.randint(1, len(self.texts) + 1, (), generator=generator))
            picture = drawn(self.dataset, index, generator)
            latent, size = picture.latent.float(), ImageSize(picture.original, picture.crop, picture.size)
        else:
            own = self.own[kind]
            place, latent, size = 0 if emptied else int(own.places[index]), own.latents[index], own.size
            if kind == "trajectories":
                return latent, int(own.timesteps[index]), place, size
        timestep = draw_timestep(generator, len(schedule), config.noisy_share)
        noise = draw_noise(generator, tuple(latent.shape))
        abar = abar_at(schedule, torch.tensor([timestep]))
        return add_noise(latent[None], noise[None], abar)[0], timestep, place, size


@torch.no_grad()
def draw_own(
    config: BakeConfig,
    texts: EncodedTexts,
    teacher: Teacher,
    kind: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> OwnSamples:
    """Samples of the prior at the run's prompts ("own"), or every state on the way of guided ones ("trajectories").

    Guided ones have the weight of the prompt that the baked model will be sampled with (`config.control_weight`), also
    where that is no part of the target. Sample n depends on the seed and n alone. Raises Cancelled when should_stop()
    asks to stop.
    """
    prior, side = teacher.prior, config.resolution
    size, sigmas = ImageSize((side, side)), sigmas_uniform(prior.schedule, config.own_steps).float()
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, config.own_count, config.batch_size):
        numbers = range(start, min(start + config.batch_size, config.own_count))
        generators = [sample_generator(config.seed, 0, number, f"own/{kind}") for number in numbers]
        places = torch.tensor([number % len(texts) + 1 if len(texts) else 0 for number in numbers])
        shape = (prior.latent_channels, side // prior.factor, side // prior.factor)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        sizes = [size] * len(numbers)
        empty, prompted = texts.pair(sizes, places, teacher.device)
        if kind == "trajectories":
            guidance = teacher.guidance(empty, prompted, sizes, config.control_weight)
        else:
            guidance = cfg(teacher.before, empty, prompted, OWN_SCALE)
        states: list[tuple[Tensor, float]] = []

        def note(step: dict, states: list = states) -> None:
            states.append((step["x"].cpu(), step["sigma"]))
            if should_stop():
                raise Cancelled

        samples = sample(teacher.guided(guidance), noise.to(teacher.device), sigmas, METHOD, note).cpu()
        if kind == "own":
            kept.append((samples, places, torch.full_like(places, -1)))
        for x, sigma in states if kind == "trajectories" else ():
            timestep = int(prior.schedule.timestep(torch.tensor(sigma), nearest=True))
            kept.append((x / (1 + sigma**2) ** 0.5, places, torch.full_like(places, timestep)))
        progress(numbers.stop, config.own_count)
    latents, places, timesteps = (torch.cat(parts) for parts in zip(*kept))
    return OwnSamples(latents, places, timesteps, size)


def keep_own(path: Path, own: OwnSamples, made_of: str) -> None:
    """Write what the prior drew; made_of: a digest of what it was drawn from."""
    tensors = {"latents": own.latents, "places": own.places, "timesteps": own.timesteps}
    write_safetensors(path, tensors, {"made_of": made_of})


def kept_own(path: Path, made_of: str, size: ImageSize) -> OwnSamples | None:
    """What the prior drew for this run before; None where there is nothing, or something made of other things."""
    try:
        if read_metadata(path).get("made_of") != made_of:
            return None
        found = read_state_dict(path)
        return OwnSamples(found["latents"], found["places"], found["timesteps"], size)
    except (FileProblem, KeyError):
        return None
