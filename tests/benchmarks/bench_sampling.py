"""What multi-guidance costs: ``python run.py bench sampling [--quick]``, one JSON object a line on standard output.

    in_domain_step   one step of the In-Domain Guider (the prior's two conditionings in one batch, the `constant` domain
                     model) over prior(u), prior(c) and domain called one by one at batch 1, as the code released with
                     arXiv 2312.08195 does; SD 1.5, random weights
    guider           what the guider adds to a step: over core's calc_cond_batch with a UNet that does nothing, and over
                     core's DualCFGGuider on the mini world
    unet_forward     the text-free forms over the full UNet, SD 1.5 and SDXL's block shapes
    samples_per_step predictions per image and step for each preset and for intervals
    import           the pack on top of torch and ComfyUI
    memory           peak main memory of separate processes

Times are interleaved, ratios are medians over pairs, "interval" holds their median with 95 % confidence.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .reporting import Benchmark, Report, interleave, peak_memory, say

HERE = Path(__file__).resolve()
CHECKOUT = HERE.parents[2]
SIGMA = 2.0
DOMAIN_WEIGHT = CONTROL_WEIGHT = 2.5


@dataclass(frozen=True)
class Plan:
    """How much to measure. Budgets are seconds after which a measurement stops, with at least three pairs."""

    pairs: int
    step_sizes: tuple[tuple[int, float], ...]  # (latent height and width, budget)
    forward_sizes: tuple[tuple[int, float], ...]
    sdxl_sizes: tuple[tuple[int, float], ...]
    no_op_pairs: int
    runs: int
    run_steps: int
    imports: int
    memory_of_steps: bool
    memory_of_forms: tuple[str, ...] = ("full", "constant", "cached")
    tiny: bool = False


FULL = Plan(
    pairs=24,
    step_sizes=((32, math.inf), (64, math.inf)),
    forward_sizes=((32, math.inf), (64, math.inf)),
    sdxl_sizes=((64, math.inf), (128, 1800.0)),
    no_op_pairs=1000,
    runs=40,
    run_steps=20,
    imports=9,
    memory_of_steps=True,
)
# Meant to stay below ten minutes on two cores, building the models and starting processes included: at 64x64 three
# pairs alone would take three of them.
QUICK = Plan(
    pairs=20,
    step_sizes=((32, 150.0),),
    forward_sizes=((32, 70.0),),
    sdxl_sizes=((64, 45.0),),
    no_op_pairs=300,
    runs=20,
    run_steps=10,
    imports=5,
    memory_of_steps=False,
)
# Shows that everything runs, in seconds. The numbers mean nothing, and their names say so.
TINY = Plan(
    pairs=3,
    step_sizes=((8, math.inf),),
    forward_sizes=((8, math.inf),),
    sdxl_sizes=((8, math.inf),),
    no_op_pairs=5,
    runs=2,
    run_steps=2,
    imports=1,
    memory_of_forms=("full",),
    memory_of_steps=False,
    tiny=True,
)


# --------------------------------------------------------------------------------------------------- (a) in-domain step


def inside_run(guider: Any, size: int, body: Callable[[Any, dict], None]) -> None:
    """Start a sampling run of `guider` and call body(guider, arguments of a prediction) in the place of the sampler."""
    import comfy.samplers
    import torch

    class Once(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            body(model_wrap, extra_args)
            return torch.zeros_like(noise)

    latent = torch.zeros(1, 4, size, size)
    with torch.inference_mode():
        guider.sample(latent, latent, Once(), torch.tensor([SIGMA, 0.0]), seed=0, disable_pbar=True)


def step_contestants(
    guider: Any, extra: dict, domain: Any, contexts: tuple, size: int, seed: int
) -> dict[str, Callable]:
    """One in-domain step, by the guider and one by one; both return x0 [1, 4, size, size]."""
    import torch

    prior = guider.model_patcher.model
    device = guider.model_patcher.load_device
    x = (torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed)) * SIGMA).to(device)
    sigma = torch.full((1,), SIGMA, device=device)
    uncond, cond = (context.to(device) for context in contexts)

    def one_by_one():
        base = prior.apply_model(x, sigma, c_crossattn=uncond)
        control = prior.apply_model(x, sigma, c_crossattn=cond)
        own = domain.model.apply_model(x, sigma, c_crossattn=uncond)
        return base + DOMAIN_WEIGHT * (own - base) + CONTROL_WEIGHT * (control - base)

    return {"one by one": one_by_one, "guider": lambda: guider(x, sigma, **extra)}


def check_equal(results: dict[str, Any], tolerance: float, what: str) -> None:
    """Contestants must do the same work. Raises RuntimeError when their results differ."""
    (first, expected), *others = results.items()
    for name, result in others:
        error = float((result - expected).abs().max() / expected.abs().max())
        if not error < tolerance:
            raise RuntimeError(f"{what}: expected '{name}' to compute what '{first}' does, relative error {error:.2g}")


def in_domain_models(config: Any, seed: int, weight_dtype: str = "default") -> tuple[Any, Any, Any, tuple]:
    """(guider, prior, domain model, (empty prompt, prompt))."""
    from . import comfy_models

    contexts = tuple(comfy_models.random_context(config, seed + i) for i in range(2))
    prior = comfy_models.prior_model(config, seed, weight_dtype)
    domain = comfy_models.domain_model(prior, config, seed, weight_dtype)
    negative, positive = ([[context, {}]] for context in contexts)
    guider = comfy_models.internals("guiding.guider").in_domain_guider(
        prior, domain, positive, negative, DOMAIN_WEIGHT, CONTROL_WEIGHT
    )
    return guider, prior, domain, contexts


def bench_steps(
    report: Report, plan: Plan, models: tuple, label: str, target: dict[int, float], tolerance: float
) -> None:
    import torch

    guider, prior, domain, contexts = models
    finish = torch.cuda.synchronize if guider.model_patcher.load_device.type == "cuda" else lambda: None
    for size, budget in plan.step_sizes:
        what = f"in_domain_step/{label}/{size}x{size}"

        def body(running: Any, extra: dict) -> None:
            contestants = step_contestants(running, extra, domain, contexts, size, report.seed)
            batches: list[int] = []
            watch = prior.model.diffusion_model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
            results = {name: contestant() for name, contestant in contestants.items()}
            watch.remove()
            check_equal(results, tolerance, what)
            if batches != [1, 1, 2]:
                say(f"  {what}: no room for the prior's two conditionings in one batch, ran {batches[2:]}")
            times = interleave(contestants, plan.pairs, budget_s=budget, finish=finish, what=what)
            report.median(
                what,
                times.ratios("guider", "one by one"),
                "ratio",
                target=target.get(size),
                guider_s=times.median("guider"),
                one_by_one_s=times.median("one by one"),
            )

        inside_run(guider, size, body)


# ------------------------------------------------------------------------------------------------ (c) text-free forward


def bench_forward(
    report: Report, plan: Plan, weights: dict, config: Any, label: str, sizes: tuple[tuple[int, float], ...]
) -> None:
    """Text-free forms over the full UNet at batch 1. They share the prior's weights, so only their own work differs."""
    import torch

    from . import comfy_models

    unets = {
        "full": comfy_models.bare_unet(weights, config),
        "constant": comfy_models.bare_unet(*comfy_models.constant_form(weights, config, report.seed)),
        "cached": comfy_models.bare_unet(*comfy_models.cached_form(weights, config, report.seed)),
    }
    for size, budget in sizes:
        inputs = comfy_models.unet_inputs(config, size, report.seed)
        what = f"unet_forward/{label}/{size}x{size}"
        with torch.inference_mode():
            # On this context the cached form is the prior, so the two must agree.
            full, cached = (unets[name](**inputs) for name in ("full", "cached"))
            check_equal({"full": full, "cached": cached}, 1e-3, what)
            contestants = {name: (lambda unet=unet: unet(**inputs)) for name, unet in unets.items()}
            times = interleave(contestants, plan.pairs, budget_s=budget, what=what)
        for form, target in (("constant", 0.97), ("cached", None)):
            report.median(
                f"{what}/{form}",
                times.ratios(form, "full"),
                "ratio",
                target=target,
                full_s=times.median("full"),
                text_free_s=times.median(form),
            )


