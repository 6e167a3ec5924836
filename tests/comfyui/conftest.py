"""ComfyUI inside the test process, and tiny models of Stable Diffusion's topology to run in it.

INDOMAIN_COMFYUI_PATH names the ComfyUI to test against; only where it is not set are these tests skipped.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

VARIABLE = "INDOMAIN_COMFYUI_PATH"

WIDTH, CONTEXT = 32, 24
"""Channels of the tiny UNets' first level, width of their text conditioning."""

TINY_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": WIDTH,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "use_checkpoint": False,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "use_linear_in_transformer": False,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and "comfyui" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.comfy)


@pytest.fixture(scope="session")
def comfyui() -> SimpleNamespace:
    """ComfyUI's modules, imported once, on the CPU."""
    path = os.environ.get(VARIABLE)
    if not path:
        pytest.skip(f"{VARIABLE} is not set")
    root = Path(path).resolve()
    assert (root / "comfy" / "samplers.py").is_file(), f"{VARIABLE}={path} holds no ComfyUI"
    sys.path.insert(0, str(root))
    cli_args = importlib.import_module("comfy.cli_args")
    cli_args.args.cpu = True
    names = (
        "comfy.conds",
        "comfy.controlnet",
        "comfy.cldm.cldm",
        "comfy.hooks",
        "comfy.latent_formats",
        "comfy.lora",
        "comfy.model_base",
        "comfy.model_management",
        "comfy.model_patcher",
        "comfy.model_sampling",
        "comfy.nested_tensor",
        "comfy.ops",
        "comfy.patcher_extension",
        "comfy.sample",
        "comfy.samplers",
        "comfy.sd",
        "comfy.supported_models",
        "comfy.utils",
        "comfy_extras.nodes_custom_sampler",
        "latent_preview",
        "nodes",
    )
    modules = {name: importlib.import_module(name) for name in names}
    # A checkout on sys.path would put this project's package `nodes` in the place of ComfyUI's module.
    assert Path(modules["nodes"].__file__).resolve() == root / "nodes.py"
    assert modules["comfy.model_management"].get_torch_device() == torch.device("cpu")
    return SimpleNamespace(
        root=root,
        comfy=sys.modules["comfy"],
        nodes=modules["nodes"],
        **{name.rsplit(".", 1)[-1]: module for name, module in modules.items() if name != "nodes"},
    )


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fill every parameter from `seed`, at scales that keep activations near 1, zero-initialised layers included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and parameter.numel() > 0:
                value = noise / parameter[0].numel() ** 0.5
            else:
                value = (1.0 if name.endswith("weight") else 0.0) + 0.1 * noise
            parameter.copy_(value)
    return module.requires_grad_(False).eval()


