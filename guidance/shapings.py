"""The list of shapings that users choose by name. A new one is added here, and nowhere else outside its own file."""

from __future__ import annotations

from typing import Any

from .errors import GuidanceError
from .frequency import Bands, Mean
from .orthogonal import Orthogonal
from .shaping import Shaping

SHAPINGS: dict[str, type[Shaping]] = {
    shaping.name: shaping
    for shaping in (
        Bands,
        Mean,
        Orthogonal,
        # New shapings at the end: saved graphs store the widgets of their options by position, in this order.
    )
}
"""Name -> class. The node Shape Guidance Term has a mode and widgets for each."""


def make_shaping(name: str, **options: Any) -> Shaping | None:
    """The shaping of that name, None where its options are neutral, so that nothing is rounded differently.

    options: values of its class's `options.option` fields. Raises GuidanceError for another name, for options the
    shaping does not have, and for values it cannot use.
    """
    if name not in SHAPINGS:
        raise GuidanceError(f"Expected a shaping of {', '.join(SHAPINGS)}, got {name!r}.")
    try:
        shaping = SHAPINGS[name].of(**options)
    except TypeError as problem:
        raise GuidanceError(f"Expected options of the shaping {name}, got others: {problem}.") from None
    return None if shaping.is_neutral else shaping
