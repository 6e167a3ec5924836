"""Runs the original StyleGAN2 code on the weights of stylegan2_cases.py and writes stylegan2.npz beside this file.

    python make_stylegan2.py PATH_OF_NVLABS_STYLEGAN3 PATH_OF_ROSINALITY_STYLEGAN2_PYTORCH

Both are checkouts outside this repository. On the CPU both run their own pure PyTorch reference operations. The
difference to this project's generator on whole images and gradients is printed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import torch.utils.cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
sys.path.insert(0, str(ROOT / "training"))
import bootstrap  # noqa: E402

bootstrap.forget_checkout_on_path()
bootstrap.register()
spec = importlib.util.spec_from_file_location("cases", HERE.parent / "stylegan2_cases.py")
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


def nvidia(config, state):
    """NVIDIA's constructor knows only widths of min(base / resolution, max): its blocks are built one by one."""
    from training import networks_stylegan2 as original

    generator = original.StyleGAN2(
        z_dim=config.z_dim,
        c_dim=config.c_dim,
        w_dim=config.w_dim,
        img_resolution=config.resolution,
        img_channels=config.img_channels,
        mapping_kwargs={"num_layers": config.mapping_layers},
        channel_base=config.resolution,
        architecture=config.architecture,
        conv_clamp=config.conv_clamp,
    )
    for index, (size, width) in enumerate(zip(config.block_resolutions, config.channels)):
        setattr(
            generator.synthesis,
            f"b{size}",
            original.SynthesisBlock(
                config.channels[index - 1] if index else 0,
                width,
                w_dim=config.w_dim,
                resolution=size,
                img_channels=config.img_channels,
                is_last=size == config.resolution,
                architecture=config.architecture,
                conv_clamp=config.conv_clamp,
            ),
        )
    missing, unexpected = generator.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith("resample_filter") for key in missing), (missing, unexpected)
    return generator.eval()


def run_nvidia(config, state, z, c, noise, truncation, cutoff):
    generator = nvidia(config, state)
    ws = generator.mapping(z, c, truncation_psi=truncation, truncation_cutoff=cutoff).detach().requires_grad_()
    images = generator.synthesis(ws, noise_mode=noise, fused_modconv=True)
    return ws, images


def run_rosinality(config, state, z, c, noise, truncation, cutoff):
    import model

    # Its table of widths is a literal in the constructor: change the literal, nothing else.
    widths = dict(zip(config.block_resolutions, config.channels))
    source = Path(model.__file__).read_text()
    start = source.index("self.channels = {")
    end = source.index("}", start) + 1
    patched = source[:start] + f"self.channels = {widths!r}" + source[end:]
    namespace = {"__name__": "model_with_widths"}
    exec(compile(patched, model.__file__, "exec"), namespace)
    generator = namespace["Generator"](config.resolution, config.w_dim, config.mapping_layers)
    target, used = generator.state_dict(), set()

    def put(name, key, shape=None):
        value = state[key] if shape is None else state[key].reshape(shape)
        assert target[name].shape == value.shape, (name, target[name].shape, value.shape)
        target[name] = value
        used.add(name)

    for layer in range(config.mapping_layers):
        put(f"style.{layer + 1}.weight", f"mapping.fc{layer}.weight")
        put(f"style.{layer + 1}.bias", f"mapping.fc{layer}.bias")
    put("input.input", "synthesis.b4.const", (1, -1, 4, 4))

    def layer(theirs, ours, index):
        for part in ("weight", "bias"):
            put(f"{theirs}.conv.modulation.{part}", f"{ours}.affine.{part}")
        put(f"{theirs}.conv.weight", f"{ours}.weight", (1, *state[f"{ours}.weight"].shape))
        if index is None:
            put(f"{theirs}.bias", f"{ours}.bias", (1, -1, 1, 1))
        else:
            put(f"{theirs}.activate.bias", f"{ours}.bias")
            put(f"{theirs}.noise.weight", f"{ours}.noise_strength", (1,))
            size = state[f"{ours}.noise_const"].shape
            put(f"noises.noise_{index}", f"{ours}.noise_const", (1, 1, *size))

    layer("conv1", "synthesis.b4.conv1", 0)
    layer("to_rgb1", "synthesis.b4.torgb", None)
    for block, size in enumerate(config.block_resolutions[1:]):
        layer(f"convs.{2 * block}", f"synthesis.b{size}.conv0", 2 * block + 1)
        layer(f"convs.{2 * block + 1}", f"synthesis.b{size}.conv1", 2 * block + 2)
        layer(f"to_rgbs.{block}", f"synthesis.b{size}.torgb", None)
    assert all("kernel" in name for name in set(target) - used), set(target) - used
    generator.load_state_dict(target)
    w = generator.style(z)
    w = state["mapping.w_avg"] + truncation * (w - state["mapping.w_avg"])
    ws = w[:, None].repeat(1, generator.n_latent, 1).detach().requires_grad_()
    images, _ = generator([ws], input_is_latent=True, randomize_noise=False)
    return ws, images


def main(stylegan3: str, rosinality: str) -> None:
    sys.path[:0] = [stylegan3, rosinality]
    torch.utils.cpp_extension.load = lambda *_, **__: None  # compiled operations are for GPUs only
    arrays = {}
    for name, (config, noise, truncation, cutoff) in cases.CASES.items():
        state = cases.weights(config)
        z, c = cases.inputs(config)
        run = run_nvidia if name.startswith("nvidia") else run_rosinality
        ws, images = run(config, state, z, c, noise, truncation, cutoff)
        (gradient,) = torch.autograd.grad((images * cases.probe(images.shape)).sum(), ws)
        own = cases.loaded(config)
        own_ws = own.map(z, c, truncation, cutoff).detach().requires_grad_()
        own_images = own.synthesize(own_ws, noise)
        (own_gradient,) = torch.autograd.grad((own_images * cases.probe(images.shape)).sum(), own_ws)
        errors = [
            float((a.double() - b.double()).norm() / b.double().norm())
            for a, b in ((own_ws, ws), (own_images, images), (own_gradient, gradient))
        ]
        print(
            f"{name:28s} images rms {float(images.square().mean().sqrt()):7.3f}  relative errors: "
            f"ws {errors[0]:.1e}, images {errors[1]:.1e}, gradient {errors[2]:.1e}"
        )
        arrays |= {f"{name}/{part}": value for part, value in cases.digest(images).items()}
        arrays[f"{name}/ws"] = ws.detach().numpy()[:, ::3]
        arrays[f"{name}/gradient"] = gradient.numpy()[:, ::3]
    np.savez_compressed(HERE / "stylegan2.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
