"""What a baked model should predict: the guidance that it takes in, evaluated with the models that make it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...guidance.combination import Guidance
from ...guidance.diffusion import Denoiser, NoiseSchedule, output_from_denoised
from ...guidance.multi_guidance import MultiGuidance
from ...guidance.networks.low_rank import without_additions
from ...guidance.null_text import load_unet
from ...guidance.terms import Source, Term
from ..domain.losses import abar_at
from ..domain.previews import Autocast
from ..prior.prior import ImageSize, Prior
from .terms import CONTROL, BakedTerm

Conditioning = Mapping[str, Tensor]


class Teacher:
    """The target of a baking (arXiv 2312.08195): D_c + sum_i w_i S_i(D_i - R_i), or with another weight of the prompt
    D_u + w_c (D_c - D_u) + sum_i w_i S_i(D_i - R_i), as an output of the prior's network.

    unet: the prior's UNet, with or without low-rank additions, which the teacher leaves out. control_weight: w_c; 1 is
    the first form. terms: as `check_terms` lets them pass. dtype: of the terms' models; of everything, where it is
    computed in half precision.
    """

    def __init__(
        self,
        prior: Prior,
        unet: nn.Module,
        terms: Sequence[BakedTerm],
        control_weight: float = 1.0,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.prior, self.terms, self.control_weight = prior, tuple(terms), control_weight
        self.device = torch.device(device)
        self.before = Denoiser(_Before(unet, dtype), prior.schedule, prior.prediction_type)
        self._models = {term.name: self._denoiser(term, dtype) for term in self.terms}

    def _denoiser(self, term: BakedTerm, dtype: torch.dtype) -> Denoiser:
        if term.model is None:
            return self.before
        weights, metadata = term.model
        unet, prior = load_unet(weights, metadata.config, dtype).to(self.device), self.prior
        if not metadata.prediction_type:  # a file that says nothing of its noise
            return Denoiser(unet, prior.schedule, prior.prediction_type)
        same = metadata.zero_snr == prior.zero_snr
        schedule = prior.schedule if same else NoiseSchedule.scaled_linear(zero_snr=metadata.zero_snr)
        return Denoiser(unet, schedule, metadata.prediction_type)

    def guidance(
        self,
        empty: Conditioning,
        prompted: Conditioning,
        sizes: Sequence[ImageSize],
        control_weight: float | None = None,
    ) -> Guidance:
        """The guidance for images of these sizes. empty, prompted: what the prior takes at the empty and own prompts.

        control_weight: another one than that of the target.
        """
        weight = self.control_weight if control_weight is None else control_weight
        terms = [Term(CONTROL, self.before, prompted, weight)]
        for term in self.terms:
            cond = self._cond(term, empty, sizes)
            model = self._models[term.name]
            terms.append(Term(term.name, model, cond, term.weight, term.reference, term.shaping))
        return Guidance(Source(self.before, empty), terms)

    def _cond(self, term: BakedTerm, empty: Conditioning, sizes: Sequence[ImageSize]) -> Conditioning:
        if term.text is None:
            return empty
        return self.prior.conditioning(sizes, term.text, self.device)

    @torch.no_grad()
    def target(
        self, noisy: Tensor, timesteps: Tensor, empty: Conditioning, prompted: Conditioning, sizes: Sequence[ImageSize]
    ) -> Tensor:
        """What the network should output [B, C, h, w] for noisy latents (unit variance) at whole timesteps [B].

        prompted is the very object `empty` where all are matched at the empty prompt, which saves a prediction.
        """
        return self.output(noisy, timesteps, self.guided(self.guidance(empty, prompted, sizes)))

    def guided(self, guidance: Guidance) -> MultiGuidance:
        """A guidance as a denoiser with this prior's noise levels."""
        return MultiGuidance(guidance, self.prior.schedule.percent_to_sigma)

    def output(self, noisy: Tensor, timesteps: Tensor, denoiser: Denoiser | MultiGuidance, **cond: Tensor) -> Tensor:
        """The network output that stands for a denoiser's prediction of noisy latents (unit variance)."""
        abar = abar_at(self.prior.schedule, timesteps).reshape(-1, 1, 1, 1)
        sigma = ((1 - abar) / abar).sqrt()
        x = noisy.float() / abar.sqrt()
        denoised = denoiser(x, sigma.flatten(), **cond)
        return output_from_denoised(denoised, x, sigma, self.prior.prediction_type)


class _Before(Autocast):
    """The prior's UNet without its low-rank additions."""

    def forward(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        with without_additions(self.unet):
            return super().forward(x, timesteps, **cond)
