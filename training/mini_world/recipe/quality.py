"""How good the mini world's parts are: numbers of autoencoder, judges, prior, domains and generator."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ....guidance.networks.autoencoder import Autoencoder
from ....guidance.networks.stylegan2 import StyleGAN2
from .. import render
from ..assets import reconstruct
from ..classifier import Classifier, judge
from ..distances import frechet_distance, kernel_distance, share_inside, within_class_diversity
from ..prompts import Prompts, target_pictures

VALIDITY_PICTURES = 2000  # of each set that floors and ceilings compare


def psnr(images: Tensor, reference: Tensor) -> float:
    """Mean over images of 10 log10(peak^2 / MSE) in dB, pictures [N, 3, H, W] in -1..1 (peak 2)."""
    error = (images.clamp(-1, 1) - reference).square().flatten(1).mean(1).clamp(min=1e-10)
    return float((10 * torch.log10(4 / error)).mean())


def accuracies(model: Classifier, pictures: render.Pictures) -> dict[str, float]:
    """Share of pictures whose digit, ink, ground and world the classifier names rightly."""
    named = judge(model, pictures.images)[1]
    return {name: _mean(named[name] == wanted) for name, wanted in pictures.labels().items()}


def score(model: Classifier, pictures: Tensor, prompts: Prompts, target: Tensor | None = None) -> dict[str, float]:
    """Pictures [N, 3, 64, 64] of the prompts against their exact targets, whose features [M, 64] may be given."""
    if target is None:
        target = judge(model, target_pictures(prompts.digits, prompts.pairs).images)[0]
    features, named = judge(model, pictures)
    ink, ground = named["ink"] == prompts.pairs[:, 0], named["ground"] == prompts.pairs[:, 1]
    return {
        "distance": frechet_distance(features, target),
        "kernel": kernel_distance(features, target),
        "digit": _mean(named["digit"] == prompts.digits),
        "ink": _mean(ink),
        "ground": _mean(ground),
        "both_colours": _mean(ink & ground),
        "in_domain": _mean(named["world"] == 1),
        "diversity": within_class_diversity(features, named["digit"]),
    }


def unseen_pictures(count: int, seed: int = 0, *, trained: bool = False) -> dict[str, render.Pictures]:
    """``rendered`` and ``handwritten`` pictures, all 56 colour pairs, of the held-out fonts and first held-out rows.

    trained: of the trained fonts and rows instead, which the second judge never saw. There are 2,000 held-out rows.
    """
    generator = Generator().manual_seed(seed)
    printed = render.rendered(count, generator, held_out=not trained)
    rows = render.TRAIN_ROWS if trained else render.HELD_OUT_ROWS
    rows = slice(rows.start, min(rows.start + count, rows.stop))
    return {"rendered": printed, "handwritten": render.handwritten(rows, render.colour_pairs(), generator)}


def autoencoder_quality(
    autoencoder: Autoencoder, model: Classifier, count: int = 2000, seed: int = 0
) -> dict[str, float]:
    """PSNR (dB) and what the classifier loses on reconstructions, on held-out fonts and held-out handwriting."""
    results: dict[str, float] = {}
    for name, pictures in unseen_pictures(count, seed).items():
        again = reconstruct(autoencoder, pictures.images)
        results[f"psnr_{name}"] = psnr(again, pictures.images)
        before = accuracies(model, pictures)
        after = accuracies(model, render.Pictures(again, **pictures.labels()))
        for head in before:
            results[f"accuracy_{name}_{head}"] = before[head]
            results[f"accuracy_lost_{name}_{head}"] = before[head] - after[head]
    return results


def validity(
    autoencoder: Autoencoder, model: Classifier, domain: str = "handwriting", seed: int = 0
) -> dict[str, float]:
    """Floor, autoencoder floor and ceiling: Frechet distances to held-out handwriting in a domain's colours.

    floor: training handwriting. autoencoder_floor: reconstructions of the held-out images against themselves.
    ceiling: rendered digits in the same colours.
    """
    generator, pairs = Generator().manual_seed(seed), render.domain_pairs(domain)
    held_out = render.handwritten(render.HELD_OUT_ROWS, pairs, generator)
    target = judge(model, held_out.images)[0]
    own = render.handwritten(slice(0, VALIDITY_PICTURES), pairs, generator)
    chosen = pairs[torch.randint(len(pairs), (VALIDITY_PICTURES,), generator=generator)]
    printed = render.rendered(VALIDITY_PICTURES, generator, held_out=True, pairs=chosen)

    def distance(images: Tensor) -> float:
        return frechet_distance(judge(model, images)[0], target)

    return {
        "floor": distance(own.images),
        "autoencoder_floor": distance(reconstruct(autoencoder, held_out.images)),
        "ceiling": distance(printed.images),
    }


@torch.no_grad()
def generated(generator: StyleGAN2, count: int, seed: int = 0, batch: int = 100) -> Tensor:
    """Pictures [count, 3, 64, 64] in -1..1 of random latents, the same for the same seed."""
    latents = torch.randn(count, generator.config.z_dim, generator=Generator().manual_seed(seed))
    return torch.cat([generator(part).clamp(-1, 1) for part in latents.split(batch)])


def generator_quality(
    generator: StyleGAN2, model: Classifier, count: int = VALIDITY_PICTURES, seed: int = 0
) -> dict[str, tuple[float, float | None]]:
    """{measure: (of ``count`` pictures of white-on-black handwriting, of as much training handwriting)}.

    Both are compared with held-out handwriting. precision: share of pictures among the held-out ones, recall: the
    reverse (arXiv 1904.06991). in_domain: share judged handwritten. share/DIGIT: of the pictures that are that digit;
    recall/DIGIT: of the digit's held-out pictures; diversity/DIGIT: mean distance to the digit's mean, over that of the
    held-out ones.
    """
    pairs = render.domain_pairs("narrow")
    real = render.handwritten(render.HELD_OUT_ROWS, pairs, None)
    trained = render.handwritten(slice(render.TRAIN_ROWS.start, render.TRAIN_ROWS.start + count), pairs, None)
    target, own = (judge(model, pictures.images)[0] for pictures in (real, trained))
    made, named = judge(model, generated(generator, count, seed))
    found: dict[str, tuple[float, float | None]] = {
        "distance": (frechet_distance(made, target), frechet_distance(own, target)),
        "kernel_distance": (kernel_distance(made, target), None),
        "in_domain": (_mean(named["world"] == 1), None),
        "precision": (share_inside(made, target), share_inside(own, target)),
        "recall": (share_inside(target, made), share_inside(target, own)),
    }

    def recall(part: Tensor, reference: Tensor) -> float:
        return share_inside(reference, part) if len(part) > 3 else 0.0

    def spread(part: Tensor) -> float:
        return within_class_diversity(part, torch.zeros(len(part)))

    for digit in range(10):
        part, reference = made[named["digit"] == digit], target[real.digit == digit]
        found[f"share/{digit}"] = _mean(named["digit"] == digit), None
        found[f"recall/{digit}"] = recall(part, reference), recall(own[trained.digit == digit], reference)
        found[f"diversity/{digit}"] = spread(part) / spread(reference), None
    return found


def _mean(right: Tensor) -> float:
    return float(right.float().mean())
