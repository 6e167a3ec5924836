"""Which weights of a generator learn."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...guidance.networks.stylegan2 import StyleGAN2

# Parameters by what `AdaptConfig.train` calls them; names are NVIDIA's.
TRAINED = {
    "convolutions": re.compile(r"synthesis\.b4\.const|synthesis\.b\d+\.conv[01]\..*"),
    # The released code means to train the learned constant, but its filter passes over it; of the convolutions it takes
    # those from 8 px on, without the biases after them.
    "released": re.compile(r"synthesis\.b(?!4\.)\d+\.conv[01]\.(?!bias$).*"),
    "synthesis": re.compile(r"synthesis\..*"),
    "all": re.compile(r".*"),
}


def trained_names(generator: StyleGAN2, train: str, freeze_bias: bool) -> tuple[str, ...]:
    """The parameters that learn, by their names in files, in order; `train` as in `AdaptConfig`."""
    return tuple(
        name
        for name, _ in generator.named_parameters()
        if TRAINED[train].fullmatch(name) and not (freeze_bias and name.endswith(".bias"))
    )


def layer_of(name: str) -> str:
    """The layer of a parameter, named as in `StyleGAN2.style_layers`; other parameters get a name that is not there."""
    return ".".join(name.removeprefix("synthesis.").split(".")[:2])


def learning_names(generator: StyleGAN2, names: Sequence[str], layers: int = 0) -> tuple[str, ...]:
    """Those of `names` that a step can change: with layer selection only what belongs to a style layer."""
    return tuple(name for name in names if not layers or layer_of(name) in generator.style_layers)


def describe_trained(generator: StyleGAN2, names: Sequence[str], layers: int = 0) -> str:
    """How many tensors learn, and how many numbers they hold, for people."""
    names = learning_names(generator, names, layers)
    sizes = {name: weight.numel() for name, weight in generator.named_parameters()}
    learns, total = sum(sizes[name] for name in names), sum(sizes.values())
    text = f"trains {len(names)} of {len(sizes)} tensors, {learns:,} of {total:,} parameters"
    return text + (f"; in each step those of the {layers} styles that matter most" if layers else "")
