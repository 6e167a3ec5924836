"""Runs on a real server: costs, previews, interruption, and equality with core's own sampler."""

from __future__ import annotations

import io

import numpy as np
import pytest
from indomain_guidance.nodes.host.client import ExecutionInterrupted, PromptRejected


def test_cost_is_reported_with_the_result(server, graphs):
    def cost(**sampler) -> float:
        return server.client.run(graphs.in_domain(seed=11, **sampler)).outputs["sample"]["samples_per_step"][0]["value"]

    assert cost(domain_weight=1.0, control_weight=2.0) == 3.0
    assert cost(domain_weight=1.0, control_weight=0.0) == 1.0
    assert cost(domain_weight=0.0, control_weight=2.0) == 2.0
    assert cost(domain_weight=0.0, control_weight=1.0) == 1.0
    half = cost(domain_weight=1.0, control_weight=2.0, steps=10, domain_end_percent=0.5)
    assert 2.0 < half < 3.0


@pytest.mark.parametrize("batch, cfg", [(1, 2.5), (2, 1.0)])
def test_domain_weight_zero_is_core_sampling_to_the_pixel(server, graphs, pixels, batch, cfg):
    ours = graphs.in_domain(batch=batch, seed=5, steps=4, domain_weight=0.0, control_weight=cfg)
    core = graphs.in_domain(batch=batch)
    core["sample"] = {
        "class_type": "KSampler",
        "inputs": {
            "model": ["prior", 0],
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            "latent_image": ["latent", 0],
            "seed": 5,
            "steps": 4,
            "cfg": cfg,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        },
    }
    first, second = pixels(server.client.run(ours)), pixels(server.client.run(core))
    assert first.shape == (batch, 64, 64, 3) and np.array_equal(first, second)
    assert first.std() > 5  # an image, not a flat field on which everything would agree


def test_the_domain_model_changes_the_image_and_its_text_does_not_matter(server, graphs, pixels):
    without = pixels(server.client.run(graphs.in_domain(seed=6, steps=4, domain_weight=0.0)))
    with_domain = pixels(server.client.run(graphs.in_domain(seed=6, steps=4, domain_weight=2.5)))
    assert np.abs(without.astype(int) - with_domain).mean() > 1


def test_live_previews_arrive_and_are_pictures(server, graphs):
    from PIL import Image

    run = server.client.run(graphs.in_domain(seed=7, steps=8))
    assert run.previews
    # Two numbers of 4 bytes say what the message and the picture are.
    with Image.open(io.BytesIO(run.previews[-1][8:])) as preview:
        assert min(preview.size) >= 8


def test_interrupted_run_ends_and_the_next_one_is_undisturbed(server, graphs, pixels):
    before = pixels(server.client.run(graphs.in_domain(seed=8, steps=3)))
    seen = []

    def interrupt(kind: str, data: dict) -> None:
        if kind == "progress" and not seen:
            seen.append(data)
            server.client.interrupt()

    with pytest.raises(ExecutionInterrupted):
        server.client.run(graphs.in_domain(seed=9, steps=5000), on_event=interrupt)
    assert seen and seen[0]["max"] == 5000
    assert server.client.queue() == {"queue_running": [], "queue_pending": []}
    again = graphs.in_domain(seed=8, steps=3)
    again["save"]["inputs"]["filename_prefix"] = "again"
    server.client.post("/free", {"unload_models": True, "free_memory": True})
    assert np.array_equal(before, pixels(server.client.run(again)))


def test_a_prompt_that_core_refuses_names_the_node(server, graphs):
    prompt = graphs.in_domain(steps=0)
    with pytest.raises(PromptRejected, match=r"node sample \(InDomainSampler\): Value 0 smaller than min of 1: steps"):
        server.client.run(prompt)


def test_two_outputs_of_which_one_is_invalid_are_refused_as_a_whole(server, graphs):
    prompt = graphs.in_domain(seed=10)
    prompt["broken"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}
    with pytest.raises(PromptRejected, match=r"node broken \(SaveImage\): Required input is missing: images"):
        server.client.run(prompt)
