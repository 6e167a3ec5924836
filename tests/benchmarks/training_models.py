"""The trainers that `bench_training` lets race: this project's learner, and diffusers' UNet trained the usual way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.guidance.networks.unet_layers import timestep_embedding
from indomain_guidance.guidance.null_text import NullContext, build_cached, fold_constants, load_unet
from indomain_guidance.training.data.buckets import bucket_sizes
from indomain_guidance.training.data.latent_dataset import Sample
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.domain.learner import DomainLearner
from torch import Generator, Tensor, nn

POOLED = 1280
SIZES = (512.0, 512.0, 0.0, 0.0, 512.0, 512.0)  # of the image, its crop, the target: what SDXL is told
GAMMA = 5.0
RATE = 1e-4


@dataclass(frozen=True)
class Shape:
    """A UNet to train, and the number of text tokens it sees."""

    config: UNetConfig
    tokens: int


# The topologies of SD 1.5 and SDXL, narrower so that their weights, gradients and Adam's state fit: 0.4 and 0.3 of the
# full width. What belongs to the text (its width, its tokens) is narrowed likewise, so that the shares of parameters
# and of multiplications that text-free training saves stay those of the full models.
SHAPES = {
    "sd15": Shape(
        UNetConfig(
            model_channels=128,
            channel_mult=(1, 2, 4, 4),
            num_res_blocks=(2, 2, 2, 2),
            transformer_depth=(1, 1, 1, 1, 1, 1, 0, 0),
            transformer_depth_middle=1,
            transformer_depth_output=(1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0),
            context_dim=304,
            num_heads=8,
        ),
        31,
    ),
    "sdxl": Shape(
        UNetConfig(
            model_channels=96,
            channel_mult=(1, 2, 4),
            num_res_blocks=(2, 2, 2),
            transformer_depth=(0, 0, 2, 2, 10, 10),
            transformer_depth_middle=10,
            transformer_depth_output=(0, 0, 0, 2, 2, 2, 10, 10, 10),
            context_dim=608,
            num_head_channels=24,
            use_linear_in_transformer=True,
            adm_in_channels=2816,
        ),
        23,
    ),
}
TINY_SHAPES = {
    "sd15": Shape(
        UNetConfig(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=(1, 1),
            transformer_depth=(1, 0),
            transformer_depth_middle=1,
            transformer_depth_output=(1, 1, 0, 0),
            context_dim=24,
            num_heads=4,
        ),
        7,
    ),
    "sdxl": Shape(
        UNetConfig(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=(1, 1),
            transformer_depth=(0, 2),
            transformer_depth_middle=2,
            transformer_depth_output=(0, 0, 2, 2),
            context_dim=32,
            num_head_channels=16,
            use_linear_in_transformer=True,
            adm_in_channels=2816,
        ),
        7,
    ),
}


def random_weights(config: UNetConfig, seed: int) -> dict[str, Tensor]:
    """Weights that keep activations near 1, the same for a seed; layers that training starts at zero included."""
    generator = Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in UNet(config).state_dict().items()}
    weights = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[key] = value.div_(shape[1:].numel() ** 0.5)
        else:
            weights[key] = value.mul_(0.02).add_(1.0 if key.endswith("weight") else 0.0)
    return weights


def null_context(shape: Shape, seed: int) -> NullContext:
    """A random "empty prompt"."""
    generator = Generator().manual_seed(1000 + seed)
    pooled = torch.zeros(1, POOLED) if shape.config.adm_in_channels else None
    return NullContext(torch.randn(1, shape.tokens, shape.config.context_dim, generator=generator), {}, pooled)


def unet_of(shape: Shape, form: str, seed: int) -> nn.Module:
    """The UNet in a form ("full", "constant", "cached"), all of it trainable."""
    weights, config = random_weights(shape.config, seed), shape.config
    if form == "cached":
        weights, config = build_cached(weights, config, null_context(shape, seed))
    elif form == "constant":  # measuring the constants would change no shape and no time
        suffix = ".attn1.to_out.0.bias"
        ends = [key for key in weights if key.endswith(suffix)]
        constants = {key.removesuffix(suffix): torch.zeros(len(weights[key])) for key in ends}
        weights, config = fold_constants(weights, config, null_context(shape, seed), constants)
    return load_unet(weights, config).train().requires_grad_(True)


def size_vector() -> Tensor:
    """SDXL's vector conditioning [1, 2816]: a zero pooled text, and SIZES embedded."""
    return torch.cat([torch.zeros(1, POOLED), timestep_embedding(torch.tensor(SIZES), 256).reshape(1, -1)], dim=1)


