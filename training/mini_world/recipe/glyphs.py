"""Rasterise the ten digits of every listed font once, so that training and measuring need no font files.

The fonts are fetched with ``npm pack @fontsource/NAME@VERSION``, in the versions that the shipped raster was made of;
only families whose package names a licence that allows it are used.
``data/glyphs.npz`` holds the result: masks uint8 [fonts, 10, 64, 64] (255 = ink), names, licences and package versions.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ....guidance.errors import Problem
from ....guidance.files.atomic import replacing
from ..render import GLYPH_PX, SIDE_PX

ALLOWED_LICENCES = {"OFL-1.1": "SIL Open Font License 1.1", "Apache-2.0": "Apache License 2.0"}

FAMILIES = """
roboto open-sans lato montserrat oswald source-sans-3 raleway pt-sans merriweather noto-sans noto-serif
playfair-display lora fira-sans work-sans inter quicksand nunito rubik karla inconsolata libre-baskerville bitter arvo
josefin-sans anton dosis cabin oxygen titillium-web exo-2 abril-fatface crimson-text vollkorn eb-garamond
cormorant-garamond archivo-black bebas-neue comfortaa righteous russo-one teko ibm-plex-sans ibm-plex-serif
ibm-plex-mono space-mono space-grotesk dm-sans dm-serif-display manrope barlow mulish heebo overpass signika slabo-27px
alegreya cardo gelasio spectral domine rokkitt zilla-slab patua-one fredoka baloo-2 varela-round jost urbanist outfit
sora lexend chivo public-sans red-hat-display asap catamaran hind kanit prompt sarabun tinos arimo cousine
anonymous-pro courier-prime roboto-slab roboto-mono source-serif-4 source-code-pro jetbrains-mono fira-mono concert-one
passion-one alfa-slab-one ultra
""".split()
VERSION = "5.3.0"
OTHER_VERSIONS = {"source-sans-3": "5.3.1", "source-serif-4": "5.3.1", "source-code-pro": "5.3.1"}


def package_of(family: str) -> str:
    """The pinned npm package of a family, ``@fontsource/lato@5.3.0``."""
    return f"@fontsource/{family}@{OTHER_VERSIONS.get(family, VERSION)}"


def rasterise_digit(font_bytes: bytes, digit: int) -> np.ndarray:
    """One digit as uint8 [64, 64], white on black, centred, its longer side GLYPH_PX pixels."""
    font = ImageFont.truetype(io.BytesIO(font_bytes), 256)
    canvas = Image.new("L", (512, 512), 0)
    ImageDraw.Draw(canvas).text((256, 256), str(digit), font=font, fill=255, anchor="mm")
    box = canvas.getbbox()
    if box is None:
        raise Problem(f"expected a drawn glyph for digit {digit}, found an empty one")
    glyph = canvas.crop(box)
    scale = GLYPH_PX / max(glyph.size)
    size = max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))
    glyph = glyph.resize(size, Image.Resampling.LANCZOS)
    cell = Image.new("L", (SIDE_PX, SIDE_PX), 0)
    cell.paste(glyph, ((SIDE_PX - glyph.width) // 2, (SIDE_PX - glyph.height) // 2))
    return np.asarray(cell, dtype=np.uint8)


def read_package(path: Path) -> tuple[dict, bytes]:
    """package.json and the upright Latin regular font of one fontsource archive."""
    with tarfile.open(path) as archive:
        about = json.loads(_content(archive, "package/package.json"))
        names = [n for n in archive.getnames() if n.endswith("-latin-400-normal.woff")]
        if not names:
            raise Problem(f"expected a file *-latin-400-normal.woff in {path.name}, found none; leave it out")
        return about, _content(archive, names[0])


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise Problem(f"expected the file {name} in {archive.name}, found none; leave it out")
    return file.read()


def fetch(family: str, folder: Path) -> Path:
    """The archive of a family's package, fetched into ``folder``. Raises ValueError where npm is missing or fails."""
    npm = shutil.which("npm")
    if npm is None:
        raise Problem(
            "expected npm on the PATH to fetch the fonts, found none; install Node.js, or leave --fonts "
            "out: the rasterised digits are in the repository"
        )
    packed = subprocess.run([npm, "pack", "--silent", package_of(family)], cwd=folder, capture_output=True, text=True)
    if packed.returncode or not packed.stdout.split():
        raise Problem(
            f"npm could not fetch {package_of(family)} ({packed.stderr.strip()[-200:] or 'no message'}); "
            "check the connection and run again"
        )
    return folder / packed.stdout.split()[-1]


def build(target: Path, families: Sequence[str] = FAMILIES, progress: Callable[[str], None] = print) -> None:
    """Fetch the families, rasterise them and replace ``target`` (npz). Needs npm and a package registry.

    Raises ValueError for a licence that does not allow it: a family less would move others between the trained and the
    held-out ones.
    """
    masks, licences = [], []
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            about, font = read_package(fetch(family, Path(folder)))
            if about.get("license") not in ALLOWED_LICENCES:
                raise Problem(
                    f"{package_of(family)}: expected a licence of {', '.join(ALLOWED_LICENCES)}, found "
                    f"{about.get('license')!r}; take the family off the list"
                )
            masks.append(np.stack([rasterise_digit(font, digit) for digit in range(10)]))
            licences.append(about["license"])
            progress(f"{package_of(family)} ({about['license']})")
    versions = [package_of(family).rsplit("@", 1)[1] for family in families]
    with replacing(target) as file:
        np.savez_compressed(
            file,
            masks=np.stack(masks),
            names=np.array(families),
            licences=np.array(licences),
            versions=np.array(versions),
        )
