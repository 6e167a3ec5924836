"""A guidance as the critic of score distillation: noise predictions on the variance-preserving scale at timestep t.

Distillation is written in eps, z_t = sqrt(abar) z + sqrt(1 - abar) noise, guidance in denoised latents D(x; sigma) at
x = z_t / sqrt(abar). Every opinion is translated by e = (x - D) / sigma, so models of any prediction type, and any
combination of them (`combination`), can be the critic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batching import Piece, call_together, check_shape, in_few_calls, is_batched
from ..combination import Guidance, Step
from ..diffusion import NoiseSchedule
from ..presets import cfg
from ..schedules import GuidanceError, PercentToSigma
from ..terms import Source

__all__ = ["OPINIONS", "Ask", "Critic", "Prediction"]

OPINIONS = ("e", "e_u", "e_c", "e_unwanted", "e_source", "e_source_c")
"""What a critic can be asked for: the fields of a `Prediction`."""

PROMPTS = {
    "source": "a description of what the generator makes now",
    "unwanted": "a description of what images should not be, such as 'blurry, low quality, unrealistic'",
}
"""The prompts that some methods need beside the one to reach, in words for messages."""

PROMPT_OF = {"e_source": "source", "e_source_c": "source", "e_unwanted": "unwanted"}
"""Which of PROMPTS an opinion is about."""

_OF_GUIDANCE = frozenset({"e", "e_u", "e_c"})
_OF_SOURCE = frozenset({"e_source", "e_source_c"})


@dataclass(frozen=True)
class Ask:
    """One question to a critic: `needs`, a set of OPINIONS, on z_t [B, C, h, w] at timesteps t [B], whole numbers.

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
    below `Ask.unwanted_from`. e_source, e_source_c: guided and effective-condition predictions of the guidance that
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
    """One source on some rows of one question."""

    ask: int
    source: Source
    rows: list[int]


