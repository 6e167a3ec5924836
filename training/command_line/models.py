"""Which file a name on the command line stands for: a file, a run's folder, or a model that ships."""

from __future__ import annotations

import os
from pathlib import Path

from ...guidance.files import FileProblem, holds_generator
from ..adaptation.config import AdaptConfig
from ..engine.checkpoints import find_checkpoints
from ..engine.folder import CONFIG
from ..engine.small_files import read_values
from ..mini_world import MINI_WORLD
from ..mini_world.assets import domain_unets_dir, generators_dir
from ..prior.settings import PriorSettings
from .console import own_command
from .kinds import kind_of


def find_generator(name: str) -> str | None:
    """The generator that a name stands for: a file, a run's folder, mini_world; None where it is something else.

    Raises FileProblem for the folder of an adaptation that is not finished.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            return None
        config, file = _run_in(path)
        return str(_finished(file, path, "generator")) if isinstance(config, AdaptConfig) else None
    if name == MINI_WORLD:
        return name
    return name if path.is_file() and holds_generator(path) else None


def find_domain(name: str) -> tuple[Path, PriorSettings | None]:
    """The file a name stands for, and the configuration of its run where the name is a run's folder.

    A file, a run's folder (whose file is a domain model or a LoRA), or the name of a domain model that ships. Raises
    FileProblem where nothing is.
    """
    path = Path(name)
    if path.is_dir():
        config, file = _run_in(path)
        return _finished(file, path, "model"), config
    shipped = domain_unets_dir() / f"{name}.safetensors"
    return (shipped if path.name == name and not path.exists() and shipped.is_file() else path), None


def find_model(name: str, unfinished: bool = False) -> str:
    """The file of whatever model a name stands for: all that `find_generator` and `find_domain` know.

    unfinished: a run that is not finished stands for its last checkpoint. Raises FileProblem.
    """
    path = Path(name)
    if unfinished and (path / CONFIG).is_file():
        kept = find_checkpoints(path)
        if kept and not _run_in(path)[1].is_file():
            return str(kept[-1][1])
    if name == MINI_WORLD:
        return str(generators_dir() / "mini-handwriting.safetensors")
    return find_generator(name) or str(find_domain(name)[0])


def _run_in(folder: Path) -> tuple[PriorSettings, Path]:
    """The settings of the run in a folder, and where its finished file is or will be. Raises FileProblem."""
    file = folder / CONFIG
    if not file.is_file():
        raise FileProblem(f"{folder}: expected a model's file or a run's folder, found no {CONFIG} in it.")
    config = kind_of(read_values(file), str(file)).read(file)
    return config, folder / f"{config.name}.safetensors"


def _finished(file: Path, folder: Path, what: str) -> Path:
    if not file.is_file():
        raise FileProblem(
            f"{file}: expected the run's finished {what}, found none; go on with {own_command('resume', folder)}."
        )
    return file


def comfyui_tokenizer() -> str:
    """The folder of CLIP's tokenizer in the ComfyUI that run.py found, "" where there is none."""
    comfyui = os.environ.get("INDOMAIN_COMFYUI_PATH", "")
    folder = os.path.join(comfyui, "comfy", "sd1_tokenizer") if comfyui else ""
    return folder if folder and os.path.isfile(os.path.join(folder, "vocab.json")) else ""
