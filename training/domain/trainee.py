"""What of a prior is trained: its text-free or full UNet, and which of the weights learn.

"Image is All You Need to Empower Large-scale Diffusion Models for In-Domain Generation" (arXiv 2312.08195), section
3.2, for the text-free forms; `full` keeps the text and is what fine-tuning baselines train.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...guidance.diffusion import Denoiser
from ...guidance.errors import Problem
from ...guidance.networks.low_rank import ADDED, add_low_rank, merged_weights
from ...guidance.networks.unet import UNet
from ...guidance.networks.unet_config import UNetConfig
from ...guidance.null_text import build_cached, fold_constants
from ...guidance.probes import AttentionStatistics, Probes, collect_probes, measure_cross_attention
from ..engine.average import swapped
from ..prior.prior import ImageSize, Prior
from ..prior.text_encoders import Text
from .config import FORMS, TRAINS

SELF_ATTENTION = re.compile(r"\.attn1\.")
PROBE_STEPS = 20  # of the prior's own trajectory, 8 of them used (design: section 3.2)
PROBE_USE = 8


@dataclass(eq=False)
class Trainee:
    """A UNet about to be trained.

    unet: fp32, in training mode; only what learns requires gradients. text: what it is conditioned on, None when it is
    text-free. constants and null_text_error, by block: what `constant` folded in, and RMS(attention - constant) /
    RMS(attention) on another trajectory; both empty for the other forms.
    """

    unet: UNet
    form: str
    train: str
    text: Text | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)
    null_text_error: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> UNetConfig:
        return self.unet.config

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name, always in the same order."""
        return {name: parameter for name, parameter in self.unet.named_parameters() if parameter.requires_grad}

    def weights(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All weights of the finished UNet under LDM keys, low-rank additions merged.

        values: what the parameters that learn are to be, by name, such as their average; None is what they are.
        """
        return {key: tensor.detach() for key, tensor in merged_weights(self.unet, values).items()}

    @contextmanager
    def using(self, values: Mapping[str, Tensor] | None) -> Iterator[UNet]:
        """The UNet in evaluation mode with other values of what learns (None: its own), and back again exactly."""
        training = self.unet.training
        with swapped(self.named_trainable(), values or {}):
            self.unet.eval()
            try:
                yield self.unet
            finally:
                self.unet.train(training)


def start_model(
    prior: Prior,
    form: str = "cached",
    train: str = "all",
    *,
    caption: str = "",
    additions: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    resolution: int = 512,
    seed: int = 0,
    device: torch.device | str = "cpu",
    constants: Mapping[str, Tensor] | None = None,
    null_text_error: Mapping[str, float] | None = None,
    on_probe: Callable[[int, int], None] | None = None,
) -> Trainee:
    """The UNet that learns, made from a prior.

    form: "cached" and "constant" are text-free (`guidance.null_text`); "full" takes the text of `caption`, one prompt
    for every image. train: "all" weights; "self_attention", how the pixels of an image relate (49.6 M of SD 1.5's
    860 M, so a seventeenth of the memory for gradients, optimizer and average); "low_rank" `additions`, drawn
    from `seed`: arguments of `add_low_rank`, None for rank 16 on all attention projections.

    `constant` runs the prior for 56 passes at `resolution` pixels on `device`; give the `constants` (and
    `null_text_error`) of an earlier start to skip them. on_probe(done, of) reports these passes. Raises ValueError.
    """
    for name, value, known in (("form", form, FORMS), ("train", train, TRAINS)):
        if value not in known:
            raise Problem(f"Expected {name} to be one of {', '.join(known)}, got {value!r}.")
    if caption and form != "full":
        raise Problem(f"Expected no caption with the text-free form {form}, got {caption!r}; use form full.")
    with torch.inference_mode(False), torch.enable_grad():
        text, folded, errors = None, {}, dict(null_text_error or {})
        # Copies: training must never reach the prior, whose tensors these are.
        weights = {key: tensor.detach().to(torch.float32, copy=True) for key, tensor in prior.unet.items()}
        config = prior.config
        if form == "cached":
            weights, config = build_cached(weights, config, prior.null_context)
        elif form == "constant":
            if constants is None:
                folded, errors = measured_constants(prior, resolution, device, on_probe)
            else:
                folded = dict(constants)
            weights, config = fold_constants(weights, config, prior.null_context, folded)
        else:
            text = prior.encode_text([caption])
        with torch.device("meta"):
            unet = UNet(config)
        unet.load_state_dict(weights, strict=True, assign=True)
        unet.gradient_checkpointing = gradient_checkpointing
        choose_trainable(unet.train(), train, additions, seed)
        return Trainee(unet, form, train, text, folded, errors)


def choose_trainable(unet: UNet, train: str, additions: Mapping[str, Any] | None = None, seed: int = 0) -> None:
    """Let exactly the parameters that `train` names require gradients, in place; see `start_model`."""
    unet.requires_grad_(train == "all")
    if train == "low_rank":
        add_low_rank(unet, seed=seed, **{"rank": 16, **(additions or {})})
    learns = {"self_attention": SELF_ATTENTION, "low_rank": ADDED}.get(train)
    if learns is not None:
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(learns.search(name) is not None)
    if not any(parameter.requires_grad for parameter in unet.parameters()):
        raise Problem(f"Expected a UNet with attention to train {train}, found none; train all weights.")


def measured_constants(
    prior: Prior,
    resolution: int,
    device: torch.device | str = "cpu",
    on_probe: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Each block's mean cross-attention output on the prior's own unconditional trajectory, and its error on another.

    The trajectories are those of the design (8 of 20 DDIM steps, seeds 0 and 1) at square latents of `resolution`.
    """
    unet = prior.load_unet().to(device)
    side = resolution // prior.factor
    y = prior.vector([ImageSize((resolution, resolution))], prior.null_context.pooled)
    denoiser = Denoiser(unet, prior.schedule, prior.prediction_type)
    total, done = 2 * (PROBE_STEPS + PROBE_USE), 0

    def progress(*_: int) -> None:
        nonlocal done
        done += 1
        if on_probe is not None:
            on_probe(done, total)

    def statistics(seed: int) -> dict[str, AttentionStatistics]:
        probes: Probes = collect_probes(
            denoiser,
            prior.null_context.tensor,
            (1, prior.config.in_channels, side, side),
            y=y,
            steps=PROBE_STEPS,
            use=PROBE_USE,
            seed=seed,
            device=device,
            on_step=progress,
        )
        return measure_cross_attention(unet, prior.null_context.tensor, probes, on_probe=progress)

    constants = {block: seen.mean for block, seen in statistics(0).items()}
    unseen = statistics(1)
    return constants, {block: unseen[block].relative_error(constant) for block, constant in constants.items()}
