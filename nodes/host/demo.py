"""``run.py demo``: the prior alone, the domain model alone and multi-guidance, side by side, made by a real server."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .client import ComfyClient, Prompt
from .server import CHECKOUT, ComfyServer

WORKFLOW = CHECKOUT / "workflows" / "api" / "in_domain_text_to_image.json"
# The workflow's own prompt is the first row. These show colours of the domain, of half of it, and of none of it.
PROMPTS = (
    "a red seven on a yellow background",
    "a blue three on a white background",
    "a green four on an orange background",
    "a white five on a blue background",
    "a purple two on a green background",
    "an orange eight on a black background",
)
_MARGIN_PX, _TITLE_PX, _TEXT_PX = 16, 44, 30
_IMAGE_PX = 128
_IMAGES_A_CELL = 4


def load_workflow(path: Path = WORKFLOW) -> dict[str, dict[str, Any]]:
    """A graph in API format."""
    return json.loads(path.read_text(encoding="utf-8"))


def columns(prompt: Prompt) -> dict[str, str]:
    """{title: node id} of the nodes that save images, in the order in which the workflow lists them."""
    return {node["_meta"]["title"]: node_id for node_id, node in prompt.items() if node["class_type"] == "SaveImage"}


def prompt_nodes(prompt: Prompt) -> list[str]:
    """The text encoders where the demo writes its prompts; that of the empty prompt stays empty."""
    return [node_id for node_id, node in prompt.items() if node["inputs"].get("text", "").strip()]


def with_text(prompt: Prompt, text: str) -> dict[str, dict[str, Any]]:
    changed = json.loads(json.dumps(prompt))
    for node_id in prompt_nodes(changed):
        changed[node_id]["inputs"]["text"] = text
    return changed


def samples_per_step(prompt: Prompt, outputs: Mapping[str, Mapping[str, Any]], saver: str) -> float | None:
    """Model evaluations a step and image of the sampler before `saver`, as it reports them; None where it does not.

    Core's KSampler reports nothing: it evaluates positive and negative, or the positive alone where cfg is 1.
    """
    decoder = prompt[saver]["inputs"]["images"][0]
    sampler = prompt[decoder]["inputs"]["samples"][0]
    if prompt[sampler]["class_type"] == "KSampler":
        return 1.0 if prompt[sampler]["inputs"]["cfg"] == 1.0 else 2.0
    reported = outputs.get(sampler, {}).get("samples_per_step")
    return float(reported[0]["value"]) if reported else None


def contact_sheet(rows: Sequence[tuple[str, Mapping[str, Sequence[Any]]]], titles: Sequence[str]):
    """One picture of everything: a row a prompt, a column a method. Small images are enlarged by whole pixels."""
    from PIL import Image, ImageDraw

    shown = [images for _, cells in rows for images in cells.values()]
    first = shown[0][0]
    scale = max(1, _IMAGE_PX // max(first.size))
    width, height = first.width * scale, first.height * scale
    column_px = min(_IMAGES_A_CELL, max(map(len, shown))) * width + _MARGIN_PX
    row_px = _TEXT_PX + height
    size = (_MARGIN_PX + len(titles) * column_px, 2 * _MARGIN_PX + _TITLE_PX + len(rows) * row_px)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = _MARGIN_PX + column * column_px
        draw.text((x, _MARGIN_PX), title, fill="black", font=_font(24))
        for row, (text, cells) in enumerate(rows):
            y = _MARGIN_PX + _TITLE_PX + row * row_px
            draw.text((x, y + 4), text, fill="#444444", font=_font(18))
            for index, image in enumerate(cells[title][:_IMAGES_A_CELL]):
                enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (x + index * width, y + _TEXT_PX))
    return sheet


def _font(size_px: int):
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size_px)
    except TypeError:  # Pillow before 10.1 has one size only
        return ImageFont.load_default()


def make_pictures(client: ComfyClient, output: Path, prompts: Sequence[str] = PROMPTS) -> dict[str, Any]:
    """Run the demo's workflow once a prompt on a running server and save what it makes in `output`.

    Returns what the demo prints: images and contact_sheet (paths), seconds, samples_per_step (by column).
    """
    from PIL import Image

    workflow = load_workflow()
    savers = columns(workflow)
    own = workflow[prompt_nodes(workflow)[0]]["inputs"]["text"].strip()
    texts = [own, *(text for text in prompts if text != own)]
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    rows, saved, cost = [], [], {}
    for number, text in enumerate(texts, 1):
        prompt = with_text(workflow, text)
        print(f"{number}/{len(texts)} {text}", file=sys.stderr, flush=True)
        run = client.run(prompt)
        cells: dict[str, list[Any]] = {}
        for title, node_id in savers.items():
            cells[title] = []
            for index, reference in enumerate(run.images(node_id)):
                data = client.image(reference)
                path = output / f"{_slug(text)}__{_slug(title)}_{index}.png"
                path.write_bytes(data)
                saved.append(str(path))
                cells[title].append(Image.open(io.BytesIO(data), formats=("PNG",)))
            cost[title] = samples_per_step(prompt, run.outputs, node_id)
        rows.append((text, cells))
    seconds = time.monotonic() - started
    sheet = output / "contact_sheet.png"
    contact_sheet(rows, list(savers)).save(sheet, optimize=True)
    return {"images": saved, "contact_sheet": str(sheet), "seconds": round(seconds, 2), "samples_per_step": cost}


def _slug(text: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in text.lower()).split())[:60]


def run_demo(comfyui: Path, output: Path, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Start a server, make the demo's pictures in `output`, end the server."""
    print("starting ComfyUI ...", file=sys.stderr, flush=True)
    with ComfyServer(comfyui, flags=flags) as server:
        try:
            return make_pictures(server.client, output)
        except (RuntimeError, OSError):
            print(server.log_tail(), file=sys.stderr, flush=True)
            raise
