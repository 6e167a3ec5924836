"""Baking guidance into a LoRA inside ComfyUI: the graph's models as the run's, the run itself, the finished file.

Nothing of the package `training/` is imported before a node runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ....guidance.errors import Problem
from ....guidance.files import DomainMetadata, read_domain_file
from ....guidance.null_text import POOLED_TEXT_ADM
from ....guidance.terms import Term
from ..models import export
from ..models.loading import load_domain_unet
from ..models.text_free import domain_info, file_key
from ..progress import RunProgress
from .execution import finish_run, finished_file
from .prior import encode_prompts, exported_dtype, prior_of_models
from .training import LATENTS

if TYPE_CHECKING:
    from ....training.baking.config import BakeConfig
    from ....training.baking.terms import MODEL, BakedTerm
    from ....training.engine.run import Result
    from ....training.prior.prior import Prior

NODE = "Bake Domain LoRA"
RUNS = "domain_baking"
# What a conditioning may hold beside the text: nothing that acts on a part of the picture or of sampling.
PLAIN = {"pooled_output"}


def config_of(values: Mapping[str, Any], model, has_domain: bool, has_terms: bool) -> BakeConfig:
    """The configuration of a run: `values` from the graph, what is connected, ComfyUI's folders and device.

    has_domain, has_terms: whether a domain model and terms are connected. Raises Problem for neither, where the
    guidance is to be baked in.
    """
    from ....training.baking.config import BakeConfig
    from ....training.engine.settings import CONNECTED_PREFIX

    whole = values.get("target") == "guided"
    if not (has_domain or has_terms or whole):
        raise Problem(f"{NODE}: expected a domain model or terms, found neither; connect one, or set target to guided.")
    folder = "diffusion_models" if values.get("train") == "all" else "loras"
    family = type(model.model.model_config).__name__
    places = {
        "base": f"{CONNECTED_PREFIX} {family}",
        # Terms alone stand in the place of a domain model; neither is read from a file.
        "domain": f"{CONNECTED_PREFIX} {'domain model' if has_domain else 'terms'}" if has_domain or has_terms else "",
        "output": str(Path(folder_paths.get_output_directory()) / RUNS / values["name"]),
        "export_to": str(_folder(folder)),
        "cache": str(Path(folder_paths.get_system_user_directory(LATENTS)) / "latents"),
        "tokenizer": str(Path(comfy.sd1_clip.__file__).with_name("sd1_tokenizer")),
        "device": str(comfy.model_management.get_torch_device()),
    }
    return BakeConfig.from_mapping({**values, **places}).absolute()


def _folder(name: str) -> Path:
    """ComfyUI's folder of that name; core lists models/unet, its older name, before models/diffusion_models."""
    paths = [Path(path) for path in folder_paths.get_folder_paths(name)]
    return next((path for path in paths if path.name == name), paths[0])


def opened(
    config: BakeConfig, model, clip, vae, domain: ModelPatcher | None, terms: Sequence[Term]
) -> tuple[Prior, MODEL | None, list[BakedTerm]]:
    """(the prior with every prompt of the run encoded, the domain model, the terms), checked before they are encoded.

    Raises Problem for models that cannot be baked or do not belong together, and layers that take no addition.
    """
    from ....guidance.networks.unet import UNet
    from ....training.baking.prompts import prompts_of
    from ....training.baking.terms import open_terms
    from ....training.domain.trainee import choose_trainable

    given = None if domain is None else model_of(domain)
    models = [None if term.model is None else model_of(term.model) for term in terms]
    captions = [about.caption or "" for _, about in filter(None, (given, *models))]
    prior = prior_of_models(model, clip, vae, captions, NODE)
    baked = terms_of(terms, models, prior)
    open_terms(config, prior, given, baked)
    with torch.device("meta"):
        unet = UNet(prior.config)
    choose_trainable(unet, config.train, config.additions)
    prompts = prompts_of(config, prior.latent_format)
    encode_prompts(prior, clip, [*captions, *prompts, *config.sample_prompts])
    return prior, given, baked


