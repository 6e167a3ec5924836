"""Command line of the mini world: make it again from a seed, or measure the shipped weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def report(name: str, value: float, unit: str, samples: int, seed: int, target: float | None = None, better: str = "lower") -> None:
    """One measured number as a JSON line on standard output."""
    print(json.dumps({"name": name, "value": round(value, 5), "unit": unit, "target": target, "better": better,
                      "samples": samples, "seed": seed}), flush=True)


def check(samples: int, seed: int) -> None:
    """Measure the shipped weights against what the set-up needs to be valid."""
    from . import measure, render
    from .assets import load_autoencoder, load_classifier, load_mini_world

    model, world = load_classifier(), load_mini_world()
    autoencoder, _ = load_autoencoder()
    for name, value in measure.autoencoder_quality(autoencoder, model, samples, seed).items():
        if name.startswith("psnr"):
            report(f"mini_world/{name}", value, "dB", samples, seed, 26.0, "higher")
        elif "lost" in name:
            report(f"mini_world/{name}", value, "share", samples, seed, 0.01)
        else:
            report(f"mini_world/{name}", value, "share", samples, seed, None, "higher")
    prompts = measure.draw_prompts(samples, render.colour_pairs(), seed)
    best = None
    for scale in (1.5, 2.0, 3.0):
        pictures, _ = measure.sample_prompts(world, measure.cfg_of(world, scale), prompts, seed=seed, name=f"prior {scale}")
        result = measure.score(model, pictures, prompts)
        if best is None or result.digit + result.both_colours > best[1].digit + best[1].both_colours:
            best = scale, result
    scale, result = best
    report("mini_world/prior_best_scale", scale, "cfg", samples, seed, None, "higher")
    for name, target in (("digit", 0.97), ("ink", 0.95), ("ground", 0.95)):
        report(f"mini_world/prior_{name}_accuracy", getattr(result, name), "share", samples, seed, target, "higher")
    for domain in ("handwriting", "narrow"):
        floors = measure.validity(autoencoder, model, domain, seed)
        inside = measure.draw_prompts(samples, render.domain_pairs(domain), seed)
        pictures, _ = measure.sample_prompts(world, measure.cfg_of(world, scale), inside, seed=seed, name=f"prior in {domain}")
        distance = measure.score(model, pictures, inside).distance
        for name, value in floors.items():
            report(f"mini_world/{domain}_{name}", value, "frechet", 2000, seed)
        report(f"mini_world/{domain}_prior_distance", distance, "frechet", samples, seed)
        report(f"mini_world/{domain}_ceiling_over_floor", floors["ceiling"] / floors["floor"], "ratio", 2000, seed, 20.0, "higher")
        report(f"mini_world/{domain}_autoencoder_floor_over_prior", floors["autoencoder_floor"] / distance, "ratio", samples, seed, 0.05)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py mini-world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="train everything again (about two hours on two cores); run again to continue")
    make.add_argument("--work", type=Path, default=Path("mini_world_work"), help="folder of checkpoints and cached latents")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--fonts", action="store_true", help="fetch the fonts and rasterise them again first (needs npm)")
    measure = commands.add_parser("check", help="measure the shipped weights; one JSON object a line")
    measure.add_argument("--samples", type=int, default=1000)
    measure.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.command == "check":
        check(options.samples, options.seed)
        return 0
    from . import glyphs, recipe, render
    if options.fonts:
        glyphs.build(render.DATA / "glyphs.npz", progress=lambda line: print(line, file=sys.stderr))
    recipe.make_everything(options.work, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
