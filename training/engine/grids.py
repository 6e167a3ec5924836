"""Sample grids: pictures as a labelled table."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...guidance.files.atomic import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST_TILE, LARGEST_TILE = 128, 512  # px; small pictures are enlarged by a whole factor, large ones reduced
MARGIN, LABEL_WIDTH = 6, 150  # px


def grid(pictures: Sequence[Tensor], rows: Sequence[str], columns: Sequence[str], title: str = "") -> Image:
    """Pictures [B, 3, H, W] in -1..1, one tensor a row, as a labelled table."""
    from PIL import Image, ImageDraw, ImageFont

    count = max(len(row) for row in pictures)
    height, width = pictures[0].shape[-2:]
    scale = max(1, -(-SMALLEST_TILE // max(height, width)))
    if max(height, width) > LARGEST_TILE:
        scale = LARGEST_TILE / max(height, width)
    tile = (round(width * scale), round(height * scale))
    font = ImageFont.load_default(13)
    line = 17
    heading = MARGIN + (line if title else 0) + line
    size = (LABEL_WIDTH + count * (tile[0] + MARGIN), heading + len(pictures) * (tile[1] + MARGIN))
    sheet = Image.new("RGB", size, (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN // 2), title, fill=(0, 0, 0), font=font)
    for index, label in enumerate(columns):
        draw.text((LABEL_WIDTH + index * (tile[0] + MARGIN), heading - line), label, fill=(90, 90, 90), font=font)
    for at, (row, label) in enumerate(zip(pictures, rows)):
        top = heading + at * (tile[1] + MARGIN)
        wrapped = textwrap.wrap(label, width=20)[: max(1, tile[1] // line)]
        for number, part in enumerate(wrapped):
            draw.text((MARGIN, top + number * line), part, fill=(0, 0, 0), font=font)
        for index, picture in enumerate(row):
            values = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            image = Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
            if scale != 1:
                image = image.resize(tile, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
            sheet.paste(image, (LABEL_WIDTH + index * (tile[0] + MARGIN), top))
    return sheet


def save_png(image: Image, path: str | os.PathLike) -> Path:
    """Write a picture as PNG, completely or not at all."""
    with replacing(path) as file:
        image.save(file, format="PNG")
    return Path(path)
