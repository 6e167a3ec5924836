"""Folders of model files: which files they list, what a name in a prompt stands for, whether a file has changed."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ....guidance.files import FileProblem
from ..allowed_folders import lies_within

MOST_FOLDERS, MOST_CHARACTERS = 4, 240  # of folders in a message, and of them all
WEIGHTS_OF_MINI_WORLD = Path(__file__).resolve().parents[3] / "training" / "mini_world" / "weights"


@dataclass
class ModelFolder:
    """The model files that one loader lists.

    names: ComfyUI's model folders; new files go into the first. node: whose messages they are. shipped: a folder of
    this pack whose files are listed too, and which no message names. extensions: None for ComfyUI's own.
    """

    names: tuple[str, ...]
    node: str
    shipped: Path | None = None
    extensions: frozenset[str] | None = None

    def register(self) -> None:
        """Make `models/NAME` a model folder of ComfyUI, on disk too, with what is shipped listed in it."""
        name = self.names[0]
        default = os.path.join(folder_paths.models_dir, name)
        with contextlib.suppress(OSError):  # nothing is lost where it cannot be made
            os.makedirs(default, exist_ok=True)
        # extra_model_paths.yaml may have named it already, without file extensions, which would list every file.
        paths, known = folder_paths.folder_names_and_paths.get(name, ([], set()))
        added = [path for path in (default, str(self.shipped)) if path not in paths]
        extensions = self.extensions or folder_paths.supported_pt_extensions
        folder_paths.folder_names_and_paths[name] = ([*paths, *added], set(known) | set(extensions))

    def own(self) -> Path:
        """The folder that new models are written to: the user's first one, never the shipped one."""
        paths = folder_paths.get_folder_paths(self.names[0])
        return Path(next(path for path in paths if path != str(self.shipped)))

    def new_file(self, filename: str, node: str) -> Path:
        """Where a new model of that name goes, subfolders included; .safetensors may be left out.

        Raises FileProblem for names outside the folder, links followed, and those that some system cannot take.
        """
        from ....training.engine.names import check_name
        from ....training.engine.settings import ConfigProblem

        folder = self.own()
        name = filename.strip().removesuffix(".safetensors")
        parts = name.split("/")
        try:
            for part in parts:
                check_name(part)
                os.fsencode(part)
        except (ConfigProblem, UnicodeError) as problem:
            raise FileProblem(f"{node}: expected a file name inside {folder}; {problem}") from None
        path = folder.joinpath(*parts[:-1], f"{parts[-1]}.safetensors")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise FileProblem(
                f"{node}: expected a file name inside {folder}, found {filename!r:.80}; use a plain name."
            )
        return path

    def listed(self) -> list[str]:
        """The names of all files, those of the first folder first, each once."""
        return list(dict.fromkeys(name for folder in self.names for name in folder_paths.get_filename_list(folder)))

    def find(self, name: str) -> Path:
        """The path of a file that a prompt names, also as another system writes the name. Raises FileProblem."""
        path = self._path(name)
        if path is not None:
            return path
        meant = self._meant(name)
        if len(meant) > 1:
            raise FileProblem(
                f"{self.node}: expected the name of one file, found {name!r:.200}, which may be any of "
                f"{_names(meant)}; pick one."
            )
        paths = [path for folder in self.names for path in folder_paths.get_folder_paths(folder)]
        places = [path for path in paths if path != str(self.shipped)]
        for place in places:
            link = os.path.abspath(os.path.join(place, meant[0])) if name and "\0" not in name else place
            # A message about a name such as ../../x reveals nothing outside the folder.
            if lies_within(link, [os.path.abspath(place)]) and os.path.islink(link) and not os.path.exists(link):
                raise FileProblem(
                    f"{self.node}: expected a file named {name!r:.150}, found in {_short(place, 120)} a link to "
                    f"{_short(os.readlink(link), 120)}, where nothing is; put the file back there, or mend the link."
                )
        own = _spellings(name)[-1].rpartition("/")[2]
        moved = [other for other in self.listed() if own and _spellings(other)[-1].rpartition("/")[2] == own]
        is_listed = f"{_names(moved)} is listed, pick it if it is the same"
        advice = is_listed if moved else "put it there, or pick a listed file"
        raise FileProblem(
            f"{self.node}: expected a file named {name!r:.150} in {_folders(places)}, found none; {advice}."
        )

    def fingerprint(self, name: str) -> str:
        """Changes when another file lies behind a name, or the file has changed; for ComfyUI's cache of node outputs.

        A copy may have the size and the time of what it replaces. It has another inode, and what was written in place
        has another time of change (ctime), which nothing can set back; on Windows that is the time of creation.
        """
        path = self._path(name)
        with contextlib.suppress(OSError):
            if path is not None:
                found = path.stat()
                identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
                return " ".join(map(str, (path, *identity)))
        return "missing"

    def _meant(self, name: str) -> list[str]:
        """The listed names that `name` may stand for: itself, else those of the nearest spelling that fits any."""
        listed = self.listed()
        if name in listed:
            return [name]
        for step, spelling in enumerate(_spellings(name)):
            found = [other for other in listed if _spellings(other)[step] == spelling]
            if found:
                return found
        return [name]

    def _path(self, name: str) -> Path | None:
        """The path of a file that the prompt names, None where there is none or where several might be meant."""
        meant = self._meant(name)
        if not name or "\0" in name or len(meant) != 1:
            return None
        # Core's look-up keeps names such as ../../x inside the folders.
        found = (folder_paths.get_full_path(folder, meant[0]) for folder in self.names)
        return next((Path(path) for path in found if path is not None), None)


DOMAIN_UNETS = ModelFolder(
    ("domain_unets", "diffusion_models"), "Load Domain UNet", WEIGHTS_OF_MINI_WORLD / "domain_unets"
)
GENERATORS = ModelFolder(
    ("generators",),
    "Load Generator",
    WEIGHTS_OF_MINI_WORLD / "generators",
    frozenset({".safetensors", ".pkl", ".pt", ".pth"}),
)
CHECKPOINTS = ModelFolder(("checkpoints",), "Train Domain UNet")


def _spellings(name: str) -> tuple[str, str, str]:
    """A name with what may differ taken out, one step more each: separators, how letters are composed, their case."""
    plain = re.sub(r"[\\/]+", "/", name)
    composed = unicodedata.normalize("NFC", plain)
    return plain, composed, composed.casefold()


def _folders(places: Sequence[str]) -> str:
    shown = list(dict.fromkeys(places))
    more, shown = len(shown) - MOST_FOLDERS, shown[:MOST_FOLDERS]
    each = MOST_CHARACTERS // max(1, len(shown))
    return " or ".join(_short(place, each) for place in shown) + (f" or {more} more folders" if more > 0 else "")


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"{name!r:.80}" for name in names[:3]) + more


def _short(path: str, most: int) -> str:
    """A path of at most `most` characters; a longer one loses its beginning."""
    return path if len(path) <= most else f"...{path[3 - most :]}"
