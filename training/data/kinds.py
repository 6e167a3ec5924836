"""Endings of file names: pictures that are read, pictures that are not, notes that go with a picture."""

from __future__ import annotations

from pathlib import PurePath

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jpe", ".jfif")
SHARD = ".tar"
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")

MASKS = ("-masklabel", "-condlabel", "_masklabel", ".masklabel", ".mask", "_mask", "-mask")


def ending(name: str) -> str:
    """The ending of a file's name in small letters, without trailing spaces and dots, which Windows drops."""
    return PurePath(name.replace("\\", "/").rstrip(" .")).suffix.lower()


def masked(stem: str) -> str | None:
    """For the name of a mask, without ending: the name of the picture it belongs to. None for other names."""
    for mark in MASKS:
        if stem.lower().endswith(mark) and len(stem) > len(mark):
            return stem[: -len(mark)]
    return None
