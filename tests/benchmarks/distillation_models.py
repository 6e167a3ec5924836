"""One optimizer step of an adaptation, as this project takes it and organised as StyleGAN-Fusion was released.

Both use the same UNet, VAE and generator of this library, so that only the organisation of a step differs. Written from
the order of operations of the released code (KunpengSong/styleganfusion), with none of the distillation library:
resize the image to the judge's size and clamp it to -1..1; encode it for SDS and ask for its gradient; encode it again
as a leaf, go back through the encoder, clamp the gradient there at its 95th percentile, and go back through clamp,
resize and generator; encode both images for the directional regularizer, ask about each, and go back through encoder
and generator once more. Its models keep gradients for their own weights and run with anomaly detection, which both cost
more; here neither side does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from indomain_guidance.guidance.diffusion import Denoiser, NoiseSchedule
from indomain_guidance.guidance.distillation.critic import Critic
from indomain_guidance.guidance.distillation.image_encoder import ImageEncoder
from indomain_guidance.guidance.distillation.objective import Draws
from indomain_guidance.guidance.networks.autoencoder import Autoencoder, AutoencoderConfig
from indomain_guidance.guidance.networks.stylegan2 import StyleGAN2, random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.training.adaptation.adapter import Adapter
from indomain_guidance.training.adaptation.config import AdaptConfig
from indomain_guidance.training.adaptation.critic import make_objective
from torch import Tensor, nn
from torch.nn import functional as F

from .comfy_models import SD15, TINY, random_context, random_weights

SCALE = 100.0
LATENT_SCALE = 0.18215


@dataclass(frozen=True)
class Shape:
    """The models of a step: latents have an eighth of the side in pixels at which images are judged."""

    unet: UNetConfig
    autoencoder: AutoencoderConfig
    generator: GeneratorConfig


# SD 1.5's models, and the 256 px generator of StyleGAN2's published configurations.
SHAPES = {
    "sd15_256px": Shape(SD15, AutoencoderConfig(), GeneratorConfig(256, (512, 512, 512, 512, 256, 128, 64))),
    "tiny": Shape(
        TINY,
        AutoencoderConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1),
        GeneratorConfig(64, (16, 16, 16, 16, 16), z_dim=16, w_dim=16, mapping_layers=2),
    ),
}


class Models:
    """What both sides use, with random weights, and its critic.

    side_px: at which images are judged; None: the generator's own. spread: factor on the generator's images, of which
    those of the tiny one lie mostly beyond -1..1 at 1.
    """

    def __init__(self, shape: Shape, seed: int, side_px: int | None = None, spread: float = 1.0) -> None:
        unet = UNet(shape.unet)
        unet.load_state_dict(random_weights(shape.unet, seed), assign=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.autoencoder: nn.Module = Autoencoder(shape.autoencoder)
        self.unet = unet.eval().requires_grad_(False)
        self.autoencoder.eval().requires_grad_(False)
        self.schedule = NoiseSchedule.scaled_linear()
        self.generator: StyleGAN2 = random_generator(shape.generator, seed)
        self.side_px = side_px or shape.generator.resolution
        with torch.no_grad():
            for name, one in self.generator.named_parameters():
                if ".torgb." in name and "affine" not in name:
                    one.mul_(spread)
        self.encode = ImageEncoder(self.encoded, self.side_px)
        self.contexts = tuple(random_context(shape.unet, seed + index) for index in range(2))
        uncond, cond = ({"context": context} for context in self.contexts)
        self.critic = Critic.cfg(Denoiser(self.unet, self.schedule), uncond, cond, SCALE)

    def encoded(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in -1..1 -> scaled posterior means [B, 4, H / 8, W / 8]."""
        return self.autoencoder.encode(images)[0] * LATENT_SCALE

    def config(self, mode: str, clamps: bool = True, seed: int = 0) -> AdaptConfig:
        """SDS with the directional regularizer, batch 1, as released but for the mode."""
        limits = {} if clamps else {"latent_clamp": 0.0, "image_quantile": 0.0, "way_back": 0.0}
        return AdaptConfig(
            generator="benchmark",
            base="benchmark",
            prompt="benchmark",
            method="sds",
            scale=SCALE,
            mode=mode,
            directional=1.0,
            batch_size=1,
            ema=0.0,
            precision="fp32",
            device="cpu",
            seed=seed,
            **limits,
        )


@torch.no_grad()
def move(parameters: dict[str, Tensor], seed: int) -> None:
    """Change the trained tensors by a tenth of their spread: the directional gradient of equal generators is zero."""
    randomness = torch.Generator().manual_seed(seed)
    for one in parameters.values():
        one.add_(torch.randn(one.shape, generator=randomness), alpha=0.1 * float(one.square().mean().sqrt()))


