"""The list of distillation methods. Beside its own file, the code of a new method is this list alone."""

from __future__ import annotations

from typing import Any

from ..errors import GuidanceError
from .bridge import SDSBridge
from .critic import Critic
from .csd import CSD
from .dds import DDS
from .ism import ISM
from .method import Method, prompts_of
from .nfsd import NFSD
from .sds import SDS
from .vsd import VSD

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        SDS,
        CSD,
        NFSD,
        DDS,
        SDSBridge,
        ISM,
        VSD,
        # New methods at the end: saved graphs store the options of methods by position, in this order.
    )
}
"""Name -> class. Settings, command line and nodes read this list."""


def make_method(name: str, critic: Critic, seed: int = 0, **options: Any) -> Method:
    """The method of that name for a critic; options are its class's fields.

    Raises GuidanceError for another name and for options the method does not have.
    """
    if name not in METHODS:
        raise GuidanceError(f"Expected the method to be one of {', '.join(METHODS)}, got {name!r}.")
    try:
        return METHODS[name].of(critic, seed, **options)
    except TypeError as problem:
        raise GuidanceError(f"Expected options of the method {name}, got others: {problem}.") from None


def methods_with(prompt: str) -> str:
    """The names of the methods that need a prompt ("source" or "unwanted") for help texts: "dds, bridge"."""
    return ", ".join(name for name, method in METHODS.items() if prompt in prompts_of(method))