def part_sd15(report: Report, plan: Plan) -> None:
    from . import comfy_models

    comfy_models.comfyui()
    config = comfy_models.TINY if plan.tiny else comfy_models.SD15
    models = in_domain_models(config, report.seed)
    bench_steps(report, plan, models, "sd15_cpu_fp32", {32: 0.92}, tolerance=1e-3)
    weights = dict(models[1].model.diffusion_model.state_dict())
    bench_forward(report, plan, weights, config, "sd15", plan.forward_sizes)


def part_sdxl(report: Report, plan: Plan) -> None:
    from . import comfy_models

    comfy_models.comfyui()
    config = comfy_models.TINY if plan.tiny else comfy_models.SDXL_BLOCKS
    weights = comfy_models.random_weights(config, report.seed)
    bench_forward(report, plan, weights, config, "sdxl_blocks", plan.sdxl_sizes)


def part_cuda(report: Report, plan: Plan) -> None:
    """The in-domain step in fp16 on the GPU, in a process of its own: ComfyUI decides once where it runs."""
    import torch

    if not torch.cuda.is_available():
        say("  no CUDA device at hand")
        return
    BENCHMARK.forward(report, plan, "cuda")


def child_cuda(report: Report, plan: Plan, arguments: list[str]) -> None:
    from . import comfy_models

    comfy_models.comfyui(cpu=False)
    config = comfy_models.TINY if plan.tiny else comfy_models.SD15
    models = in_domain_models(config, report.seed, "fp16")
    bench_steps(report, plan, models, "sd15_cuda_fp16", {32: 0.85}, tolerance=5e-2)


