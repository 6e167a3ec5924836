"""Texts that nobody can show, in every input of every node, and as names on the disk: an error at most, and the server
serves on. The inputs are the server's own list, so that a new node is covered by itself.
"""

from __future__ import annotations

import itertools
import os
import shutil
import urllib.error

import pytest
from indomain_guidance.nodes.host.client import ExecutionFailed, PromptRejected

HALF, NUL, LONG, ESCAPE = "\ud800", "a\x00b", "x" * 100_000, "\x1b[2J\x1b]0;x\x07\u202e"
SMALL = {"steps": 1, "batch_size": 1, "count": 1, "sample_every": 0, "resolution": 64, "checkpoint": "mini_world"}
CORE = {
    "MODEL": ("InDomainLoadMiniWorld", 0),
    "CLIP": ("InDomainLoadMiniWorld", 1),
    "VAE": ("InDomainLoadMiniWorld", 2),
    "CONDITIONING": ("CLIPTextEncode", 0),
    "LATENT": ("EmptyLatentImage", 0),
    "IMAGE": ("EmptyImage", 0),
}
NUMBERS = itertools.count(1)


class Prompts:
    """Makes prompts of any node from the server's own description of it."""

    def __init__(self, info: dict) -> None:
        self.info = info
        self.own = sorted(name for name in info if name.startswith("InDomain"))

    def inputs_of(self, name: str) -> dict[str, tuple]:
        given = self.info[name]["input"]
        return {**given.get("required", {}), **given.get("optional", {})}

    def kind_of(self, spec: tuple) -> str:
        return "COMBO" if isinstance(spec[0], list) else spec[0]

    def texts(self) -> list[tuple[str, str]]:
        return [
            (name, one)
            for name in self.own
            for one, spec in self.inputs_of(name).items()
            if self.kind_of(spec) in ("STRING", "COMBO")
        ]

    def add(self, graph: dict, name: str, changed: dict | None = None) -> str:
        """Add a node and all that it needs with its defaults; its id."""
        inputs = {}
        for one, spec in self.info[name]["input"].get("required", {}).items():
            if one not in (changed or {}):
                inputs[one] = self.value(graph, one, spec)
        key = str(len(graph) + 1)
        graph[key] = {"class_type": name, "inputs": {**inputs, **(changed or {})}}
        return key

    def value(self, graph: dict, one: str, spec: tuple):
        kind, about = self.kind_of(spec), spec[1] if len(spec) > 1 else {}
        if one in SMALL:
            return SMALL[one]
        if kind == "COMBO":
            options = spec[0] if isinstance(spec[0], list) else about["options"]
            return about.get("default", options[0])
        if "default" in about or kind in ("STRING", "INT", "FLOAT", "BOOLEAN"):
            return about.get("default", "")
        maker, slot = CORE[kind] if kind in CORE else self.maker_of(kind)
        return [self.add(graph, maker), slot]

    def maker_of(self, kind: str) -> tuple[str, int]:
        # The one that needs the least: a loader before what makes another of one.
        needs = {name: self.info[name]["input"].get("required", {}) for name in self.own}
        makers = [
            name
            for name in self.own
            if kind in self.info[name]["output"] and kind not in map(self.kind_of, needs[name].values())
        ]
        name = min(makers, key=lambda name: len(needs[name]))
        return name, self.info[name]["output"].index(kind)

    def with_text(self, name: str, one: str, text: str) -> dict:
        """A prompt of the node with this text, and of a node that takes what it makes, or shows it."""
        graph: dict = {}
        key = self.add(graph, name, {one: text})
        for slot, kind in enumerate(self.info[name]["output"]):
            takers = [
                (other, wanted)
                for other in self.own
                if other != name
                for wanted, spec in self.inputs_of(other).items()
                if self.kind_of(spec) == kind
            ]
            takers = [taker for taker in takers if kind not in CORE]
            # What only shows is quicker than what trains.
            takers.sort(key=lambda taker: self.info[taker[0]]["output_node"])
            if takers:
                self.add(graph, takers[0][0], {takers[0][1]: [key, slot]})
        last = str(max(map(int, graph)))
        if not self.info[graph[last]["class_type"]]["output_node"]:
            graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": [last, 0]}}
        return graph


@pytest.fixture(scope="module")
def prompts(server):
    return Prompts(server.client.object_info())


def serves(server) -> None:
    """A prompt that was never asked before runs."""
    run = server.client.run({"1": {"class_type": "PreviewAny", "inputs": {"source": f"{next(NUMBERS)}"}}}, timeout_s=60)
    assert run.outputs["1"]


