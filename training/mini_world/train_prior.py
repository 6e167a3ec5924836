"""Stage 3 of the recipe: the open-world prior, UNet and text encoder together, on latents of rendered digits with captions."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn

from ...guidance.diffusion import NoiseSchedule
from ...guidance.networks.autoencoder import Autoencoder
from ...guidance.networks.text_encoder import TextEncoder, TextEncoderConfig
from ...guidance.networks.unet import UNet, UNetConfig
from . import render, tokens
from .loop import LoopConfig, Progress, run_loop, save_atomically, step_generator

UNET = UNetConfig(model_channels=32, channel_mult=(2, 3), num_res_blocks=(2, 2), transformer_depth=(1, 1, 0, 0),
                  transformer_depth_middle=1, transformer_depth_output=(1, 1, 1, 0, 0, 0), context_dim=128, num_heads=4)
TEXT = TextEncoderConfig(width=128, layers=2, heads=4, mlp_width=512, vocab_size=tokens.ROWS, end_token=tokens.END_ROW)
LOOP = LoopConfig(name="prior", steps=5000, rate=1.5e-3, ema=0.999, save_every=500)
CAPTIONS_A_BATCH, IMAGES_A_CAPTION = 32, 4
PER_KIND = 64            # latents kept for each of the 560 (digit, ink, ground) kinds
EMPTY_SHARE = 0.12       # captions dropped so that the unconditional exists
PARTIAL_SHARE = 0.2      # captions that leave a part unsaid


def kinds() -> Tensor:
    """Every (digit, ink, ground) with ink unlike ground, long [560, 3]."""
    pairs = render.colour_pairs()
    digits = torch.arange(10).repeat_interleave(len(pairs))
    return torch.cat([digits[:, None], pairs.repeat(10, 1)], dim=1)


@torch.no_grad()
def encode_latents(autoencoder: Autoencoder, images: Tensor, batch: int = 64) -> Tensor:
    """Posterior means [N, 4, 8, 8] of pictures [N, 3, 64, 64], unscaled."""
    return torch.cat([autoencoder.encode(part)[0] for part in images.split(batch)])


def cached_latents(work: Path, name: str, autoencoder: Autoencoder, count: int, draw) -> Tensor:
    """Latents of ``count`` blocks of pictures, from ``work/NAME.latents`` or encoded there: draw(block) -> [B, 3, 64, 64]."""
    path = work / f"{name}.latents"
    if path.exists():
        return torch.load(path, weights_only=True)
    progress, parts = Progress(f"{name} latents", count), []
    for block in range(count):
        parts.append(encode_latents(autoencoder, draw(block)))
        progress.update(block + 1, "")
    save_atomically(torch.stack(parts), path)
    return torch.stack(parts)


def rendered_latents(work: Path, autoencoder: Autoencoder, seed: int) -> Tensor:
    """Latents of the open world by kind: [560, PER_KIND, 4, 8, 8], unscaled."""
    every = kinds()

    def draw(kind: int) -> Tensor:
        digit, pair = every[kind, 0].expand(PER_KIND), every[kind, 1:].expand(PER_KIND, 2)
        return render.rendered(PER_KIND, step_generator(seed + 1, kind), digits=digit, pairs=pair).images

    return cached_latents(work, "rendered", autoencoder, len(every), draw)


def draw_caption(kind: Tensor, generator: Generator) -> str:
    """A caption of one (digit, ink, ground): whole, in part, or empty."""
    digit, ink, ground = kind.tolist()
    dice, part = torch.rand(2, generator=generator).tolist()
    if dice < EMPTY_SHARE:
        return ""
    if dice < EMPTY_SHARE + PARTIAL_SHARE:
        # Leave out the digit, the ink, the ground, or both colours.
        choice = int(part * 4)
        digit = None if choice == 0 else digit
        ink = None if choice in (1, 3) else ink
        ground = None if choice in (2, 3) else ground
    return render.caption(digit, ink, ground)


class Prior(nn.Module):
    """UNet and text encoder as one module, so that one loop trains, averages and saves both."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text = UNet(UNET), TextEncoder(TEXT)


def noised(latents: Tensor, schedule: NoiseSchedule, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise at uniform timesteps (arXiv 2006.11239, eq. 4): (x_t, timesteps, noise)."""
    timesteps = torch.randint(len(schedule), (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    abar = schedule.alphas_cumprod[timesteps][:, None, None, None]
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise, timesteps, noise


def train(work: Path, autoencoder: Autoencoder, scale: float, seed: int = 0, steps: int | None = None) -> Prior:
    """Train (or finish) the prior in folder ``work``; ``scale`` makes the latents unit variance."""
    latents = rendered_latents(work, autoencoder, seed) * scale
    every, schedule = kinds(), NoiseSchedule.scaled_linear()

    def loss_of(model: nn.Module, generator: Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.randint(len(every), (CAPTIONS_A_BATCH,), generator=generator)
        texts = torch.stack([tokens.tokenize(draw_caption(every[kind], generator)) for kind in chosen])
        picks = torch.randint(PER_KIND, (CAPTIONS_A_BATCH, IMAGES_A_CAPTION), generator=generator)
        batch = rearrange(latents[chosen[:, None], picks], "k i c h w -> (k i) c h w")
        noisy, timesteps, noise = noised(batch, schedule, generator)
        hidden, _ = model.text(tokens.to_rows(texts))
        loss = F.mse_loss(model.unet(noisy, timesteps, hidden.repeat_interleave(IMAGES_A_CAPTION, 0)).float(), noise)
        return loss, {}

    torch.manual_seed(seed + 2)
    loop = LoopConfig(**{**LOOP.__dict__, "seed": seed + 2, "steps": steps or LOOP.steps})
    return run_loop(loop, Prior(), loss_of, work)