def model_of(model: ModelPatcher) -> tuple[dict[str, Tensor], DomainMetadata]:
    """A MODEL's UNet as weights and metadata, its patches baked in. Raises Problem for other kinds of models."""
    info = domain_info(model)
    config = info.metadata.config if info is not None and info.metadata is not None else None
    if config is None:
        config = export.exported_config(model, NODE)
    prediction, zero_snr = export.exported_prediction(model, NODE)
    facts = {"latent_format": export.exported_latent_format(model, NODE), "zero_snr": zero_snr}
    if info is not None and not model.patches and Path(info.path).is_file():
        weights, known = read_domain_file(info.path)
    else:
        exported = export.exported_state_dict(model, exported_dtype(model))
        weights = {file_key(key): tensor for key, tensor in exported.items()}
        known = info.metadata if info is not None and info.metadata is not None else DomainMetadata(config)
    # What a patch such as Model Sampling Discrete says about the MODEL holds, not what its file says.
    return weights, replace(known, prediction_type=prediction, **facts)


def terms_of(terms: Sequence[Term], models: Sequence[MODEL | None], prior: Prior) -> list[BakedTerm]:
    """Terms of Guidance Term as those of a baking. Raises Problem for conditionings that are not plain text.

    models: those of the terms, None for the prior.
    """
    from ....training.baking.terms import BakedTerm, domain_term

    found = []
    for term, model in zip(terms, models):
        more: dict[str, Any] = {"reference": term.reference, "shaping": term.shaping}
        if term.cond is not None:
            more["text"] = _text_of(term, prior)
        if model is None:
            found.append(BakedTerm(term.name, term.weight, **more))
        else:
            source = f"The model of term {term.name!r}"
            found.append(domain_term(term.name, term.weight, model, prior, source, **more))
    return found


def _text_of(term: Term, prior: Prior):
    from ....training.prior.text_encoders import Text

    (tensor, options), *rest = term.cond
    unusual = {name for name, value in options.items() if value is not None} - PLAIN
    if rest or unusual or not isinstance(tensor, Tensor) or tensor.shape[-1] != prior.config.context_dim:
        what = f"one with {min(unusual)}" if unusual else "several in one" if rest else "another model's"
        raise Problem(
            f"{NODE}: expected term {term.name!r} with the plain text of one CLIP Text Encode of the prior's CLIP, "
            f"found {what}; what acts on a part of a picture or of sampling cannot be baked in."
        )
    has_pooled = prior.config.adm_in_channels in POOLED_TEXT_ADM
    pooled = options.get("pooled_output") if has_pooled else None
    return Text(_plain(tensor), None if pooled is None else _plain(pooled))


def _plain(tensor: Tensor) -> Tensor:
    return tensor[:1].detach().float().cpu().clone()


def run(
    config: BakeConfig, prior: Prior, domain: MODEL | None, terms: Sequence[BakedTerm], resume: bool | str
) -> tuple[Result, list[str]]:
    """Bake; (result, warnings) when the run is finished (`finish_run`). Call it outside inference mode."""
    from ....training.baking.bake import bake

    progress = RunProgress()

    def learn() -> Result:
        return bake(
            config,
            resume=resume,
            base=prior,
            domain=domain,
            terms=terms,
            listener=progress,
            should_stop=progress.should_stop,
        )

    return finish_run(NODE, config, progress, learn)


def load_baked(config: BakeConfig, model) -> tuple[Any, Any]:
    """The finished file as (MODEL, LORA_MODEL): the prior with the LoRA at strength 1, or the whole UNet alone."""
    path = finished_file(config)
    if config.train == "all":
        why = f"{NODE}: all weights were trained, so there is no LoRA; use the model output."
        return load_domain_unet(str(path)), ExecutionBlocker(why)
    lora = comfy.utils.load_torch_file(str(path), safe_load=True)
    return comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0.0)[0], lora
