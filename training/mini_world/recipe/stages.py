"""The whole recipe, stage after stage: autoencoder, judges, prior, domain models, generator. Each resumes by itself.

Stages write their files below ``work/weights``; only when all are there do they replace the shipped ones, so that a run
that is stopped half-way leaves no world whose parts do not belong together.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from einops import rearrange
from torch import Generator, Tensor

from ....guidance.files import (
    DomainMetadata,
    GeneratorMetadata,
    prior_content_hash,
    write_domain_file,
    write_generator,
    write_safetensors,
)
from ....guidance.files.atomic import replacing
from ....guidance.networks.autoencoder import Autoencoder
from ....guidance.networks.text_encoder import END_TOKEN, TextEncoder
from ....guidance.null_text import NullContext
from .. import MINI_WORLD, assets, render, tokens
from ..classifier import HEADS, Classifier
from . import train_autoencoder, train_classifier, train_domain, train_generator, train_prior
from .kept_files import made_once, weights_hash
from .loop import LoopConfig, Model

LICENCE = "Apache-2.0"
STAGED = "weights"  # the folder of finished files, until all are there
STATISTICS_IMAGES = 2048  # on which the latents' scale and preview colours are measured
DATA_LICENCES = {
    "fonts": "OFL-1.1 and Apache-2.0 families listed in data/README.md",
    "handwriting": "MNIST (Yann LeCun, Corinna Cortes; from NIST Special Databases 1 and 3), CC BY-SA 3.0",
}


def half(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the files hold them, fp16."""
    return {key: value.detach().to(torch.float16) for key, value in state_dict.items()}


def rounded(module: Model) -> Model:
    """The module with its weights rounded to fp16, so that later stages train against what ships."""
    module.load_state_dict({key: value.float() for key, value in half(module.state_dict()).items()})
    return module.eval().requires_grad_(False)


@torch.no_grad()
def latent_statistics(autoencoder: Autoencoder, seed: int = 0) -> tuple[float, list[list[float]], list[float]]:
    """(scale, rgb factors [4][3], rgb bias [3]): scale makes the latents' deviation 1.

    Factors and bias preview latents: the least-squares map from a scaled latent pixel to the mean colour, -1..1, of its
    8 x 8 image pixels.
    """
    images = train_autoencoder.both_worlds(STATISTICS_IMAGES, Generator().manual_seed(seed + 99)).images
    latents = train_prior.encode_latents(autoencoder, images)
    scale = 1.0 / float(latents.std())
    rows = rearrange(latents * scale, "b c h w -> (b h w) c")
    colours = rearrange(torch.nn.functional.avg_pool2d(images, 8), "b c h w -> (b h w) c")
    solution = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], 1), colours).solution
    return scale, solution[:4].tolist(), solution[4].tolist()


def null_context(text_encoder: TextEncoder) -> NullContext:
    """The mini world's empty prompt as its UNet sees it."""
    with torch.no_grad():
        hidden, _ = text_encoder(tokens.to_rows(tokens.tokenize("")[None]))
    return NullContext(hidden, {"text_encoder": "mini_world", "layer": "-1", "empty": "encoded"})


def _write(work: Path, loop: LoopConfig, seed: int, name: str, model: torch.nn.Module, **metadata: str) -> None:
    about = {"format": "indomain_guidance.mini_world", "licence": LICENCE, "data": json.dumps(DATA_LICENCES)}
    about |= {"steps": str(loop.steps), "ema": str(loop.ema), "seed": str(seed), **metadata}
    write_safetensors(work / STAGED / f"{name}.safetensors", half(model.state_dict()), about)


def make_autoencoder(work: Path, seed: int = 0) -> tuple[Autoencoder, float]:
    """Stage 1: train, write, and return the autoencoder as shipped with its latent scale."""
    model = rounded(train_autoencoder.train(work, seed))
    source = f"autoencoder {weights_hash(model)}, {STATISTICS_IMAGES} images, seed {seed}"
    scale, factors, bias = made_once(work / "autoencoder.statistics", source, lambda: latent_statistics(model, seed))
    previews = {"latent_rgb_factors": json.dumps(factors), "latent_rgb_bias": json.dumps(bias)}
    config = json.dumps(model.config.to_dict())
    loop = train_autoencoder.LOOP
    _write(work, loop, seed, "autoencoder", model, config=config, scale_factor=repr(scale), **previews)
    return model, scale


