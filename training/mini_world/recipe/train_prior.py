"""Stage 3 of the recipe: the open-world prior, UNet and text encoder together, on rendered digits with captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn

from ....guidance.diffusion import NoiseSchedule
from ....guidance.networks.autoencoder import Autoencoder
from ....guidance.networks.text_encoder import TextEncoder, TextEncoderConfig
from ....guidance.networks.unet import UNet
from ....guidance.networks.unet_config import UNetConfig
from ...domain.losses import add_noise
from .. import render, tokens
from .kept_files import made_once, weights_hash
from .loop import LoopConfig, run_loop
from .status_line import StatusLine

UNET = UNetConfig(
    model_channels=32,
    channel_mult=(2, 3),
    num_res_blocks=(2, 2),
    transformer_depth=(1, 1, 0, 0),
    transformer_depth_middle=1,
    transformer_depth_output=(1, 1, 1, 0, 0, 0),
    context_dim=128,
    num_heads=4,
)
TEXT = TextEncoderConfig(width=128, layers=2, heads=4, mlp_width=512, vocab_size=tokens.ROWS, end_token=tokens.END_ROW)
LOOP = LoopConfig(name="prior", steps=5800, rate=1.5e-3, ema=0.999, bf16=False)
CAPTIONS_A_BATCH, IMAGES_A_CAPTION = 16, 4
PER_KIND = 64  # latents kept for each of the 560 (digit, ink, ground) kinds
EMPTY_SHARE = 0.12  # captions dropped so that the unconditional exists
PARTIAL_SHARE = 0.2  # captions that leave a part unsaid
NOISY_SHARE = 0.5  # samples drawn from the noisier half of the schedule, where a digit is decided
WEIGHT_CAP = 5.0  # of 1 / SNR in the loss weight, see loss_weight
PROBE_WEIGHT = 0.05  # of the word probe, see word_probe_loss
PROBE_TOKENS = 8  # tokens of a caption that are probed


def kinds() -> Tensor:
    """Every (digit, ink, ground) with ink unlike ground, long [560, 3]."""
    pairs = render.colour_pairs()
    digits = torch.arange(10).repeat_interleave(len(pairs))
    return torch.cat([digits[:, None], pairs.repeat(10, 1)], dim=1)


@torch.no_grad()
def encode_latents(autoencoder: Autoencoder, images: Tensor, batch: int = 64) -> Tensor:
    """Posterior means [N, 4, 8, 8] of pictures [N, 3, 64, 64], unscaled."""
    return torch.cat([autoencoder.encode(part)[0] for part in images.split(batch)])


def cached_latents(
    work: Path, name: str, autoencoder: Autoencoder, count: int, draw: Callable[[int], Tensor], drawn: str
) -> Tensor:
    """Latents of ``count`` blocks of pictures, draw(block) -> [B, 3, 64, 64], encoded once: ``work/NAME.latents``.

    drawn: what the pictures are. Latents of another autoencoder or of other pictures are made again.
    """

    def encode() -> Tensor:
        status, parts = StatusLine(f"{name} latents"), []
        for block in range(count):
            parts.append(encode_latents(autoencoder, draw(block)))
            status.update(block + 1, count)
        return torch.stack(parts)

    source = f"autoencoder {weights_hash(autoencoder)}, {count} blocks, {drawn}"
    return made_once(work / f"{name}.latents", source, encode)


def rendered_latents(work: Path, autoencoder: Autoencoder, seed: int) -> Tensor:
    """Latents of the open world by kind: [560, PER_KIND, 4, 8, 8], unscaled."""
    every = kinds()

    def draw(kind: int) -> Tensor:
        digit, pair = every[kind, 0].expand(PER_KIND), every[kind, 1:].expand(PER_KIND, 2)
        return render.rendered(PER_KIND, render.step_generator(seed + 1, kind), digits=digit, pairs=pair).images

    return cached_latents(work, "rendered", autoencoder, len(every), draw, f"{PER_KIND} a kind, seed {seed}")


def draw_said(kind: Tensor, generator: Generator) -> tuple[int, int, int] | None:
    """What a caption of one (digit, ink, ground) says: all, a part (-1 for the rest), or None for the empty caption."""
    digit, ink, ground = kind.tolist()
    dice, part = torch.rand(2, generator=generator).tolist()
    if dice < EMPTY_SHARE:
        return None
    if dice < EMPTY_SHARE + PARTIAL_SHARE:
        # Leave out the digit, the ink, the ground, or both colours.
        choice = int(part * 4)
        digit = -1 if choice == 0 else digit
        ink = -1 if choice in (1, 3) else ink
        ground = -1 if choice in (2, 3) else ground
    return digit, ink, ground


def caption_of(said: tuple[int, int, int] | None) -> str:
    return "" if said is None else render.caption(*(None if part < 0 else part for part in said))


def word_probe_loss(hidden: Tensor, said: Tensor, generator: Generator) -> Tensor:
    """Cross-entropy of reading digit, ink and ground off random tokens of the encoded text by fixed random directions.

    It stands in for CLIP's pre-training: without it the encoder passes on the colours, which matter most to the pixels,
    and learns to tell digits apart only after thousands of steps. hidden [B, 77, W]; said [B, 3], -1 for what the
    caption leaves out (the class after the last). Padding sees the whole caption, so tokens behind it are probed.
    """
    counts = (11, 9, 9)
    directions = torch.randn(sum(counts), hidden.shape[2], generator=Generator().manual_seed(0))
    directions = directions / directions.norm(dim=1, keepdim=True)
    positions = torch.randint(10, hidden.shape[1], (PROBE_TOKENS,), generator=generator)
    logits = (hidden[:, positions] @ directions.T).split(counts, dim=2)
    losses = []
    for part, wanted in zip(logits, said.unbind(1)):
        wanted = torch.where(wanted < 0, part.shape[2] - 1, wanted).repeat_interleave(PROBE_TOKENS)
        losses.append(F.cross_entropy(part.flatten(0, 1), wanted))
    return sum(losses[1:], losses[0]) / len(losses)


class PriorNetworks(nn.Module):
    """UNet and text encoder as one module, so that one loop trains, averages and saves both."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text = UNet(UNET), TextEncoder(TEXT)


