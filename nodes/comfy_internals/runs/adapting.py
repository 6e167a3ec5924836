"""Adapting a generator inside ComfyUI: the graph's models as the critic, progress and cancel, folders, memory.

What it shares with training a domain model comes from `training`. Nothing of the package `training/` is imported before
a node runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import folder_paths
import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ....guidance.distillation.critic import PROMPTS
from ....guidance.distillation.methods import METHODS
from ....guidance.errors import Problem
from ....guidance.schedules import Constant
from ....guidance.terms import Term
from ..models.domain_info import domain_info
from ..models.generators import GraphGenerator, generator_folder
from .critic import NODE, CriticInputs, ignored_hooks, native_side
from .training import Progress, check_claim, finish_run

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ....training.adaptation.config import AdaptConfig
    from ....training.engine.engine import Result

RUNS = "generator_adaptation"


def conditioning_signature(conditioning: list) -> str:
    """What a CONDITIONING is known again by (`training.adaptation.config.same_prompt`), in hex: WHAT-WHERE.

    WHAT: digest of its numbers, texts and shapes. WHERE: 8 random projections of its tensors, whose distance says how
    far two conditionings lie apart, so that the last bits of another driver or torch do not make it another one.
    """
    digest, tensors = hashlib.sha256(), []

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(repr(tuple(value.shape)).encode())
            tensors.append(value)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                if value[key] is not None:  # what a version of ComfyUI has a name for, and nobody set
                    digest.update(str(key).encode())
                    add(value[key])
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        elif isinstance(value, (str, int, float, bool, type(None))):
            digest.update(repr(value).encode())

    add(conditioning)
    where = torch.zeros(8, dtype=torch.float64)
    for index, tensor in enumerate(tensors):
        flat = tensor.detach().to("cpu", torch.float64).flatten()
        random = torch.Generator().manual_seed(index)
        for at in range(len(where)):
            where[at] += torch.randn(len(flat), generator=random).double() @ flat / max(1, len(flat)) ** 0.5
    return f"{digest.hexdigest()[:6]}-{where.half().numpy().astype('<f2').tobytes().hex()}"


def prompt_texts(prompt: Mapping[str, Any] | None) -> dict[str, str]:
    """What the running node's conditionings say, by the name of the input, where a node with the text made them.

    prompt: the graph in API format (ComfyUI's hidden PROMPT).
    """
    context = get_executing_context()
    own = (prompt or {}).get("" if context is None else context.node_id, {})
    texts = {}
    for name, link in own.get("inputs", {}).items():
        maker = prompt.get(str(link[0]), {}).get("inputs", {}) if isinstance(link, list) and link else {}
        text = maker.get("text", maker.get("text_g"))
        if isinstance(text, str) and text.strip():
            texts[name] = " ".join(text.split())
    return texts


def places(
    name: str, generator: GraphGenerator, critic: CriticInputs, texts: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What the graph decides of a configuration: what is connected, where files go, what is computed on.

    Prompts are conditionings here, and stand in it by a signature, behind their text where that is known
    (`prompt_texts`): a run goes on only with the same ones, wherever in the graph their texts stand.
    """
    from ....training.engine.settings import CONNECTED_PREFIX

    def connected(what: str) -> str:
        conditioning, text = getattr(critic, what), (texts or {}).get(what)
        if conditioning is None:
            return ""
        return f"{text or CONNECTED_PREFIX} [{conditioning_signature(conditioning)}]"

    found = domain_of(critic.terms)
    domain = {} if found is None else {"domain": found[0], "domain_weight": found[1]}
    if critic.terms and found is None:
        models = (model_name(critic.model if term.model is None else term.model) for term in critic.terms)
        domain = {"domain": f"{CONNECTED_PREFIX} {', '.join(models)}"}
    negative = ", unwanted ".join(filter(None, map(connected, ("negative", "unwanted"))))
    return {
        "generator": generator.source,
        "base": f"{CONNECTED_PREFIX} {type(critic.model.model.model_config).__name__}",
        "prompt": connected("positive"),
        "negative": negative,
        "source_prompt": connected("source"),
        "domain": "",
        **domain,
        "vae": "",
        "tokenizer": "",
        "output": str(Path(folder_paths.get_output_directory()) / RUNS / name),
        "export_to": str(generator_folder()),
        "device": str(comfy.model_management.get_torch_device()),
    }


def finished_file(config: AdaptConfig) -> Path:
    """Where the finished file of a run is put for ComfyUI."""
    return Path(config.export_to) / f"{config.name}.safetensors"


def check_name(config: AdaptConfig) -> None:
    """Refuse to replace a generator that another run made. Raises FileProblem."""
    check_claim(config, finished_file(config))


def run(
    config: AdaptConfig, generator: GraphGenerator, critic: CriticInputs, resume: bool | str
) -> tuple[Result, list[str]]:
    """Adapt; (result, warnings) when the run is finished.

    A cancelled run is saved, and then ends as ComfyUI's other nodes end when they are cancelled. Raises ValueError in
    one sentence for everything a user can do something about.
    """
    from ....training.adaptation.adapt import adapt

    for name, words in PROMPTS.items():
        # The negative conditioning cannot replace an unwanted one: e_u - e_unwanted would be zero.
        if config.needs(name) and getattr(critic, name) is None:
            raise Problem(
                f"{NODE}: expected a conditioning with {words}, which the method {config.method} compares with, found "
                f"none; connect one to {name}."
            )
    progress = Progress()
    for hook in ignored_hooks(critic.model):
        progress.warnings.append(f"{hook} on the model changes sampling, which does not take place here: ignored.")
    method = METHODS[config.method]
    # Each image may be judged beside the source's.
    pairs = config.directional or config.reconstruction or method.compares_with_frozen()
    latents = config.batch_size * (2 if pairs else 1)

    def learn() -> Result:
        return critic.run(
            config.resolution or native_side(critic.model),
            latents,
            (config.t_min, config.t_max),
            lambda judge, encode: adapt(
                config,
                resume=resume,
                generator=generator.loaded(),
                critic=judge,
                encode=encode,
                listener=progress,
                should_stop=progress.should_stop,
            ),
            learns=method.learns,
            cancelled=progress.cancel,
        )

    return finish_run(NODE, config, progress, learn)


def model_name(model: ModelPatcher) -> str:
    """What a MODEL can be called in a file: the domain model's file or the family, and whether it is patched."""
    info = domain_info(model)
    name = type(model.model.model_config).__name__ if info is None else Path(info.path).name
    return f"{name} with {len(model.patches)} patched weights" if model.patches else name


def domain_of(terms: Sequence[Term]) -> tuple[str, float] | None:
    """(file, weight) of the one domain model that these terms consist of, which a configuration has words for; None for
    other terms.
    """
    if len(terms) != 1:
        return None
    (term,) = terms
    info = None if term.model is None else domain_info(term.model)
    plain = term.reference is None and term.cond is None and term.shaping is None
    is_file = info is not None and info.form != "full" and Path(info.path).is_file() and not term.model.patches
    return (info.path, term.weight.value) if plain and is_file and isinstance(term.weight, Constant) else None