def refused(server, prompt: dict) -> str | None:
    """The message with which a prompt fails, None when it runs to its end; it must not hang."""
    try:
        server.client.run(prompt, timeout_s=120)
    except ExecutionFailed as failed:
        return str(failed)
    except (PromptRejected, urllib.error.HTTPError) as rejected:  # by core, before anything of ours ran
        return str(rejected)[:400]
    return None


@pytest.mark.parametrize("text", [HALF, NUL, LONG, ESCAPE], ids=["half a character", "nul", "long", "escape"])
def test_no_text_in_any_input_of_any_node_ends_the_server(server, prompts, text):
    inputs = prompts.texts()
    assert len(inputs) > 40 and {name for name, _ in inputs} >= {"InDomainTrainDomainUNet", "InDomainShapeTerm"}
    raw = []
    for name, one in inputs:  # a server that one of them has ended hangs at the next
        message = refused(server, prompts.with_text(name, one, text))
        if message is not None and not (message.isprintable() and len(message) <= 500):
            raw.append((name, one, message[:200]))
    serves(server)
    assert raw == []
    # Newer versions of ComfyUI log a choice that is not listed by themselves, as it is.
    assert not any(text in line for line in server.log().splitlines() if "not in " not in line)


def test_a_text_that_nobody_can_show_names_a_term_of_a_whole_run(server, graphs):
    prompt = graphs.multi_guidance([{"name": f"evil{HALF}{ESCAPE}", "model": ["domain", 0]}], steps=1)
    assert len(server.client.run(prompt).images("save")) == 1
    assert "evil\\ud800\\x1b[2J" in server.log() and ESCAPE not in server.log()
    serves(server)


def bytes_name(folder, name: bytes) -> str:
    """A path whose name is no UTF-8, as Python and JSON write it."""
    return os.path.join(str(folder), os.fsdecode(name))


@pytest.fixture
def strange(server):
    """Copies files and folders to names that are no UTF-8, and removes them."""
    made = []

    def copy(source, folder, name: bytes) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        there = bytes_name(folder, name)
        try:
            (shutil.copytree if os.path.isdir(source) else shutil.copy)(source, there)
        except (OSError, UnicodeError):
            pytest.skip("this file system has no such names")
        made.append(there)
        return os.path.basename(there)

    yield copy
    for path in reversed(made):
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def test_files_whose_names_are_no_text_are_listed_and_refused_by_name(server, graphs, strange):
    from indomain_guidance.training.mini_world import assets

    models = server.base / "models"
    good = strange(
        assets.domain_unets_dir() / "mini-handwriting.safetensors", models / "domain_unets", b"good\xff.safetensors"
    )
    page = models / "domain_unets" / "page.html"
    page.write_text("no model", encoding="utf-8")
    bad = strange(page, models / "domain_unets", b"bad\xfe\x1b[2J.safetensors")
    worse = strange(page, models / "generators", b"bad\xfe\x1b[2J.pkl")
    info = server.client.object_info()
    listed = info["InDomainLoadDomainUNet"]["input"]["required"]["unet_name"]
    assert {good, bad} <= set(listed[0] if isinstance(listed[0], list) else listed[1]["options"])
    assert "good\\udcff.safetensors: expected a file whose path is UTF-8" in refused(server, graphs.in_domain(good))
    generator = {"1": {"class_type": "InDomainLoadGenerator", "inputs": {"generator_name": worse}}}
    for prompt in (graphs.in_domain(bad), generator):
        message = refused(server, prompt)
        assert message.isprintable() and "bad\\udcfe\\x1b[2J" in message
        serves(server)


def test_images_and_runs_whose_names_are_no_text_can_be_trained_on(server, handwriting, strange):
    folder = strange(handwriting, server.base / "input", b"pictures\xff")
    page = server.base / "page"
    page.write_text("no picture", encoding="utf-8")
    strange(page, server.base / "input" / folder, b"bad\xfe\x1b[2J.png")
    inputs = {
        "name": "strange",
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
    }
    run = server.client.run({"train": {"class_type": "InDomainTrainDomainUNet", "inputs": inputs}})
    texts = [*run.texts, *run.outputs["train"]["text"]]
    assert any("bad\\udcfe\\x1b[2J" in text for text in texts)
    assert all(line.isprintable() for text in texts for line in text.split("\n"))
    serves(server)