@dataclass(frozen=True)
class Latents:
    """Random cached latents in memory, as a dataset of the learner; `groups` are buckets of one shape each."""

    tensors: Sequence[Tensor]
    groups: Mapping[tuple[int, int], Sequence[int]]
    content_hash: str

    @classmethod
    def of(cls, sides: Sequence[tuple[int, int]], each: int, seed: int) -> Latents:
        generator, tensors, groups = Generator().manual_seed(seed), [], {}
        for side in sides:
            groups[side] = range(len(tensors), len(tensors) + each)
            tensors += [torch.randn(4, *side, generator=generator) for _ in range(each)]
        digest = hashlib.sha256(b"".join(one.numpy().tobytes() for one in tensors))
        return cls(tensors, groups, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.tensors)

    def draw(self, index: int, generator: Generator) -> Sample:
        height, width = self.tensors[index].shape[-2:]
        size = (8 * height, 8 * width)
        return Sample(self.tensors[index], original=size, size=size, crop=(0, 0))

    def name_of(self, index: int) -> str:
        return str(index)


def bucket_sides(side: int) -> list[tuple[int, int]]:
    """The shapes of latents that aspect-ratio buckets of about side x side have."""
    step = 64 if side >= 16 else 16
    return [(height // 8, width // 8) for height, width in bucket_sizes(8 * side, step, 2.0)]


class Contestant:
    """Something that trains: `step()` is one optimizer step and returns its loss, `loss()` that of a fixed batch."""

    parameters: int

    def step(self) -> float:
        raise NotImplementedError

    def predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        raise NotImplementedError

    def __init__(self, side: int, seed: int) -> None:
        generator = Generator().manual_seed(3000 + seed)
        self._fixed = (
            torch.randn(2, 4, side, side, generator=generator),
            torch.randn(2, 4, side, side, generator=generator),
            torch.tensor([200, 700]),
        )

    @torch.no_grad()
    def loss(self) -> float:
        """Plain loss on a batch that is the same for every contestant and moment."""
        clean, noise, timesteps = self._fixed
        abar = NoiseSchedule.scaled_linear().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        output = self.predict(abar.sqrt() * clean + (1 - abar).sqrt() * noise, timesteps)
        return float((output - noise).square().mean())


class Ours(Contestant):
    """This project's learner. form: "full", "constant", "cached"; buckets: images in shapes of one area."""

    def __init__(
        self, shape: Shape, form: str, side: int, batch: int, seed: int, ema: bool = False, buckets: bool = False
    ) -> None:
        super().__init__(side, seed)
        sides = bucket_sides(side) if buckets else [(side, side)]
        config = TrainConfig(
            base="benchmark",
            form=form,
            resolution=max(64, 8 * side),
            batch_size=batch,
            learning_rate=RATE,
            warmup=0,
            ema=0.999 if ema else 0.0,
            min_snr_gamma=GAMMA,
            precision="fp32",
            device="cpu",
            seed=seed,
        )
        self._arguments = {}
        if form == "full":
            self._arguments["context"] = null_context(shape, seed).tensor
        if shape.config.adm_in_channels:
            self._arguments["y"] = size_vector()
        unet = unet_of(shape, form, seed)
        self.parameters = sum(one.numel() for one in unet.parameters())
        self.learner = DomainLearner(
            config,
            unet,
            Latents.of(sides, max(4 * batch, 16) // len(sides) or 1, seed),
            NoiseSchedule.scaled_linear(),
            "epsilon",
            lambda sizes: self._conditioning(len(sizes)),
        )

    def _conditioning(self, count: int) -> dict[str, Tensor]:
        return {name: value.expand(count, *value.shape[1:]) for name, value in self._arguments.items()}

    def step(self) -> float:
        return self.learner.take_step().loss

    def predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.learner.unet(noisy, timesteps, **self._conditioning(len(noisy)))


def diffusers_unet(shape: Shape, seed: int) -> nn.Module:
    """diffusers' UNet with the weights of `unet_of(shape, "full", seed)`."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ours = shape.config
    levels = len(ours.channel_mult)
    widths = [ours.model_channels * mult for mult in ours.channel_mult]
    depths = [ours.transformer_depth[sum(ours.num_res_blocks[:level])] for level in range(levels)]
    options: dict[str, Any] = {}
    if ours.adm_in_channels:
        options = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": ours.adm_in_channels,
        }
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=ours.num_res_blocks[0],
        down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        transformer_layers_per_block=[max(depth, 1) for depth in depths],
        cross_attention_dim=ours.context_dim,
        # diffusers calls the number of heads a head's width here, in its own models' files too.
        attention_head_dim=[ours.heads_for(width) for width in widths],
        use_linear_projection=ours.use_linear_in_transformer,
        **options,
    )
    weights = {f"model.diffusion_model.{key}": value for key, value in random_weights(ours, seed).items()}
    converted = convert_ldm_unet_checkpoint(weights, config=dict(unet.config))
    unet.load_state_dict(converted, strict=True)
    return unet


class Diffusers(Contestant):
    """The training loop of diffusers' own text-to-image example, one process, on cached latents and text.

    Its defaults are AdamW as torch chooses to run it; fused: in one pass over the weights, as this project does.
    """

    def __init__(self, shape: Shape, side: int, batch: int, seed: int, fused: bool = False) -> None:
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler

        super().__init__(side, seed)
        self.unet = diffusers_unet(shape, seed).train()
        self.parameters = sum(one.numel() for one in self.unet.parameters())
        self._batch = batch
        self._latents = torch.stack(list(Latents.of([(side, side)], max(4 * batch, 16), seed).tensors))
        self._text = null_context(shape, seed).tensor
        self._added = None
        if shape.config.adm_in_channels:
            self._added = {"text_embeds": torch.zeros(1, POOLED), "time_ids": torch.tensor([SIZES])}
        self._noise = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        options = {"fused": True} if fused else {}
        self._optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8, **options
        )
        self._rate = get_scheduler("constant", self._optimizer)

    def predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        count = len(noisy)
        added = None
        if self._added is not None:
            added = {name: value.expand(count, -1) for name, value in self._added.items()}
        text = self._text.expand(count, -1, -1)
        return self.unet(noisy, timesteps, text, added_cond_kwargs=added, return_dict=False)[0]

    def step(self) -> float:
        from diffusers.training_utils import compute_snr

        latents = self._latents[torch.randint(len(self._latents), (self._batch,))]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(self._noise.config.num_train_timesteps, (self._batch,))
        output = self.predict(self._noise.add_noise(latents, noise, timesteps), timesteps)
        snr = compute_snr(self._noise, timesteps)
        weights = torch.stack([snr, GAMMA * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
        loss = nn.functional.mse_loss(output.float(), noise.float(), reduction="none")
        loss = (loss.mean(dim=list(range(1, loss.ndim))) * weights).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self._optimizer.step()
        self._rate.step()
        self._optimizer.zero_grad()
        return loss.item()


CONTESTANTS: dict[str, Callable[[Shape, int, int, int], Contestant]] = {
    "diffusers": Diffusers,
    "diffusers, fused optimizer": lambda *sizes: Diffusers(*sizes, fused=True),
    "full": lambda shape, *sizes: Ours(shape, "full", *sizes),
    "constant": lambda shape, *sizes: Ours(shape, "constant", *sizes),
    "cached": lambda shape, *sizes: Ours(shape, "cached", *sizes),
    "constant with EMA": lambda shape, *sizes: Ours(shape, "constant", *sizes, ema=True),
    "constant in buckets": lambda shape, *sizes: Ours(shape, "constant", *sizes, buckets=True),
}


def expected_parameters(shape: Shape, form: str) -> int:
    """How many parameters a form must have, counted from the full UNet's keys: what is removed, and what is added."""
    with torch.device("meta"):
        full = UNet(replace(shape.config, null_text="none")).state_dict()
    count = sum(one.numel() for one in full.values())
    keys = (".attn2.to_k.", ".attn2.to_v.") if form == "cached" else (".attn2.", ".norm2.")
    if form == "full":
        return count
    removed = [one for key, one in full.items() if any(part in key for part in keys)]
    added = 0
    if form == "cached":  # keys and values of the empty prompt
        added = sum(shape.tokens * one.shape[0] for key, one in full.items() if ".attn2.to_k." in key) * 2
    return count - sum(one.numel() for one in removed) + added
