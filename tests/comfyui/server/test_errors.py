"""What a user does wrong costs one sentence in the node, and the server goes on serving."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
from indomain_guidance.nodes.host.client import ExecutionFailed, PromptRejected

SHIPPED = "mini-handwriting.safetensors"
SEEDS = itertools.count(1000)


@pytest.fixture(scope="module")
def shipped():
    """(weights, metadata) of the shipped domain model."""
    from indomain_guidance.guidance.files import read_domain_file
    from indomain_guidance.training.mini_world import assets

    return read_domain_file(assets.domain_unets_dir() / SHIPPED)


@pytest.fixture(scope="module")
def folder(server):
    path = server.base / "models" / "domain_unets"
    path.mkdir(parents=True, exist_ok=True)
    return path


def message_of(server, prompt, node_type: str) -> str:
    """The one sentence with which `prompt` fails in a node of `node_type`; afterwards a good prompt must run."""
    with pytest.raises(ExecutionFailed) as caught:
        server.client.run(prompt)
    failure = caught.value
    message = str(failure)
    assert failure.node_type == node_type, f"failed in {failure.node_type}: {message}"
    assert "\n" not in message and len(message) < 500, message
    # One sentence, perhaps with parts divided by a semicolon; dots inside of file names do not end it.
    assert ". " not in message, message
    return message


@pytest.fixture
def still_serving(server, graphs):
    yield
    # A new seed each time, so that nothing is answered from a cache.
    prompt = graphs.in_domain(steps=1, seed=next(SEEDS))
    assert len(server.client.run(prompt).images("save")) == 1


pytestmark = pytest.mark.usefixtures("still_serving")


@pytest.mark.parametrize("name", ["not_there.safetensors", "../../../etc/passwd"])
def test_files_that_are_not_listed(server, graphs, name):
    # Newer versions refuse them before anything runs.
    with pytest.raises((ExecutionFailed, PromptRejected)) as caught:
        server.client.run(graphs.in_domain(name))
    message = str(caught.value)
    assert name in message and ("domain_unets" in message or "Value not in list" in message)
    assert "InDomainLoadDomainUNet" in (getattr(caught.value, "node_type", "") or message)


def test_truncated_file(server, graphs, folder):
    from indomain_guidance.training.mini_world import assets

    data = (assets.domain_unets_dir() / SHIPPED).read_bytes()
    (folder / "truncated.safetensors").write_bytes(data[: len(data) // 2])
    message = message_of(server, graphs.in_domain("truncated.safetensors"), "InDomainLoadDomainUNet")
    assert "truncated.safetensors" in message


def test_empty_file_and_text_file(server, graphs, folder):
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "page.safetensors").write_text("<html>not found</html>" * 50, encoding="utf-8")
    for name in ("empty.safetensors", "page.safetensors"):
        assert name in message_of(server, graphs.in_domain(name), "InDomainLoadDomainUNet")


def test_file_that_is_no_unet(server, graphs, folder):
    import torch
    from safetensors.torch import save_file

    save_file({"lora_unet_x.lora_up.weight": torch.zeros(4, 4)}, str(folder / "lora.safetensors"))
    message = message_of(server, graphs.in_domain("lora.safetensors"), "InDomainLoadDomainUNet")
    assert "lora.safetensors" in message and "expected" in message.lower()


def test_nan_in_a_file(server, graphs, folder, shipped):
    from indomain_guidance.guidance.files import read_metadata
    from indomain_guidance.training.mini_world import assets
    from safetensors.torch import load_file, save_file

    # Written past this project's own writer, which refuses to write such a file.
    path = assets.domain_unets_dir() / SHIPPED
    weights = load_file(str(path))
    key = sorted(weights)[3]
    weights[key].view(-1)[0] = float("nan")
    save_file(weights, str(folder / "nan.safetensors"), metadata=dict(read_metadata(path)))
    message = message_of(server, graphs.in_domain("nan.safetensors"), "InDomainLoadDomainUNet")
    assert "nan.safetensors" in message and key in message


def test_domain_model_of_another_latent_space(server, graphs, folder, shipped):
    from indomain_guidance.guidance.files import write_domain_file

    weights, metadata = shipped
    write_domain_file(folder / "sd15_space.safetensors", weights, dataclasses.replace(metadata, latent_format="sd15"))
    message = message_of(server, graphs.in_domain("sd15_space.safetensors"), "InDomainSampler")
    assert "latent" in message.lower()


def test_no_terms(server, graphs):
    message = message_of(server, graphs.multi_guidance([]), "InDomainMultiGuidanceGuider")
    assert "term" in message.lower()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(server, graphs, value):
    # JSON as written by Python and read by the server knows NaN and Infinity; min and max do not catch NaN.
    weight = json.loads(json.dumps(float(value)))
    if value == "nan":
        message = message_of(server, graphs.in_domain(domain_weight=weight), "InDomainSampler")
        assert "finite" in message.lower()
        prompt = graphs.multi_guidance([{"name": "odd", "weight": weight}])
        message = message_of(server, prompt, "InDomainGuidanceTerm")
        assert "weight" in message and "finite" in message
    else:
        with pytest.raises(PromptRejected, match="domain_weight"):
            server.client.run(graphs.in_domain(domain_weight=weight))


def test_flow_prior_with_an_epsilon_domain_model(server, graphs):
    prompt = graphs.in_domain(prior=["flow", 0])
    prompt["flow"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["prior", 0], "shift": 3.0}}
    assert "flow" in message_of(server, prompt, "InDomainSampler").lower()


def test_sigma_ranges_that_do_not_meet(server, graphs):
    prompt = graphs.in_domain(prior=["zero_snr", 0])
    prompt["zero_snr"] = {
        "class_type": "ModelSamplingDiscrete",
        "inputs": {"model": ["prior", 0], "sampling": "v_prediction", "zsnr": True},
    }
    message = message_of(server, prompt, "InDomainSampler")
    assert "14.6" in message and "4" in message and "sigma" in message.lower()


def test_term_that_references_itself(server, graphs):
    prompt = graphs.multi_guidance([{"name": "loop", "reference": "loop", "model": ["domain", 0]}])
    message = message_of(server, prompt, "InDomainMultiGuidanceGuider")
    assert "loop" in message


def test_reference_to_no_term(server, graphs):
    prompt = graphs.multi_guidance([{"name": "one", "reference": "nobody", "model": ["domain", 0]}])
    assert "nobody" in message_of(server, prompt, "InDomainMultiGuidanceGuider")


@pytest.mark.parametrize(
    ("inputs", "node_type", "word"),
    [
        ({"term": "nobody"}, "InDomainShapeTerm", "one, two"),
        ({"mode": "orthogonal", "orthogonal_to": "nobody"}, "InDomainMultiGuidanceGuider", "two"),
    ],
)
def test_shaping_of_or_by_no_term(server, graphs, inputs, node_type, word):
    prompt = graphs.multi_guidance([{"name": "one", "model": ["domain", 0]}, {"name": "two"}])
    prompt["shape"] = {
        "class_type": "InDomainShapeTerm",
        "inputs": {"terms": ["term1", 0], "term": "one", "mode": "frequencies", **inputs},
    }
    prompt["guider"]["inputs"]["terms"] = ["shape", 0]
    message = message_of(server, prompt, node_type)
    assert "nobody" in message and word in message


def test_two_terms_of_one_name(server, graphs):
    prompt = graphs.multi_guidance([{"name": "same", "model": ["domain", 0]}, {"name": "same", "model": ["domain", 0]}])
    assert "same" in message_of(server, prompt, "InDomainMultiGuidanceGuider")


@pytest.mark.parametrize("literal", ["abc", 5, None, ["a", "b", "c"], {"samples": 1}], ids=repr)
@pytest.mark.parametrize("socket", ["prior", "positive", "latent_image"])
def test_a_literal_where_a_link_should_be(server, graphs, socket, literal):
    # Core sends on whatever stands in a prompt; some of it newer versions refuse before anything runs.
    prompt = graphs.in_domain(seed=next(SEEDS))
    prompt["sample"]["inputs"][socket] = literal
    with pytest.raises((ExecutionFailed, PromptRejected)) as caught:
        server.client.run(prompt)
    if isinstance(caught.value, ExecutionFailed):
        assert f"expected {socket} to be a" in str(caught.value) and "\n" not in str(caught.value)


def test_a_picture_that_is_too_small_for_the_models(server, graphs):
    prompt = graphs.in_domain(seed=next(SEEDS))
    prompt["latent"]["inputs"].update(width=16, height=16)
    try:
        server.client.run(prompt)
    except ExecutionFailed as failure:  # what torch cannot do is told as ours
        assert "Expected a latent that is large enough for its models, got [2, 2] pixels" in str(failure)
