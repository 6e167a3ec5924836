"""At which timesteps a critic is asked, over a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GuidanceError

T_SCHEDULES = ("uniform", "annealed", "falling")


@dataclass(frozen=True)
class Timesteps:
    """Timesteps t in [t_min, t_max], both included.

    schedule: "uniform" draws one for each sample (StyleGAN-Fusion, arXiv 2212.04473: 10 to 500 for faces, 10 to 300
    for animals); "annealed" too, from a range whose upper end falls linearly from t_max to t_min over the run;
    "falling" draws nothing and goes down linearly from t_max to t_min, all samples alike (the monotone schedule of
    DreamTime, arXiv 2306.12422, with even weights). Raises GuidanceError for a range that is empty, below 0 or
    not of whole numbers.
    """

    t_min: int = 10
    t_max: int = 500
    schedule: str = "uniform"

    def __post_init__(self) -> None:
        if not (isinstance(self.t_min, int) and isinstance(self.t_max, int) and 0 <= self.t_min <= self.t_max):
            raise GuidanceError(
                f"Expected whole timesteps 0 <= t_min <= t_max, got t_min {self.t_min} and t_max {self.t_max}."
            )
        if self.schedule not in T_SCHEDULES:
            raise GuidanceError(f"Expected a schedule of {', '.join(T_SCHEDULES)}, got {self.schedule!r}.")

    def upper(self, step: int, steps: int) -> int:
        """The largest timestep at `step`, 0 to steps - 1, of a run of `steps`."""
        if self.schedule == "uniform":
            return self.t_max
        progress = min(max(step / max(steps - 1, 1), 0.0), 1.0)
        return self.t_max - round(progress * (self.t_max - self.t_min))

    def draw(self, batch: int, step: int, steps: int, generator: torch.Generator | None = None) -> Tensor:
        """One timestep for each of `batch` samples, int64 [batch], on the generator's device."""
        device = generator.device if generator is not None else "cpu"
        upper = self.upper(step, steps)
        if self.schedule == "falling":
            return torch.full((batch,), upper, dtype=torch.int64, device=device)
        return torch.randint(self.t_min, upper + 1, (batch,), generator=generator, device=device)
