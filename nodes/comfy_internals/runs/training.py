"""Training a domain model inside ComfyUI: where its files go, the run itself, the finished file as a MODEL.

Nothing of the package `training/` is imported before a node runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import folder_paths

from ....guidance.files import read_keys
from ....training.mini_world import MINI_WORLD
from ..models.folders import DOMAIN_UNETS
from ..models.loading import load_domain_unet, load_mini_world_prior
from ..progress import RunProgress
from .execution import finish_run, finished_file
from .prior import NODE

if TYPE_CHECKING:
    from ....training.domain.config import TrainConfig
    from ....training.engine.run import Result
    from ....training.prior.prior import Prior

RUNS = "domain_training"
LATENTS = "indomain_guidance"


def config_of(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a run: `values` from the graph, and ComfyUI's folders and device."""
    from ....training.domain.config import TrainConfig

    folder = DOMAIN_UNETS.own()
    if values.get("train") == "low_rank" and values.get("form") == "full":
        # The baseline's file is an ordinary LoRA.
        folder = Path(folder_paths.get_folder_paths("loras")[0])
    places = {
        "output": str(Path(folder_paths.get_output_directory()) / RUNS / values["name"]),
        "export_to": str(folder),
        # Encoded images, for all runs, in a folder that no prompt can name and no client can read.
        "cache": str(Path(folder_paths.get_system_user_directory(LATENTS)) / "latents"),
        "vae": "",
        "tokenizer": str(Path(comfy.sd1_clip.__file__).with_name("sd1_tokenizer")),
        "device": str(comfy.model_management.get_torch_device()),
    }
    return TrainConfig.from_mapping({**values, **places}).absolute()


def run(config: TrainConfig, prior: Prior | None, resume: bool | str) -> tuple[Result, list[str]]:
    """Train; (result, warnings) when the run is finished (`finish_run`). Call it outside inference mode."""
    from ....training.domain.train import train

    progress = RunProgress()

    def learn() -> Result:
        return train(config, resume=resume, base=prior, listener=progress, should_stop=progress.should_stop)

    return finish_run(NODE, config, progress, learn)


def load_trained(config: TrainConfig, model):
    """The finished file as a MODEL; a LoRA (the low-rank baseline) on the prior it was trained on."""
    path = finished_file(config)
    if not any(key.startswith("lora_") for key in read_keys(path)):
        return load_domain_unet(str(path))
    if model is None and config.base == MINI_WORLD:
        model = load_mini_world_prior()
    elif model is None:
        model = comfy.sd.load_checkpoint_guess_config(config.base, output_vae=False, output_clip=False)[0]
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), 1.0, 0.0)[0]
