"""Words in pictures, with whatever font this Pillow has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw


def default_font(size: int) -> Any:
    """Pillow's own font at `size` pixels; before Pillow 10.1, or without FreeType, its small fixed one."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError):
        return ImageFont.load_default()


def write(draw: ImageDraw, place: tuple[float, float], text: str, *, fill: tuple[int, int, int], font: Any) -> None:
    """Draw one line of text at (x, y); the fixed font gets "?" for what it has no letters for."""
    try:
        draw.text(place, text, fill=fill, font=font)
    except UnicodeEncodeError:
        draw.text(place, text.encode("latin-1", "replace").decode("latin-1"), fill=fill, font=font)