# -------------------------------------------------------------------------------------------------- (b) guider overhead


def part_guider(report: Report, plan: Plan) -> None:
    from . import comfy_models

    comfy_models.comfyui()
    bench_no_op(report, plan)
    bench_dual_cfg(report, plan)


def bench_no_op(report: Report, plan: Plan) -> None:
    """What the guider adds to a step of three samples when the models cost nothing.

    Against one calc_cond_batch call of three conditionings on one model; the guider has two models and so two calls.
    """
    import comfy.samplers
    import torch

    from . import comfy_models

    guider, prior, domain, _ = in_domain_models(comfy_models.TINY, report.seed)
    for patcher in (prior, domain):
        patcher.model.diffusion_model.forward = lambda x, *args, **kwargs: x
    size = 64

    def body(running: Any, extra: dict) -> None:
        x = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(report.seed)) * SIGMA
        sigma = torch.full((1,), SIGMA)
        options = extra["model_options"]
        conds = [running.conds[key] for key in ("positive", "negative", "negative")]
        model = running.inner_model
        contestants = {
            "calc_cond_batch": lambda: comfy.samplers.calc_cond_batch(model, conds, x, sigma, options),
            "guider": lambda: running(x, sigma, **extra),
        }
        times = interleave(contestants, plan.no_op_pairs, what="guider/over_calc_cond_batch", warm_up=10)
        report.median(
            "guider/over_calc_cond_batch",
            [1e3 * s for s in times.differences("guider", "calc_cond_batch")],
            "ms/step",
            target=2.0,
            guider_ms=1e3 * times.median("guider"),
            calc_cond_batch_ms=1e3 * times.median("calc_cond_batch"),
        )

    inside_run(guider, size, body)


def bench_dual_cfg(report: Report, plan: Plan) -> None:
    """Whole sampling runs on the mini world: the same three predictions of one model, combined by core and by us.

    Beside it, without a target, the In-Domain Guider, whose third prediction comes from a second model.
    """
    import comfy.sample
    import comfy.samplers
    import torch
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    from . import comfy_models

    guiders = comfy_models.internals("guiding.guider")
    if plan.tiny:
        _, prior, domain, _ = in_domain_models(comfy_models.TINY, report.seed)
        texts = [comfy_models.random_context(comfy_models.TINY, report.seed + i) for i in range(3)]
        positive, middle, negative = ([[text, {}]] for text in texts)
    else:
        loading = comfy_models.internals("models.loading")
        prior, clip, _ = loading.load_mini_world()
        domain = loading.load_domain_unet(
            str(comfy_models.internals("models.folders").DOMAIN_UNETS.shipped / "mini-handwriting.safetensors")
        )
        prompts = ("a red seven on a yellow background", "a seven", "")
        positive, middle, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts)

    dual = Guider_DualCFG(prior)
    dual.set_conds(positive, middle, negative)
    dual.set_cfg(CONTROL_WEIGHT, DOMAIN_WEIGHT + CONTROL_WEIGHT, nested=False)
    same = guiders.TermGuider(
        prior,
        negative,
        [guiders.Term("domain", None, middle, DOMAIN_WEIGHT), guiders.Term("control", None, positive, CONTROL_WEIGHT)],
    )
    in_domain = guiders.in_domain_guider(prior, domain, positive, negative, DOMAIN_WEIGHT, CONTROL_WEIGHT)

    latent = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(latent, report.seed)
    sampler = comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(prior.get_model_object("model_sampling"), "normal", plan.run_steps)

    def run(guider: Any) -> Callable[[], Any]:
        return lambda: guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=report.seed)

    contestants = {"DualCFGGuider": run(dual), "same terms": run(same), "in-domain": run(in_domain)}
    with torch.inference_mode():
        results = {name: contestants[name]() for name in ("DualCFGGuider", "same terms")}
        check_equal(results, 1e-3, "guider/over_dual_cfg")
        times = interleave(contestants, plan.runs, what="guider/over_dual_cfg")
    step_ms = {name: 1e3 * times.median(name) / plan.run_steps for name in contestants}
    for name, contestant, target in (
        ("guider/over_dual_cfg", "same terms", 1.05),
        ("guider/in_domain_over_dual_cfg", "in-domain", None),
    ):
        report.median(
            name,
            times.ratios(contestant, "DualCFGGuider"),
            "ratio",
            target=target,
            guider_ms=step_ms[contestant],
            dual_cfg_ms=step_ms["DualCFGGuider"],
        )


