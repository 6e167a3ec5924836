"""What the pack touches of ComfyUI's inside is in one list, and the ComfyUI at hand has all of it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import types
from pathlib import Path

import pytest
import torch
from indomain_guidance.nodes.comfy_internals.touched import TOUCHED

NODES = Path(__file__).resolve().parents[2] / "nodes"
MODULES = sorted({name.split(".")[0] for name in TOUCHED})
# What variables of these names hold, wherever they stand in this package.
HELD = {
    "patcher": "ModelPatcher",
    "model_patcher": "ModelPatcher",
    "current": "ModelPatcher",
    "model": "ModelPatcher",
    "control": "ControlBase",
    "clip": "CLIP",
    "vae": "VAE",
    "model_config": "BASE",
}
# A variable called `model`, and the attribute of that name, may hold either.
EITHER = {"ModelPatcher": ("ModelPatcher", "BaseModel"), "ControlBase": ("ControlBase", "T2IAdapter")}


def parts(line: str) -> tuple[str, list[str] | None, list[str], bool]:
    """(dotted name, first parameters or None, keywords, whether a version may be without it)."""
    name, parameters = re.fullmatch(r"([\w.]+)\??(?:\((.*)\))?", line).groups()
    if parameters is None:
        return name, None, [], line.endswith("?")
    first, _, keywords = parameters.partition("*")
    split = [[word.strip() for word in part.split(",") if word.strip()] for part in (first, keywords)]
    return name, *split, "?" in line


def has(owner, name: str) -> bool:
    """Whether a module, or a class or its instances, have an attribute of that name."""
    if hasattr(owner, name):
        return True
    bases = owner.__mro__[:-1] if inspect.isclass(owner) else ()
    return any(
        name in getattr(base, "__annotations__", ())
        or re.search(rf"\bself\.{name}\b[^\n=(]*=(?!=)", inspect.getsource(base))  # it is set, not only used
        for base in bases
        if base is not torch.nn.Module and base.__module__ != "builtins"
    )


def lacking(module, line: str) -> str | None:
    """What this ComfyUI lacks of a line of the list; None where all is there."""
    name, first, keywords, optional = parts(line)
    *owners, last = name.split(".")
    owner = module
    for one in owners:
        if not hasattr(owner, one):
            return f"{module.__name__}.{name}: there is no {one}"
        owner = getattr(owner, one)
    if not (has(owner, last) if first is None else hasattr(owner, last)):
        return None if optional else f"{module.__name__}.{name} is not there"
    if first is None:
        return None
    function = getattr(owner, last)
    is_method = inspect.isclass(function) or isinstance(vars(owner).get(last), types.FunctionType)
    parameters = inspect.signature(function.__init__ if inspect.isclass(function) else function).parameters
    names = list(parameters)[1 if is_method and (inspect.isclass(function) or inspect.isclass(owner)) else 0 :]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    missing = [wanted for found, wanted in zip([*names, *[None] * len(first)], first) if found != wanted]
    missing += [keyword for keyword in keywords if keyword not in parameters and not takes_any]
    if missing:
        return (
            f"{module.__name__}.{name}: expected parameters {', '.join([*first, *keywords])}, found {', '.join(names)}"
        )
    return None


@pytest.mark.parametrize("name", TOUCHED)
def test_this_comfyui_has_what_the_pack_touches(comfyui, name, monkeypatch):
    monkeypatch.syspath_prepend(comfyui.root)  # core's nodes put a folder in front that hides core's package `utils`
    module = importlib.import_module(name)
    assert [problem for problem in (lacking(module, line) for line in TOUCHED[name]) if problem] == []


def test_what_is_not_there_is_named(comfyui):
    samplers = comfyui.samplers
    assert lacking(samplers, "gone(x)") == "comfy.samplers.gone is not there" and lacking(samplers, "gone?") is None
    assert lacking(samplers, "CFGGuider.gone") == "comfy.samplers.CFGGuider.gone is not there"
    assert lacking(samplers, "Gone.name") == "comfy.samplers.Gone.name: there is no Gone"
    found = lacking(samplers, "sampler_object(other)")
    assert found == "comfy.samplers.sampler_object: expected parameters other, found name"
    assert lacking(samplers, "CFGGuider.sample(noise, *, gone)").startswith("comfy.samplers.CFGGuider.sample: expected")
    assert lacking(samplers, "CFGGuider.conds") is None


def test_a_method_that_core_still_calls_but_no_longer_has_is_named(comfyui, monkeypatch):
    monkeypatch.delattr(comfyui.samplers.CFGGuider, "inner_set_conds")
    for line in ("CFGGuider.inner_set_conds(conds)", "CFGGuider.inner_set_conds"):
        assert lacking(comfyui.samplers, line) == "comfy.samplers.CFGGuider.inner_set_conds is not there"


# ---- the list is complete ---------------------------------------------------------------------------------------


def listed() -> set[str]:
    """Every name of the list, with its module and with the classes and modules around it."""
    names: set[str] = set()
    for module, lines in TOUCHED.items():
        for line in lines:
            words = [*module.split("."), *parts(line)[0].split(".")]
            names.update(".".join(words[:end]) for end in range(1, len(words) + 1))
    return names


def attributes_of(class_name: str) -> set[str]:
    """The attributes listed of a class of core's, whichever module it is in."""
    return {
        name.split(".")[-1]
        for lines in TOUCHED.values()
        for name in (parts(line)[0] for line in lines)
        if name.split(".")[-2:-1] == [class_name]
    }


