"""The guidance that is baked: terms that need no prompt of the user's, from a domain model and a file of terms.

What plain CFG of scale w_c makes of a model that adds G = sum_i w_i S_i(D_i - R_i) to every prediction is
(u + G) + w_c ((c + G) - (u + G)) = u + G + w_c (c - u): in-domain guidance (arXiv 2312.08195), as long as G is the same
for c and u.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ...guidance.combination import Guidance
from ...guidance.errors import GuidanceError, Problem
from ...guidance.files import DomainMetadata, FileProblem, check_latent_format, prior_content_hash, read_domain_file
from ...guidance.schedules import Constant, Interval, Weight, as_weight, weight_from_json
from ...guidance.shaping import Shaping
from ...guidance.shapings import make_shaping
from ...guidance.terms import Source, Term
from ..engine.settings import CONNECTED_PREFIX, ConfigProblem
from ..engine.small_files import read_values
from ..mini_world.assets import domain_unets_dir
from ..prior.prior import Prior
from ..prior.text_encoders import Text
from .config import BakeConfig

CONTROL = "control"  # the prompt's own term, which none of these may be called or read
MODEL = tuple[dict[str, Tensor], DomainMetadata]
_FIELDS = {"name", "weight", "model", "prompt", "reference", "shaping"}


@dataclass(frozen=True, eq=False)
class BakedTerm:
    """One term w_i(sigma) S_i(D_i - R_i). model: weights and metadata of the UNet of D_i, None for the prior's.

    text: what D_i is conditioned on, None for the empty prompt. reference: the name of the term whose prediction is
    R_i, None for the prior on the empty prompt. shaping: S_i, None for none.
    """

    name: str
    weight: Weight
    model: MODEL | None = None
    text: Text | None = None
    reference: str | None = None
    shaping: Shaping | None = None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What decides its prediction, in plain values: a run goes on only with the same."""
        text = "" if self.text is None else hashlib.sha256(self.text.context.float().numpy().tobytes()).hexdigest()
        model = "prior" if self.model is None else prior_content_hash(self.model[0])
        return {
            "name": self.name,
            "weight": self.weight.to_json(),
            "model": model,
            "text": text,
            "reference": self.reference,
            "shaping": repr(self.shaping),
        }


def open_terms(
    config: BakeConfig, prior: Prior, domain: MODEL | None = None, more: Sequence[BakedTerm] = ()
) -> list[BakedTerm]:
    """The terms that the settings name. domain: instead of the file `config.domain`; more: terms beside them.

    Raises FileProblem for files and for models that do not belong to the prior, ConfigProblem for terms that do not
    fit together.
    """
    terms, is_connected = [], config.domain.startswith(CONNECTED_PREFIX)
    if domain is None and is_connected and not more:
        raise ConfigProblem(
            f"domain: expected a file, found '{config.domain}', what was connected in ComfyUI; continue there, or give "
            "--domain FILE with the domain model that was used."
        )
    if domain is not None or (config.domain and not is_connected):
        source = "The domain model" if is_connected or not config.domain else config.domain
        start, end = config.domain_start, config.domain_end
        weight = as_weight(config.domain_weight)
        if (start, end) != (0.0, 1.0):
            weight = Interval(weight, start, end)
        terms.append(domain_term("domain", weight, domain or _read_model(config.domain), prior, source))
    if config.terms:
        terms += _read_terms(config.terms, prior)
    terms += more
    check_terms(terms)
    return terms


def domain_term(name: str, weight: Weight, model: MODEL, prior: Prior, source: str, **more: Any) -> BakedTerm:
    """A term of a domain model, which must belong to the prior. Raises FileProblem; source: what to call its file."""
    _, metadata = model
    check_latent_format(metadata, prior.latent_format, source)
    if metadata.prior_hash and metadata.prior_hash != prior.prior_hash:
        raise FileProblem(
            f"{source}: expected a domain model of the prior {prior.name}, found one of another checkpoint (content "
            f"{metadata.prior_hash[:12]} instead of {prior.prior_hash[:12]}); use the prior that it was made of, "
            "without LoRAs."
        )
    found = (metadata.config.in_channels, metadata.config.out_channels)
    if found != (prior.config.in_channels, prior.config.out_channels):
        raise FileProblem(
            f"{source}: expected a model of {prior.config.in_channels} input and {prior.config.out_channels} output "
            f"channels, as the prior has, found {found[0]} and {found[1]}; use a domain model of this prior."
        )
    if metadata.null_text == "none" and more.get("text") is None and metadata.caption is not None:
        more["text"] = prior.encode_text([metadata.caption])
    return BakedTerm(name, weight, model, **more)


