"""Graphs for the tests that drive a real server, built from the mini world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)


class Graphs:
    """Prompts in API format; every method returns a new one."""

    @staticmethod
    def workflow(name: str) -> dict:
        return json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))

    @staticmethod
    def mini(unet_name: str = "mini-handwriting.safetensors", batch: int = 1) -> dict:
        """Loaders, conditionings and an empty latent: nodes prior, domain, positive, negative, latent."""
        return {
            "prior": {"class_type": "InDomainLoadMiniWorld", "inputs": {}},
            "domain": {
                "class_type": "InDomainLoadDomainUNet",
                "inputs": {"unet_name": unet_name, "weight_dtype": "default"},
            },
            "positive": {
                "class_type": "CLIPTextEncode",
                "inputs": {"clip": ["prior", 1], "text": "a red seven on a yellow background"},
            },
            "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["prior", 1], "text": ""}},
            "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": batch}},
        }

    @classmethod
    def in_domain(
        cls,
        unet_name: str = "mini-handwriting.safetensors",
        batch: int = 1,
        prior: list | None = None,
        **sampler: object,
    ) -> dict:
        """The In-Domain Sampler on the mini world, decoded and saved by node `save`."""
        graph = cls.mini(unet_name, batch)
        graph["sample"] = {
            "class_type": "InDomainSampler",
            "inputs": {
                "prior": prior or ["prior", 0],
                "domain": ["domain", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": 1,
                "steps": 2,
                "sampler_name": "euler",
                "scheduler": "normal",
                "domain_weight": 1.0,
                "control_weight": 2.0,
                "denoise": 1.0,
                **sampler,
            },
        }
        return cls.saved(graph, ["sample", 0])

    @classmethod
    def multi_guidance(cls, terms: list[dict], steps: int = 2) -> dict:
        """Multi-Guidance Guider with `terms` (inputs of Guidance Term nodes) in SamplerCustomAdvanced."""
        graph = cls.mini()
        guider: dict = {"prior": ["prior", 0], "base": ["negative", 0]}
        for index, term in enumerate(terms):
            inputs = {
                "name": f"term {index}",
                "weight": 1.0,
                "start_percent": 0.0,
                "end_percent": 1.0,
                "ramp": "constant",
                "reference": "",
                **term,
            }
            if index:
                inputs["terms"] = [f"term{index - 1}", 0]
            graph[f"term{index}"] = {"class_type": "InDomainGuidanceTerm", "inputs": inputs}
            guider["terms"] = [f"term{index}", 0]
        graph |= {
            "guider": {"class_type": "InDomainMultiGuidanceGuider", "inputs": guider},
            "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
            "method": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
            "sigmas": {
                "class_type": "BasicScheduler",
                "inputs": {"model": ["prior", 0], "scheduler": "normal", "steps": steps, "denoise": 1.0},
            },
            "sample": {
                "class_type": "SamplerCustomAdvanced",
                "inputs": {
                    "noise": ["noise", 0],
                    "guider": ["guider", 0],
                    "sampler": ["method", 0],
                    "sigmas": ["sigmas", 0],
                    "latent_image": ["latent", 0],
                },
            },
        }
        return cls.saved(graph, ["sample", 0])

    @staticmethod
    def saved(graph: dict, samples: list) -> dict:
        graph["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": samples, "vae": ["prior", 2]}}
        graph["save"] = {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "test"}}
        return graph


@pytest.fixture(scope="session")
def graphs() -> type[Graphs]:
    return Graphs


@pytest.fixture(scope="session")
def handwriting(tmp_path_factory) -> Path:
    """A folder of 24 images of the mini world's handwriting."""
    from indomain_guidance.training.mini_world.pictures import export_pictures

    folder = tmp_path_factory.mktemp("images") / "handwriting"
    export_pictures(folder, count=24)
    return folder


@pytest.fixture(scope="session")
def pixels(server):
    """The saved images of a run's node as one array [B, H, W, 3]."""
    import io

    import numpy as np
    from PIL import Image

    def read(run, node_id: str = "save"):
        images = [Image.open(io.BytesIO(server.client.image(reference))) for reference in run.images(node_id)]
        return np.stack([np.asarray(image.convert("RGB")) for image in images])

    return read


@pytest.fixture(autouse=True)
def server_survives(request):
    """Whatever a test did, the shared server still runs afterwards."""
    yield
    if "server" in request.fixturenames:
        assert request.getfixturevalue("server").alive()