class Ours:
    """The production step; mode: "shared", the default, or "sgf"."""

    def __init__(self, models: Models, mode: str, clamps: bool = True, seed: int = 0) -> None:
        config = models.config(mode, clamps, seed)
        self.objective = make_objective(config, models.critic, models.encode, "cpu")
        self.adapter = Adapter(config, models.generator, self.objective, models.encode)
        move(self.adapter.parameters, seed)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return self.adapter.parameters

    def step(self) -> float:
        """One optimizer step; its loss."""
        return self.adapter.take_step().loss

    def gradients(self, z: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The gradient of every trained tensor for given latents and noise, without a step."""
        generator, frozen = self.adapter.generator, self.adapter.frozen
        self.adapter.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            reference = frozen(z)
        self.objective.backward(generator(z), reference, self.adapter.encode, step=0, steps=1, draws=draws)
        return {name: one.grad.clone() for name, one in self.parameters.items()}


class Released:
    """The same update in the released order of operations. It trains the tensors that `Ours` trains."""

    def __init__(self, models: Models, clamps: bool = True, seed: int = 0) -> None:
        own = Ours(models, "sgf", clamps, seed).adapter
        self.models, self.clamps, self.config = models, clamps, own.config
        self.generator, self.frozen = own.generator, own.frozen
        self.parameters, self.optimizer = own.parameters, own.optimizer
        self.seed, self.steps = seed, 0
        self.abar = models.schedule.alphas_cumprod

    def step(self) -> float:
        """One optimizer step; its loss."""
        randomness = torch.Generator().manual_seed(self.seed * 1_000_003 + self.steps)
        z = torch.randn(1, self.generator.config.z_dim, generator=randomness)
        side = self.models.side_px // 8
        t = torch.randint(self.config.t_min, self.config.t_max + 1, (1,), generator=randomness)
        noise = {name: torch.randn(1, 4, side, side, generator=randomness) for name in ("sds", "directional")}
        loss = self._backward(z, Draws(t, noise))
        self.optimizer.step()
        self.steps += 1
        return loss

    def gradients(self, z: Tensor, draws: Draws) -> dict[str, Tensor]:
        """The gradient of every trained tensor for given latents and noise, without a step."""
        self._backward(z, draws)
        return {name: one.grad.clone() for name, one in self.parameters.items()}

    def _backward(self, z: Tensor, draws: Draws) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        encode, t = self.models.encoded, draws.t
        with torch.no_grad():
            before = self._judged(self.frozen(z))
        images = self._judged(self.generator(z))
        # SDS: its gradient on latents is made with one encoding and brought to the image with another.
        latents = encode(images)
        gradient, difference = self._sds(latents, draws.noise["sds"], t)
        if self.clamps:
            leaf = images.detach().clone().requires_grad_()
            encode(leaf).backward(gradient)
            limit = torch.quantile(leaf.grad.flatten(1).abs(), 0.95, dim=1).view(-1, 1, 1, 1)
            images.backward(leaf.grad.clamp(-limit, limit), retain_graph=True)
        else:
            latents.backward(gradient, retain_graph=True)
        # The directional regularizer encodes both images anew, and asks about each by itself.
        trained, frozen = encode(images), encode(before)
        gradient = self._directional(trained, frozen, draws.noise["directional"], t)
        trained.backward(gradient, retain_graph=True)
        return float(difference.square().mean())

    def _judged(self, images: Tensor) -> Tensor:
        side = self.models.side_px
        return F.interpolate(images, (side, side), mode="bilinear", align_corners=False).clamp(-1, 1)

    @torch.no_grad()
    def _sds(self, latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        difference = self._guided(latents, noise, t) - noise
        return self._weighted(difference, t), difference

    @torch.no_grad()
    def _directional(self, trained: Tensor, frozen: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self._weighted(self._guided(trained, noise, t) - self._guided(frozen, noise, t), t)

    def _weighted(self, gradient: Tensor, t: Tensor) -> Tensor:
        gradient = (1 - self.abar[t]).view(-1, 1, 1, 1) * gradient
        return gradient.clamp(-1, 1) if self.clamps else gradient

    def _guided(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """e_u + s (e_c - e_u) in one call of two."""
        abar = self.abar[t].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
        context = torch.cat(self.models.contexts)
        e_u, e_c = self.models.unet(torch.cat([noisy] * 2), t.repeat(2), context=context).chunk(2)
        return e_u + SCALE * (e_c - e_u)
