"""w(t): how strongly a distillation gradient counts at each timestep."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..schedules import GuidanceError

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "1-abar": lambda abar: 1 - abar,
    "uniform": lambda abar: abar * 0 + 1,
    "sigma": lambda abar: ((1 - abar) / abar).sqrt(),
    "sigma2": lambda abar: (1 - abar) / abar,
    "sqrt_abar": lambda abar: abar.sqrt() * (1 - abar),
}
"""By name, each from abar: `1-abar` DreamFusion and SGF, `sigma` ISM, `sigma2` and `sqrt_abar` other releases."""

Weighting = str | Callable[[Tensor], Tensor]


def weigh(weighting: Weighting, abar: Tensor) -> Tensor:
    """w(t) from abar [B, 1, 1, 1], by a name of WEIGHTINGS or a callable of abar.

    `1-abar` is the w(t) = sigma_t^2 of DreamFusion (arXiv 2209.14988, section 3); `uniform` is 1 everywhere. Raises
    GuidanceError for another name.
    """
    if callable(weighting):
        return weighting(abar)
    if weighting not in WEIGHTINGS:
        raise GuidanceError(f"Expected the weighting to be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
    return WEIGHTINGS[weighting](abar)
