"""From images to gradients on them: encoder, critic, method, regularizers and clamps in one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..schedules import GuidanceError
from .clamps import clamp_image_gradient, clamp_latent_gradient, lead_back
from .critic import Ask, Critic, Prediction
from .image_encoder import ImageEncoder
from .method import Context, LatentTerm, Method, Regularizer
from .perceptual import Perceptual
from .timesteps import Timesteps
from .weighting import WEIGHTINGS, Weighting, weigh

__all__ = ["MODES", "WAY_BACK", "Draws", "NotFinite", "Objective", "Report", "inject"]

MODES = ("shared", "sgf")
# Enough for Adam, whose steps have one size, where nothing else speaks; too little to matter where something does.
WAY_BACK = 0.01

Encode = Callable[[Tensor], Tensor]


class NotFinite(GuidanceError):
    """A gradient with NaN or infinity in it; nothing was injected."""


@dataclass(frozen=True)
class Draws:
    """A step's random numbers: t [B] and each term's noise [B, C, h, w], by the term's name."""

    t: Tensor
    noise: Mapping[str, Tensor]


@dataclass(frozen=True)
class Report:
    """What one step did.

    loss: per term, the mean square of its unweighted gradient on z (what the released code logs), for the perceptual
    term its loss; a method's own losses beside them. gradient_norm: per term, the norm of what it gave to z, after
    weight and clamp; "image": of what reached the images; both of the batch's mean, after division by B. clamped: per
    term, the share of values of z that the latent clamp changed; "image": of the image gradient. timesteps: each
    sample's.
    """

    loss: dict[str, float] = field(default_factory=dict)
    gradient_norm: dict[str, float] = field(default_factory=dict)
    clamped: dict[str, float] = field(default_factory=dict)
    timesteps: tuple[int, ...] = ()


def inject(z: Tensor, gradient: Tensor, images: Tensor, *, retain_graph: bool = False) -> Tensor:
    """The vector-Jacobian product: a gradient on z [B, C, h, w] becomes one on images [B, 3, H, W], in float32.

    The customary (z - (z - gradient).detach())^2 loses gradients that are small against z in half precision; here
    they enter the graph as they are. Where z is float16, whose smallest numbers they may fall below on their way
    through the encoder, they are scaled up by a power of two first, and the scale is lowered where that overflows.
    """
    if z.dtype != torch.float16:
        return torch.autograd.grad(z, images, gradient.to(z.dtype), retain_graph=retain_graph)[0].float()
    largest = float(gradient.abs().max())
    exponent = math.floor(math.log2(256 / largest)) if 0 < largest < math.inf else 0
    while True:
        scale = 2.0**exponent
        result = torch.autograd.grad(z, images, (gradient * scale).to(z.dtype), retain_graph=True)[0].float() / scale
        if bool(result.isfinite().all()) or largest * scale < 2.0**-8 or not math.isfinite(largest):
            return result
        exponent -= 4