# ------------------------------------------------------------------------------------------------- (d) samples per step


def part_samples(report: Report, plan: Plan) -> None:
    """Predictions per image and step, counted where the models are called; 25 steps of DPM-Solver++(2M)."""
    from indomain_guidance.guidance import presets
    from indomain_guidance.guidance.schedules import Interval

    def middle(weight: float, outside: float = 0.0) -> Interval:
        return Interval(weight, 0.2, 0.8, outside=outside)

    prior, other = "prior", "other"
    cases = {
        "cfg": lambda p, o, u, c: presets.cfg(p, u, c),
        "cfg/scale_1": lambda p, o, u, c: presets.cfg(p, u, c, 1.0),
        "cfg/interval_0.2_0.8": lambda p, o, u, c: presets.cfg(p, u, c, middle(7.5, outside=1.0)),
        "in_domain": lambda p, o, u, c: presets.in_domain(p, o, u, c),
        "in_domain/domain_weight_0": lambda p, o, u, c: presets.in_domain(p, o, u, c, domain_weight=0.0),
        "in_domain/control_weight_0": lambda p, o, u, c: presets.in_domain(p, o, u, c, control_weight=0.0),
        "in_domain/weights_sum_to_1": lambda p, o, u, c: presets.in_domain(p, o, u, c, 0.4, 0.6),
        "in_domain/domain_interval_0.2_0.8": lambda p, o, u, c: presets.in_domain(p, o, u, c, middle(2.5)),
        "in_domain/domain_interval_0.4_1": lambda p, o, u, c: presets.in_domain(p, o, u, c, Interval(2.5, 0.4, 1.0)),
        "domain_guidance": lambda p, o, u, c: presets.domain_guidance(p, o, u),
        "unconditional_prior": lambda p, o, u, c: presets.unconditional_prior(p, o, u, c),
        "autoguidance": lambda p, o, u, c: presets.autoguidance(p, o, c),
        "personalization": lambda p, o, u, c: presets.personalization(o, p, u, c),
        "dual_cfg": lambda p, o, u, c: presets.dual_cfg(p, u, {"text": 2.0}, c, 8.0, 4.0),
        "dual_cfg/equal_scales": lambda p, o, u, c: presets.dual_cfg(p, u, {"text": 2.0}, c),
    }
    for name, preset in cases.items():
        value = count_samples(lambda make: preset(make(prior), make(other), {"text": 0.0}, {"text": 1.0}), report.seed)
        report.line(f"samples_per_step/{name}", value, "samples/step", samples=STEPS)


STEPS = 25


def count_samples(guidance: Callable[[Callable[[str], Callable]], Any], seed: int) -> float:
    """Predictions per image and step of a guidance, counted by its models themselves."""
    import torch
    from indomain_guidance.guidance import MultiGuidance, NoiseSchedule, sample, sigmas_uniform

    schedule = NoiseSchedule.scaled_linear()
    batch, counted = 2, 0

    def make(name: str) -> Callable:
        def denoise(x, sigma, text):
            nonlocal counted
            counted += len(x)
            return x / (1 + sigma.view(-1, 1, 1, 1) ** 2) + 0.01 * text

        return denoise

    denoise = MultiGuidance(guidance(make), schedule.percent_to_sigma)
    noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    sample(denoise, noise, sigmas_uniform(schedule, STEPS), "dpmpp_2m")
    return counted / (batch * STEPS)


# ----------------------------------------------------------------------------------------------------------- (e) import


