"""What a real server shows of the pack: nodes, tooltips, help pages, templates, and workflows that run."""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CATEGORIES = {
    "guidance": (
        "InDomainLoadMiniWorld",
        "InDomainLoadDomainUNet",
        "InDomainSampler",
        "InDomainGuider",
        "InDomainGuidanceTerm",
        "InDomainShapeTerm",
        "InDomainMultiGuidanceGuider",
    ),
    "training": (
        "InDomainTextFreeUNet",
        "InDomainMiniWorldImages",
        "InDomainTrainDomainUNet",
        "InDomainTrainingOptions",
        "InDomainBakeDomainLoRA",
        "InDomainBakeOptions",
    ),
    "generators": (
        "InDomainLoadGenerator",
        "InDomainGeneratorSample",
        "InDomainAdaptGenerator",
        "InDomainAdaptOptions",
        "InDomainBlendGenerators",
        "InDomainSaveGenerator",
    ),
}
NODES = tuple(node_id for names in CATEGORIES.values() for node_id in names)
ONLY_IN_THE_EDITOR = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
API_WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows" / "api").glob("*.json"))


@pytest.fixture(scope="module")
def object_info(server):
    return server.client.object_info()


def test_the_pack_loads_without_a_warning(server):
    log = server.log()
    assert "in-domain-guidance" in log
    assert "IMPORT FAILED" not in "\n".join(line for line in log.splitlines() if "in-domain-guidance" in line)
    assert "Error while calling comfy_entrypoint" not in log


def inputs_of(node):
    """(kind, options) of a node's inputs, by name."""
    given = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    return {name: (kind, options[0] if options else {}) for name, (kind, *options) in given.items()}


def test_every_node_is_registered_in_its_category(object_info):
    shown = {node_id: node["category"] for node_id, node in object_info.items() if node_id.startswith("InDomain")}
    assert shown == {node_id: f"In-Domain Guidance/{name}" for name, ids in CATEGORIES.items() for node_id in ids}


def test_nodes_are_found_by_other_words_where_comfyui_looks_for_them(object_info):
    found = {node_id: {word.lower() for word in object_info[node_id].get("search_aliases", ())} for node_id in NODES}
    if not object_info["CLIPTextEncode"].get("search_aliases"):
        assert not any(found.values()), "this ComfyUI knows no aliases of its own nodes"
        return
    for word, node_id in (
        ("lora", "InDomainTrainDomainUNet"),
        ("lora", "InDomainBakeDomainLoRA"),
        ("fine-tune", "InDomainTrainDomainUNet"),
        ("cfg", "InDomainSampler"),
        ("cfg", "InDomainMultiGuidanceGuider"),
        ("autoguidance", "InDomainGuidanceTerm"),
        ("gan", "InDomainLoadGenerator"),
        ("stylegan", "InDomainAdaptGenerator"),
        ("stylegan", "InDomainLoadGenerator"),
        ("sds", "InDomainAdaptGenerator"),
        ("domain model", "InDomainLoadDomainUNet"),
    ):
        assert any(word in alias for alias in found[node_id])
    assert all(found.values())


def test_rare_inputs_are_folded_away_where_comfyui_can(object_info):
    advanced = {
        node_id: {name for name, (_, options) in inputs_of(object_info[node_id]).items() if options.get("advanced")}
        for node_id in NODES
    }
    if not any(options.get("advanced") for _, options in inputs_of(object_info["UNETLoader"]).values()):
        assert not any(advanced.values()), "this ComfyUI folds nothing of its own nodes away"
        return
    assert advanced["InDomainSampler"] == {"domain_start_percent", "domain_end_percent"} == advanced["InDomainGuider"]
    assert advanced["InDomainGuidanceTerm"] == {"start_percent", "end_percent", "ramp"}
    assert advanced["InDomainLoadDomainUNet"] == {"weight_dtype"}
    for node_id in ("InDomainTrainingOptions", "InDomainAdaptOptions", "InDomainBakeOptions"):
        shown = len(inputs_of(object_info[node_id])) - len(advanced[node_id])
        assert 5 <= shown <= 10 < len(advanced[node_id])


@pytest.mark.parametrize("node_id", NODES)
def test_every_input_has_a_tooltip(object_info, node_id):
    assert object_info[node_id]["description"]
    inputs = inputs_of(object_info[node_id])
    untold = [name for name, (_, options) in inputs.items() if not options.get("tooltip", "").strip()]
    assert untold == []


