"""Orientation from EXIF blocks and XMP."""

from __future__ import annotations

import struct

import pytest
from indomain_guidance.training.data.exif import orientation


def directory(entries, tail: bytes = b"", order: str = "<") -> bytes:
    """A TIFF directory of (tag, kind, count, value or offset)."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(entries))
    return head + b"".join(struct.pack(f"{order}HHII", *one) for one in entries) + bytes(4) + tail


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [3, 4])
def test_orientation_is_read_from_exif_and_else_from_xmp(order, kind):
    for value in range(1, 9):
        entry = (
            struct.pack(f"{order}HHIHH", 274, 3, 1, value, 0)
            if kind == 3
            else struct.pack(f"{order}HHII", 274, 4, 1, value)
        )
        exif = directory([], order=order)[:8] + struct.pack(f"{order}H", 1) + entry + bytes(4)
        assert orientation(exif, b"") == orientation(b"Exif\0\0" + exif, b'tiff:Orientation="3"') == value
        assert orientation(b"", b"<x tiff:Orientation='%d'>" % value) == value
        assert orientation(b"", b"<tiff:Orientation>%d</tiff:Orientation>" % value) == value
    for damaged in (b"", b"II", exif[:10], exif[:-6], b"XX" + exif[2:], b"II*\0\xff\xff\xff\xff"):
        assert orientation(damaged, b"") == 1
