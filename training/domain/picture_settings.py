"""What a run must be told to learn from pictures, with some of them held out."""

from __future__ import annotations

from abc import ABC

from ..data.settings import DataSettings
from ..prior.settings import PriorSettings
from .low_rank import LowRankSettings


class PictureSettings(LowRankSettings, DataSettings, PriorSettings, ABC):
    """A run's settings with the prior's, the images' and those of low-rank additions.

    Every kind of run says the fields below with its own defaults and words.
    """

    min_snr_gamma: float
    sample_steps: int
    validate_every: int
    held_out_share: float
