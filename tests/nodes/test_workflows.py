"""The shipped workflows: both formats say the same, every link holds, every node of the pack has a help page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / "workflows"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
# Nodes that only the editor knows.
NOTES = {"MarkdownNote", "Note"}
CONTROL_AFTER_GENERATE = {"fixed", "increment", "decrement", "randomize"}
# Their seed has no such control: a training run continues only with the seed it was started with.
KEEP_THEIR_SEED = {"InDomainTrainDomainUNet", "InDomainMiniWorldImages", "InDomainAdaptGenerator"}


def api(name: str) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def editor(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def editor_inputs(graph: dict, node: dict) -> dict:
    """What the editor would send for a node: links as [node, slot], then its widgets in order."""
    links = {link[0]: link for link in graph["links"]}
    inputs = {}
    widgets = iter(node["widgets_values"])
    for index, entry in enumerate(node["inputs"]):
        if "widget" in entry:
            value = next(widgets)
            if entry["name"] in ("seed", "noise_seed") and node["type"] not in KEEP_THEIR_SEED:
                assert next(widgets) in CONTROL_AFTER_GENERATE
            inputs[entry["name"]] = value
        if entry["link"] is not None:
            _, source, slot, target, target_slot, _ = links[entry["link"]]
            assert (target, target_slot) == (node["id"], index)
            inputs[entry["name"]] = [str(source), slot]
    assert next(widgets, None) is None, f"{node['type']} has more widget values than widgets"
    return inputs


def test_the_demo_workflow_and_its_siblings_are_there():
    assert "in_domain_text_to_image" in NAMES and len(NAMES) >= 3
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_describe_one_graph(name):
    graph = editor(name)
    from_editor = {
        str(node["id"]): (node["type"], editor_inputs(graph, node))
        for node in graph["nodes"]
        if node["type"] not in NOTES
    }
    from_api = {node_id: (node["class_type"], node["inputs"]) for node_id, node in api(name).items()}
    assert from_editor == from_api


@pytest.mark.parametrize("name", NAMES)
def test_links_join_outputs_to_inputs_of_one_type(name):
    graph = editor(name)
    nodes = {node["id"]: node for node in graph["nodes"]}
    seen = set()
    for number, source, slot, target, target_slot, kind in graph["links"]:
        output, entry = nodes[source]["outputs"][slot], nodes[target]["inputs"][target_slot]
        assert number in output["links"] and entry["link"] == number and number not in seen
        assert output["type"] == kind and entry["type"] in (kind, "*")
        seen.add(number)
    listed = {number for node in nodes.values() for output in node["outputs"] for number in output["links"] or ()}
    assert listed == seen
    assert graph["last_node_id"] >= max(nodes) and graph["last_link_id"] >= max(seen)


# What a sampler's live preview adds below its widgets.
PREVIEW_PX = 200
SAMPLERS = ("KSampler", "SamplerCustomAdvanced", "InDomainSampler")


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_cover_each_other_even_while_sampling(name):
    boxes = []
    for node in editor(name)["nodes"]:
        width, height = node["size"]
        boxes.append((node["type"], *node["pos"], width, height + PREVIEW_PX * (node["type"] in SAMPLERS)))
    for index, (kind, x, y, width, height) in enumerate(boxes):
        assert width > 0 and height > 0
        for other, x2, y2, width2, height2 in boxes[:index]:
            # A node's title bar, 30 px, lies above its position.
            apart = x + width <= x2 or x2 + width2 <= x or y + height <= y2 - 30 or y2 + height2 <= y - 30
            assert apart, f"{kind} covers {other}"


@pytest.mark.parametrize("name", NAMES)
def test_graph_opens_below_and_beside_the_editors_own_bars(name):
    graph = editor(name)
    view = graph["extra"]["ds"]
    left = min(node["pos"][0] for node in graph["nodes"])
    top = min(node["pos"][1] - 30 for node in graph["nodes"])
    # The tabs and the name of the workflow take 130 px, the side bar 58.
    assert (top + view["offset"][1]) * view["scale"] >= 130
    assert (left + view["offset"][0]) * view["scale"] >= 58


@pytest.mark.parametrize("name", NAMES)
def test_titles_of_groups_can_be_read(name):
    graph = editor(name)
    for group in graph["groups"]:
        x, y, width, height = group["bounding"]
        inside = [
            node["pos"]
            for node in graph["nodes"]
            if 0 <= node["pos"][0] - x < width and 0 <= node["pos"][1] - y < height
        ]
        assert inside, group["title"]
        # The group's title, then the title of its first node.
        assert min(top for _, top in inside) >= y + group.get("font_size", 24) + 10 + 30, group["title"]


def test_the_demo_saves_the_three_methods_under_their_names():
    prefixes = [
        node["inputs"]["filename_prefix"]
        for node in api("in_domain_text_to_image").values()
        if node["class_type"] == "SaveImage"
    ]
    assert prefixes == ["in_domain/prior", "in_domain/domain", "in_domain/multi_guidance"]
    graph = api("in_domain_text_to_image")
    samplers = [node for node in graph.values() if "sampler_name" in node["inputs"]]
    assert len(samplers) == 3
    # Side by side only means something from the same noise.
    starts = [[node["inputs"][name] for name in ("seed", "steps", "latent_image")] for node in samplers]
    assert starts[0] == starts[1] == starts[2]


def test_the_adapting_workflow_is_the_guides_first_adaptation():
    from indomain_guidance.training.mini_world.first_runs import FIRST_ADAPTATION

    graph = api("adapt_generator")
    (node,) = (one for one in graph.values() if one["class_type"] == "InDomainAdaptGenerator")
    values = {**graph[node["inputs"]["options"][0]]["inputs"], **node["inputs"]}
    elsewhere = {"generator", "base", "name", "prompt"}
    assert {name: values[name] for name in FIRST_ADAPTATION if name not in elsewhere} == {
        name: value for name, value in FIRST_ADAPTATION.items() if name not in elsewhere
    }
    assert graph[node["inputs"]["positive"][0]]["inputs"]["text"] == FIRST_ADAPTATION["prompt"]


def test_every_node_has_a_help_page():
    ids = set()
    for path in (ROOT / "nodes").glob("*.py"):
        ids |= set(re.findall(r'node_id="(\w+)"', path.read_text(encoding="utf-8")))
    assert len(ids) >= 7
    assert ids == {path.stem for path in (ROOT / "nodes" / "docs").glob("*.md")}


def test_only_workflows_are_served():
    # ComfyUI serves the whole folder to the network.
    assert {path.suffix for path in WORKFLOWS.rglob("*") if path.is_file()} <= {".json", ".jpg"}


def test_pictures_in_the_template_browser_are_small_and_belong_to_a_workflow():
    pictures = sorted(WORKFLOWS.rglob("*.jpg"))
    assert {path.stem for path in pictures} >= {"in_domain_text_to_image", "shaped_terms"}
    for path in pictures:
        # The template browser looks for the workflow's own name.
        assert path.with_suffix(".json").is_file() and path.stat().st_size < 60_000
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "JPEG" and min(picture.size) >= 200
