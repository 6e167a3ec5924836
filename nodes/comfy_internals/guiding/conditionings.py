"""Which conditionings a guidance needs, and by which names ComfyUI knows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.sampler_helpers

from ....guidance.combination import Guidance
from ....guidance.schedules import Constant
from ....guidance.terms import BASE, Source, Term
from . import compatibility
from .calls import NEGATIVE, POSITIVE, Conditionings
from .gaps import may_have_gaps


def filled_in(terms: Sequence[Term], base: Source) -> list[Term]:
    """The terms with the base's model and conditioning where they have none.

    Terms share a prediction where model and conditioning are the same objects. Where the conditioning leaves pixels out
    that the references fill, and the references differ, each term gets a list of its own.
    """
    found: list[Term] = []
    references: dict[Source, str] = {}
    for term in terms:
        term = term.on(base)
        if may_have_gaps(options for _, options in term.cond):
            reference = term.reference or BASE
            if references.setdefault(term.source, reference) != reference:
                term = dataclasses.replace(term, cond=list(term.cond))
        found.append(term)
    return found


def ever_needed(guidance: Guidance, always: Sequence[str] = ()) -> list[Source]:
    """The sources that are evaluated at some noise level: the base, and those of terms whose weight is not always 0.

    always: names of terms that count although their weight is 0.
    """
    needed = [guidance.base]
    for term in guidance.terms:
        if term.weight != Constant(0.0):
            needed += [term.source, guidance.reference(term)]
    needed += [term.source for term in guidance.terms if term.name in always]
    return list(dict.fromkeys(needed))


@dataclass(frozen=True)
class NamedConditionings:
    """The conditionings of a guidance as core names them: "negative" is the base, "positive" the prior's first other
    one, "term NAME" all else.

    names: of each source that is ever needed. of_prior: the conditionings that go through core, as nodes make them.
    of_others: those that only other models read, in core's inner form. control: the source of "positive".
    """

    names: dict[Source, str]
    of_prior: dict[str, list]
    of_others: Conditionings
    control: Source | None


def name_conditionings(guidance: Guidance, needed: Sequence[Source]) -> NamedConditionings:
    """Name the conditionings of the `needed` sources.

    One that no weight asks for stays out: core would give its areas and ControlNets to the others. Raises GuidanceError
    for a combination of areas and ControlNets that core cannot prepare.
    """
    prior, base = guidance.base.model, guidance.base.cond
    of_prior = [source for source in guidance.sources if source.model is prior and source.cond is not base]
    if not any(source in needed for source in of_prior):  # sampling hooks ask for it whatever its weight
        needed = [*needed, *of_prior[:1]]
    sources = [source for source in guidance.sources if source in needed]
    by_identity, own, others, control = {id(base): NEGATIVE}, {NEGATIVE: base}, {}, None
    # The prior's first: a conditioning that other models read too has its name from there.
    for source in sorted(sources, key=lambda source: source.model is not prior):
        if id(source.cond) in by_identity:
            continue
        name = f"term {guidance.names(source)[0]}"
        if source.model is not prior:
            others[name] = comfy.sampler_helpers.convert_cond(source.cond)
        else:
            name, control = (POSITIVE, source) if control is None else (name, control)
            own[name] = source.cond
        by_identity[id(source.cond)] = name
    names = {source: by_identity[id(source.cond)] for source in sources}
    compatibility.check_spreading(
        own.get(POSITIVE, ()),
        {" and ".join(guidance.names(source)): source.cond for source in sources if names[source] != POSITIVE},
    )
    return NamedConditionings(names, own, others, control)