@pytest.mark.parametrize("node_id", NODES)
def test_numbers_state_their_neutral_value_and_range(object_info, node_id):
    for name, (kind, *options) in object_info[node_id]["input"].get("required", {}).items():
        if kind in ("FLOAT", "INT"):
            assert {"default", "min", "max"} <= set(options[0]), name


@pytest.mark.parametrize("node_id", NODES)
def test_help_page_is_served(server, node_id):
    page = server.client.get_bytes(f"/extensions/in-domain-guidance/docs/{node_id}.md").decode()
    assert page == (ROOT / "nodes" / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert page.startswith("# ") and len(page) > 200


def test_nothing_but_help_pages_is_served(server):
    served = {
        path.relative_to(ROOT / "nodes" / "web") for path in (ROOT / "nodes" / "web").rglob("*") if path.is_file()
    }
    assert served == {Path("docs", f"{node_id}.md") for node_id in NODES}
    for path in ("guiders.py", "nodes/guiders.py", "../guiders.py", "..%2Fguiders.py"):
        with pytest.raises(urllib.error.HTTPError):
            server.client.get_bytes(f"/extensions/in-domain-guidance/{path}")


def test_shipped_domain_models_are_listed(object_info):
    kind, options = object_info["InDomainLoadDomainUNet"]["input"]["required"]["unet_name"][:2]
    listed = kind if isinstance(kind, list) else options["options"]
    shipped = {path.name for path in (ROOT / "training/mini_world/weights/domain_unets").glob("*.safetensors")}
    assert shipped and shipped <= set(listed)


def test_shipped_generators_are_listed(object_info):
    kind, options = object_info["InDomainLoadGenerator"]["input"]["required"]["generator_name"][:2]
    listed = kind if isinstance(kind, list) else options["options"]
    shipped = {path.name for path in (ROOT / "training/mini_world/weights/generators").glob("*.safetensors")}
    assert shipped and shipped <= set(listed)


def test_templates_are_listed_and_use_only_known_nodes(server, object_info):
    names = server.client.get("/workflow_templates")["in-domain-guidance"]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    for name in names:
        graph = json.loads(server.client.get_bytes(f"/api/workflow_templates/in-domain-guidance/{name}.json"))
        types = {node["type"] for node in graph["nodes"]}
        assert types - ONLY_IN_THE_EDITOR <= set(object_info), name
        assert types & set(NODES), name


@pytest.mark.parametrize("name", API_WORKFLOWS)
def test_api_workflow_runs(server, graphs, handwriting, name):
    prompt = graphs.workflow(name)
    for node in prompt.values():
        # The miniature stands in for a checkpoint that a newcomer would have to download: same outputs, same places.
        if node["class_type"] == "CheckpointLoaderSimple":
            node.update(class_type="InDomainLoadMiniWorld", inputs={})
        if node["class_type"] == "InDomainTrainDomainUNet":
            # What stays is the graph; the folder is one that a newcomer has to fill.
            if node["inputs"]["checkpoint"] != "connected":
                node["inputs"].update(checkpoint="mini_world", image_folder=str(handwriting))
            node["inputs"].update(name=f"from_{name}", resolution=64, steps=4, batch_size=2, sample_every=4)
        if node["class_type"] == "InDomainTrainingOptions":
            node["inputs"].update(sample_count=1, sample_steps=2)
        if node["class_type"] == "InDomainBakeDomainLoRA":
            node["inputs"].update(name=f"from_{name}", steps=4, batch_size=2, sample_every=4)
        if node["class_type"] == "InDomainBakeOptions":
            node["inputs"].update(sample_count=1, sample_steps=2, own_count=2, own_steps=2, random_prompts=4)
        if node["class_type"] == "InDomainAdaptGenerator":
            node["inputs"].update(name=f"from_{name}", steps=2, batch_size=1, sample_every=2)
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"].update(width=64, height=64)
        if node["class_type"] == "InDomainMiniWorldImages":
            node["inputs"]["count"] = 24
    run = server.client.run(prompt)
    outputs = [node_id for node_id, node in prompt.items() if node["class_type"] in ("SaveImage", "PreviewAny")]
    assert outputs and all(run.outputs.get(node_id) for node_id in outputs)
