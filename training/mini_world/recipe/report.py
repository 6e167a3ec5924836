"""``mini-world check``: the shipped weights measured, one JSON object a line; docs/mini_world.md says what is asked."""

from __future__ import annotations

import json
from collections.abc import Callable

from torch import Tensor

from .. import render
from ..assets import MiniWorld, load_autoencoder, load_classifier, load_generator, load_mini_world
from ..classifier import Classifier, judge
from ..prompts import Prompts, cfg_of, draw_prompts, sample_prompts
from . import quality
from .status_line import StatusLine

SCALES = (1.5, 2.0, 3.0)  # of classifier-free guidance
BEST_SCALE = 2.0  # the one of them at which digits and every colour are right often enough


def _line(name: str, value: float, samples: int, **more: float | str) -> None:
    line = {"name": f"mini_world/{name}", "value": round(value, 5), "samples": samples, **more}
    print(json.dumps(line, allow_nan=False), flush=True)


def _judges() -> dict[str, Classifier]:
    """Both judges by what begins the names of their lines."""
    return {"": load_classifier(), "held_out_judge/": load_classifier(held_out=True)}


def _sample(world: MiniWorld, prompts: Prompts, scale: float, seed: int) -> Tensor:
    status = StatusLine(f"prior, CFG {scale}")
    return sample_prompts(world, cfg_of(world, scale), prompts, seed=seed, progress=status.update)[0]


def check_judges(samples: int, seed: int) -> None:
    """Each judge's own accuracy on the fonts and rows that it was not trained on."""
    for name, model in _judges().items():
        for kind, pictures in quality.unseen_pictures(samples, seed, trained=bool(name)).items():
            for head, share in quality.accuracies(model, pictures).items():
                _line(f"{name}accuracy_{kind}_{head}", share, len(pictures))


def check_autoencoder(samples: int, seed: int) -> None:
    """PSNR, and the accuracy that reconstructions lose, on held-out fonts and held-out handwriting."""
    rows = render.HELD_OUT_ROWS.stop - render.HELD_OUT_ROWS.start
    for name, value in quality.autoencoder_quality(load_autoencoder()[0], load_classifier(), samples, seed).items():
        if name.startswith(("psnr", "accuracy_lost")):
            _line(name, value, samples if "rendered" in name else min(samples, rows))


def check_prior(samples: int, seed: int) -> None:
    """How well the prior's pictures obey prompts of all 56 colour pairs, and the colour that is right least often."""
    world, judges, prompts = load_mini_world(), _judges(), draw_prompts(samples, render.colour_pairs(), seed)
    wanted = {"digit": prompts.digits, "ink": prompts.pairs[:, 0], "ground": prompts.pairs[:, 1]}
    for scale in SCALES:
        pictures = _sample(world, prompts, scale, seed)
        for judge_name, model in judges.items():
            named = judge(model, pictures)[1]
            for head, labels in wanted.items():
                name, right = f"{judge_name}prior_at_cfg_{scale}_{head}_accuracy", (named[head] == labels).float()
                _line(name, float(right.mean()), samples)
                if head != "digit":
                    worst = min(labels.unique().tolist(), key=lambda colour: float(right[labels == colour].mean()))
                    of_colour = right[labels == worst]
                    colour = render.COLOUR_NAMES[worst]
                    _line(f"{name}/worst", float(of_colour.mean()), len(of_colour), colour=colour)


def check_domains(samples: int, seed: int) -> None:
    """Floors, ceiling and the prior's distance of both domains: is there something to measure?"""
    world, model = load_mini_world(), load_classifier()
    for domain in ("handwriting", "narrow"):
        for name, value in quality.validity(world.autoencoder, model, domain, seed).items():
            _line(f"{domain}_{name}", value, quality.VALIDITY_PICTURES)
        prompts = draw_prompts(samples, render.domain_pairs(domain), seed)
        result = quality.score(model, _sample(world, prompts, BEST_SCALE, seed), prompts)
        for name in ("distance", "kernel"):
            _line(f"{domain}_prior_{name}", result[name], samples)


def check_generator(samples: int, seed: int) -> None:
    """The generator's pictures against held-out handwriting: distance, precision, recall, every digit's share."""
    count = quality.VALIDITY_PICTURES
    found = quality.generator_quality(load_generator(), load_classifier(), count, seed)
    for name, (value, of_training) in found.items():
        more = {} if of_training is None else {"training_rows": round(of_training, 5)}
        _line(f"generator_{name}", value, count, **more)


PARTS: dict[str, Callable[[int, int], None]] = {
    "judges": check_judges,
    "autoencoder": check_autoencoder,
    "prior": check_prior,
    "domains": check_domains,
    "generator": check_generator,
}