def make_classifier(work: Path, seed: int = 0, held_out: bool = False) -> Classifier:
    """Stage 2: the judge; with ``held_out`` the second one, trained on the held-out fonts and rows alone."""
    model = rounded(train_classifier.train(work, seed, held_out=held_out))
    loop = train_classifier.HELD_OUT_LOOP if held_out else train_classifier.LOOP
    images = "held-out fonts and rows" if held_out else "trained fonts and rows"
    _write(work, loop, seed, loop.name, model, heads=json.dumps(HEADS), trained_on=images)
    return model


def make_prior(work: Path, autoencoder: Autoencoder, scale: float, seed: int = 0) -> train_prior.PriorNetworks:
    """Stage 3: UNet and text encoder."""
    model, loop = rounded(train_prior.train(work, autoencoder, scale, seed)), train_prior.LOOP
    about = {"config": train_prior.UNET.to_json(), "prediction_type": "epsilon", "latent_format": MINI_WORLD}
    _write(work, loop, seed, "prior_unet", model.unet, **about)
    config = json.dumps({**train_prior.TEXT.to_dict(), "vocab_size": END_TOKEN + 1, "end_token": END_TOKEN})
    _write(work, loop, seed, "text_encoder", model.text, config=config, token_ids=json.dumps(list(tokens.ROW_IDS)))
    return model


def make_domain(
    work: Path, domain: str, prior: train_prior.PriorNetworks, autoencoder: Autoencoder, scale: float, seed: int = 0
) -> Path:
    """Stage 4: one domain model."""
    context = null_context(prior.text)
    weights = prior.unet.state_dict()
    model = train_domain.train(work, domain, weights, train_prior.UNET, context, autoencoder, scale, seed)
    size, content = _dataset()
    metadata = DomainMetadata(
        config=model.config,
        latent_format=MINI_WORLD,
        prediction_type="epsilon",
        null_context=context.to_dict(),
        prior_hash=prior_content_hash(weights),
        domain_name=train_domain.FILE_NAMES[domain],
        dataset_size=size,
        dataset_hash=content,
        steps=train_domain.LOOP.steps,
        ema=train_domain.LOOP.ema,
        resolution=render.SIDE_PX,
        licence=LICENCE,
        extra={"seed": str(seed), "data": json.dumps(DATA_LICENCES)},
    )
    path = work / STAGED / assets.domain_unets_dir().name / f"{train_domain.FILE_NAMES[domain]}.safetensors"
    return write_domain_file(path, half(model.state_dict()), metadata)


def make_generator(work: Path, seed: int = 0) -> Path:
    """Stage 5: the StyleGAN2 of handwriting, white on black."""
    model = train_generator.train(work, seed)
    size, content = _dataset()
    metadata = GeneratorMetadata(
        name=train_generator.FILE_NAME,
        licence=LICENCE,
        extra={
            "steps": str(train_generator.LOOP.steps),
            "steps_at_half_size": str(train_generator.SMALL_LOOP.steps),
            "ema": str(train_generator.LOOP.ema),
            "seed": str(seed),
            "dataset_size": str(size),
            "dataset_hash": content,
            "data": json.dumps(DATA_LICENCES["handwriting"]),
        },
    )
    path = work / STAGED / assets.generators_dir().name / f"{train_generator.FILE_NAME}.safetensors"
    return write_generator(path, model, metadata, dtype="fp16")


def _dataset() -> tuple[int, str]:
    """How many images of handwriting are trained on, and their SHA-256."""
    images, _ = render.load_handwriting(render.TRAIN_ROWS)
    return len(images), hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def install(work: Path, weights: Path) -> list[Path]:
    """Put the finished files of ``work`` into the folder ``weights``, each replaced at once; the paths there."""
    source, placed = work / STAGED, []
    for path in sorted(source.rglob("*.safetensors")):
        placed.append(weights / path.relative_to(source))
        with replacing(placed[-1]) as file:
            file.write(path.read_bytes())
    return placed


def make_everything(work: Path, seed: int = 0) -> list[Path]:
    """All stages in order, then the shipped weights are replaced; what is finished in ``work`` is not trained again."""
    autoencoder, scale = make_autoencoder(work, seed)
    make_classifier(work, seed)
    make_classifier(work, seed, held_out=True)
    prior = make_prior(work, autoencoder, scale, seed)
    for domain in train_domain.DOMAINS:
        make_domain(work, domain, prior, autoencoder, scale, seed)
    make_generator(work, seed)
    return install(work, assets.weights_dir())
