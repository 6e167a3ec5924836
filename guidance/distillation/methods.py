"""The distillation methods by name."""

from __future__ import annotations

from typing import Any

from ..schedules import GuidanceError
from .bridge import SDSBridge
from .critic import Critic
from .csd import CSD
from .dds import DDS
from .ism import ISM
from .method import Method
from .nfsd import NFSD
from .sds import SDS
from .vsd import VSD

__all__ = ["METHODS", "make_method"]

METHODS: dict[str, type[Method]] = {one.name: one for one in (SDS, CSD, NFSD, DDS, SDSBridge, ISM, VSD)}
"""sds, csd, nfsd, dds, bridge, ism, vsd."""


def make_method(name: str, critic: Critic, **options: Any) -> Method:
    """The method of that name for a critic; options are its class's (`network` and more for vsd).

    Raises GuidanceError for another name and for options the method does not have.
    """
    if name not in METHODS:
        raise GuidanceError(f"Expected the method to be one of {', '.join(METHODS)}, got {name!r}.")
    try:
        return VSD.of(critic, **options) if name == VSD.name else METHODS[name](**options)
    except TypeError as problem:
        raise GuidanceError(f"Expected options of the method {name}, got others: {problem}.") from None