def check_terms(terms: Sequence[BakedTerm]) -> None:
    """Raise ConfigProblem for terms whose sum is not the same for every prompt, and for names that do not fit."""
    for term in terms:
        if term.name == CONTROL or CONTROL in (term.reference, *(term.shaping.others if term.shaping else ())):
            raise ConfigProblem(
                f"terms: expected terms that need no prompt, found {term.name!r}, which is called or reads "
                f"{CONTROL!r}, the prompt's own; leave it out."
            )
    try:
        named = [Term(term.name, None, None, term.weight, term.reference, term.shaping) for term in terms]
        if named:
            Guidance(Source(None), named)
    except GuidanceError as problem:
        raise ConfigProblem(f"terms: {problem}") from None


def check_not_nothing(config: BakeConfig, terms: Sequence[BakedTerm], prompts: Sequence[str]) -> None:
    """Raise ConfigProblem where the target is what the prior predicts already."""
    if not all(_is_zero(term.weight) for term in terms):
        return
    if config.target == "domain":
        raise ConfigProblem("domain_weight: expected a guidance to bake in, found no weight but 0; 1.5 is usual.")
    if config.control_weight == 1:
        raise ConfigProblem(
            "control_weight: expected another number than 1, with which target guided bakes nothing in without a "
            "domain model, found 1; 3 to 7 are usual."
        )
    if not prompts or config.empty_share == 1:
        raise ConfigProblem(
            "target: expected prompts to match guided at, as without a domain model nothing else is baked in, found "
            f"{'an empty_share of 1' if prompts else 'none'}; name some in prompt_list or prompt_file."
        )


def _is_zero(weight: Weight) -> bool:
    if isinstance(weight, Interval):
        return weight.outside == 0 and _is_zero(as_weight(weight.value))
    return weight == Constant(0.0)


def _read_model(path: str) -> MODEL:
    shipped = domain_unets_dir() / f"{path}.safetensors"
    return read_domain_file(shipped if os.path.basename(path) == path and shipped.is_file() else path)


def _read_terms(path: str, prior: Prior) -> list[BakedTerm]:
    """The terms of a file of settings with one field, terms. Raises FileProblem, naming the file and the term."""
    values = read_values(path)
    entries = values.get("terms")
    if not isinstance(entries, list) or not entries or len(values) > 1:
        fields = ", ".join(values) or "none"
        raise FileProblem(
            f"{path}: expected a list of guidance terms in the field terms and nothing else, found the fields {fields}."
        )
    return [_read_term(entry, path, prior) for entry in entries]


def _read_term(entry: Any, path: str, prior: Prior) -> BakedTerm:
    if not isinstance(entry, Mapping) or not {"name", "weight"} <= entry.keys() <= _FIELDS:
        raise FileProblem(
            f"{path}: expected terms of name and weight, and of model, prompt, reference and shaping as needed, found "
            f"{entry!r:.120}."
        )
    given = {key: value for key, value in entry.items() if value is not None}
    texts = {key: given.get(key, "") for key in ("name", "model", "prompt", "reference")}
    for key, text in texts.items():
        if not isinstance(text, str) or (key == "name" and not text):
            raise FileProblem(f"{path}: expected the {key} of a term as a text, found {text!r:.80}.")
    shaped = given.get("shaping", {})
    if not isinstance(shaped, Mapping) or (shaped and not isinstance(shaped.get("name"), str)):
        raise FileProblem(
            f"{path}: term {texts['name']!r:.80}: expected a shaping as its name and options, found {shaped!r:.80}."
        )
    try:
        shaped = dict(shaped)
        more: dict[str, Any] = {
            "text": prior.encode_text([texts["prompt"]]) if texts["prompt"] else None,
            "reference": texts["reference"] or None,
            "shaping": make_shaping(shaped.pop("name"), **shaped) if shaped else None,
        }
        weight = weight_from_json(entry["weight"])
    except FileProblem:
        raise
    except (Problem, TypeError, ValueError) as problem:
        raise FileProblem(f"{path}: term {texts['name']!r:.80}: {problem}") from None
    if not texts["model"]:
        return BakedTerm(texts["name"], weight, **more)
    file = texts["model"]
    if not (domain_unets_dir() / f"{file}.safetensors").is_file():
        file = os.path.join(Path(path).parent, file)
    return domain_term(texts["name"], weight, _read_model(file), prior, file, **more)
