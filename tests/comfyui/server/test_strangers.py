"""A server that others reach: what prompts may name there, over the API."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import urllib.error

import pytest
from indomain_guidance.nodes.host.client import ExecutionFailed
from indomain_guidance.nodes.host.server import ComfyServer


@pytest.fixture(scope="module")
def places(tmp_path_factory, handwriting):
    """Folders of images: one that a variable allows, one that extra_model_paths.yaml allows, one of nobody's."""
    root = tmp_path_factory.mktemp("places")
    for name in ("by_variable", "by_yaml", "secret"):
        shutil.copytree(handwriting, root / name)
    (root / "paths.yaml").write_text(f"mine:\n    indomain_allowed_folders: {root / 'by_yaml'}\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def open_server(comfyui_path, places, handwriting):
    """A server that counts as reached by others, on an address that nobody but this machine reaches."""
    before = os.environ.get("INDOMAIN_ALLOWED_FOLDERS")
    os.environ["INDOMAIN_ALLOWED_FOLDERS"] = str(places / "by_variable")
    # 127.1 is 127.0.0.1 to the system, but no address that is sure to be the machine's own.
    flags = ["--listen", "127.1", "--extra-model-paths-config", str(places / "paths.yaml")]
    try:
        with ComfyServer(comfyui_path, flags=flags) as running:
            shutil.copytree(handwriting, running.base / "input" / "pictures")
            yield running
    finally:
        os.environ.pop("INDOMAIN_ALLOWED_FOLDERS")
        if before is not None:
            os.environ["INDOMAIN_ALLOWED_FOLDERS"] = before


def prompt(folder: str, name: str = "strangers", **more) -> dict:
    inputs = {
        "name": name,
        "checkpoint": "mini_world",
        "image_folder": folder,
        "form": "cached",
        "steps": 1,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "resolution": 64,
        "sample_every": 0,
        "seed": 0,
        "resume": "auto",
        **more,
    }
    return {"train": {"class_type": "InDomainTrainDomainUNet", "inputs": inputs}}


def message(server, graph: dict) -> str:
    with pytest.raises(ExecutionFailed) as failed:
        server.client.run(graph, timeout_s=120)
    return str(failed.value)


def test_what_the_owner_did_not_allow_is_refused_the_same_way_there_or_not(open_server, places):
    link = open_server.base / "input" / "way"
    link.symlink_to(places / "secret", target_is_directory=True)
    names = [
        str(places / "secret"),
        str(places / "nothing"),
        "way",
        "way/nothing",
        "/etc",
        "../models",
        "../user",
        "~",
        "/*/*",
    ]
    said = {message(open_server, prompt(name)).replace(repr(name), "NAME") for name in names}
    assert len(said) == 1 and "INDOMAIN_ALLOWED_FOLDERS" in said.pop()
    assert not list((open_server.base / "output").rglob("strangers"))


def test_links_out_of_the_input_folder_are_not_followed_by_a_run(open_server, places):
    pictures = open_server.base / "input" / "pictures"
    way = pictures / "way"
    if not way.is_symlink():
        way.symlink_to(places / "secret", target_is_directory=True)
    run = open_server.client.run(prompt("pictures", "linked"))
    assert run.outputs["train"]["text"]
    folder = open_server.base / "output" / "domain_training" / "linked"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["within"][0] == os.path.realpath(open_server.base / "input")
    assert "\n24 images" in "\n" + "\n".join(run.texts)


def test_what_the_owner_allows_can_be_trained_on(open_server, places):
    for name in ("by_variable", "by_yaml"):
        assert open_server.client.run(prompt(str(places / name), name)).outputs["train"]["text"]


def test_nothing_is_written_where_a_prompt_says(open_server, places):
    there = places / "made by a stranger"
    graph = prompt("pictures", options={"cache": str(there), "vae": str(there)})
    assert "connect In-Domain Training Options" in message(open_server, graph)
    graph = prompt("pictures", "again", options=["options", 0], cache=str(there))
    graph["options"] = {"class_type": "InDomainTrainingOptions", "inputs": {"cache": str(there), "output": str(there)}}
    with contextlib.suppress(urllib.error.HTTPError):
        open_server.client.run(graph, timeout_s=120)
    assert not there.exists()
    assert any((open_server.base / "user" / "__indomain_guidance" / "latents").rglob("*.safetensors"))
