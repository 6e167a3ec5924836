"""Training through a real server: an API prompt, cancel and resume, and what users do wrong."""

from __future__ import annotations

import io
import itertools
import json
import time

import numpy as np
import pytest
from indomain_guidance.guidance.files import read_domain_file
from indomain_guidance.nodes.host.client import ExecutionFailed, ExecutionInterrupted, PromptRejected
from indomain_guidance.training.engine.log import read_log
from PIL import Image

NAMES = (f"run_{number}" for number in itertools.count())


@pytest.fixture
def prompt(handwriting):
    """Makes prompts of the training node alone, and its options."""

    def make(options: dict | None = None, **inputs) -> dict:
        return {
            "options": {
                "class_type": "InDomainTrainingOptions",
                "inputs": {
                    "warmup": 0,
                    "sample_count": 2,
                    "sample_steps": 2,
                    "log_every": 1,
                    "held_out_share": 0.0,
                    **(options or {}),
                },
            },
            "train": {
                "class_type": "InDomainTrainDomainUNet",
                "inputs": {
                    "name": next(NAMES),
                    "checkpoint": "mini_world",
                    "image_folder": str(handwriting),
                    "form": "cached",
                    "steps": 4,
                    "batch_size": 4,
                    "learning_rate": 1e-3,
                    "resolution": 64,
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
    """The folder of a prompt's run."""
    return lambda prompt: server.base / "output" / "domain_training" / prompt["train"]["inputs"]["name"]


@pytest.fixture
def made_by(server):
    """The file that a prompt's run leaves in models/domain_unets."""

    def path(prompt):
        return server.base / "models" / "domain_unets" / f"{prompt['train']['inputs']['name']}.safetensors"

    return path


def kinds(run) -> list[str]:
    return [type(event).__name__ for event in read_log(run / "log.jsonl")]


def events_of(run, kind: str) -> list:
    return [event for event in read_log(run / "log.jsonl") if type(event).__name__ == kind]


def same_weights(a, b) -> bool:
    ours, theirs = read_domain_file(a)[0], read_domain_file(b)[0]
    return ours.keys() == theirs.keys() and all(bool((ours[key] == theirs[key]).all()) for key in ours)


def test_a_prompt_of_the_node_alone_makes_a_model_that_can_be_loaded(server, graphs, prompt, made_by, run_of):
    graph = prompt({"sample_prompts": "a red seven"})
    progress = []
    run = server.client.run(graph, on_event=lambda kind, data: progress.append((kind, data)))
    assert made_by(graph).is_file()
    assert run.outputs["train"]["text"] == [str(made_by(graph))]
    assert len(run.images("train")) == 2  # samples and loss curve
    metadata = read_domain_file(made_by(graph))[1]
    assert (metadata.steps, metadata.dataset_size, metadata.latent_format) == (4, 24, "mini_world")
    assert len(list((run_of(graph) / "samples").glob("*.png"))) == 3
    # Progress counts the steps, and sample grids arrive as previews.
    values = [data["value"] for kind, data in progress if kind == "progress" and data["max"] == 4]
    assert values and values[-1] == 4 and values == sorted(values)
    assert any(text.startswith("step 4 of 4: loss 0.") for text in run.texts)
    assert any("encoding images" in text for text in run.texts) and any("memory" in text for text in run.texts)
    assert run.previews
    with (
        Image.open(io.BytesIO(run.previews[-1][8:])) as preview,
        Image.open(sorted((run_of(graph) / "samples").glob("*.png"))[-1]) as grid,
    ):
        assert preview.width / preview.height == pytest.approx(grid.width / grid.height, rel=0.05)
    # The new file is listed, loads and samples.
    assert len(server.client.run(graphs.in_domain(made_by(graph).name, seed=21)).images("save")) == 1


def test_connected_models_and_an_image_batch(server, prompt, made_by, run_of):
    graph = prompt(
        {"sample_prompts": "a red seven\na blue three"},
        image_folder="",
        checkpoint="connected",
        model=["prior", 0],
        clip=["prior", 1],
        vae=["prior", 2],
        images=["images", 1],
    )
    graph["prior"] = {"class_type": "InDomainLoadMiniWorld", "inputs": {}}
    graph["images"] = {"class_type": "InDomainMiniWorldImages", "inputs": {"domain": "narrow", "count": 8, "seed": 0}}
    graph["samples"] = {"class_type": "SaveImage", "inputs": {"images": ["train", 1], "filename_prefix": "grid"}}
    graph["loss"] = {"class_type": "SaveImage", "inputs": {"images": ["train", 2], "filename_prefix": "loss"}}
    run = server.client.run(graph)
    assert made_by(graph).is_file() and len(run.images("samples")) == len(run.images("loss")) == 1
    (images,) = run_of(graph).glob("images-*")
    assert len(list(images.glob("*.png"))) == 8
    grid = np.asarray(Image.open(io.BytesIO(server.client.image(run.images("samples")[0]))).convert("RGB"))
    assert grid.std() > 5


def test_cancel_saves_and_running_again_continues_to_the_same_bits(server, prompt, made_by, run_of):
    whole, parts = prompt(steps=12, sample_every=0), prompt(steps=12, sample_every=0)
    server.client.run(whole)

    def interrupt(kind: str, data: dict) -> None:
        # Newer versions tell of a few steps a second only.
        if kind == "progress" and data["max"] == 12 and 1 <= data["value"] < 12:
            server.client.interrupt()

    with pytest.raises(ExecutionInterrupted):
        server.client.run(parts, on_event=interrupt)
    (stopped,) = events_of(run_of(parts), "Stopped")
    assert 1 <= stopped.step < 12 and not made_by(parts).exists()
    assert [path.name for path in (run_of(parts) / "checkpoints").glob("*.ckpt")] == [f"step-{stopped.step:06d}.ckpt"]
    server.client.run(parts)
    assert [event.step for event in events_of(run_of(parts), "Started")] == [0, stopped.step]
    assert same_weights(made_by(parts), made_by(whole))
    assert server.client.queue() == {"queue_running": [], "queue_pending": []}


def test_more_steps_train_the_same_run_further(server, prompt, made_by, run_of):
    graph = prompt(sample_every=0)
    server.client.run(graph)
    graph["train"]["inputs"]["steps"] = 6
    server.client.run(graph)
    assert [event.step for event in events_of(run_of(graph), "Started")] == [0, 4]
    assert read_domain_file(made_by(graph))[1].steps == 6


def test_unchanged_inputs_are_answered_from_the_cache_and_new_images_are_not(server, prompt, handwriting, tmp_path):
    for path in sorted(handwriting.glob("*.png"))[:6]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    graph = prompt(image_folder=str(tmp_path), sample_every=0)
    server.client.run(graph)
    assert "train" in server.client.run(graph).cached
    Image.new("RGB", (64, 64), "red").save(tmp_path / "new.png")
    # The run is complete, and the node says what to do instead of passing old weights off as trained on the new image.
    with pytest.raises(ExecutionFailed, match=r"finished and they changed since \(6 then, now 7\); raise steps"):
        server.client.run(graph)
    graph["train"]["inputs"]["steps"] += 1
    assert "train" not in server.client.run(graph).cached


def test_the_server_answers_while_it_trains(server, prompt):
    answered = []

    def ask(kind: str, data: dict) -> None:
        if kind == "progress" and len(answered) < 3:
            began = time.monotonic()
            server.client.get("/system_stats")
            answered.append(time.monotonic() - began)

    server.client.run(prompt(steps=8, sample_every=0), on_event=ask)
    assert len(answered) == 3 and max(answered) < 10


# ---- what users do wrong ----------------------------------------------------------------------------------------


def message_of(server, graph, **following) -> str:
    """The one sentence with which the training node fails."""
    with pytest.raises(ExecutionFailed) as caught:
        server.client.run(graph, **following)
    message = str(caught.value)
    assert caught.value.node_type == "InDomainTrainDomainUNet", message
    assert "\n" not in message and len(message) < 700 and "Traceback" not in message, message
    return message


def test_an_empty_folder(server, prompt, tmp_path, made_by):
    graph = prompt(image_folder=str(tmp_path))
    message = message_of(server, graph)
    assert str(tmp_path) in message or "no image" in message.lower()
    assert not made_by(graph).exists()


def test_corrupt_images_are_left_out_and_only_corrupt_images_are_an_error(
    server, prompt, handwriting, tmp_path, run_of, made_by
):
    first = sorted(handwriting.glob("*.png"))[0].read_bytes()
    (tmp_path / "cut.png").write_bytes(first[: len(first) // 2])
    (tmp_path / "words.jpg").write_text("this is no image")
    graph = prompt(image_folder=str(tmp_path), sample_every=0)
    message = message_of(server, graph)
    assert "none usable among 2" in message and "cut.png" in message
    for path in sorted(handwriting.glob("*.png"))[:5]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    graph = prompt(image_folder=str(tmp_path), sample_every=0)
    server.client.run(graph)
    assert read_domain_file(made_by(graph))[1].dataset_size == 5
    assert any("cut.png" in event.text for event in events_of(run_of(graph), "Warned"))


def test_a_loss_that_is_not_a_number_keeps_the_last_good_weights(server, prompt, run_of, made_by):
    graph = prompt({"clip": 0.0, "checkpoint_every": 1}, learning_rate=1.0, steps=200, sample_every=0)
    message = message_of(server, graph)
    assert "NaN" in message and "step" in message and "handwriting-" in message and "learning rate" in message
    assert not made_by(graph).exists()


@pytest.mark.parametrize("name", ["", "../outside", "a/b", "CON", "CON?", " "])
def test_names_that_are_no_file_names(server, prompt, name):
    message = message_of(server, prompt(name=name))
    assert "plain file name" in message
    assert not list(server.base.rglob("outside*"))


def test_values_out_of_range_are_refused_before_anything_runs(server, prompt):
    for inputs in ({"batch_size": 10**6}, {"steps": 0}, {"learning_rate": -1.0}, {"resolution": 32}):
        with pytest.raises(PromptRejected, match=next(iter(inputs))):
            server.client.run(prompt(**inputs))
    assert "multiple of 8" in message_of(server, prompt(resolution=100))
    learning_rate = json.loads("NaN")
    assert "learning_rate" in message_of(server, prompt(learning_rate=learning_rate))


def test_a_batch_that_no_memory_holds_is_refused_before_it_takes_any(server, prompt, run_of, made_by):
    graph = prompt(batch_size=65536, sample_every=0)
    message = message_of(server, graph)
    assert "batch_size 65536 at resolution 64" in message and "GiB available" in message and "accumulation" in message
    assert not made_by(graph).exists() and "Step" not in kinds(run_of(graph))
    # Nothing of it stands in the way of a smaller batch.
    graph["train"]["inputs"].update(batch_size=2, steps=1)
    server.client.run(graph)


def test_a_batch_larger_than_the_folder_is_filled_from_its_start(server, prompt, made_by):
    graph = prompt(batch_size=30, steps=1, sample_every=0)
    server.client.run(graph)
    assert made_by(graph).is_file()


def test_other_refusals_name_what_to_do(server, prompt, handwriting):
    assert "nothing at" in message_of(server, prompt(image_folder="not_there"))
    # Newer versions refuse what is not listed before anything runs.
    with pytest.raises((ExecutionFailed, PromptRejected), match="absent.safetensors"):
        server.client.run(prompt(checkpoint="absent.safetensors"))
    assert "no model, no clip, no vae" in message_of(server, prompt(checkpoint="connected"))
    assert "expected a checkpoint to go on from, found none" in message_of(server, prompt(resume="continue"))
    graph = prompt(sample_every=0, steps=1)
    server.client.run(graph)
    graph["train"]["inputs"].update(resume="new", steps=2)
    assert "without a run" in message_of(server, graph)
    graph["train"]["inputs"].update(resume="auto", seed=1)
    assert "seed" in message_of(server, graph)
