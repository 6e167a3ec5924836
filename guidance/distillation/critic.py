"""A guidance as the critic of score distillation: noise predictions on the variance-preserving scale at timestep t.

Distillation is written in eps, z_t = sqrt(abar) z + sqrt(1 - abar) noise, guidance in denoised latents D(x; sigma) at
x = z_t / sqrt(abar). Every prediction is translated by e = (x - D) / sigma, so models of any prediction type, and any
combination of them (`combination`), can be the critic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batching import Piece, evaluate, for_rows
from ..combination import Guidance, Step
from ..diffusion import NoiseSchedule
from ..errors import GuidanceError
from ..presets import cfg
from ..schedules import PercentToSigma
from ..terms import Source

PREDICTIONS = ("e", "e_u", "e_c", "e_unwanted", "e_source", "e_source_c")
"""What a critic can be asked for: the fields of a `Prediction`."""

PROMPTS = {
    "source": "a description of what the generator makes now",
    "unwanted": "a description of what images should not be, such as 'blurry, low quality, unrealistic'",
}
"""The prompts that some methods need beside the one to reach, in words for messages."""

PROMPT_OF = {"e_source": "source", "e_source_c": "source", "e_unwanted": "unwanted"}
"""Which of PROMPTS a prediction is about."""

_OF_GUIDANCE = frozenset({"e", "e_u", "e_c"})
_OF_SOURCE = frozenset({"e_source", "e_source_c"})


@dataclass(frozen=True)
class Request:
    """What is asked of a critic: `needs`, some of PREDICTIONS, on z_t [B, C, h, w] at timesteps t [B], whole numbers.

    unwanted_from: e_unwanted is evaluated only for samples at this timestep or later; 0: for all.
    """

    z_t: Tensor
    t: Tensor
    needs: frozenset[str] = _OF_GUIDANCE
    unwanted_from: int = 0


class Prediction:
    """Noise predictions [B, C, h, w] in float32; reading one that was not asked for raises GuidanceError.

    e: the guided prediction. e_u: the base's. e_c: that of the effective condition, e = e_u + scale (e_c - e_u), with
    `scale` [B, 1, 1, 1] the sum of the terms' weights. e_unwanted: on the critic's unwanted prompt, NaN for samples
    below `Request.unwanted_from`. e_source, e_source_c: guided and effective-condition predictions of the guidance that
    describes the source.
    """

    e: Tensor
    e_u: Tensor
    e_c: Tensor
    scale: Tensor
    e_unwanted: Tensor
    e_source: Tensor
    e_source_c: Tensor

    def __init__(self, **found: Tensor) -> None:
        vars(self).update(found)

    def __getattr__(self, name: str) -> Tensor:
        if name in Prediction.__annotations__:
            raise GuidanceError(f"Expected the prediction {name}, found that nobody asked for it; name it in `needs`.")
        raise AttributeError(name)


@dataclass(frozen=True, eq=False)
class _Job(Piece):
    """One source on some rows of one request."""

    request: int
    rows: list[int]


class Critic:
    """Noise predictions e(z_t, t) of a guidance (arXiv 2312.08195), without gradients through any model.

    guidance: what the generator is led towards; its models are callables `model(x, sigma [B], **cond) -> x0` and its
    conditionings dicts of their arguments, as for `MultiGuidance`. schedule: which noise level a timestep is. unwanted:
    the Source of e_unwanted (NFSD, CSD). source: a Guidance that describes what the generator makes now (DDS,
    SDS-Bridge). percent_to_sigma: the schedule's own unless given.

    All requests of a step are answered together (`predict_many`): each (model, conditioning, latents) is evaluated
    once, and all that fit together of one model run in one call. A model whose conditionings are not plain tensors may
    bring its own `denoise_many(jobs) -> list of x0`, jobs being (x, sigma, arguments) triples. `calls` and `samples`
    count model calls and the latents in them.
    """

    def __init__(
        self,
        guidance: Guidance,
        schedule: NoiseSchedule,
        *,
        unwanted: Source | None = None,
        source: Guidance | None = None,
        percent_to_sigma: PercentToSigma | None = None,
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise GuidanceError(f"Expected a critic to have a NoiseSchedule, got {type(schedule).__name__}.")
        for each in (*guidance.sources, *(source.sources if source else ()), *([unwanted] if unwanted else [])):
            each.check_callable("a critic")
        self.guidance = guidance
        self.schedule = schedule
        self.unwanted = unwanted
        self.source = source
        self.percent_to_sigma = percent_to_sigma or schedule.percent_to_sigma
        self.calls = 0
        self.samples = 0

    @classmethod
    def cfg(
        cls,
        denoiser: Any,
        uncond: Mapping[str, Any] | None,
        cond: Mapping[str, Any] | None,
        scale: float = 7.5,
        *,
        schedule: NoiseSchedule | None = None,
        unwanted: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> Critic:
        """The critic of plain classifier-free guidance, e_u + s (e_c - e_u) (arXiv 2207.12598).

        denoiser: a `Denoiser`, or a callable `denoise(x, sigma, **cond) -> x0` with its `schedule`. scale: SGF's 100
        for SDS, 1 to 30 for the newer methods. unwanted, source: conditionings for those methods that use them.
        """
        return cls(
            cfg(denoiser, uncond, cond, scale),
            schedule if schedule is not None else getattr(denoiser, "schedule", None),  # pyright: ignore[reportArgumentType]
            unwanted=None if unwanted is None else Source(denoiser, unwanted),
            source=None if source is None else cfg(denoiser, uncond, source, scale),
        )

    def alphas_cumprod(self, t: Tensor, like: Tensor) -> Tensor:
        """abar at timesteps t [B], as float32 [B, 1, ...] that broadcasts against `like`."""
        return self.schedule.alphas_cumprod[self._whole(t)].to(like.device).reshape(-1, *[1] * (like.ndim - 1))

    def noisy(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar) z + sqrt(1 - abar) noise (arXiv 2006.11239, eq. 4)."""
        abar = self.alphas_cumprod(t, z)
        return abar.sqrt() * z + (1 - abar).sqrt() * noise

    def check(self, needs: Iterable[str], whose: str = "this method") -> None:
        """Raise GuidanceError for what is no prediction, and for one about a prompt that this critic lacks."""
        for name in needs:
            if name not in PREDICTIONS:
                raise GuidanceError(f"Expected predictions among {', '.join(PREDICTIONS)}, got {name!r}.")
            prompt = PROMPT_OF.get(name)
            if prompt is not None and getattr(self, prompt) is None:
                raise GuidanceError(f"Expected {PROMPTS[prompt]}, for {whose}; give the critic `{prompt}`.")

    def predict(self, z_t: Tensor, t: Tensor, needs: Iterable[str] = ("e", "e_u", "e_c")) -> Prediction:
        """The predictions in `needs` on z_t [B, C, h, w] at timesteps t [B], in one call per model where possible."""
        return self.predict_many([Request(z_t, t, frozenset(needs))])[0]

    def noise_prediction(self, source: Source, z_t: Tensor, t: Tensor) -> Tensor:
        """One source alone, e [B, C, h, w] in float32, with gradients to its model where autograd records."""
        plan = _Plan(self, Request(z_t, t, frozenset()))
        ((_, output),) = self._run([plan.job(0, source, list(range(len(z_t))))])
        return plan.noise(output)

    @torch.no_grad()
    def predict_many(self, requests: Sequence[Request]) -> list[Prediction]:
        """Answer several requests at once; latents of one shape per model. Returns one Prediction per request.

        Raises GuidanceError for unknown predictions, a prompt that the critic lacks, timesteps outside the schedule,
        and models that return another shape.
        """
        plans = [_Plan(self, request) for request in requests]
        jobs = [job for index, plan in enumerate(plans) for job in plan.jobs(index)]
        denoised: list[dict[Source, Tensor]] = [{} for _ in plans]
        for job, output in self._run(jobs):
            denoised[job.request][job.source] = plans[job.request].spread(output, job.rows)
        return [plan.answer(own) for plan, own in zip(plans, denoised)]

    def _whole(self, t: Tensor) -> Tensor:
        """Timesteps as whole numbers on the CPU. Raises GuidanceError for those outside the schedule."""
        steps = t.detach().cpu().long().reshape(-1)
        if len(steps) and not 0 <= int(steps.min()) <= int(steps.max()) < len(self.schedule):
            raise GuidanceError(f"Expected timesteps from 0 to {len(self.schedule) - 1}, got others: {steps.tolist()}.")
        return steps

    def _run(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Tensor]]:
        """Every job with its x0, in as few calls of each model as possible."""
        for call in evaluate(jobs):
            self.calls += 1
            self.samples += sum(len(job.rows) for job, _ in call)
            yield from call


