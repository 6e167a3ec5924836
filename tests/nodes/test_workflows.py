"""The shipped workflows: both formats say the same, every link holds, the graphs are readable as they open."""

from __future__ import annotations

import json
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
KEEP_THEIR_SEED = {
    *("InDomainTrainDomainUNet", "InDomainMiniWorldImages", "InDomainAdaptGenerator", "InDomainBakeDomainLoRA")
}


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


@pytest.mark.parametrize("name", NAMES)
def test_every_input_has_a_value(name):
    assert not [(node["class_type"], node["inputs"]) for node in api(name).values() if None in node["inputs"].values()]


# What a sampler's live preview adds below its widgets.
PREVIEW_PX = 200
SAMPLERS = ("KSampler", "SamplerCustomAdvanced", "InDomainSampler")
TITLE_PX = 30  # a node's title bar lies above its position
# A template that opens in the newest editor is shown whole, in three quarters of the window, and below this scale
# the classic editor draws no text.
WINDOW, SMALLEST_SCALE = (1600, 1000), 0.6


def box(node: dict) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a node, its title bar and a sampler's preview included."""
    (x, y), (width, height) = node["pos"], node["size"]
    if node["flags"].get("collapsed"):
        height = 0
    return x, y - TITLE_PX, x + width, y + height + PREVIEW_PX * (node["type"] in SAMPLERS)


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_cover_each_other_even_while_sampling(name):
    boxes = [(node["type"], *box(node)) for node in editor(name)["nodes"]]
    for index, (kind, left, top, right, bottom) in enumerate(boxes):
        assert right > left and bottom > top
        for other, left2, top2, right2, bottom2 in boxes[:index]:
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart, f"{kind} covers {other}"


@pytest.mark.parametrize("name", NAMES)
def test_every_node_lies_in_a_group_and_below_its_title(name):
    graph = editor(name)
    for node in graph["nodes"]:
        left, top, right, bottom = box(node)
        around = [
            group["title"]
            for group in graph["groups"]
            for x, y, width, height in [group["bounding"]]
            # The group's title; above the node's own the editor draws the name of the pack.
            if x <= left and y + group["font_size"] + 20 <= top and right <= x + width and bottom <= y + height
        ]
        assert len(around) == (node["type"] not in NOTES), node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_graph_is_small_enough_to_be_read_when_it_opens(name):
    graph = editor(name)
    boxes = [box(node) for node in graph["nodes"]]
    boxes += [(x, y, x + width, y + height) for x, y, width, height in (group["bounding"] for group in graph["groups"])]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    width, height = max(box[2] for box in boxes) - left, max(box[3] for box in boxes) - top
    assert min(0.75 * WINDOW[0] / width, 0.75 * WINDOW[1] / height) >= SMALLEST_SCALE
    # Older editors show the view that the file names: all of it, below the tabs (130 px) and beside the bar (58 px).
    view = graph["extra"]["ds"]
    scale, (x, y) = view["scale"], view["offset"]
    assert scale >= SMALLEST_SCALE
    assert (left + x) * scale >= 58 and (left + width + x) * scale <= WINDOW[0]
    assert (top + y) * scale >= 130 and (top + height + y) * scale <= WINDOW[1]


@pytest.mark.parametrize("name", NAMES)
def test_titles_are_unique_and_options_collapsed(name):
    nodes = editor(name)["nodes"]
    titles = [node.get("title") or node["type"] for node in nodes]
    assert len(set(titles)) == len(titles)
    assert all(node["flags"].get("collapsed") for node in nodes if node["type"].endswith("Options"))


@pytest.mark.parametrize("name", NAMES)
def test_files_to_fetch_are_named_with_their_address(name):
    """The editor offers to download what `properties.models` of a node names."""
    for node in editor(name)["nodes"]:
        named = [value for value in node["widgets_values"] if str(value).endswith(".safetensors")]
        fetched = [value for value in named if not value.startswith("mini-")]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == fetched
        for model in models:
            assert model["url"].startswith("https://huggingface.co/") and model["directory"] == "checkpoints"
            assert f"/{model['name']}" in model["url"]


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


def test_the_baking_workflow_is_the_guides_first_baking():
    from indomain_guidance.training.mini_world.first_runs import FIRST_BAKING

    graph = api("bake_domain_lora")
    (node,) = (one for one in graph.values() if one["class_type"] == "InDomainBakeDomainLoRA")
    values = {**graph[node["inputs"]["options"][0]]["inputs"], **node["inputs"]}
    values["sample_prompts"] = tuple(values["sample_prompts"].splitlines())
    elsewhere = {"base", "domain", "name"}
    assert {name: values[name] for name in FIRST_BAKING if name not in elsewhere} == {
        name: value for name, value in FIRST_BAKING.items() if name not in elsewhere
    }
    # Side by side only means something from the same noise, at the same scale.
    plain, guided = (
        next(one["inputs"] for one in graph.values() if one["class_type"] == kind)
        for kind in ("KSampler", "InDomainSampler")
    )
    same = ("seed", "steps", "sampler_name", "scheduler", "latent_image", "positive", "negative")
    assert [plain[name] for name in same] == [guided[name] for name in same]
    assert (plain["cfg"], guided["control_weight"]) == (values["control_weight"],) * 2
    assert guided["domain_weight"] == values["domain_weight"]


def test_only_workflows_are_served():
    # ComfyUI serves the whole folder to the network.
    assert {path.suffix for path in WORKFLOWS.rglob("*") if path.is_file()} <= {".json", ".jpg"}


def test_pictures_in_the_template_browser_are_small_and_belong_to_a_workflow():
    pictures = sorted(WORKFLOWS.rglob("*.jpg"))
    assert sorted(path.stem for path in pictures) == NAMES
    for path in pictures:
        # The template browser looks for the workflow's own name.
        assert path.with_suffix(".json").is_file() and path.stat().st_size < 60_000
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "JPEG" and min(picture.size) >= 200
