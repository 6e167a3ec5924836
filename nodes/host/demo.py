"""``run.py demo``: the prior alone, the domain model alone and multi-guidance, side by side, made by a real server."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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
_MARGIN_PX = 16
_IMAGE_PX = 128
_IMAGES_A_CELL = 4


def load_workflow(path: Path = WORKFLOW) -> dict[str, dict[str, Any]]:
    """A graph in API format."""
    return json.loads(path.read_text(encoding="utf-8"))


def upstream(prompt: Prompt, node_id: str) -> Iterator[str]:
    """`node_id` and every node it depends on, nearest first."""
    waiting, seen = [node_id], set()
    while waiting:
        current = waiting.pop(0)
        if current in seen or current not in prompt:
            continue
        seen.add(current)
        yield current
        for value in prompt[current].get("inputs", {}).values():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
                waiting.append(value[0])


def columns(prompt: Prompt) -> dict[str, str]:
    """{title: node id} of the nodes that save images, in the order in which the workflow lists them."""
    found = {}
    for node_id, node in prompt.items():
        if node["class_type"] == "SaveImage":
            title = node.get("_meta", {}).get("title") or Path(node["inputs"]["filename_prefix"]).name
            found[title if title not in found else f"{title} ({node_id})"] = node_id
    if not found:
        raise ValueError("Expected at least one SaveImage node in the demo's workflow, found none.")
    return found


def prompt_nodes(prompt: Prompt) -> list[str]:
    """The text encoders that feed a `positive` input: where the demo writes its prompts."""
    encoders = []
    for node in prompt.values():
        link = node.get("inputs", {}).get("positive")
        if isinstance(link, list):
            for node_id in upstream(prompt, link[0]):
                if isinstance(prompt[node_id]["inputs"].get("text"), str) and node_id not in encoders:
                    encoders.append(node_id)
    # An encoder of the empty prompt is the unconditional, and stays empty.
    encoders = [node_id for node_id in encoders if prompt[node_id]["inputs"]["text"].strip()]
    if not encoders:
        raise ValueError("Expected a text encoder behind a `positive` input in the demo's workflow, found none.")
    return encoders


def with_text(prompt: Prompt, text: str) -> dict[str, dict[str, Any]]:
    changed = json.loads(json.dumps(prompt))
    for node_id in prompt_nodes(changed):
        changed[node_id]["inputs"]["text"] = text
    return changed


def samples_per_step(prompt: Prompt, outputs: Mapping[str, Mapping[str, Any]], saver: str) -> float | None:
    """Model evaluations a step and image of the sampler before `saver`, as it reports them; None where none does.

    Core's KSampler reports nothing: it evaluates positive and negative, or the positive alone where cfg is 1.
    """
    for node_id in upstream(prompt, saver):
        reported = outputs.get(node_id, {}).get("samples_per_step")
        if reported:
            return float(reported[0]["value"])
        if prompt[node_id]["class_type"] == "KSampler":
            return 1.0 if prompt[node_id]["inputs"]["cfg"] == 1.0 else 2.0
    return None


def contact_sheet(rows: Sequence[tuple[str, Mapping[str, Sequence[Any]]]], titles: Sequence[str]):
    """One picture of everything: a row a prompt, a column a method. Small images are enlarged by whole pixels."""
    from PIL import Image, ImageDraw

    first = next(image for _, cells in rows for images in cells.values() for image in images)
    scale = max(1, _IMAGE_PX // max(first.size))
    width, height = first.width * scale, first.height * scale
    cell_images = min(_IMAGES_A_CELL, max(len(images) for _, cells in rows for images in cells.values()))
    cell_width = cell_images * width
    title_font, text_font = _font(24), _font(18)
    title_px, text_px = 44, 30
    sheet = Image.new(
        "RGB",
        (
            _MARGIN_PX + len(titles) * (cell_width + _MARGIN_PX),
            _MARGIN_PX + title_px + len(rows) * (text_px + height) + _MARGIN_PX,
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = _MARGIN_PX + column * (cell_width + _MARGIN_PX)
        draw.text((x, _MARGIN_PX), title, fill="black", font=title_font)
        for row, (text, cells) in enumerate(rows):
            y = _MARGIN_PX + title_px + row * (text_px + height)
            draw.text((x, y + 4), text, fill="#444444", font=text_font)
            for index, image in enumerate(list(cells.get(title, ()))[:cell_images]):
                enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (x + index * width, y + text_px))
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
    rows, saved, cost = [], [], dict.fromkeys(savers)
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
            reported = samples_per_step(prompt, run.outputs, node_id)
            cost[title] = cost[title] if reported is None else reported
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
