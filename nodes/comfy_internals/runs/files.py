"""The folder and the finished file of a run: other files are not replaced, and a refused run leaves no folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ....guidance.errors import Problem
from ....guidance.files import FileProblem
from ..progress import uncancelled

if TYPE_CHECKING:
    from ....training.engine.run_settings import RunSettings


def finished_file(config: RunSettings) -> Path:
    """Where the finished file of a run is put for ComfyUI."""
    return Path(config.export_to) / f"{config.name}.safetensors"


def check_claim(config: RunSettings, replaceable: Callable[[Path], bool] = lambda path: False) -> None:
    """Refuse to replace a finished file that another run made. Raises FileProblem.

    A file is the run's own once the run has checkpoints, or when the weights are those it finished with. A folder that
    a failed first try left is not enough. replaceable: whether a file may be replaced whoever made it.
    """
    from ....training.engine.checkpoints import find_checkpoints

    path, own = finished_file(config), config.run_folder / f"{config.name}.safetensors"
    if not path.exists() or find_checkpoints(config.run_folder):
        return
    if own.is_file() and own.stat().st_size == path.stat().st_size and _weights_digest(own) == _weights_digest(path):
        return
    if not replaceable(path):
        raise FileProblem(
            f"{path}: expected no file under this name, found one that this run did not make; choose another name "
            "or move the file away."
        )


def _weights_digest(path: Path) -> bytes:
    """SHA-256 of a .safetensors file without its header, which holds the time of writing."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        for chunk in uncancelled(iter(lambda: file.read(1 << 22), b"")):
            digest.update(chunk)
    return digest.digest()


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Around a run and what is written into its folder: a run that is refused leaves no new folder behind."""
    from ....training.engine.folder import has_saved
    from ....training.engine.lock import locked

    new = not folder.exists()
    try:
        yield
    except Problem:
        with suppress(Problem):  # another run has locked it by now
            if new and folder.is_dir() and not has_saved(folder):
                with locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)
        raise
