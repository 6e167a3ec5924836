"""Rasterise the ten digits of every listed font once, so that training and measuring need no font files.

The fonts are fetched with ``npm pack @fontsource/NAME`` (the newest version; those of the shipped raster are kept in it); only families whose package names a licence that allows it are used.
``data/glyphs.npz`` holds the result: masks uint8 [fonts, 10, 64, 64] (255 = ink), names, licences and package versions.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

CELL_PX = 64      # raster of one glyph
GLYPH_PX = 60     # its longer side, so that every glyph fills its cell alike
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


def rasterise_digit(font_bytes: bytes, digit: int) -> np.ndarray:
    """One digit as uint8 [64, 64], white on black, centred, its longer side GLYPH_PX pixels."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(io.BytesIO(font_bytes), 256)
    canvas = Image.new("L", (512, 512), 0)
    ImageDraw.Draw(canvas).text((256, 256), str(digit), font=font, fill=255, anchor="mm")
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"expected a drawn glyph for digit {digit}, found an empty one")
    glyph = canvas.crop(box)
    scale = GLYPH_PX / max(glyph.size)
    glyph = glyph.resize((max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))), Image.LANCZOS)
    cell = Image.new("L", (CELL_PX, CELL_PX), 0)
    cell.paste(glyph, ((CELL_PX - glyph.width) // 2, (CELL_PX - glyph.height) // 2))
    return np.asarray(cell, dtype=np.uint8)


def read_package(path: Path) -> tuple[dict, bytes]:
    """package.json and the upright Latin regular font of one fontsource archive."""
    with tarfile.open(path) as archive:
        about = json.load(archive.extractfile("package/package.json"))
        names = [n for n in archive.getnames() if n.endswith("-latin-400-normal.woff")]
        if not names:
            raise ValueError(f"expected a file *-latin-400-normal.woff in {path.name}, found none; leave this family out")
        return about, archive.extractfile(names[0]).read()


def build(target: Path, progress=print) -> None:
    """Fetch every family, rasterise it and write ``target`` (npz). Needs npm and a package registry."""
    masks, names, licences, versions = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            packed = subprocess.run(["npm", "pack", "--silent", f"@fontsource/{family}"], cwd=folder, check=True,
                                    capture_output=True, text=True)
            about, font = read_package(Path(folder) / packed.stdout.split()[-1])
            if about.get("license") not in ALLOWED_LICENCES:
                progress(f"{family}: licence {about.get('license')!r} is not on the list, left out")
                continue
            masks.append(np.stack([rasterise_digit(font, digit) for digit in range(10)]))
            names.append(family)
            licences.append(about["license"])
            versions.append(about["version"])
            progress(f"{family} {about['version']} ({about['license']})")
    np.savez_compressed(target, masks=np.stack(masks), names=np.array(names), licences=np.array(licences),
                        versions=np.array(versions))
