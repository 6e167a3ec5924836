"""Adaptations of a generator of nothing, judged by critics of nothing; and a process of its own to kill.

python training/bootstrap.py tests/training/tiny_adaptation.py FOLDER '{"steps": 20}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from indomain_guidance.guidance.combination import Guidance
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.guidance.distillation.critic import Critic
from indomain_guidance.guidance.networks.stylegan2 import StyleGAN2, random_generator
from indomain_guidance.guidance.networks.stylegan2_config import GeneratorConfig
from indomain_guidance.guidance.terms import Source, Term
from indomain_guidance.training.adaptation.adapt import adapt
from indomain_guidance.training.adaptation.config import AdaptConfig
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
TARGET = (0.8, -0.6, 0.2)  # the colour that the critic of nothing wants, in -1..1


def tiny_generator(seed: int = 0, **changes: object) -> StyleGAN2:
    """16 px, a few thousand weights, with a mean style."""
    fields = {"resolution": 16, "channels": (8, 8, 8), "z_dim": 8, "w_dim": 8, "mapping_layers": 2, **changes}
    generator = random_generator(GeneratorConfig(**fields), seed)
    with torch.no_grad():
        generator.mapping.w_avg.copy_(generator.mean_style(100))
        for name, one in generator.named_parameters():  # zero at first, as noise strengths begin
            if name.endswith("noise_strength"):
                one.fill_(0.1)
    return generator.eval().requires_grad_(False)


class Gaussian:
    """The denoiser of latents that are normal around `mean` [C], of standard deviation `spread`: exact."""

    def __init__(self, mean: tuple[float, ...], spread: float = 0.3) -> None:
        self.mean, self.spread = torch.tensor(mean), spread

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Tensor) -> Tensor:
        noise, own = sigma.reshape(-1, 1, 1, 1) ** 2, self.spread**2
        return (own * x + noise * self.mean.to(x).reshape(1, -1, 1, 1)) / (own + noise)


def tiny_critic(target: tuple[float, ...] = TARGET, scale: float = 1.0) -> Critic:
    """Wants pictures of one colour; its base wants them grey."""
    guidance = Guidance(Source(Gaussian((0.0,) * len(target)), {}), [Term("control", Gaussian(target), {}, scale)])
    return Critic(guidance, NoiseSchedule.scaled_linear())


def shrink(images: Tensor) -> Tensor:
    """The encoder of nothing: latents are 4x4 means of the pixels."""
    return F.avg_pool2d(images, images.shape[-1] // 4)


def tiny_config(folder: Path, **changes: object) -> AdaptConfig:
    """A short adaptation on the CPU in FOLDER/run."""
    return AdaptConfig(
        **{
            "generator": "tiny",
            "base": "tiny",
            "prompt": "a colour",
            "output": str(folder / "run"),
            "name": "moved",
            "steps": 4,
            "batch_size": 2,
            "scale": 1.0,
            "checkpoint_every": 2,
            "sample_every": 0,
            "log_every": 1,
            "device": "cpu",
            "precision": "fp32",
            **changes,
        }
    )


def main(folder: Path, changes: dict) -> int:
    """One adaptation; its events as JSON lines."""

    def tell(event) -> None:
        print(json.dumps(event.to_dict()), flush=True)

    config = tiny_config(folder, **changes)
    adapt(config, generator=tiny_generator(), critic=tiny_critic(), encode=shrink, listener=tell)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
