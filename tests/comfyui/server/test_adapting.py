"""Adapting a generator through a real server: an API prompt, cancel, resume, and mistakes."""

from __future__ import annotations

import io
import itertools
import pickle

import pytest
import torch
from indomain_guidance.guidance.files import read_generator, write_generator
from indomain_guidance.guidance.networks.stylegan2 import random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig
from indomain_guidance.nodes.host.client import ExecutionFailed, ExecutionInterrupted, PromptRejected
from indomain_guidance.training.engine.log import read_log
from PIL import Image

NAMES = (f"adapted_{number}" for number in itertools.count())
SOURCE = "tiny_source.safetensors"


@pytest.fixture(scope="module", autouse=True)
def folder(server):
    """models/generators of the server, with a small random generator in it."""
    folder = server.base / "models" / "generators"
    config = GeneratorConfig(16, (8, 8, 8), z_dim=8, w_dim=8, mapping_layers=2)
    write_generator(folder / SOURCE, random_generator(config, 0))
    return folder


@pytest.fixture
def prompt():
    """Makes prompts that load the generator and the mini world, adapt, and nothing else."""

    def make(options: dict | None = None, **inputs) -> dict:
        return {
            "source": {"class_type": "InDomainLoadGenerator", "inputs": {"generator_name": SOURCE}},
            "judge": {"class_type": "InDomainLoadMiniWorld", "inputs": {}},
            "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["judge", 1], "text": "a red seven"}},
            "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["judge", 1], "text": ""}},
            "options": {
                "class_type": "InDomainAdaptOptions",
                "inputs": {"t_max": 600, "sample_count": 2, **(options or {})},
            },
            "adapt": {
                "class_type": "InDomainAdaptGenerator",
                "inputs": {
                    "generator": ["source", 0],
                    "model": ["judge", 0],
                    "vae": ["judge", 2],
                    "positive": ["positive", 0],
                    "negative": ["negative", 0],
                    "name": next(NAMES),
                    "method": "sds",
                    "scale": 7.5,
                    "directional": 0.5,
                    "reconstruction": 0.0,
                    "steps": 4,
                    "batch_size": 2,
                    "learning_rate": 0.002,
                    "layers": 0,
                    "sample_every": 2,
                    "seed": 0,
                    "resume": "auto",
                    "options": ["options", 0],
                    **inputs,
                },
            },
        }

    return make


@pytest.fixture
def run_of(server):
    return lambda prompt: server.base / "output" / "generator_adaptation" / prompt["adapt"]["inputs"]["name"]


@pytest.fixture
def made_by(folder):
    return lambda prompt: folder / f"{prompt['adapt']['inputs']['name']}.safetensors"


def events_of(run, kind: str) -> list:
    return [event for event in read_log(run / "log.jsonl") if type(event).__name__ == kind]


def same_weights(a, b) -> bool:
    ours, theirs = (read_generator(path).generator.state_dict() for path in (a, b))
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_prompt_makes_a_generator_that_can_be_loaded_blended_saved_and_drawn(server, folder, prompt, made_by, run_of):
    graph = prompt()
    progress = []
    run = server.client.run(graph, on_event=lambda kind, data: progress.append((kind, data)))
    assert run.outputs["adapt"]["text"] == [str(made_by(graph))]
    assert len(run.images("adapt")) == 2  # samples and loss curve
    loaded = read_generator(made_by(graph))
    assert loaded.metadata.history[-1]["prompt"] == "a red seven"
    assert loaded.metadata.history[-1]["steps"] == 4 and not same_weights(made_by(graph), folder / SOURCE)
    assert len(list((run_of(graph) / "samples").glob("*.png"))) == 3
    # Progress counts the steps, and grids arrive as previews.
    values = [data["value"] for kind, data in progress if kind == "progress" and data["max"] == 4]
    assert values and values[-1] == 4 and values == sorted(values)
    assert any(text.startswith("step 4 of 4: loss ") for text in run.texts) and run.previews
    with (
        Image.open(io.BytesIO(run.previews[-1][8:])) as preview,
        Image.open(sorted((run_of(graph) / "samples").glob("*.png"))[-1]) as grid,
    ):
        assert preview.width / preview.height == pytest.approx(grid.width / grid.height, rel=0.05)
    name = made_by(graph).name
    use = {
        "source": graph["source"],
        "adapted": {"class_type": "InDomainLoadGenerator", "inputs": {"generator_name": name}},
        "blend": {
            "class_type": "InDomainBlendGenerators",
            "inputs": {"source": ["source", 0], "adapted": ["adapted", 0], "amount": 0.5},
        },
        "file": {
            "class_type": "InDomainSaveGenerator",
            "inputs": {"generator": ["blend", 0], "filename": f"half_{name}", "file_dtype": "fp16", "replace": False},
        },
        "draw": {
            "class_type": "InDomainGeneratorSample",
            "inputs": {"generator": ["blend", 0], "seed": 0, "truncation": 0.7, "batch_size": 3},
        },
        "save": {"class_type": "SaveImage", "inputs": {"images": ["draw", 0], "filename_prefix": "drawn"}},
    }
    run = server.client.run(use)
    assert len(run.images("save")) == 3 and (folder / f"half_{name}").is_file()
    assert any("16 px" in text for text in run.outputs["adapted"]["text"])


