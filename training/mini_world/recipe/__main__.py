"""Command line of the mini world: make it again from a seed, or measure the shipped weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

SCALES = (1.5, 2.0, 3.0)  # of classifier-free guidance, among which the prior's best is chosen
COLOUR_TARGET, DIGIT_TARGET = 0.95, 0.97


def report(
    name: str,
    value: float,
    unit: str,
    samples: int,
    seed: int,
    target: float | None = None,
    better: str = "lower",
    **more: object,
) -> None:
    """One measured number as a JSON line on standard output."""
    line = {
        "name": f"mini_world/{name}",
        "value": round(value, 5),
        "unit": unit,
        "target": target,
        "better": better,
        "samples": samples,
        "seed": seed,
        **more,
    }
    print(json.dumps(line, allow_nan=False), flush=True)


class Check:
    """Measures the shipped weights against what the set-up needs to be valid; each part prints its lines."""

    def __init__(self, samples: int, seed: int, keep: Path | None = None) -> None:
        self.samples, self.seed, self.keep = samples, seed, keep

    @cached_property
    def world(self):
        from ..assets import load_mini_world

        return load_mini_world()

    @cached_property
    def judges(self) -> dict:
        """Prefix of the names of what a judge says -> the judge: the first one has none."""
        from ..assets import load_classifier

        return {"": load_classifier(), "held_out_judge/": load_classifier(held_out=True)}

    @cached_property
    def prior(self) -> dict:
        """Scale -> what the prior draws at it, in all 56 colour pairs."""
        return {scale: self.sample(self.prompts, scale, f"prior, CFG {scale}") for scale in SCALES}

    @cached_property
    def prompts(self):
        from .. import measure, render

        return measure.draw_prompts(self.samples, render.colour_pairs(), self.seed)

    @cached_property
    def best_scale(self) -> float:
        """The scale whose worst reading by the first judge, digits or one colour, is furthest above its target."""

        def margin(scale: float) -> float:
            seen = self.obedience("", scale)
            return min(
                seen["digit"] - DIGIT_TARGET,
                self.worst(seen, "ink")[0] - COLOUR_TARGET,
                self.worst(seen, "ground")[0] - COLOUR_TARGET,
            )

        return max(SCALES, key=margin)

    def obedience(self, prefix: str, scale: float) -> dict:
        """Shares that a judge names as prompted: digit, ink, ground, and by_colour of the latter two."""
        from .. import measure
        from ..classifier import judge

        named, prompts = judge(self.judges[prefix], self.prior[scale])[1], self.prompts
        wanted = {"digit": prompts.digits, "ink": prompts.pairs[:, 0], "ground": prompts.pairs[:, 1]}
        return {
            **{head: float((named[head] == labels).float().mean()) for head, labels in wanted.items()},
            "by_colour": measure.accuracies_by_colour(named, prompts),
        }

    @staticmethod
    def worst(seen: dict, head: str) -> tuple[float, int, str]:
        """(share, pictures, name) of the colour that is named rightly least often."""
        return min((share, count, colour) for colour, (share, count) in seen["by_colour"][head].items())

    def sample(self, prompts, scale: float, name: str):
        from .. import measure

        guidance = measure.cfg_of(self.world, scale)
        return measure.sample_prompts(self.world, guidance, prompts, seed=self.seed, name=name, keep=self.keep)[0]

    def part_judges(self) -> None:
        """Each judge's own accuracy on the fonts and rows that it was not trained on."""
        from .. import measure

        for prefix, model in self.judges.items():
            for kind, pictures in measure.unseen_pictures(self.samples, self.seed, trained=bool(prefix)).items():
                for head, share in measure.accuracies(model, pictures).items():
                    report(f"{prefix}accuracy_{kind}_{head}", share, "share", len(pictures), self.seed, None, "higher")

    def part_autoencoder(self) -> None:
        """PSNR, and the accuracy that reconstructions lose, on held-out fonts and held-out handwriting."""
        from .. import measure

        found = measure.autoencoder_quality(self.world.autoencoder, self.judges[""], self.samples, self.seed)
        counts = {kind: len(pictures) for kind, pictures in measure.unseen_pictures(self.samples, self.seed).items()}
        for name, value in found.items():
            count = counts["rendered" if "rendered" in name else "handwritten"]
            if name.startswith("psnr"):
                report(name, value, "dB", count, self.seed, 26.0, "higher")
            elif "lost" in name:
                report(name, value, "share", count, self.seed, 0.01)

    def part_prior(self) -> None:
        """How well the prior's pictures obey the prompt: at its best scale by colour, at the others in short."""
        best = self.best_scale
        report("prior_best_scale", best, "cfg", self.samples, self.seed, None, "higher")
        targets = {"digit": DIGIT_TARGET, "ink": COLOUR_TARGET, "ground": COLOUR_TARGET}
        for prefix in self.judges:
            for scale in sorted(SCALES, key=lambda scale: scale != best):
                seen, where = self.obedience(prefix, scale), "" if scale == best else f"_at_cfg_{scale}"
                for head, target in targets.items():
                    name, target = f"{prefix}prior{where}_{head}_accuracy", target if scale == best else None
                    report(name, seen[head], "share", self.samples, self.seed, target, "higher")
                    if head == "digit":
                        continue
                    for colour, (share, count) in seen["by_colour"][head].items() if scale == best else ():
                        report(f"{name}/{colour}", share, "share", count, self.seed, target, "higher")
                    share, count, colour = self.worst(seen, head)
                    report(f"{name}/worst", share, "share", count, self.seed, target, "higher", colour=colour)

    def part_domains(self) -> None:
        """Floors, ceiling and the prior's distance of both domains: is there something to measure?"""
        from .. import measure, render

        scale, model = self.best_scale, self.judges[""]
        for domain in ("handwriting", "narrow"):
            count = measure.VALIDITY_PICTURES
            floors = measure.validity(self.world.autoencoder, model, domain, self.seed)
            inside = measure.draw_prompts(self.samples, render.domain_pairs(domain), self.seed)
            pictures = self.sample(inside, scale, f"prior in {domain}, CFG {scale}")
            result = measure.score(model, pictures, inside)
            for name, value in floors.items():
                better = "higher" if name == "ceiling" else "lower"
                report(f"{domain}_{name}", value, "frechet", count, self.seed, None, better)
            report(f"{domain}_prior_distance", result.distance, "frechet", self.samples, self.seed)
            report(f"{domain}_prior_kernel_distance", result.kernel, "kid", self.samples, self.seed)
            ratio = floors["ceiling"] / floors["floor"]
            report(f"{domain}_ceiling_over_floor", ratio, "ratio", count, self.seed, 20.0, "higher")
            ratio = floors["autoencoder_floor"] / result.distance
            report(f"{domain}_autoencoder_floor_over_prior", ratio, "ratio", self.samples, self.seed, 0.05)

    def part_generator(self) -> None:
        """The generator's pictures against held-out handwriting: distance, precision, recall, every digit's share."""
        from .. import measure
        from ..assets import load_generator

        count = measure.VALIDITY_PICTURES
        found = measure.generator_quality(load_generator(), self.judges[""], count, self.seed)
        report("generator_distance", found.distance, "frechet", count, self.seed, floor=round(found.floor, 5))
        report("generator_kernel_distance", found.kernel, "kid", count, self.seed)
        report("generator_in_domain", found.in_domain, "share", count, self.seed, None, "higher")
        for name, value, floor in (
            ("precision", found.precision, found.precision_floor),
            ("recall", found.recall, found.recall_floor),
        ):
            report(f"generator_{name}", value, "share", count, self.seed, None, "higher", training_rows=round(floor, 5))
        for digit in range(10):
            share, own = found.digits[digit], found.digit_recall_floor[digit]
            report(f"generator_share/{digit}", share, "share", count, self.seed, None, "higher")
            report(
                f"generator_recall/{digit}",
                found.digit_recall[digit],
                "share",
                count,
                self.seed,
                None,
                "higher",
                training_rows=round(own, 5),
            )
            report(
                f"generator_diversity/{digit}", found.digit_diversity[digit], "ratio", count, self.seed, None, "higher"
            )


