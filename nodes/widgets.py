"""Inputs that several nodes have: weights, shares, positions in sampling, seeds, and the widgets of a configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from comfy_api.latest import io

from ..guidance.errors import Problem

# Numbers stay exact in the editor's JavaScript up to here.
LARGEST_SEED = 2**53 - 1
RESUME = {"auto": "auto", "continue": True, "new": False}


def number_input(name: str, default: float, least: float, most: float, tooltip: str, optional: bool = False):
    """A number that moves in steps of 0.05, stored to three digits."""
    return io.Float.Input(
        name, default=default, min=least, max=most, step=0.05, round=0.001, optional=optional, tooltip=tooltip
    )


def weight_input(name: str, tooltip: str):
    """The weight of a guidance, -100 to 100."""
    return number_input(name, 2.5, -100.0, 100.0, tooltip)


def percent_input(name: str, default: float, tooltip: str, optional: bool = False):
    """A position in sampling: 0 is the start, at the highest noise, 1 the end."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, optional=optional, tooltip=tooltip)


def option_input(field: dataclasses.Field, prefix: str = ""):
    """The widget of an option of the library (`guidance.options`); prefix: of its tooltip."""
    about = field.metadata
    values: dict[str, Any] = {"default": field.default, "optional": True, "tooltip": f"{prefix}{about['help']}."}
    if "choices" in about:
        return io.Combo.Input(field.name, options=list(about["choices"]), **values)
    if isinstance(field.default, bool):
        return io.Boolean.Input(field.name, **values)
    if isinstance(field.default, float):
        limits = {name: about[name] for name in ("min", "max", "step")}
        return io.Float.Input(field.name, round=0.001, **limits, **values)
    return io.String.Input(field.name, **values)


def resume_input():
    """Whether a run goes on from its last checkpoint."""
    return io.Combo.Input(
        "resume",
        options=list(RESUME),
        default="auto",
        tooltip="auto: continue the run of this name if there is one, else start it. continue: there must be one. new: "
        "there must be none.",
    )


def config_input(settings: type, name: str, **changes: Any):
    """The widget of one field of a configuration: kind, default, range and tooltip are the field's own.

    changes: arguments of the input that differ here.
    """
    from ..training.engine.settings import kinds_of

    field = {field.name: field for field in dataclasses.fields(settings)}[name]
    kind, about = kinds_of(settings)[name], field.metadata
    default: Any = field.default
    tooltip = about["help"] + "."
    if not tooltip.startswith(about.get("choices", ())):
        tooltip = tooltip[0].upper() + tooltip[1:]
    if kind in (int, float):
        values = {"default": default, "min": about["min"], "max": about["max"], **changes}
        least, most, usual = (_number(values[key]) for key in ("min", "max", "default"))
        values["tooltip"] = f"{tooltip} {least} to {most}, default {usual}."
        if kind is int:
            return io.Int.Input(name, **values)
        return io.Float.Input(name, **{"step": _step(default, about["max"]), "round": False, **values})
    values = {"default": default, "tooltip": tooltip}
    if kind is bool:
        return io.Boolean.Input(name, **{**values, **changes})
    if "choices" in about:
        return io.Combo.Input(name, **{**values, "options": list(about["choices"]), **changes})
    if kind is tuple:
        values |= {"default": "", "multiline": True, "tooltip": f"{tooltip} One a line."}
    return io.String.Input(name, **{**values, **changes})


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.10g}"


def _step(default: float, largest: float) -> float:
    """A step of the arrows that suits a number: a tenth of its own size, finer for decays that end just below 1."""
    if default <= 0.0:
        return 0.01
    if largest < 1.0 and default > 0.5:
        return 0.0001
    return 10.0 ** min(math.floor(math.log10(default)) - 1, -1)


def option_names(settings: type, elsewhere: Collection[str]) -> list[str]:
    """The fields of a configuration that its options node offers: all but those that are decided `elsewhere`."""
    from ..training.engine.settings import fields_of

    return [field.name for field in fields_of(settings) if field.name not in elsewhere]


def given_options(options: Any, known: Collection[str], node: str) -> dict[str, Any]:
    """What an options node hands over. Raises Problem for anything else, which a prompt may hold in its place."""
    if options is None:
        return {}
    are_options = isinstance(options, Mapping)
    wrong = [repr(name) for name in options if name not in known] if are_options else [repr(options)]
    if wrong:
        raise Problem(f"options: expected what {node} gives, found {wrong[0]:.80}; connect {node}, or nothing.")
    return dict(options)
