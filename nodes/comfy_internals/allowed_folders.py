"""Which files and folders a prompt may name, in one place for all nodes.

Anyone who reaches the server can send prompts. Where only this machine does, that is its user, who may read any folder.
Where others do, prompts reach ComfyUI's input folder, as with core's own loaders, and folders that the owner allows.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence

import folder_paths
from comfy.cli_args import args

from ...guidance.files import FileProblem

VARIABLE = "INDOMAIN_ALLOWED_FOLDERS"
# Of a folder in extra_model_paths.yaml, beside checkpoints and loras.
KEY = "indomain_allowed_folders"
LONGEST_PATH = 4096  # characters; Linux takes as many bytes, Windows without more ado 260


def reached_by_others(listen: str) -> bool:
    """Whether a server that listens on these addresses, divided by commas, can be reached from outside.

    Only addresses that are sure to be this machine's own count as such: an empty one is all of them, and a name may be.
    """
    return not all(map(_is_own, listen.split(",")))


def _is_own(address: str) -> bool:
    if address.lower() == "localhost":
        return True
    try:
        parsed = ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def allowed_folders() -> tuple[str, ...] | None:
    """The folders, with links followed, inside of which prompts may name files; None: any file."""
    if not reached_by_others(args.listen):
        return None
    return tuple(dict.fromkeys(map(os.path.realpath, _named_folders())))


def _named_folders() -> list[str]:
    """ComfyUI's input folder, and what the owner allows, as they are named."""
    more, _ = folder_paths.folder_names_and_paths.get(KEY, ([], set()))
    listed = os.environ.get(VARIABLE, "").split(os.pathsep)
    names = [folder_paths.get_input_directory(), *more, *(os.path.expanduser(name) for name in listed if name.strip())]
    return [os.path.abspath(name) for name in names]


def check_allowed(name: str, node: str, allowed: Sequence[str] | None) -> str:
    """The path of a file or folder that a prompt names; a relative one lies in ComfyUI's input folder.

    A pattern's path may go on with braces and wildcards; the code that expands it checks that no link leads out. Raises
    FileProblem for what lies outside, links followed. Nothing outside is looked at: the message reveals nothing of it.
    """
    if len(name) > LONGEST_PATH or "\0" in name or not _can_be_a_name(name):
        raise FileProblem(f"{node}: expected the path of a file or folder, found {name!r:.120}, which can be none.")
    if allowed is None:
        return os.path.join(folder_paths.get_input_directory(), os.path.expanduser(name))
    path = _path_within(name, allowed) or _pattern_within(name, allowed)
    if path is None:
        raise FileProblem(
            f"{node}: expected files in ComfyUI's input folder or in a folder that the owner of this server allows, "
            f"found {name!r:.120}; copy them into the input folder, or have the owner add their folder to the "
            f"environment variable {VARIABLE} or, as {KEY}, to extra_model_paths.yaml."
        )
    return path


def _path_within(name: str, allowed: Sequence[str]) -> str | None:
    """The path, if it lies within the allowed folders, links followed."""
    if name == "~" or name.startswith(("~/", "~\\")):  # ~NAME would say whether this machine has a user of that name
        name = os.path.expanduser(name)
    # An absolute path stays as it is when it is joined.
    path = os.path.join(folder_paths.get_input_directory(), name)
    path, other = (os.path.abspath(spelling) for spelling in (path, path.replace("\\", "/")))
    # As it is written first, backslashes read in both ways: to follow links is to look at what is there.
    named = [*_named_folders(), *allowed]
    if lies_within(path, named) and lies_within(other, named) and lies_within(os.path.realpath(path), allowed):
        return path
    return None


def _pattern_within(name: str, allowed: Sequence[str]) -> str | None:
    """The same for what has braces and wildcards, by the folder that they begin in."""
    magic = re.search(r"[{*?\[]", name)
    if magic is None:
        return None
    cut = max(name.rfind(separator, 0, magic.start()) for separator in "/\\") + 1
    folder = None if ".." in re.split(r"[/\\{},]", name[cut:]) else _path_within(name[:cut] or ".", allowed)
    return None if folder is None else os.path.join(folder, name[cut:])


def _can_be_a_name(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeError:  # halves of characters, which JSON may hold
        return False
    return True


def lies_within(path: str, folders: Sequence[str]) -> bool:
    """Whether an absolute path is one of the folders or below it; as it is written, links are not followed."""
    parts = _parts(path)
    return any(parts[: len(folder)] == folder for folder in map(_parts, folders))


def _parts(path: str) -> list[str]:
    return [part for part in os.path.normcase(os.path.normpath(path)).split(os.sep) if part]
