"""What a real server shows of the pack: nodes, tooltips, help pages, templates, and workflows that run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
NODES = (
    "InDomainLoadDomainUNet", "InDomainTextFreeUNet", "InDomainGuidanceTerm", "InDomainShapeTerm",
    "InDomainMultiGuidanceGuider", "InDomainGuider", "InDomainSampler", "InDomainLoadMiniWorld",
    "InDomainTrainDomainUNet", "InDomainTrainingOptions", "InDomainMiniWorldImages", "InDomainLoadGenerator",
    "InDomainGeneratorSample", "InDomainAdaptGenerator", "InDomainAdaptOptions", "InDomainBlendGenerators",
    "InDomainSaveGenerator",
)  # fmt: skip
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


@pytest.mark.parametrize("node_id", NODES)
def test_every_input_has_a_tooltip(object_info, node_id):
    node = object_info[node_id]
    assert node["category"] == "In-Domain Guidance" and node["description"]
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    untold = [name for name, (_, *options) in inputs.items() if not (options and options[0].get("tooltip", "").strip())]
    assert untold == []


@pytest.mark.parametrize("node_id", NODES)
def test_numbers_state_their_neutral_value_and_range(object_info, node_id):
    for name, (kind, *options) in object_info[node_id]["input"].get("required", {}).items():
        if kind in ("FLOAT", "INT"):
            assert {"default", "min", "max"} <= set(options[0]), name


@pytest.mark.parametrize("node_id", NODES)
def test_help_page_is_served(server, node_id):
    page = server.client.get_bytes(f"/extensions/in-domain-guidance/docs/{node_id}.md").decode()
    assert page == (ROOT / "nodes" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    assert page.startswith("# ") and len(page) > 200


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
            node["inputs"].update(sample_count=1, sample_steps=2, cache=str(handwriting.parent / "latents"))
        if node["class_type"] == "InDomainAdaptGenerator":
            node["inputs"].update(name=f"from_{name}", steps=2, batch_size=1, sample_every=2)
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"].update(width=64, height=64)
        if node["class_type"] == "InDomainMiniWorldImages":
            node["inputs"]["count"] = 24
    run = server.client.run(prompt)
    outputs = [node_id for node_id, node in prompt.items() if node["class_type"] in ("SaveImage", "PreviewAny")]
    assert outputs and all(run.outputs.get(node_id) for node_id in outputs)
