"""The settings of low-rank additions, of runs that train some (`guidance.networks.low_rank`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...guidance.networks.low_rank import NAMED_LAYERS
from ..engine.settings import Settings, group

additions = group("low_rank")


@dataclass(frozen=True, kw_only=True)
class LowRankSettings(Settings):
    """Which layers get an addition, and what kind. Raises ConfigProblem."""

    groups: ClassVar[tuple[str, ...]] = ("low_rank",)

    rank: int = additions(16, "rank of the additions, usually 4 to 64", min=1, max=1024)
    layers: str = additions(
        "blocks",
        f"the layers that get one: {', '.join(NAMED_LAYERS)} (blocks: all but the first and last convolution and the "
        "embeddings of timestep and size, which kohya's scripts do not read), and patterns of their names such as "
        "*.attn1.* or input_blocks.*, divided by spaces or commas",
    )
    low_rank_scale: float = additions(
        1.0, "what the additions are multiplied by, LoRA's alpha / rank", min=1e-6, max=1e6
    )
    dora: bool = additions(
        False,
        "DoRA (arXiv 2402.09353), which also learns the size of the weights; ComfyUI reads such files, diffusers "
        "overlooks the sizes",
    )

    @property
    def additions(self) -> dict[str, Any]:
        """The arguments of `add_low_rank` beside network and seed."""
        return {"rank": self.rank, "layers": self.layers, "scale": self.low_rank_scale, "dora": self.dora}