def dotted(node: ast.AST) -> list[str]:
    """a.b.c as its words; [] for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else []
    return [*inner, node.attr] if inner else []


def names_of_modules(tree: ast.AST) -> dict[str, str]:
    """The names by which a file knows modules and things of core's: {name here: dotted name there}."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                if one.name.split(".")[0] in MODULES:
                    known[one.asname or one.name.split(".")[0]] = one.name if one.asname else one.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in MODULES:
            known.update({one.asname or one.name: f"{node.module}.{one.name}" for one in node.names})
    return known


def used_of_modules(tree: ast.AST) -> set[str]:
    """Dotted names of core's that a file uses, those in getattr(module, "name") included."""
    known = names_of_modules(tree)
    used = set(known.values())
    for node in ast.walk(tree):
        words = dotted(node)
        if words and words[0] in known:
            used.add(".".join([known[words[0]], *words[1:]]))
        if isinstance(node, ast.Call) and dotted(node.func) in (["getattr"], ["hasattr"]):
            owner, name = dotted(node.args[0]), node.args[1]
            if owner and owner[0] in known and isinstance(name, ast.Constant):
                used.add(".".join([known[owner[0]], *owner[1:], name.value]))
    return used


def used_of_objects(tree: ast.AST) -> set[tuple[str, str]]:
    """(class of core's, attribute) of variables whose annotation, or else whose name, says what they hold."""
    modules, used = names_of_modules(tree), set()
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        arguments = [*function.args.args, *function.args.kwonlyargs]
        said = {one.arg: ast.unparse(one.annotation) for one in arguments if one.annotation is not None}
        for node in ast.walk(function):
            words = dotted(node.value) if isinstance(node, ast.Attribute) else []
            if words and words[0] not in modules:
                kind = said.get(words[0]) if len(words) == 1 else None
                kind = HELD.get(words[-1]) if kind in (None, "Any") else kind
                used.update([(kind, node.attr)] if kind in HELD.values() else [])
    return used


def overridden(cls: ast.ClassDef) -> set[str]:
    """Names that a class defines, takes from `super()`, or has of itself without giving them a value."""
    used = {node.name for node in cls.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute):
            is_super = isinstance(node.value, ast.Call) and dotted(node.value.func) == ["super"]
            if is_super or dotted(node.value) == ["self"]:
                used.add(node.attr)
    return used


def trees():
    for path in sorted(NODES.rglob("*.py")):
        if path.relative_to(NODES).parts[0] != "host":  # which talks to ComfyUI as a server
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_the_list_holds_every_name_that_the_code_uses_of_a_module():
    known = listed()
    # The methods of a listed dictionary are not core's to change.
    data = {f"{module}.{parts(line)[0]}" for module, lines in TOUCHED.items() for line in lines if "(" not in line}

    def is_listed(name: str) -> bool:
        words = name.split(".")
        is_method = ".".join(words[:-1]) in data and words[-2].islower()
        return name in known or is_method or words[-1].startswith("__")

    unlisted = {
        f"{path.relative_to(NODES)}: {name}"
        for path, tree in trees()
        for name in used_of_modules(tree)
        if not is_listed(name)
    }
    assert unlisted == set()


def test_the_list_holds_every_attribute_that_the_code_uses_of_cores_objects():
    unlisted = set()
    for path, tree in trees():
        for kind, name in used_of_objects(tree):
            known = set().union(*(attributes_of(one) for one in EITHER.get(kind, (kind,))))
            if name not in known and not hasattr(torch.nn.Module, name) and not name.startswith("indomain_"):
                unlisted.add(f"{path.relative_to(NODES)}: {kind}.{name}")
    assert unlisted == set()


def derived_from_core() -> list[tuple[Path, ast.ClassDef, str]]:
    """(file, class, dotted name of the class of core's that it derives from, through classes of this package too)."""
    found, known_here = [], {}
    for path, tree in trees():
        known = names_of_modules(tree)
        for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for words in filter(None, map(dotted, cls.bases)):
                if words[0] in known and "comfy_api" not in known[words[0]]:
                    known_here[cls.name] = ".".join([known[words[0]], *words[1:]])
                    found.append((path, cls, known_here[cls.name]))
    for path, tree in trees():
        for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            for words in filter(None, map(dotted, cls.bases)):
                if len(words) == 1 and words[0] in known_here:
                    known_here.setdefault(cls.name, known_here[words[0]])
                    found.append((path, cls, known_here[words[0]]))
    return found


def test_the_list_holds_every_method_of_cores_that_a_class_overrides(comfyui):
    unlisted, classes = set(), set()
    for path, cls, dotted_name in derived_from_core():
        module, _, name = dotted_name.rpartition(".")
        core = getattr(importlib.import_module(module), name)
        classes.add(cls.name)
        for method in overridden(cls):
            own = method.startswith("__") or hasattr(torch.nn.Module, method)
            if has(core, method) and not own and method not in attributes_of(name):
                unlisted.add(f"{path.relative_to(NODES)}: {cls.name}({name}).{method}")
    assert {"SourceGuider", "TermGuider", "PredictionGuider", "TextFree", "PlainUNetConfig"} <= classes
    assert unlisted == set()