def part_import(report: Report, plan: Plan) -> None:
    """Import time in fresh processes; the first of each kind, which may have to compile, does not count."""
    for kind, name, target in (("pack", "import/pack", 0.3), ("library", "import/library", 0.3)):
        seconds = []
        for run in range(plan.imports + (not plan.tiny)):
            (result,) = BENCHMARK.child(report, plan, "import", kind)
            if run > 0 or plan.tiny:
                seconds.append(result["seconds"])
        report.median(name, seconds, "s", target=target)


def child_import(report: Report, plan: Plan, arguments: list[str]) -> None:
    """Time one import: `pack` by ComfyUI's own loader, after ComfyUI and its nodes; `library` with all its names."""
    import torch  # noqa: F401 - not part of what is measured

    (kind,) = arguments
    if kind == "library":
        begin = time.perf_counter()
        import indomain_guidance.guidance as guidance

        for name in guidance.__all__:
            getattr(guidance, name)
        seconds = time.perf_counter() - begin
    else:
        from . import comfy_models

        seconds = asyncio.run(_import_pack(comfy_models))
    print(json.dumps({"seconds": seconds}), file=report.stream, flush=True)


async def _import_pack(comfy_models: Any) -> float:
    comfy_models.comfyui()
    # What this benchmark itself has imported of the library is there under another name and counts in full.
    import nodes

    logging.getLogger().setLevel(logging.CRITICAL)  # ComfyUI's own nodes complain about packages they miss
    await nodes.init_builtin_extra_nodes()
    logging.getLogger().setLevel(logging.WARNING)
    folder = str(CHECKOUT)
    begin = time.perf_counter()
    loaded = await nodes.load_custom_node(folder)
    seconds = time.perf_counter() - begin
    if not loaded or "InDomainSampler" not in nodes.NODE_CLASS_MAPPINGS:
        raise RuntimeError("ComfyUI could not load the pack; its message is above.")
    return seconds


# --------------------------------------------------------------------------------------------------------------- memory


def part_memory(report: Report, plan: Plan) -> None:
    """Peak memory of separate processes, above what they hold before the model is built."""
    forms = {form: _memory(report, plan, "forward", form) for form in plan.memory_of_forms}
    for form, size in forms.items():
        report.line(f"memory/sd15_forward/{form}", size / 1e9, "GB", samples=1, over_full=size / forms["full"])
    if plan.memory_of_steps:
        steps = {way: _memory(report, plan, "step", way) for way in ("one by one", "guider")}
        for way, size in steps.items():
            report.line(
                f"memory/sd15_in_domain_step/{way.replace(' ', '_')}",
                size / 1e9,
                "GB",
                samples=1,
                over_one_by_one=size / steps["one by one"],
            )


def _memory(report: Report, plan: Plan, *what: str) -> int:
    (result,) = BENCHMARK.child(report, plan, "memory", *what)
    return result["bytes"]


def child_memory(report: Report, plan: Plan, arguments: list[str]) -> None:
    """`forward FORM` or `step WAY` of SD 1.5 at 64x64 latents, once."""
    from dataclasses import replace

    import torch

    from . import comfy_models

    comfy_models.comfyui()
    what, which = arguments
    config, size = (comfy_models.TINY, 8) if plan.tiny else (comfy_models.SD15, 64)
    before = peak_memory()
    if what == "forward":
        form = replace(config, null_text="none" if which == "full" else which)
        unet = comfy_models.bare_unet(comfy_models.random_weights(form, report.seed), form)
        with torch.inference_mode():
            unet(**comfy_models.unet_inputs(config, size, report.seed))
    else:
        guider, _, domain, contexts = in_domain_models(config, report.seed)
        inside_run(
            guider,
            size,
            lambda running, extra: step_contestants(running, extra, domain, contexts, size, report.seed)[which](),
        )
    print(json.dumps({"bytes": peak_memory() - before}), file=report.stream, flush=True)


# ----------------------------------------------------------------------------------------------------------------- main

BENCHMARK = Benchmark(
    "sampling",
    __doc__,
    HERE,
    {"full": FULL, "quick": QUICK, "tiny": TINY},
    {
        "samples": part_samples,
        "guider": part_guider,
        "import": part_import,
        "sd15": part_sd15,
        "sdxl": part_sdxl,
        "memory": part_memory,
        "cuda": part_cuda,
    },
    {"import": child_import, "memory": child_memory, "cuda": child_cuda},
    quick="at most ten minutes",
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main(sys.argv[1:]))
