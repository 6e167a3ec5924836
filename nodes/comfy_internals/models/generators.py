"""Image generators (StyleGAN2) inside ComfyUI: the folder `models/generators`, loading, drawing, blending and saving.

Nothing of `training/` is imported before a node runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import torch
from torch import Tensor

from ....guidance.errors import Problem
from ....guidance.files import FileProblem, GeneratorMetadata, read_generator, write_generator
from ....guidance.networks.blending import blend_generators, resolution_split
from ....guidance.networks.stylegan2 import LARGEST_SEED, StyleGAN2, class_labels, latents_of_seeds
from ....guidance.networks.stylegan2_config import GeneratorConfig
from ..progress import ProgressBar
from .folders import GENERATORS
from .loading import ordinary_tensors

NOISE = ("const", "random", "none")
# Enough pixels in one pass to keep a device busy; a larger batch is drawn in several.
PIXELS_AT_ONCE = 2**22
SHARE_OF_MEMORY = 0.8  # of what is free, that the images of one batch may take


@dataclass(frozen=True, eq=False)
class GraphGenerator:
    """The value of an INDOMAIN_GENERATOR output: a frozen generator on the CPU, and its file's metadata."""

    generator: StyleGAN2
    metadata: GeneratorMetadata
    source: str  # the file it came from, or how it was made, for messages

    @property
    def name(self) -> str:
        """What to call it."""
        return self.metadata.name or Path(self.source).stem


def load_generator(name: str) -> tuple[GraphGenerator, tuple[str, ...]]:
    """(a listed generator, its reader's notes). Raises FileProblem."""
    path = GENERATORS.find(name)
    # Weights made in ComfyUI's inference mode could never be adapted.
    with ordinary_tensors():
        loaded = read_generator(path)
        generator = loaded.generator.eval().requires_grad_(False)
    return GraphGenerator(generator, loaded.metadata, str(path)), tuple(loaded.notes)


def save_generator(loaded: GraphGenerator, path: Path, dtype: str, replace: bool) -> None:
    """Write a generator as this project's safetensors. Raises FileProblem where another file has that name already."""
    # Unlike Path.exists, os.path.exists takes paths that are too long; writing then raises a plain message.
    if os.path.exists(path) and not replace:
        raise FileProblem(
            f"{path}: expected no file under this name, found one; choose another name, or switch replace on."
        )
    metadata = loaded.metadata if loaded.metadata.name else dataclasses.replace(loaded.metadata, name=path.stem)
    write_generator(path, loaded.generator, metadata, dtype=dtype)


def in_pixels(config: GeneratorConfig) -> str:
    """The size of a generator's images."""
    square = config.width == config.height
    return f"{config.width} px" if square else f"{config.width} x {config.height} px"


def describe_generator(loaded: GraphGenerator) -> str:
    """A generator in a few words."""
    config = loaded.generator.config
    parameters = sum(parameter.numel() for parameter in loaded.generator.parameters())
    classes = f", {config.c_dim} classes" if config.c_dim else ""
    return (
        f"{loaded.name}: StyleGAN2 ({config.architecture}), {in_pixels(config)}, {parameters / 1e6:.1f} M weights, "
        f"z {config.z_dim}, w {config.w_dim} x {loaded.generator.num_ws}{classes}"
    )


def blend(
    source: GraphGenerator, adapted: GraphGenerator, amount: float, split_resolution=0, amount_below_split=0.0
) -> GraphGenerator:
    """source + amount * (adapted - source); layers of up to `split_resolution` pixels take the other amount, 0: none.

    Its metadata are those of `adapted`, with the licences of both and the blend as the last entry of the history.
    Raises ValueError for generators of different architecture and for a split that is none of their sizes.
    """
    split, below = split_resolution, amount_below_split
    with ordinary_tensors():
        amounts = resolution_split(source.generator, split, below, amount) if split else amount
        blended = blend_generators(source.generator, adapted.generator, amounts)
    said = f"{below:g} up to {split} px, {amount:g} above" if split else f"{amount:g}"
    name = f"{source.name} to {adapted.name} at {said}"
    stage = {"blend": amount, "source": source.name, "adapted": adapted.name}
    if split:
        stage |= {"split_resolution": split, "amount_below_split": below}
    # The licences of both parents hold for a blend.
    licences = [part for parent in (source, adapted) for part in parent.metadata.licence.split("; ") if part]
    history = (*adapted.metadata.history, stage)
    licence = "; ".join(dict.fromkeys(licences))
    return GraphGenerator(
        blended, dataclasses.replace(adapted.metadata, name=name, licence=licence, history=history), name
    )


