"""What the schemas of several nodes share: categories of the menu, inputs, and the outputs of a run."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..guidance.errors import Problem, printable
from .comfy_internals.runs.pictures import load_image, or_skipped

if TYPE_CHECKING:
    from ..training.engine.run import Result

GUIDANCE = "In-Domain Guidance/guidance"
TRAINING = "In-Domain Guidance/training"
GENERATORS = "In-Domain Guidance/generators"
# Numbers stay exact in the editor's JavaScript up to here.
LARGEST_SEED = 2**53 - 1
# Not drawn anew for each run: a run continues only with the seed it was started with.
SEED_OF_A_RUN = {"max": LARGEST_SEED, "control_after_generate": False}
RESUME = {"auto": "auto", "continue": True, "new": False}


def schema(search_aliases: Sequence[str], advanced: Sequence[str] = (), **arguments: Any) -> io.Schema:
    """io.Schema(**arguments), with two things that only newer versions of ComfyUI know; elsewhere they are left out.

    search_aliases: words to be found by, beside the names. advanced: inputs that the editor folds away until asked.
    """
    if "search_aliases" in inspect.signature(io.Schema).parameters:
        arguments["search_aliases"] = list(search_aliases)
    unknown = set(advanced) - {entry.id for entry in arguments["inputs"]}
    assert not unknown, f"{arguments['node_id']} has no inputs {unknown}"
    for entry in arguments["inputs"]:
        if entry.id in advanced and hasattr(entry, "advanced"):
            entry.advanced = True
    return io.Schema(**arguments)


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
    """The widget of one field of a configuration, with its kind, default, range and tooltip, except for `changes`."""
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
        values |= {"default": "\n".join(default), "multiline": True, "tooltip": f"{tooltip} One a line."}
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


def option_values(settings: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What an options node hands over: its widgets' values, a text of lines for each list of texts."""
    from ..training.engine.settings import kinds_of

    kinds = kinds_of(settings)
    lines = {
        name: tuple(filter(None, map(str.strip, text.splitlines())))
        for name, text in values.items()
        if kinds[name] is tuple
    }
    return {**values, **lines}


def picture_outputs(grid: str) -> list:
    """The outputs for the finished run's pictures; while it runs, the node itself shows them. grid: what it shows."""
    return [
        io.Image.Output(
            display_name="final samples",
            tooltip=f"{grid} at the end of the run; while it runs, the node shows each new grid. Nothing when sample "
            "every is 0.",
        ),
        io.Image.Output(
            display_name="final loss curve",
            tooltip="The loss curve at the end of the run; while it runs, the node shows the loss as text.",
        ),
    ]


def run_outputs(
    node: type[io.ComfyNode], made: Any, result: Result, path: Path, warnings: Sequence[str]
) -> io.NodeOutput:
    """What was made (a tuple: several outputs), grid, loss curve and file; the node shows the pictures too."""
    grid, plot = load_image(result.samples), load_image(result.plot)
    shown = [picture[0] for picture in (grid, plot) if picture is not None]
    preview = ui.PreviewImage(shown, cls=node).as_dict() if shown else {}
    text = tuple(map(printable, (path, *warnings)))
    several = made if isinstance(made, tuple) else (made,)
    return io.NodeOutput(*several, or_skipped(grid), or_skipped(plot), str(path), ui={**preview, "text": text})