def loss_weight(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """sqrt(min(1 / SNR, cap)) for each timestep [B]: between the eps loss (1) and the x0 loss (1 / SNR).

    The eps loss alone teaches colours at once and digits very late: what the digit changes lies at high noise, where an
    error in x0 hardly shows in eps.
    """
    abar = schedule.alphas_cumprod[timesteps]
    return ((1 - abar) / abar).clamp(max=WEIGHT_CAP).sqrt()


def noised(
    latents: Tensor, schedule: NoiseSchedule, generator: Generator, noisy_share: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [B, C, h, w] at random noise levels: (x_t of `add_noise`, timesteps [B], noise).

    Timesteps are uniform, but a ``noisy_share`` (0: none) of them falls into the noisier half of the schedule.
    """
    timesteps = torch.randint(len(schedule), (len(latents),), generator=generator)
    half, noisier = len(schedule) // 2, int(noisy_share * len(latents))
    timesteps[:noisier] = half + timesteps[:noisier] // 2
    noise = torch.randn(latents.shape, generator=generator)
    return add_noise(latents, noise, schedule.alphas_cumprod[timesteps]), timesteps, noise


def train(work: Path, autoencoder: Autoencoder, scale: float, seed: int = 0) -> PriorNetworks:
    """Train (or finish) the prior in folder ``work``; ``scale`` makes the latents unit variance."""
    latents = rendered_latents(work, autoencoder, seed) * scale
    every, schedule = kinds(), NoiseSchedule.scaled_linear()

    def loss_of(model: PriorNetworks, generator: Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.randint(len(every), (CAPTIONS_A_BATCH,), generator=generator)
        said = [draw_said(every[kind], generator) for kind in chosen]
        texts = torch.stack([tokens.tokenize(caption_of(parts)) for parts in said])
        picks = torch.randint(PER_KIND, (CAPTIONS_A_BATCH, IMAGES_A_CAPTION), generator=generator)
        batch = rearrange(latents[chosen[:, None], picks], "k i c h w -> (k i) c h w")
        noisy, timesteps, noise = noised(batch, schedule, generator, NOISY_SHARE)
        hidden, _ = model.text(tokens.to_rows(texts))
        error = model.unet(noisy, timesteps, hidden.repeat_interleave(IMAGES_A_CAPTION, 0)).float() - noise
        loss = (error.square().mean(dim=(1, 2, 3)) * loss_weight(schedule, timesteps)).mean()
        probe = word_probe_loss(hidden.float(), torch.tensor([parts or (-1, -1, -1) for parts in said]), generator)
        return loss + PROBE_WEIGHT * probe, {"denoising": loss.item(), "probe": probe.item()}

    torch.manual_seed(seed + 2)
    return run_loop(replace(LOOP, seed=seed + 2), PriorNetworks(), loss_of, work)