@dataclass
class Objective:
    """The gradient that distillation gives to a generator's images (arXiv 2212.04473, section 3).

    method: an SDS-like `Method`. regularizers: terms that keep the frozen generator's character. perceptual: an
    optional `Perceptual` on the images. timesteps, weighting: t and w(t), the same for all terms. latent_clamp: the
    limit on each term's gradient on z after its weight, None for none. image_quantile: the quantile at which the image
    gradient is clamped per sample, None for none.

    All that looks at images sees them as they are judged: resized (`ImageEncoder`) and clamped to +-bound. The image
    gradient is clamped there, and goes back through both then. bound: 1 for images of -1..1; None: they have no range.
    way_back: the share, 0 to 1, that a value beyond the bound keeps of a gradient that leads back (`lead_back`); 0 is a
    clamp's gradient, as released; None: 0.01, or 0 in the mode "sgf". With a clamp's, images that are beyond
    everywhere, all black, never learn again; the whole gradient unsettles saturated colours, which a clamp holds. An
    optimizer like Adam makes whole steps of a hundredth where there is nothing else.

    mode:
    * "shared": all terms see one noise, so predictions on the same z_t are evaluated once, and their gradients are
      added before one pass back through the encoder; the image clamp acts on the sum. Each term's expectation is that
      of "sgf".
    * "sgf": the released update. Each term draws its own noise, and the image clamp acts on the method's part alone
      (SGF's settings: latent_clamp 1, image_quantile 0.95, critic scale 100).

    In both, one encode with a graph, and one without where the frozen image is needed, and one call to each model.
    Raises GuidanceError for settings that cannot work.
    """

    critic: Critic
    method: Method
    regularizers: Sequence[Regularizer] = ()
    timesteps: Timesteps = field(default_factory=Timesteps)
    weighting: Weighting = "1-abar"
    latent_clamp: float | None = None
    image_quantile: float | None = None
    mode: str = "shared"
    perceptual: Perceptual | None = None
    bound: float | None = 1.0
    way_back: float | None = None
    _waiting: Context | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise GuidanceError(f"Expected the mode to be one of {', '.join(MODES)}, got {self.mode!r}.")
        if not callable(self.weighting) and self.weighting not in WEIGHTINGS:
            raise GuidanceError(f"Expected the weighting to be one of {', '.join(WEIGHTINGS)}, got {self.weighting!r}.")
        if self.latent_clamp is not None and not self.latent_clamp > 0:
            raise GuidanceError(f"Expected latent_clamp above 0, or none, got {self.latent_clamp}.")
        if self.image_quantile is not None and not 0 < self.image_quantile <= 1:
            raise GuidanceError(f"Expected image_quantile above 0 and at most 1, or none, got {self.image_quantile}.")
        if self.bound is not None and not 0 < self.bound < math.inf:
            raise GuidanceError(f"Expected the bound of images to be finite and above 0, or none, got {self.bound}.")
        if self.way_back is not None and not 0 <= self.way_back <= 1:
            raise GuidanceError(f"Expected way_back to be 0 to 1, or none, got {self.way_back}.")
        for term in (*self.regularizers, *([self.perceptual] if self.perceptual else [])):
            if not math.isfinite(term.weight):
                raise GuidanceError(f"Expected the weight of {term.name} to be finite, got {term.weight}.")
        names = [term.name for term in self._terms(True)]
        if len(set(names)) < len(names):
            raise GuidanceError(f"Expected each regularizer once, got {', '.join(names)}.")
        if self.timesteps.t_max >= len(self.critic.schedule):
            raise GuidanceError(
                f"Expected t_max below {len(self.critic.schedule)}, the critic's number of timesteps, got "
                f"{self.timesteps.t_max}."
            )
        if not self.method.through_encoder:
            raise GuidanceError(
                f"Expected a method whose gradient goes back through the encoder, got {self.method.name}; use another."
            )
        self.critic.check(self.method.needs | self.method.needs_frozen, f"the method {self.method.name}")

    @property
    def needs_frozen(self) -> bool:
        """Whether the frozen generator's images are needed."""
        return self._perceives or any(term.compares_with_frozen() for term in self._terms(True))

    def backward(
        self,
        images: Tensor,
        frozen: Tensor | None,
        encode: Encode,
        *,
        step: int,
        steps: int,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        draws: Draws | None = None,
        wait: bool = False,
    ) -> Report:
        """Add this objective's gradient to everything that `images` were made from.

        images: [B, 3, H, W] with a graph, as the generator gave them. frozen: the frozen generator's from the same
        latents, or None where `needs_frozen` is false. encode: images within the bound -> z [B, C, h, w], scaled as the
        critic's models expect, differentiable (posterior mean); an `ImageEncoder` for images that are judged at another
        size. step of steps: 0 to steps - 1. generator: draws t and noise, on its own device. t [B]: timesteps that were
        drawn before; draws: all random numbers of the step. wait: leave what the method itself learns to
        `train_method`, for who looks at the generator's gradients first. The gradient is that of the batch's mean.
        Raises NotFinite, with nothing injected, where a gradient is not finite, and GuidanceError for inputs that do
        not fit.
        """
        if not images.requires_grad:
            raise GuidanceError("Expected images with a graph to the generator's weights, got images without one.")
        gradient, report, context = self._gradient(images, frozen, encode, step, steps, generator, t, draws, True)
        torch.autograd.backward(images, gradient.to(images.dtype))
        self._waiting = context
        return report if wait else self.train_method(report)

    def train_method(self, report: Report) -> Report:
        """Let a method with a state learn from the last `backward`, once; the report with its losses."""
        context, self._waiting = self._waiting, None
        losses = {} if context is None else self.method.step(context)
        return replace(report, loss={**report.loss, **losses})

    def image_gradient(
        self,
        images: Tensor,
        frozen: Tensor | None,
        encode: Encode,
        *,
        step: int,
        steps: int,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        draws: Draws | None = None,
        regularize: bool = True,
    ) -> tuple[Tensor, Report]:
        """The gradient on images [B, 3, H, W], float32, that `backward` would inject, and the report.

        regularize: False leaves only the method, as layer selection does. A method with state is not stepped.
        """
        return self._gradient(images, frozen, encode, step, steps, generator, t, draws, regularize)[:2]

    def draw(
        self,
        z: Tensor,
        step: int,
        steps: int,
        generator: torch.Generator | None = None,
        t: Tensor | None = None,
        regularize: bool = True,
    ) -> Draws:
        """t and noise for latents like z: t first, then one noise for all terms, or ("sgf") one for each in turn."""
        t = self.timesteps.draw(len(z), step, steps, generator) if t is None else t
        device = generator.device if generator is not None else z.device

        def noise() -> Tensor:
            return torch.randn(z.shape, generator=generator, device=device).to(z.device)

        names = [term.name for term in self._terms(regularize)]
        if self.mode == "sgf":
            return Draws(t, {name: noise() for name in names})
        return Draws(t, dict.fromkeys(names, noise()))

    def state_dict(self) -> dict[str, Any]:
        """The method's state; empty for the stateless."""
        return {"method": self.method.name, "state": self.method.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises GuidanceError for another method's."""
        if state["method"] != self.method.name:
            raise GuidanceError(f"Expected the state of the method {self.method.name}, got that of {state['method']}.")
        self.method.load_state_dict(state["state"])

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def _perceives(self) -> bool:
        return self.perceptual is not None and self.perceptual.weight != 0

    @property
    def _share_back(self) -> float:
        return self.way_back if self.way_back is not None else 0.0 if self.mode == "sgf" else WAY_BACK

    def _within(self, images: Tensor) -> Tensor:
        return images if self.bound is None else images.clamp(-self.bound, self.bound)

    def _terms(self, regularize: bool) -> list[LatentTerm]:
        """The method and the regularizers that are on."""
        return [self.method, *(one for one in self.regularizers if regularize and one.weight != 0)]

    def _gradient(
        self,
        images: Tensor,
        frozen: Tensor | None,
        encode: Encode,
        step: int,
        steps: int,
        generator: torch.Generator | None,
        t: Tensor | None,
        draws: Draws | None,
        regularize: bool,
    ) -> tuple[Tensor, Report, Context]:
        terms = self._terms(regularize)
        perceives = self._perceives and regularize
        looks = any(term.compares_with_frozen() for term in terms)
        if (looks or perceives) and frozen is None:
            raise GuidanceError("Expected the frozen generator's images for this objective, got none.")
        if frozen is not None and frozen.shape != images.shape:
            raise GuidanceError(f"Expected frozen images of the shape {list(images.shape)}, got {list(frozen.shape)}.")
        # Leaves here, so that the encoder's graph is gone before the generator's is walked.
        made = images.detach().requires_grad_()
        with torch.enable_grad():
            resized = _resized(made, encode)
            leaf = self._within(resized.detach()).requires_grad_()
            encoded = encode(leaf)
        z = encoded.detach().float()
        with torch.no_grad():
            frozen = self._within(_resized(frozen.detach(), encode)) if looks or perceives else None
            z_frozen = encode(frozen).float() if looks else None
        draws = draws if draws is not None else self.draw(z, step, steps, generator, t, regularize)
        contexts = self._contexts(terms, z, z_frozen, draws, step, steps, generator)

        batch = len(images)
        parts, loss, norms, clamped = {}, {}, {}, {}
        for term, context in zip(terms, contexts):
            with torch.no_grad():
                raw = term.gradient(context)
                weight = getattr(term, "weight", 1.0)
                weighted = raw * (weigh(self.weighting, context.abar) * weight)
                if not bool(weighted.isfinite().all()):
                    raise NotFinite(
                        f"The gradient of {term.name} has values that are not finite at timesteps "
                        f"{draws.t.tolist()}; lower the learning rate, or run the critic in float32."
                    )
                parts[term.name], clamped[term.name] = clamp_latent_gradient(weighted, self.latent_clamp)
                loss[term.name] = raw.square().mean()
                norms[term.name] = parts[term.name].norm() / batch

        gradient, clamped["image"] = self._to_images(encoded, leaf, parts)
        del encoded  # and with it the graph that float16 keeps for a second try
        gradient = gradient / batch
        if perceives:
            with torch.enable_grad():
                perceived = leaf.detach().requires_grad_()
                value = self.perceptual.loss(perceived, frozen)
            loss["perceptual"] = value.detach()
            gradient = gradient + torch.autograd.grad(value, perceived)[0].float()
        if self.bound is not None:
            gradient = lead_back(gradient, resized.detach(), self.bound, self._share_back)
        if resized is not made:
            gradient = torch.autograd.grad(resized, made, gradient.to(resized.dtype))[0].float()
        if not bool(gradient.isfinite().all()):
            raise NotFinite(
                f"The image gradient has values that are not finite at timesteps {draws.t.tolist()}; run the encoder "
                "in float32."
            )
        norms["image"] = gradient.norm()
        report = Report(_numbers(loss), _numbers(norms), _numbers(clamped), tuple(draws.t.tolist()))
        return gradient, report, contexts[0]

    def _contexts(
        self,
        terms: Sequence[LatentTerm],
        z: Tensor,
        z_frozen: Tensor | None,
        draws: Draws,
        step: int,
        steps: int,
        generator: torch.Generator | None,
    ) -> list[Context]:
        """Each term's view; all that any of them needs to know is asked at once."""
        t = draws.t.to(z.device)
        abar = self.critic.alphas_cumprod(t, z)
        # Terms that share a noise share latents and predictions.
        noises: list[Tensor] = []
        group_of: list[int] = []
        for term in terms:
            if term.name not in draws.noise or draws.noise[term.name].shape != z.shape:
                raise GuidanceError(f"Expected noise of shape {list(z.shape)} for the term {term.name}.")
            noise = draws.noise[term.name]
            known = [index for index, other in enumerate(noises) if other is noise]
            group_of.append(known[0] if known else len(noises))
            if not known:
                noises.append(noise)
        asks: list[Ask] = []
        place: dict[tuple[int, bool], int] = {}
        for group, noise in enumerate(noises):
            members = [term for term, own in zip(terms, group_of) if own == group]
            for of_frozen in (False, True):
                wanted = [(one, one.needs_frozen if of_frozen else one.needs) for one in members]
                needs = frozenset().union(*(names for _, names in wanted))
                unwanted_from = min((one.unwanted_from for one, names in wanted if "e_unwanted" in names), default=0)
                if needs:
                    place[group, of_frozen] = len(asks)
                    latents = z_frozen if of_frozen else z
                    asks.append(Ask(self.critic.noisy(latents, noise.to(z), t), t, needs, unwanted_from))
        answers = self.critic.predict_many(asks) if asks else []
        contexts = []
        for group in group_of:
            noise = noises[group].to(z)
            own, other = place.get((group, False)), place.get((group, True))
            contexts.append(
                Context(
                    critic=self.critic,
                    z=z,
                    t=t,
                    abar=abar,
                    noise=noise,
                    z_t=asks[own].z_t if own is not None else self.critic.noisy(z, noise, t),
                    prediction=answers[own] if own is not None else Prediction(),
                    frozen=z_frozen,
                    frozen_prediction=answers[other] if other is not None else Prediction(),
                    step=step,
                    steps=steps,
                    generator=generator,
                )
            )
        return contexts

    def _to_images(self, z: Tensor, images: Tensor, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The parts' gradient on the images, and the share of it that the image clamp changed."""
        if self.image_quantile is None or self.mode == "shared" or len(parts) == 1:
            return clamp_image_gradient(inject(z, sum(parts.values()), images), self.image_quantile)
        own = parts[self.method.name]
        others = sum(part for name, part in parts.items() if name != self.method.name)
        gradient, share = clamp_image_gradient(inject(z, own, images, retain_graph=True), self.image_quantile)
        return gradient + inject(z, others, images), share


def _resized(images: Tensor, encode: Encode) -> Tensor:
    return encode.resize(images) if isinstance(encode, ImageEncoder) else images


def _numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars of one device as floats, in one copy."""
    return dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist())) if values else {}
