"""Graphs that were saved with earlier versions: the editor stores widgets by position."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

# The inputs of every node, in order. Inputs are never removed or moved, new ones come last: add them here as well.
GOLDEN = Path(__file__).parent / "golden" / "inputs.json"
INPUTS: dict[str, list[str]] = json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def inputs(comfyui):
    """The ids of every node's inputs, as its schema lists them."""
    folder_paths = importlib.import_module("folder_paths")
    folders = importlib.import_module("indomain_guidance.nodes.comfy_internals.models.folders")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
        for folder in (folders.DOMAIN_UNETS, folders.GENERATORS):
            folder.register()
        schemas = [node.define_schema() for node in importlib.import_module("indomain_guidance.nodes").node_classes()]
    return {schema.node_id: [entry.id for entry in schema.inputs] for schema in schemas}


@pytest.mark.parametrize("node_id", INPUTS)
def test_inputs_stay_where_they_were_and_new_ones_come_last(inputs, node_id):
    known = INPUTS[node_id]
    assert inputs[node_id][: len(known)] == known


def test_every_node_is_known(inputs):
    assert inputs.keys() == INPUTS.keys()