class Critic:
    """Noise predictions e(z_t, t) of a guidance (arXiv 2312.08195), without gradients through any model.

    guidance: what the generator is led towards; its models are callables `model(x, sigma [B], **cond) -> x0` and its
    conditionings dicts of their arguments, as for `MultiGuidance`. schedule: which noise level a timestep is. unwanted:
    the Source of e_unwanted (NFSD, CSD). source: a Guidance that describes what the generator makes now (DDS,
    SDS-Bridge). percent_to_sigma: the schedule's own unless given. max_batch: the most latents in one model call, None
    for no limit; one question's latents on one conditioning are never split, and `denoise_many` sets its own limits.

    All questions of a step are asked together (`predict_many`): each (model, conditioning, latents) is evaluated once,
    and all that fit together of one model run in one call. A model whose conditionings are not plain tensors may bring
    its own `denoise_many(jobs) -> list of x0`, jobs being (x, sigma, arguments) triples. `calls` and `samples` count
    model calls and the latents in them.
    """

    def __init__(
        self,
        guidance: Guidance,
        schedule: NoiseSchedule,
        *,
        unwanted: Source | None = None,
        source: Guidance | None = None,
        percent_to_sigma: PercentToSigma | None = None,
        max_batch: int | None = None,
    ) -> None:
        if not isinstance(guidance, Guidance):
            raise GuidanceError(f"Expected a critic to have a Guidance, got {type(guidance).__name__}.")
        if not isinstance(schedule, NoiseSchedule):
            raise GuidanceError(f"Expected a critic to have a NoiseSchedule, got {type(schedule).__name__}.")
        if max_batch is not None and max_batch < 1:
            raise GuidanceError(f"Expected max_batch to be at least 1, got {max_batch}.")
        sources = [*guidance.sources, *(source.sources if source else ()), *([unwanted] if unwanted else [])]
        for one in sources:
            if not callable(one.model):
                raise GuidanceError(f"Expected a critic's models to be callables, got {type(one.model).__name__}.")
            if one.cond is not None and not isinstance(one.cond, Mapping):
                raise GuidanceError(
                    f"Expected a critic's conditionings to be dicts or None, got {type(one.cond).__name__}."
                )
        self.guidance = guidance
        self.schedule = schedule
        self.unwanted = unwanted
        self.source = source
        self.percent_to_sigma = percent_to_sigma or schedule.percent_to_sigma
        self.max_batch = max_batch
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
        max_batch: int | None = None,
    ) -> Critic:
        """The critic of plain classifier-free guidance, e_u + s (e_c - e_u) (arXiv 2207.12598).

        denoiser: a `Denoiser`, or a callable `denoise(x, sigma, **cond) -> x0` with its `schedule`. scale: SGF's 100
        for SDS, 1 to 30 for the newer methods. unwanted, source: conditionings for those methods that use them.
        """
        schedule = schedule if schedule is not None else getattr(denoiser, "schedule", None)
        return cls(
            cfg(denoiser, uncond, cond, scale),
            schedule,
            unwanted=None if unwanted is None else Source(denoiser, unwanted),
            source=None if source is None else cfg(denoiser, uncond, source, scale),
            max_batch=max_batch,
        )

    def alphas_cumprod(self, t: Tensor, like: Tensor) -> Tensor:
        """abar at timesteps t [B], as float32 [B, 1, ...] that broadcasts against `like`."""
        return self.schedule.alphas_cumprod[self._whole(t)].to(like.device).reshape(-1, *[1] * (like.ndim - 1))

    def noisy(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = sqrt(abar) z + sqrt(1 - abar) noise (arXiv 2006.11239, eq. 4)."""
        abar = self.alphas_cumprod(t, z)
        return abar.sqrt() * z + (1 - abar).sqrt() * noise

    def predict(self, z_t: Tensor, t: Tensor, needs: Iterable[str] = ("e", "e_u", "e_c")) -> Prediction:
        """The opinions in `needs` on z_t [B, C, h, w] at timesteps t [B], in one call per model where possible."""
        return self.predict_many([Ask(z_t, t, frozenset(needs))])[0]

    def noise_prediction(self, source: Source, z_t: Tensor, t: Tensor) -> Tensor:
        """One source alone, e [B, C, h, w] in float32, with gradients to its model where autograd records."""
        plan = self._plan(Ask(z_t, t, frozenset()))
        ((_, output),) = self._run([plan.job(0, source, list(range(len(z_t))))])
        return plan.noise(output.to(plan.x.dtype))

    @torch.no_grad()
    def predict_many(self, asks: Sequence[Ask]) -> list[Prediction]:
        """Answer several questions at once; latents of one shape per model. Returns one Prediction per question.

        Raises GuidanceError for an unknown opinion, a prompt that the critic lacks, timesteps outside the
        schedule, and models that return another shape.
        """
        plans = [self._plan(ask) for ask in asks]
        jobs = [job for index, plan in enumerate(plans) for job in plan.jobs(index)]
        outputs: list[dict[Source, Tensor]] = [{} for _ in plans]
        for job, output in self._run(jobs):
            plan = plans[job.ask]
            output = output.to(plan.x.dtype)
            if len(job.rows) < len(plan.x):
                whole = torch.zeros_like(plan.x)
                whole[torch.tensor(job.rows, device=whole.device)] = output
                output = whole
            outputs[job.ask][job.source] = output
        return [plan.answer(predictions) for plan, predictions in zip(plans, outputs)]

    # -----------------------------------------------------------------------------------------------------------------

    def _whole(self, t: Tensor) -> Tensor:
        steps = t.detach().cpu().long().reshape(-1)
        if len(steps) and not 0 <= int(steps.min()) <= int(steps.max()) < len(self.schedule):
            raise GuidanceError(
                f"Expected timesteps from 0 to {len(self.schedule) - 1}, got {int(steps.min())} to {int(steps.max())}."
            )
        return steps

    def check(self, needs: Iterable[str], whose: str = "this method") -> None:
        """Raise GuidanceError where one of `needs` is no opinion, or is about a prompt that this critic lacks."""
        for opinion in needs:
            if opinion not in OPINIONS:
                raise GuidanceError(f"Expected opinions among {', '.join(OPINIONS)}, got {opinion!r}.")
            prompt = PROMPT_OF.get(opinion)
            if prompt is not None and getattr(self, prompt) is None:
                raise GuidanceError(
                    f"Expected {PROMPTS[prompt]}, for {whose}, got a critic without one; give the critic `{prompt}`."
                )

    def _plan(self, ask: Ask) -> _Plan:
        self.check(ask.needs)
        steps = self._whole(ask.t)
        if len(steps) != len(ask.z_t):
            raise GuidanceError(f"Expected one timestep for each of {len(ask.z_t)} latents, got {len(steps)}.")
        levels = self.schedule.sigmas[steps].tolist()
        abar = self.alphas_cumprod(steps, ask.z_t)
        # In float32 whatever the models' precision: e is a difference of two nearly equal numbers over sigma.
        x = ask.z_t.to(torch.promote_types(ask.z_t.dtype, torch.float32)) / abar.sqrt()
        return _Plan(self, ask, x, levels)

    def _run(self, jobs: Sequence[_Job]) -> Iterable[tuple[_Job, Tensor]]:
        by_model: dict[int, list[_Job]] = {}
        for job in jobs:
            by_model.setdefault(id(job.source.model), []).append(job)
        for own in by_model.values():
            model = own[0].source.model
            many = getattr(model, "denoise_many", None)
            for call in [own] if callable(many) else in_few_calls(own, self.max_batch):
                self.calls += 1
                self.samples += sum(len(job.rows) for job in call)
                if callable(many):
                    outputs = list(many([(job.x, job.sigma, job.arguments) for job in call]))
                else:
                    outputs = call_together(model, call)
                for job, output in zip(call, outputs):
                    check_shape(output, job.x)
                    yield job, output


class _Plan:
    """What one question needs at its noise levels, and how the answers combine."""

    def __init__(self, critic: Critic, ask: Ask, x: Tensor, levels: list[float]) -> None:
        self.critic, self.needs, self.x, self.levels = critic, ask.needs, x, levels
        self.unwanted = [int(t) >= ask.unwanted_from for t in ask.t.reshape(-1).tolist()]
        self.sigma = torch.tensor(levels, dtype=torch.float32, device=x.device)
        self.of_guidance = self._steps(critic.guidance, _OF_GUIDANCE, {"e_u", "e_c"})
        self.of_source = self._steps(critic.source, _OF_SOURCE, {"e_source_c"})

    def _steps(self, guidance: Guidance | None, own: frozenset[str], of_base: set[str]) -> dict[float, Step]:
        if guidance is None or not self.needs & own:
            return {}
        keep_base = bool(self.needs & of_base)
        to_sigma = self.critic.percent_to_sigma
        return {level: guidance.at(level, to_sigma, keep_base) for level in dict.fromkeys(self.levels)}

    def jobs(self, index: int) -> list[_Job]:
        rows: dict[Source, list[int]] = {}
        for row, level in enumerate(self.levels):
            needed: dict[Source, None] = {}
            if self.of_guidance:
                # e_u alone needs no term.
                terms = self.needs & {"e", "e_c"}
                needed |= dict.fromkeys(self.of_guidance[level].needed if terms else [self.critic.guidance.base])
            if self.of_source:
                needed |= dict.fromkeys(self.of_source[level].needed)
            if "e_unwanted" in self.needs and self.unwanted[row]:
                needed[self.critic.unwanted] = None
            for source in needed:
                rows.setdefault(source, []).append(row)
        return [self.job(index, source, chosen) for source, chosen in rows.items()]

    def job(self, index: int, source: Source, rows: list[int]) -> _Job:
        batch = len(self.x)
        whole = len(rows) == batch
        chosen = None if whole else torch.tensor(rows, device=self.x.device)
        x, sigma = (self.x, self.sigma) if whole else (self.x[chosen], self.sigma[chosen])
        arguments = dict(source.cond or {})
        for key, value in arguments.items():
            if not is_batched(value):
                continue
            if value.shape[0] == 1:
                arguments[key] = value.expand(len(rows), *value.shape[1:])
            elif value.shape[0] != batch:
                raise GuidanceError(
                    f"Expected the tensor {key!r} of a conditioning to have a first dimension of 1 or {batch}, one "
                    f"per latent, got shape {list(value.shape)}."
                )
            elif not whole:
                arguments[key] = value[chosen.to(value.device)]
        return _Job(x, sigma, arguments, index, source, rows)

    def answer(self, predictions: Mapping[Source, Tensor]) -> Prediction:
        critic, needs = self.critic, self.needs
        found: dict[str, Tensor] = {}
        if "e" in needs:
            found["e"] = self.noise(self._combined(self.of_guidance, predictions))
        if "e_u" in needs:
            found["e_u"] = self.noise(predictions[critic.guidance.base])
        if "e_c" in needs:
            condition, found["scale"] = self._effective(self.of_guidance, predictions)
            found["e_c"] = self.noise(condition)
        if "e_unwanted" in needs:
            rows = torch.tensor(self.unwanted, device=self.x.device)
            found["e_unwanted"] = torch.full_like(self.x, math.nan)
            if any(self.unwanted):
                found["e_unwanted"][rows] = self.noise(predictions[critic.unwanted])[rows]
        if "e_source" in needs:
            found["e_source"] = self.noise(self._combined(self.of_source, predictions))
        if "e_source_c" in needs:
            found["e_source_c"] = self.noise(self._effective(self.of_source, predictions)[0])
        return Prediction(**found)

    def noise(self, denoised: Tensor) -> Tensor:
        return (self.x - denoised) / self._wide(self.sigma)

    def _wide(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (self.x.ndim - 1))

    def _groups(self, steps: Mapping[float, Step]) -> list[tuple[Step, list[int]]]:
        """Rows whose guidance is the same, with it."""
        # By weights: steps of one `recipe` combine alike, yet may differ in the sum of weights, which is `scale`.
        groups: dict[tuple, tuple[Step, list[int]]] = {}
        for row, level in enumerate(self.levels):
            step = steps[level]
            groups.setdefault(tuple(step.weights.values()), (step, []))[1].append(row)
        return list(groups.values())

    def _combined(self, steps: Mapping[float, Step], predictions: Mapping[Source, Tensor]) -> Tensor:
        result = torch.empty_like(self.x)
        for step, rows in self._groups(steps):
            own, index = self._of_rows(step, rows, predictions)
            result[index] = step.combine(own)
        return result

    def _effective(self, steps: Mapping[float, Step], predictions: Mapping[Source, Tensor]) -> tuple[Tensor, Tensor]:
        result, scales = torch.empty_like(self.x), torch.empty_like(self.sigma)
        for step, rows in self._groups(steps):
            own, index = self._of_rows(step, rows, predictions)
            result[index], _, scale = step.effective(own)
            scales[index] = scale
        return result, self._wide(scales)

    def _of_rows(
        self, step: Step, rows: list[int], predictions: Mapping[Source, Tensor]
    ) -> tuple[dict[Source, Tensor], Tensor]:
        index = torch.tensor(rows, device=self.x.device)
        if len(rows) == len(self.x):
            return {source: predictions[source] for source in step.needed}, index
        return {source: predictions[source][index] for source in step.needed}, index