class _Plan:
    """What one request needs at its noise levels, and how the answers combine; rows are its samples."""

    def __init__(self, critic: Critic, request: Request) -> None:
        critic.check(request.needs)
        steps = critic._whole(request.t)
        if len(steps) != len(request.z_t):
            raise GuidanceError(f"Expected one timestep for each of {len(request.z_t)} latents, got {len(steps)}.")
        self.critic, self.needs = critic, request.needs
        # In float32 whatever the models' precision: e is a difference of two nearly equal numbers over sigma.
        z_t = request.z_t.to(torch.promote_types(request.z_t.dtype, torch.float32))
        self.x = z_t / critic.alphas_cumprod(steps, z_t).sqrt()
        self.sigma = critic.schedule.sigmas[steps].to(self.x.device)
        self.repelled = [t >= request.unwanted_from for t in steps.tolist()] if "e_unwanted" in self.needs else []
        self.of_guidance = self._steps(critic.guidance, _OF_GUIDANCE, {"e_u", "e_c"})
        self.of_source = self._steps(critic.source, _OF_SOURCE, {"e_source_c"})

    def _steps(self, guidance: Guidance | None, own: frozenset[str], of_base: set[str]) -> list[Step]:
        """The guidance at each row's noise level; empty where no prediction asks for it."""
        if guidance is None or not self.needs & own:
            return []
        keep_base, levels = bool(self.needs & of_base), self.sigma.tolist()
        steps = {level: guidance.at(level, self.critic.percent_to_sigma, keep_base) for level in dict.fromkeys(levels)}
        return [steps[level] for level in levels]

    def jobs(self, request: int) -> list[_Job]:
        """Each source that is needed, on the rows that need it."""
        rows: dict[Source, list[int]] = {}
        only_base = not self.needs & {"e", "e_c"}  # e_u alone needs no term
        for row in range(len(self.x)):
            needed: list[Source | None] = []
            if self.of_guidance:
                needed += [self.critic.guidance.base] if only_base else self.of_guidance[row].needed
            if self.of_source:
                needed += self.of_source[row].needed
            if self.repelled and self.repelled[row]:
                needed.append(self.critic.unwanted)
            for source in dict.fromkeys(needed):
                if source is not None:
                    rows.setdefault(source, []).append(row)
        return [self.job(request, source, chosen) for source, chosen in rows.items()]

    def job(self, request: int, source: Source, rows: list[int]) -> _Job:
        """One source on some rows: x, sigma and the conditioning cut to them."""
        batch = len(self.x)
        chosen = None if len(rows) == batch else torch.tensor(rows, device=self.x.device)
        x, sigma = (self.x, self.sigma) if chosen is None else (self.x[chosen], self.sigma[chosen])
        return _Job(source, x, sigma, for_rows(source.cond or {}, batch, chosen), request, rows)

    def spread(self, output: Tensor, rows: list[int]) -> Tensor:
        """x0 of some rows as [B, C, h, w], 0 in the others."""
        output = output.to(self.x.dtype)
        if len(rows) == len(self.x):
            return output
        whole = torch.zeros_like(self.x)
        whole[torch.tensor(rows, device=whole.device)] = output
        return whole

    def answer(self, denoised: Mapping[Source, Tensor]) -> Prediction:
        """The predictions that were asked for, from x0 of each source."""
        critic, needs = self.critic, self.needs
        found: dict[str, Tensor] = {}
        if "e" in needs:
            found["e"] = self._combined(self.of_guidance, denoised, Step.combine)
        if "e_u" in needs:
            found["e_u"] = self.noise(denoised[critic.guidance.base])
        if "e_c" in needs:
            found["e_c"] = self._combined(self.of_guidance, denoised, Step.effective_condition)
            found["scale"] = self._wide(self.sigma.new_tensor([step.scale for step in self.of_guidance]))
        if critic.unwanted is not None and "e_unwanted" in needs:
            found["e_unwanted"] = torch.full_like(self.x, math.nan)
            if any(self.repelled):
                rows = torch.tensor(self.repelled, device=self.x.device)
                found["e_unwanted"][rows] = self.noise(denoised[critic.unwanted])[rows]
        if "e_source" in needs:
            found["e_source"] = self._combined(self.of_source, denoised, Step.combine)
        if "e_source_c" in needs:
            found["e_source_c"] = self._combined(self.of_source, denoised, Step.effective_condition)
        return Prediction(**found)

    def noise(self, denoised: Tensor) -> Tensor:
        """e = (x - D) / sigma."""
        return (self.x - denoised.to(self.x.dtype)) / self._wide(self.sigma)

    def _wide(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (self.x.ndim - 1))

    def _combined(
        self,
        steps: Sequence[Step],
        denoised: Mapping[Source, Tensor],
        combine: Callable[[Step, Mapping[Source, Tensor]], Tensor],
    ) -> Tensor:
        """e of each row's step; rows with the same weights are combined together."""
        groups: dict[tuple[float, ...], list[int]] = {}
        for row, step in enumerate(steps):
            groups.setdefault(tuple(step.weights.values()), []).append(row)
        result = torch.empty_like(self.x)
        for rows in groups.values():
            step, index = steps[rows[0]], torch.tensor(rows, device=self.x.device)
            result[index] = combine(step, {source: denoised[source][index] for source in step.needed})
        return self.noise(result)
