"""Endings of file names: pictures that are read, pictures that are not, notes that go with a picture."""

from __future__ import annotations

from pathlib import PurePath

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jpe", ".jfif")
SHARD = ".tar"
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")

OTHER_PICTURES = frozenset(
    ".heic .heif .hif .jxl .jp2 .j2k .jpf .jpx .jpm .apng .jif .psd .psb .xcf .kra .ora .clip .svg .svgz .ai .eps .ps "
    ".pdf .ico .icns .cur .tga .dds .exr .hdr .qoi .pcx .ppm .pgm .pbm .pnm .pfm .sgi .rgb .wmf .emf .fits .dib .ktx "
    ".ktx2 .raw .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .x3f .3fr .fff .iiq .mef .mos "
    ".erf .kdc .rwl .gpr".split()
)
NOTES = frozenset(
    ".txt .caption .captions .cap .tags .json .jsonl .csv .tsv .yaml .yml .toml .xml .xmp .cls .npz .npy .pt .pth "
    ".safetensors .parquet .idx .index".split()
)
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
