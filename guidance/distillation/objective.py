"""From images to gradients on them: encoder, critic, method, regularizers and clamps in one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import GuidanceError
from .context import Context, Draws, contexts_of
from .critic import Critic
from .gradients import clamp_image_gradient, clamp_latent_gradient, inject, lead_back
from .image_encoder import ImageEncoder
from .method import LatentTerm, Method, Regularizer
from .perceptual import Perceptual
from .timesteps import Timesteps
from .weighting import WEIGHTINGS

MODES = ("shared", "sgf")
WAY_BACK = 0.01  # the default of `Objective.way_back`

Encode = Callable[[Tensor], Tensor]


class NotFinite(GuidanceError):
    """A gradient with NaN or infinity in it; nothing was injected."""


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


@dataclass
class Objective:
    """The gradient that distillation gives to a generator's images (arXiv 2212.04473, section 3).

    method: an SDS-like `Method`. regularizers: terms that keep the frozen generator's character. perceptual: an
    optional `Perceptual` on the images. timesteps, weighting: t and w(t), the same for all terms. latent_clamp: the
    limit on each term's gradient on z after its weight, None for none. image_quantile: the quantile at which the image
    gradient is clamped per sample, None for none.

    Images are judged resized (`ImageEncoder`) and clamped to +-bound; the image gradient is clamped there, and then
    goes back through both. bound: 1 for images of -1..1; None: they have no range. way_back: the share, 0 to 1, that a
    value beyond the bound keeps of a gradient that leads back (`lead_back`); None is 0.01, or 0 in the mode "sgf". 0 is
    the released clamp's gradient, with which an image that is black everywhere never learns again; 1 unsettles
    saturated colours, which a clamp holds. At 0.01 an optimizer like Adam, whose steps have one size, still moves
    pixels that have no other gradient.

    mode:
    * "shared": all terms have one noise, so predictions on the same z_t are evaluated once, and their gradients are
      added before one pass back through the encoder; the image clamp acts on the sum. Each term's expectation is that
      of "sgf".
    * "sgf": the released update. Each term draws its own noise, and the image clamp acts on the method's part alone
      (SGF's settings: latent_clamp 1, image_quantile 0.95, critic scale 100).

    In both, one encode with a graph, one without where the frozen image is needed, and one call to each model. Raises
    GuidanceError for settings that cannot work.
    """

    critic: Critic
    method: Method
    regularizers: Sequence[Regularizer] = ()
    timesteps: Timesteps = field(default_factory=Timesteps)
    weighting: str = "1-abar"
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
        if self.weighting not in WEIGHTINGS:
            raise GuidanceError(f"Expected the weighting to be one of {', '.join(WEIGHTINGS)}, got {self.weighting!r}.")
        for name, fits, expected in (
            ("latent_clamp", lambda value: value > 0, "above 0"),
            ("image_quantile", lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("bound", lambda value: 0 < value < math.inf, "finite and above 0"),
            ("way_back", lambda value: 0 <= value <= 1, "0 to 1"),
        ):
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise GuidanceError(f"Expected {name} to be {expected}, or none, got {value}.")
        for term in (*self.regularizers, *([self.perceptual] if self.perceptual else [])):
            if not math.isfinite(term.weight):
                raise GuidanceError(f"Expected the weight of {term.name} to be finite, got {term.weight}.")
        names = [term.name for term in self._terms(True)]
        if len(set(names)) < len(names):
            raise GuidanceError(f"Expected each regularizer once, got {', '.join(names)}.")
        if self.timesteps.t_max >= len(self.critic.schedule):
            raise GuidanceError(f"Expected t_max below {len(self.critic.schedule)}, got {self.timesteps.t_max}.")
        if not self.method.through_encoder:
            raise GuidanceError(f"Expected a method whose gradient passes the encoder, got {self.method.name}.")
        self.critic.check(self.method.needs | self.method.needs_frozen, f"the method {self.method.name}")

    @property
    def needs_frozen(self) -> bool:
        """Whether the frozen generator's images are needed."""
        return self._perceptual(True) is not None or _compare(self._terms(True))

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
        `train_method`, so that the generator's gradients can be checked first. The gradient is that of the batch's
        mean. Raises NotFinite, with nothing injected, where a gradient is not finite, and GuidanceError for inputs that
        do not fit.
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

    def _perceptual(self, regularize: bool) -> Perceptual | None:
        """The perceptual term where it is on."""
        return self.perceptual if regularize and self.perceptual is not None and self.perceptual.weight != 0 else None

    def _within(self, images: Tensor) -> Tensor:
        return images if self.bound is None else images.clamp(-self.bound, self.bound)

    def _terms(self, regularize: bool) -> list[LatentTerm]:
        """The method and the regularizers that are on."""
        return [self.method, *(term for term in self.regularizers if regularize and term.weight != 0)]

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
        terms, perceptual = self._terms(regularize), self._perceptual(regularize)
        if frozen is not None and frozen.shape != images.shape:
            raise GuidanceError(f"Expected frozen images of the shape {list(images.shape)}, got {list(frozen.shape)}.")
        if not perceptual and not _compare(terms):
            frozen = None
        elif frozen is None:
            raise GuidanceError("Expected the frozen generator's images for this objective, got none.")
        # Leaves here, so that the encoder's graph is gone before the generator's is walked.
        made = images.detach().requires_grad_()
        with torch.enable_grad():
            resized = _resized(made, encode)
            judged = self._within(resized.detach()).requires_grad_()
            encoded = encode(judged)
        z, z_frozen = encoded.detach().float(), None
        if frozen is not None:
            with torch.no_grad():
                frozen = self._within(_resized(frozen.detach(), encode))
                z_frozen = encode(frozen).float() if _compare(terms) else None
        draws = draws if draws is not None else self.draw(z, step, steps, generator, t, regularize)
        contexts = contexts_of(terms, self.critic, z, z_frozen, draws, step=step, steps=steps, generator=generator)

        parts, loss, norms, clamped = {}, {}, {}, {}
        for term, context in zip(terms, contexts):
            raw, parts[term.name], clamped[term.name] = self._on_latents(term, context)
            loss[term.name], norms[term.name] = raw.square().mean(), parts[term.name].norm() / len(images)
        gradient, clamped["image"] = self._to_images(encoded, judged, parts)
        del encoded  # and with it the graph that float16 keeps for a second try
        gradient = gradient / len(images)
        if perceptual is not None and frozen is not None:
            loss["perceptual"], own = perceptual.gradient(judged.detach(), frozen)
            gradient = gradient + own
        if self.bound is not None:
            default = 0.0 if self.mode == "sgf" else WAY_BACK
            share = default if self.way_back is None else self.way_back
            gradient = lead_back(gradient, resized.detach(), self.bound, share)
        if resized is not made:
            gradient = torch.autograd.grad(resized, made, gradient.to(resized.dtype))[0].float()
        if not bool(gradient.isfinite().all()):
            raise NotFinite(f"The image gradient is not finite at timesteps {draws.t.tolist()}; encode in float32.")
        norms["image"] = gradient.norm()
        report = Report(_numbers(loss), _numbers(norms), _numbers(clamped), tuple(draws.t.tolist()))
        return gradient, report, contexts[0]

    @torch.no_grad()
    def _on_latents(self, term: LatentTerm, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """A term's gradient on z as it is, the same weighted and clamped, and the share that the clamp changed."""
        raw = term.gradient(context)
        weight = term.weight if isinstance(term, Regularizer) else 1.0
        weighted = raw * (WEIGHTINGS[self.weighting](context.abar) * weight)
        if not bool(weighted.isfinite().all()):
            raise NotFinite(
                f"The gradient of {term.name} has values that are not finite at timesteps {context.t.tolist()}; lower "
                "the learning rate, or run the critic in float32."
            )
        return raw, *clamp_latent_gradient(weighted, self.latent_clamp)

    def _to_images(self, z: Tensor, images: Tensor, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The parts' gradient on the images, and the share of it that the image clamp changed."""
        first, *others = parts.values()  # the method's is the first
        if self.image_quantile is None or self.mode == "shared" or not others:
            return clamp_image_gradient(inject(z, sum(others, first), images), self.image_quantile)
        gradient, share = clamp_image_gradient(inject(z, first, images, retain_graph=True), self.image_quantile)
        return gradient + inject(z, sum(others[1:], others[0]), images), share


def _resized(images: Tensor, encode: Encode) -> Tensor:
    return encode.resize(images) if isinstance(encode, ImageEncoder) else images


def _compare(terms: Sequence[LatentTerm]) -> bool:
    """Whether a term needs the frozen generator's image."""
    return any(term.compares_with_frozen() for term in terms)


def _numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars of one device as floats, in one copy."""
    return dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist())) if values else {}