def test_cancel_saves_and_running_again_continues_to_the_same_bits(server, prompt, made_by, run_of):
    whole, parts = (prompt(steps=12, sample_every=0) for _ in range(2))
    server.client.run(whole)

    def interrupt(kind: str, data: dict) -> None:
        # Newer versions tell of a few steps a second only.
        if kind == "progress" and data["max"] == 12 and 1 <= data["value"] < 12:
            server.client.interrupt()

    with pytest.raises(ExecutionInterrupted):
        server.client.run(parts, on_event=interrupt)
    (stopped,) = events_of(run_of(parts), "Stopped")
    assert 1 <= stopped.step < 12 and not made_by(parts).exists()
    server.client.run(parts)
    assert [event.step for event in events_of(run_of(parts), "Started")] == [0, stopped.step]
    assert same_weights(made_by(parts), made_by(whole))
    assert server.client.queue() == {"queue_running": [], "queue_pending": []}


def test_more_steps_adapt_the_same_run_further_and_unchanged_inputs_come_from_the_cache(
    server, prompt, made_by, run_of
):
    graph = prompt(sample_every=0)
    server.client.run(graph)
    assert "adapt" in server.client.run(graph).cached
    graph["adapt"]["inputs"]["steps"] = 6
    server.client.run(graph)
    assert [event.step for event in events_of(run_of(graph), "Started")] == [0, 4]
    assert read_generator(made_by(graph)).metadata.history[-1]["steps"] == 6


def test_a_domain_model_may_judge_too(server, graphs, prompt, made_by):
    graph = prompt(sample_every=0, terms=["term", 0])
    graph["domain"] = graphs.mini()["domain"]
    graph["term"] = {
        "class_type": "InDomainGuidanceTerm",
        "inputs": {
            "name": "domain",
            "weight": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
            "ramp": "constant",
            "reference": "",
            "model": ["domain", 0],
        },
    }
    server.client.run(graph)
    assert made_by(graph).is_file()


# ---- what users do wrong ----------------------------------------------------------------------------------------


def message_of(server, graph, node_type: str = "InDomainAdaptGenerator", **following) -> str:
    """The one sentence with which a node fails."""
    with pytest.raises(ExecutionFailed) as caught:
        server.client.run(graph, **following)
    message = str(caught.value)
    assert caught.value.node_type == node_type, message
    assert "\n" not in message and len(message) < 700 and "Traceback" not in message, message
    return message


class Hostile:
    """What executes a command in whoever unpickles it trustingly."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        import os

        return (os.system, (f"touch {self.path}",))


def test_wrong_and_hostile_files(server, folder, tmp_path):
    def load(name: str) -> str:
        graph = {"load": {"class_type": "InDomainLoadGenerator", "inputs": {"generator_name": name}}}
        return message_of(server, graph, "InDomainLoadGenerator")

    (folder / "hostile.pkl").write_bytes(pickle.dumps({"G_ema": Hostile(tmp_path / "ran")}))
    (folder / "words.pt").write_text("this is no network")
    (folder / "cut.safetensors").write_bytes((folder / SOURCE).read_bytes()[:5000])
    assert "hostile.pkl" in load("hostile.pkl") and not (tmp_path / "ran").exists()
    assert "words.pt: expected" in load("words.pt")
    assert "cut.safetensors" in load("cut.safetensors")
    # Newer versions refuse what is not listed before anything runs.
    graph = {"load": {"class_type": "InDomainLoadGenerator", "inputs": {"generator_name": "absent.pkl"}}}
    with pytest.raises((ExecutionFailed, PromptRejected), match="pick a listed|Value not in list"):
        server.client.run(graph)


def test_values_out_of_range_are_refused_before_anything_runs(server, prompt):
    for inputs in ({"batch_size": 10**6}, {"steps": 0}, {"learning_rate": -1.0}, {"scale": 1e6}, {"layers": 65}):
        with pytest.raises(PromptRejected, match=next(iter(inputs))):
            server.client.run(prompt(**inputs))


def test_other_refusals_name_what_to_do(server, prompt):
    assert "plain file name" in message_of(server, prompt(name="../outside"))
    assert "expected a checkpoint to go on from, found none" in message_of(server, prompt(resume="continue"))
    assert "method dds" in message_of(server, prompt(method="dds"))
    assert "t_min" in message_of(server, prompt({"t_min": 700}))
    graph = prompt(sample_every=0, steps=1)
    server.client.run(graph)
    graph["adapt"]["inputs"].update(resume="new", steps=2)
    assert "without a run" in message_of(server, graph)
    graph["adapt"]["inputs"].update(resume="auto", seed=1)
    assert "seed" in message_of(server, graph)
    graph["adapt"]["inputs"].update(seed=0)
    graph["positive"]["inputs"]["text"] = "a blue three"
    assert "prompt" in message_of(server, graph)
