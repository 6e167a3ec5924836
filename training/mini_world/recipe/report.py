"""``mini-world check``: the shipped weights measured against what the set-up needs; one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import render
from ..assets import MiniWorld, load_classifier, load_generator, load_mini_world
from ..classifier import Classifier, judge
from ..prompts import Prompts, cfg_of, draw_prompts, sample_prompts
from . import quality
from .kept_files import made_once, weights_hash
from .status_line import StatusLine

SCALES = (1.5, 2.0, 3.0)  # of classifier-free guidance, among which the prior's best is chosen
TARGETS = {"digit": 0.97, "ink": 0.95, "ground": 0.95}  # shares that the prior's pictures should get right
SECOND = "held_out_judge/"  # begins the names of what the second judge says


class WeightsReport:
    """Measures the shipped weights; each part prints its lines. keep: a folder for sampled pictures, to continue from.

    samples: pictures or prompts of a measurement.
    """

    def __init__(self, samples: int, seed: int, keep: Path | None = None) -> None:
        self.samples, self.seed, self.keep = samples, seed, keep

    def line(
        self,
        name: str,
        value: float,
        unit: str = "share",
        better: str = "higher",
        target: float | None = None,
        samples: int | None = None,
        **more: Any,
    ) -> None:
        """One measured number as a JSON line on standard output."""
        samples = self.samples if samples is None else samples
        line = {"name": f"mini_world/{name}", "value": round(value, 5), "unit": unit, "target": target}
        line |= {"better": better, "samples": samples, "seed": self.seed, **more}
        print(json.dumps(line, allow_nan=False), flush=True)

    @cached_property
    def world(self) -> MiniWorld:
        return load_mini_world()

    @cached_property
    def judges(self) -> dict[str, Classifier]:
        return {"": load_classifier(), SECOND: load_classifier(held_out=True)}

    @cached_property
    def prompts(self) -> Prompts:
        return draw_prompts(self.samples, render.colour_pairs(), self.seed)

    @cached_property
    def prior(self) -> dict[float, Tensor]:
        """Scale -> what the prior draws at it, in all 56 colour pairs."""
        return {scale: self.sample(self.prompts, scale, f"prior, CFG {scale}") for scale in SCALES}

    def sample(self, prompts: Prompts, scale: float, name: str) -> Tensor:
        """The prior's pictures of the prompts, from the folder `keep` where they are there already."""

        def draw() -> Tensor:
            status, guidance = StatusLine(name), cfg_of(self.world, scale)
            return sample_prompts(self.world, guidance, prompts, seed=self.seed, progress=status.update)[0]

        if self.keep is None:
            return draw()
        weights = weights_hash(self.world.prior.unet, self.world.text_encoder, self.world.autoencoder)
        source = json.dumps([name, scale, prompts.captions, self.seed, weights])
        return made_once(self.keep / f"{name}.pictures", source, draw)

    def obedience(self, judge_name: str, scale: float) -> dict[str, Any]:
        """Shares that a judge names as prompted: digit, ink, ground, and by_colour of the latter two."""
        named, prompts = judge(self.judges[judge_name], self.prior[scale])[1], self.prompts
        wanted = {"digit": prompts.digits, "ink": prompts.pairs[:, 0], "ground": prompts.pairs[:, 1]}
        shares = {head: float((named[head] == labels).float().mean()) for head, labels in wanted.items()}
        return {**shares, "by_colour": quality.accuracies_by_colour(named, prompts)}

    @staticmethod
    def worst(seen: dict[str, Any], head: str) -> tuple[float, int, str]:
        """(share, pictures, name) of the colour that is named rightly least often."""
        return min((share, count, colour) for colour, (share, count) in seen["by_colour"][head].items())

    @cached_property
    def best_scale(self) -> float:
        """The scale whose worst reading by the first judge, digits or one colour, is furthest above its target."""

        def margin(scale: float) -> float:
            seen = self.obedience("", scale)
            readings = {"digit": seen["digit"], **{head: self.worst(seen, head)[0] for head in ("ink", "ground")}}
            return min(share - TARGETS[head] for head, share in readings.items())

        return max(SCALES, key=margin)

    def part_judges(self) -> None:
        """Each judge's own accuracy on the fonts and rows that it was not trained on."""
        for name, model in self.judges.items():
            for kind, pictures in quality.unseen_pictures(self.samples, self.seed, trained=bool(name)).items():
                for head, share in quality.accuracies(model, pictures).items():
                    self.line(f"{name}accuracy_{kind}_{head}", share, samples=len(pictures))

    def part_autoencoder(self) -> None:
        """PSNR, and the accuracy that reconstructions lose, on held-out fonts and held-out handwriting."""
        found = quality.autoencoder_quality(self.world.autoencoder, self.judges[""], self.samples, self.seed)
        counts = {kind: len(pictures) for kind, pictures in quality.unseen_pictures(self.samples, self.seed).items()}
        for name, value in found.items():
            count = counts["rendered" if "rendered" in name else "handwritten"]
            if name.startswith("psnr"):
                self.line(name, value, "dB", target=26.0, samples=count)
            elif "lost" in name:
                self.line(name, value, better="lower", target=0.01, samples=count)

    def part_prior(self) -> None:
        """How well the prior's pictures obey the prompt: at its best scale by colour, at the others in short."""
        best = self.best_scale
        self.line("prior_best_scale", best, "cfg")
        for judge_name in self.judges:
            for scale in sorted(SCALES, key=lambda scale: scale != best):
                seen, where = self.obedience(judge_name, scale), "" if scale == best else f"_at_cfg_{scale}"
                for head, target in TARGETS.items():
                    name, target = f"{judge_name}prior{where}_{head}_accuracy", target if scale == best else None
                    self.line(name, seen[head], target=target)
                    if head == "digit":
                        continue
                    for colour, (share, count) in seen["by_colour"][head].items() if scale == best else ():
                        self.line(f"{name}/{colour}", share, target=target, samples=count)
                    share, count, colour = self.worst(seen, head)
                    self.line(f"{name}/worst", share, target=target, samples=count, colour=colour)

    def part_domains(self) -> None:
        """Floors, ceiling and the prior's distance of both domains: is there something to measure?"""
        scale, model = self.best_scale, self.judges[""]
        count = quality.VALIDITY_PICTURES
        for domain in ("handwriting", "narrow"):
            floors = quality.validity(self.world.autoencoder, model, domain, self.seed)
            prompts = draw_prompts(self.samples, render.domain_pairs(domain), self.seed)
            result = quality.score(model, self.sample(prompts, scale, f"prior in {domain}, CFG {scale}"), prompts)
            for name, value in floors.items():
                better = "higher" if name == "ceiling" else "lower"
                self.line(f"{domain}_{name}", value, "frechet", better, samples=count)
            self.line(f"{domain}_prior_distance", result["distance"], "frechet", "lower")
            self.line(f"{domain}_prior_kernel_distance", result["kernel"], "kid", "lower")
            ratio = floors["ceiling"] / floors["floor"]
            self.line(f"{domain}_ceiling_over_floor", ratio, "ratio", target=20.0, samples=count)
            ratio = floors["autoencoder_floor"] / result["distance"]
            self.line(f"{domain}_autoencoder_floor_over_prior", ratio, "ratio", "lower", target=0.05)

    def part_generator(self) -> None:
        """The generator's pictures against held-out handwriting: distance, precision, recall, every digit's share."""
        count = quality.VALIDITY_PICTURES
        found = quality.generator_quality(load_generator(), self.judges[""], count, self.seed)
        units = {
            "distance": ("frechet", "lower"),
            "kernel_distance": ("kid", "lower"),
            "diversity": ("ratio", "higher"),
        }
        for name, (value, of_training) in found.items():
            more = {} if of_training is None else {"training_rows": round(of_training, 5)}
            unit, better = units.get(name.split("/")[0], ("share", "higher"))
            self.line(f"generator_{name}", value, unit, better, samples=count, **more)


PARTS: dict[str, Callable[[WeightsReport], None]] = {
    "judges": WeightsReport.part_judges,
    "autoencoder": WeightsReport.part_autoencoder,
    "prior": WeightsReport.part_prior,
    "domains": WeightsReport.part_domains,
    "generator": WeightsReport.part_generator,
}