PARTS: dict[str, Callable[[Check], None]] = {
    "judges": Check.part_judges,
    "autoencoder": Check.part_autoencoder,
    "prior": Check.part_prior,
    "domains": Check.part_domains,
    "generator": Check.part_generator,
}


def _count(text: str) -> int:
    value = int(text)
    if value < 10:
        raise argparse.ArgumentTypeError(f"expected at least 10, one prompt a digit, found {value}")
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py mini-world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = (
        "train everything again (about two and a half hours on two cores) and replace the shipped weights when "
        "all is done; stop it at will and run it again to continue"
    )
    make = commands.add_parser("make", help=about, description=about[0].upper() + about[1:] + ".")
    make.add_argument(
        "--work",
        type=Path,
        default=Path("mini_world_work"),
        help="folder of checkpoints, cached latents and finished files, 0.3 GB (default: %(default)s)",
    )
    make.add_argument("--seed", type=int, default=0, help="of weights, pictures and noise (default: 0, as shipped)")
    make.add_argument(
        "--fonts",
        action="store_true",
        help="first fetch the fonts, in the pinned versions, and rasterise them again (needs npm)",
    )
    about = "measure the shipped weights; one JSON object a line, progress on standard error"
    measure = commands.add_parser("check", help=about, description=about[0].upper() + about[1:] + ".")
    measure.add_argument(
        "--samples", type=_count, default=1000, help="pictures or prompts of a measurement, at least 10 (default: 1000)"
    )
    measure.add_argument("--seed", type=int, default=0, help="of prompts, pictures and noise (default: 0)")
    measure.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given several times")
    measure.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep sampled latents here, and use those that an interrupted run left"
    )
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            check = Check(options.samples, options.seed, options.keep)
            for name in options.part or PARTS:
                PARTS[name](check)
        else:
            _make(options)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumable = options.command == "make" or options.keep is not None
        more = "run it again to continue" if resumable else "with --keep DIR it can be continued"
        print(f"\nstopped; {more}", file=sys.stderr)
        return 130
    return 0


def _make(options: argparse.Namespace) -> None:
    from .. import glyphs, render
    from . import stages as recipe

    if options.fonts:
        glyphs.build(render.DATA / "glyphs.npz", progress=lambda line: print(line, file=sys.stderr))
    for path in recipe.make_everything(options.work, options.seed):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
