"""w(t): how strongly a distillation gradient counts at each timestep."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "1-abar": lambda abar: 1 - abar,
    "uniform": lambda abar: abar * 0 + 1,
    "sigma": lambda abar: ((1 - abar) / abar).sqrt(),
    "sigma2": lambda abar: (1 - abar) / abar,
    "sqrt_abar": lambda abar: abar.sqrt() * (1 - abar),
}
"""w(t) from abar [B, 1, 1, 1], by name; a new one is added here.

`1-abar` is the w(t) = sigma_t^2 of DreamFusion (arXiv 2209.14988, section 3) and SGF, `uniform` is 1 everywhere,
`sigma` is ISM's, `sigma2` and `sqrt_abar` are those of other releases.
"""