class Tiny:
    """Makes MODELs, conditionings, LoRAs and ControlNets small enough for tests of fractions of a second."""

    def __init__(self, comfyui: SimpleNamespace) -> None:
        self.comfyui = comfyui
        self.comfy = comfyui.comfy

    def prior(
        self, seed: int = 0, family: str = "SD15", prediction: str = "EPS", zero_snr: bool = False, **unet: Any
    ) -> Any:
        """A core MODEL of that family in the tiny size, with random weights."""
        config = getattr(self.comfy.supported_models, family)({**TINY_UNET, **unet})
        model_type = getattr(self.comfy.model_base.ModelType, prediction)
        config.model_type = lambda state_dict, prefix="": model_type
        config.sampling_settings = {**config.sampling_settings, **({"zsnr": True} if zero_snr else {})}
        config.set_inference_dtype(torch.float32, None)
        model = randomize(config.get_model({}, "", device="cpu"), seed)
        cpu = torch.device("cpu")
        return self.comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    def cached_domain(
        self, prior: Any, context: torch.Tensor, seed: int | None = None, prediction: str = "epsilon"
    ) -> Any:
        """The `cached` form of a tiny prior for `context` [1, T, D]; with a seed, trained away from it at random."""
        null_text = importlib.import_module("indomain_guidance.guidance.null_text")
        unet = importlib.import_module("indomain_guidance.guidance.networks.unet_config")
        loading = importlib.import_module("indomain_guidance.nodes.comfy_internals.models.loading")
        weights = {key: value.clone() for key, value in prior.model.diffusion_model.state_dict().items()}
        config = unet.unet_config_from_state_dict(weights, num_heads=8)
        weights, config = null_text.build_cached(weights, config, null_text.NullContext(context, {}))
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            weights = {
                k: v + 0.3 * v.std().nan_to_num() * torch.randn(v.shape, generator=generator)
                for k, v in weights.items()
            }
        info = loading.DomainInfo("tiny domain", "tiny.safetensors", "cached", None)
        return loading.build_unet_model(
            weights, config, info=info, latent_format="sd15", source="tiny", prediction_type=prediction
        )

    def conditioning(self, seed: int, **options: Any) -> list:
        """A CONDITIONING of one random prompt of 77 tokens."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return [[torch.randn(1, 77, CONTEXT, generator=generator), dict(options)]]

    def latent(self, seed: int = 0, batch: int = 1, size: int = 8, **options: Any) -> dict:
        """A LATENT of random content; seed 0 is the empty one."""
        generator = torch.Generator().manual_seed(seed)
        samples = torch.randn(batch, 4, size, size, generator=generator) if seed else torch.zeros(batch, 4, size, size)
        return {"samples": samples, **options}

    def lora(self, patcher: Any, seed: int, strength: float = 1.0, contains: str = "attn1") -> Any:
        """A clone with random weight patches, such as a LoRA makes."""
        generator = torch.Generator().manual_seed(seed)
        patches = {}
        for key, weight in patcher.model.state_dict().items():
            if contains in key and key.endswith("weight"):
                patches[key] = ("diff", (0.5 * weight.std() * torch.randn(weight.shape, generator=generator),))
        assert patches
        clone = patcher.clone()
        clone.add_patches(patches, strength)
        return clone

    def control_net(self, seed: int = 0, size: int = 8, strength: float = 1.0, **unet: Any) -> Any:
        """A core ControlNet of the tiny topology with a random hint."""
        config = {key: value for key, value in {**TINY_UNET, **unet}.items() if key != "out_channels"}
        network = self.comfy.cldm.cldm.ControlNet(
            hint_channels=3,
            num_heads=8,
            dtype=torch.float32,
            device="cpu",
            operations=self.comfy.ops.disable_weight_init,
            **config,
        )
        randomize(network, 500 + seed)
        control = self.comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
        hint = torch.rand(1, 3, size * 8, size * 8, generator=torch.Generator().manual_seed(seed))
        return control.copy().set_cond_hint(hint, strength)

    @staticmethod
    def with_options(conditioning: list, **options: Any) -> list:
        """A copy of a conditioning with more options, as core's conditioning nodes make."""
        return [[tensor, {**old, **options}] for tensor, old in conditioning]

    def sample(
        self,
        guider: Any,
        seed: int = 1,
        steps: int = 3,
        sampler: str = "euler",
        scheduler: str = "normal",
        **latent: Any,
    ):
        """Sample an empty tiny latent (or `latent=`) with a guider; the samples."""
        internals = importlib.import_module("indomain_guidance.nodes.comfy_internals.guiding.latents")
        given = latent.pop("latent", None) or self.latent(**latent)
        return internals.sample_latent(guider, given, seed, steps, sampler, scheduler, 1.0)["samples"]

    def denoised(self, patcher: Any, conditioning: list, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """What core alone predicts for x [B, C, H, W] at sigma on one conditioning."""
        guider = self.comfy.samplers.CFGGuider(patcher)
        guider.set_conds(conditioning, conditioning)
        return self.predict(guider, x, sigma)

    def predict(self, guider: Any, x: torch.Tensor, sigma: float, seen: dict | None = None) -> torch.Tensor:
        """What a guider, core's or ours, predicts for x [B, C, H, W] at sigma, in a run of its own."""
        seen = {} if seen is None else seen

        class Once(self.comfy.samplers.Sampler):
            def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
                seen["x0"] = model_wrap(x, torch.full((x.shape[0],), sigma), **extra_args)
                return torch.zeros_like(x)

        guider.sample(torch.zeros_like(x), torch.zeros_like(x), Once(), torch.tensor([sigma, 0.0]), seed=0)
        return seen["x0"]


@pytest.fixture(scope="session")
def tiny(comfyui: SimpleNamespace) -> Tiny:
    return Tiny(comfyui)


@pytest.fixture(scope="session")
def guiders(comfyui: SimpleNamespace) -> Any:
    """The nodes under test, imported as ComfyUI imports them: after ComfyUI itself."""
    guiders, terms = (importlib.import_module(f"indomain_guidance.nodes.{name}") for name in ("guiders", "terms"))
    return SimpleNamespace(**{**vars(terms), **vars(guiders)})


def execute(node: Any, *values: Any, **more: Any) -> Any:
    """Run a node on its inputs, in the order of its schema."""
    names = [entry.id for entry in node.GET_SCHEMA().inputs]
    return node.execute(**dict(zip(names, values)), **more)


@pytest.fixture(scope="session")
def internals(comfyui: SimpleNamespace) -> Any:
    """The guider behind the nodes, and how it samples."""
    guiding = "indomain_guidance.nodes.comfy_internals.guiding"
    guider, latents = (importlib.import_module(f"{guiding}.{name}") for name in ("guider", "latents"))
    return SimpleNamespace(**{**vars(latents), **vars(guider)})


@pytest.fixture
def cancelled_at(comfyui: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """``with cancelled_at(2, of=6) as seen:`` a cancel arrives as a progress bar of 6 steps shows its second.

    The bar raises as ComfyUI's own hook does on every update; ``seen`` lists what bars have shown.
    """
    management = comfyui.model_management

    @contextlib.contextmanager
    def run(value: int, of: int) -> Iterator[list[int]]:
        seen: list[int] = []

        def update(bar: Any, now: int, total: int | None = None, preview: Any = None) -> None:
            seen.append(now)
            if (now, total) == (value, of):
                management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()

        try:
            with monkeypatch.context() as patch:
                patch.setattr(comfyui.utils.ProgressBar, "update_absolute", update)
                yield seen
        finally:
            management.interrupt_current_processing(False)

    return run
