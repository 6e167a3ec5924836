"""Baking a domain model into a LoRA on a real server: the template's graph, then the file in core's own loader."""

from __future__ import annotations

import numpy as np
import pytest
from indomain_guidance.nodes.host.client import ExecutionFailed


@pytest.fixture
def prompt(graphs):
    """Makes the template's graph with few steps; more: other inputs of Bake Domain LoRA. (graph, id of that node)."""

    def make(name: str, **more) -> tuple[dict, str]:
        graph = graphs.workflow("bake_domain_lora")
        ids = {node["class_type"]: node_id for node_id, node in graph.items()}
        node_id = ids["InDomainBakeDomainLoRA"]
        graph[node_id]["inputs"].update(name=name, steps=4, batch_size=4, learning_rate=2e-2, sample_every=0, **more)
        graph[ids["InDomainBakeOptions"]]["inputs"].update(
            warmup=0, own_count=2, own_steps=2, random_prompts=4, validate_every=0
        )
        graph[ids["InDomainMiniWorldImages"]]["inputs"]["count"] = 16
        graph[ids["EmptyLatentImage"]]["inputs"]["batch_size"] = 1
        for kind in ("KSampler", "InDomainSampler"):
            graph[ids[kind]]["inputs"]["steps"] = 3
        return graph, node_id

    return make


def test_ksampler_draws_with_the_lora_and_cores_loader_reads_its_file(server, prompt, pixels):
    graph, node_id = prompt("on_a_server")
    run = server.client.run(graph)
    saved = {node["inputs"]["filename_prefix"]: key for key, node in graph.items() if node["class_type"] == "SaveImage"}
    baked, guided = (pixels(run, saved[f"in_domain/{name}"]) for name in ("baked_lora", "guidance"))
    path = server.base / "models" / "loras" / "on_a_server.safetensors"
    assert path.is_file() and run.outputs[node_id]["text"] == [str(path)]
    assert baked.shape == guided.shape == (1, 64, 64, 3)

    # The same graph without the LoRA, and with its file: no node of the baking is left.
    (stock,) = (key for key, node in graph.items() if node["class_type"] == "LoraModelLoader")
    prior = graph[stock]["inputs"]["model"]

    def without_baking(**loader) -> np.ndarray:
        used = {**graph, stock: {"class_type": "LoraLoaderModelOnly", "inputs": {"model": prior, **loader}}}
        left = {key: used[key] for key in sorted(_ancestors(used, saved["in_domain/baked_lora"]))}
        assert not any("Bake" in node["class_type"] for node in left.values())
        return pixels(server.client.run(left), saved["in_domain/baked_lora"])

    from_file = without_baking(lora_name=path.name, strength_model=1.0)
    plain = without_baking(lora_name=path.name, strength_model=0.0)
    assert np.array_equal(from_file, baked)
    assert np.abs(plain.astype(int) - baked).mean() > 1


def test_all_weights_make_no_lora_and_say_so_where_one_is_asked_for(server, prompt):
    graph, _ = prompt("whole")
    (options,) = (node for node in graph.values() if node["class_type"] == "InDomainBakeOptions")
    options["inputs"]["train"] = "all"
    with pytest.raises(ExecutionFailed, match="all weights were trained, so there is no LoRA; use the model output"):
        server.client.run(graph)
    assert (server.base / "models" / "diffusion_models" / "whole.safetensors").is_file()


def _ancestors(graph: dict, node_id: str) -> set[str]:
    """A node and everything that it needs."""
    found, waiting = set(), [node_id]
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting += [value[0] for value in graph[key]["inputs"].values() if isinstance(value, list)]
    return found
