"""Adapting a generator inside ComfyUI: what the graph decides of a configuration, and the run itself.

Nothing of the package `training/` is imported before a node runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context

from ....guidance.distillation.critic import PROMPTS
from ....guidance.distillation.methods import METHODS
from ....guidance.errors import Problem
from ....guidance.files import LoadedGenerator
from ....guidance.schedules import Constant
from ....guidance.terms import Term
from ..guiding.sampling_hooks import PREDICTION_HOOKS
from ..models.folders import GENERATORS
from ..models.generators import GraphGenerator
from ..models.text_free import domain_info
from ..progress import RunProgress
from .critic import NODE, CriticInputs, native_side
from .execution import finish_run

if TYPE_CHECKING:
    from ....training.adaptation.config import AdaptConfig
    from ....training.engine.run import Result

RUNS = "generator_adaptation"


def prompt_texts(prompt: Mapping[str, Any] | None) -> dict[str, str]:
    """The texts behind the running node's conditionings, by input; prompt: the graph in API format."""
    context = get_executing_context()
    graph = prompt or {}
    own = graph.get("" if context is None else context.node_id, {})
    texts = {}
    for name, link in own.get("inputs", {}).items():
        maker = graph.get(str(link[0]), {}).get("inputs", {}) if isinstance(link, list) and link else {}
        text = maker.get("text", maker.get("text_g"))
        if isinstance(text, str) and text.strip():
            texts[name] = " ".join(text.split())
    return texts


def config_of(
    values: Mapping[str, Any], generator: GraphGenerator, critic: CriticInputs, texts: Mapping[str, str]
) -> AdaptConfig:
    """The configuration of a run: `values` from the graph, what is connected, ComfyUI's folders and device.

    Prompts stand in it for people to read (`prompt_texts`); the run itself takes the conditionings.
    """
    from ....training.adaptation.config import AdaptConfig
    from ....training.engine.settings import CONNECTED_PREFIX

    def label(what: str) -> str:
        return "" if getattr(critic, what) is None else texts.get(what, CONNECTED_PREFIX)

    found = domain_of(critic.terms)
    domain = {"domain": ""} if found is None else {"domain": found[0], "domain_weight": found[1]}
    if critic.terms and found is None:
        models = (model_name(critic.model if term.model is None else term.model) for term in critic.terms)
        domain = {"domain": f"{CONNECTED_PREFIX} {', '.join(models)}"}
    places = {
        "generator": generator.source,
        "base": f"{CONNECTED_PREFIX} {type(critic.model.model.model_config).__name__}",
        "prompt": label("positive"),
        "negative": ", unwanted ".join(filter(None, map(label, ("negative", "unwanted")))),
        "source_prompt": label("source"),
        **domain,
        "vae": "",
        "tokenizer": "",
        "output": str(Path(folder_paths.get_output_directory()) / RUNS / values["name"]),
        "export_to": str(GENERATORS.own()),
        "device": str(comfy.model_management.get_torch_device()),
    }
    return AdaptConfig.from_mapping({**values, **places})


def run(
    config: AdaptConfig, generator: GraphGenerator, critic: CriticInputs, resume: bool | str
) -> tuple[Result, list[str]]:
    """Adapt; (result, warnings) when the run is finished (`finish_run`)."""
    from ....training.adaptation.adapt import adapt

    for name, words in PROMPTS.items():
        # The negative conditioning cannot replace an unwanted one: e_u - e_unwanted would be zero.
        if config.needs(name) and getattr(critic, name) is None:
            raise Problem(
                f"{NODE}: expected a conditioning with {words}, which the method {config.method} compares with, found "
                f"none; connect one to {name}."
            )
    progress = RunProgress()
    for hook in filter(critic.model.model_options.get, PREDICTION_HOOKS):
        progress.warnings.append(f"{hook} on the model changes sampling, which does not take place here: ignored.")
    method = METHODS[config.method]
    # Each image may be judged beside the source's.
    pairs = config.directional or config.reconstruction or method.compares_with_frozen()

    def learn() -> Result:
        return critic.run(
            config.resolution or native_side(critic.model),
            config.batch_size * (2 if pairs else 1),
            (config.t_min, config.t_max),
            lambda judge, encode: adapt(
                config,
                resume=resume,
                generator=LoadedGenerator(generator.generator, generator.metadata),
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
    """(file, weight) where the terms are one domain model, which a configuration has words for; None for others."""
    if len(terms) != 1:
        return None
    (term,) = terms
    info = None if term.model is None or term.model.patches else domain_info(term.model)
    plain = term.reference is None and term.cond is None and term.shaping is None
    if info is None or info.form == "full" or not Path(info.path).is_file():
        return None
    return (info.path, term.weight.value) if plain and isinstance(term.weight, Constant) else None