# ---- drawing ----------------------------------------------------------------------------------------------------


def one_hot(label: int, count: int, c_dim: int) -> Tensor | None:
    """Class labels c [count, c_dim]; None for a generator without classes. Raises ValueError for an unknown class."""
    if c_dim == 0:
        return None
    if not 0 <= label < c_dim:
        raise Problem(
            f"Generator Sample: expected a class from 0 to {c_dim - 1}, as the generator has, found {label}; lower "
            "class."
        )
    return class_labels([label] * count, c_dim)


@contextlib.contextmanager
def on_device(generator: StyleGAN2) -> Iterator[torch.device]:
    """A generator on ComfyUI's device, and back on the CPU whatever happens. Makes room for it first."""
    device = comfy.model_management.get_torch_device()
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*generator.parameters(), *generator.buffers()])
    if device.type != "cpu":
        comfy.model_management.free_memory(4 * size + 2**30, device)
    try:
        generator.to(device)
        yield device
    finally:
        generator.to("cpu")


@torch.no_grad()
def draw(
    generator: GraphGenerator,
    seed: int,
    truncation: float,
    batch_size: int,
    noise: str = "const",
    class_index: int = 0,
    truncation_cutoff: int = 0,
) -> Tensor:
    """Images as IMAGE [batch_size, H, W, 3] in 0..1, of the seeds from `seed` on.

    truncation: 1 is a no-op, 0 the mean image. truncation_cutoff: how many of the w vectors it acts on, from the
    coarsest; 0 all. noise: "random" is drawn from each image's own seed, the same on every device. Raises Problem where
    memory does not suffice.
    """
    from ....training.engine.memory import is_memory_problem

    network, config, count = generator.generator, generator.generator.config, batch_size
    _check_room(count, config)
    z = latents_of_seeds(range(seed, seed + count), config.z_dim)
    c = one_hot(class_index, count, config.c_dim)
    done, at_once = 0, max(1, min(count, PIXELS_AT_ONCE // (config.height * config.width)))
    if noise == "random":
        at_once = 1  # each image's from its own seed, however many are drawn
    progress = ProgressBar(count)
    try:
        with ordinary_tensors(), on_device(network) as device:
            images = torch.empty(count, config.height, config.width, 3)
            while done < count:
                chosen = slice(done, done + at_once)
                random = torch.Generator().manual_seed((seed + done) & LARGEST_SEED)
                labels = None if c is None else c[chosen].to(device)
                try:
                    ws = network.map(z[chosen].to(device), labels, truncation, truncation_cutoff or None)
                    drawn = as_image(network.synthesize(ws, noise=noise, generator=random))
                except (RuntimeError, MemoryError) as problem:
                    if at_once == 1 or not is_memory_problem(problem):
                        raise
                    problem.with_traceback(None)  # it holds the tensors that did not fit
                    comfy.model_management.soft_empty_cache()
                    at_once = (at_once + 1) // 2
                    continue
                images[chosen] = drawn
                done += len(drawn)
                progress.update_absolute(done, count)
    except (RuntimeError, MemoryError) as problem:
        if not is_memory_problem(problem):
            raise
        raise Problem(
            f"Generator Sample: memory ran out at image {done + 1} of {count}, of {in_pixels(config)} each; "
            "lower batch_size, free some memory, or use a generator of fewer pixels."
        ) from problem.with_traceback(None)
    return images


def _check_room(count: int, config: GeneratorConfig) -> None:
    """Raise Problem for images that do not fit into memory together: the system would end ComfyUI without a word."""
    from ....training.engine.memory import available_memory
    from ....training.engine.tracing import size_text

    needed = 4 * count * (3 * config.height * config.width + config.c_dim + config.z_dim)
    room = available_memory() or comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > SHARE_OF_MEMORY * room:
        raise Problem(
            f"Generator Sample: expected images that fit into memory, found that {count:,} of {in_pixels(config)} each "
            f"take {size_text(needed)} of the {size_text(room)} that are free; lower batch_size."
        )


def as_image(drawn: Tensor) -> Tensor:
    """A generator's output [B, C, H, W] in about -1..1 as IMAGE [B, H, W, 3] in 0..1 on the CPU; grey becomes RGB."""
    rgb = drawn[:, :3] if drawn.shape[1] >= 3 else drawn[:, :1].expand(-1, 3, -1, -1)
    return (rgb.float() * 0.5 + 0.5).clamp(0.0, 1.0).permute(0, 2, 3, 1).cpu().contiguous()
