"""What a prompt sends to the nodes is what their schemas say, whichever way it came."""

from __future__ import annotations

import importlib
from fractions import Fraction

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def own_folders(comfyui, monkeypatch):
    """Model folders that are registered here are gone afterwards."""
    folder_paths = importlib.import_module("folder_paths")
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))


@pytest.fixture(scope="module")
def node(comfyui):
    io = importlib.import_module("comfy_api.latest").io
    checked = importlib.import_module("indomain_guidance.nodes.inputs").checked

    class Every(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id="Every",
                display_name="Every Kind",
                category="tests",
                inputs=[
                    io.Int.Input("count", default=1, min=1, max=8),
                    io.Float.Input("share", default=0.5, min=0.0, max=1.0),
                    io.Boolean.Input("on", default=True),
                    io.String.Input("name", default=""),
                    io.Combo.Input("kind", options=["a", "b"], default="a"),
                    io.Combo.Input("file", options=["listed"]),
                    io.Model.Input("model", optional=True),
                ],
                outputs=[io.Int.Output()],
            )

        @classmethod
        @checked("file")
        def execute(cls, count, name="", **more):
            return io.NodeOutput(count)

    return Every


GOOD = {"count": 4, "share": 0.5, "on": False, "name": "x", "kind": "b", "file": "not listed", "model": None}


def test_what_the_schema_allows_comes_through(node):
    for more in (
        {},
        {"count": np.int64(8)},
        {"share": 1},
        {"share": np.float32(0.25)},
        {"name": "\ud800"},
        {"model": None},
    ):
        assert node.execute(**{**GOOD, **more}).result == ({**GOOD, **more}["count"],)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"count": 9}, "count to be a whole number from 1 to 8, found 9"),
        ({"count": 0}, "from 1 to 8, found 0"),
        ({"count": 2.0}, "a whole number"),
        ({"count": True}, "a whole number from 1 to 8, found True"),
        ({"count": "4"}, "found '4'"),
        ({"share": float("nan")}, "share to be a finite number from 0.0 to 1.0, found nan"),
        ({"share": float("inf")}, "found inf"),
        ({"share": Fraction(3, 2)}, "from 0.0 to 1.0"),
        ({"on": 1}, "on to be true or false, found 1"),
        ({"name": 5}, "name to be a text of at most 100,000 characters, found 5"),
        ({"name": "x" * 100_001}, "at most 100,000 characters, found 'xxx"),
        ({"kind": "c"}, "kind to be one of a, b, found 'c'"),
        ({"kind": ["a"]}, "one of a, b"),
        ({"file": 7}, "file to be a text"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(node, wrong, words):
    with pytest.raises(ValueError, match="^Every Kind: expected .*" + words) as refused:
        node.execute(**{**GOOD, **wrong})
    assert len(str(refused.value)) < 400


# ---- sockets --------------------------------------------------------------------------------------------------------

LITERALS = ["abc", "", 5, 0, 2.5, True, [], ["a", "b", "c"], {}, {"samples": 5}, [[1, 2]]]
SOCKETS = {
    "MODEL",
    "CONDITIONING",
    "VAE",
    "CLIP",
    "LATENT",
    "IMAGE",
    "INDOMAIN_GUIDANCE_TERMS",
    "INDOMAIN_GENERATOR",
    "INDOMAIN_TRAINING_OPTIONS",
    "INDOMAIN_ADAPT_OPTIONS",
}


@pytest.fixture
def sockets_of_the_pack(comfyui, monkeypatch):
    """(node, input) for every input of the pack that takes a link alone."""
    folder_paths = importlib.import_module("folder_paths")
    # The pack's folders are for this test alone: others register their own.
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folders = importlib.import_module("indomain_guidance.nodes.comfy_internals.models.folders")
    folders.DOMAIN_UNETS.register()
    folders.GENERATORS.register()
    nodes = importlib.import_module("indomain_guidance.nodes").node_classes()
    found = [(node, one) for node in nodes for one in node.GET_SCHEMA().inputs if str(one.io_type) in SOCKETS]
    assert {str(one.io_type) for _, one in found} == SOCKETS and len({node for node, _ in found}) >= 10
    return found


def given_without(node, wrong):
    """Inputs of a node that are what they should be, as far as they are no sockets, and one that is not."""
    values = {}
    for one in node.GET_SCHEMA().inputs:
        if str(one.io_type) not in SOCKETS and not one.optional:
            values[one.id] = getattr(one, "default", None)
            if values[one.id] is None:
                values[one.id] = one.options[0] if getattr(one, "options", None) else "none"
    values |= wrong
    return {key: [value] for key, value in values.items()} if node.GET_SCHEMA().is_input_list else values


def test_a_literal_in_any_socket_of_the_pack_is_refused_in_a_sentence(sockets_of_the_pack):
    check = importlib.import_module("indomain_guidance.nodes.inputs").check_inputs
    problem = importlib.import_module("indomain_guidance.guidance.errors").Problem
    for node, one in sockets_of_the_pack:
        files = tuple(each.id for each in node.GET_SCHEMA().inputs if each.id.endswith(("_name", "checkpoint")))
        for literal in LITERALS:
            kind = str(one.io_type)
            right = (literal == [] and kind.endswith("TERMS")) or (
                isinstance(literal, dict) and kind.endswith("OPTIONS")
            )
            if right:
                continue
            with pytest.raises(
                problem, match=f": expected {one.id} to be .*, from another node's output, found"
            ) as refused:
                check(node, given_without(node, {one.id: literal}), files)
            assert str(refused.value).startswith(node.GET_SCHEMA().display_name) and "\n" not in str(refused.value)
        if not one.optional:
            with pytest.raises(problem, match=f": expected {one.id} to be .*found None"):
                check(node, given_without(node, {one.id: None}), files)


def test_every_node_with_sockets_checks_them(sockets_of_the_pack):
    for node, one in sockets_of_the_pack:
        if not one.optional:
            values = given_without(
                node,
                {
                    each.id: "abc"
                    for each in node.GET_SCHEMA().inputs
                    if str(each.io_type) in SOCKETS and not each.optional
                },
            )
            with pytest.raises(ValueError, match=", from another node's output, found 'abc'"):
                node.execute(**values)


def test_nothing_over_a_link_is_the_default_of_an_optional_input(comfyui):
    terms = importlib.import_module("indomain_guidance.nodes.terms")
    (term,) = chain = terms.GuidanceTerm.execute(name="a", weight=1.0, reference=None).result[0]
    assert term.reference is None
    (shaped,) = terms.ShapeGuidanceTerm.execute(terms=chain, mode="orthogonal", orthogonal_to=None).result[0]
    assert shaped.shaping.others == ("control",)


def test_what_other_nodes_give_comes_through(comfyui, tiny):
    import torch

    check = importlib.import_module("indomain_guidance.nodes.inputs").check_inputs
    guiders, terms = (importlib.import_module(f"indomain_guidance.nodes.{name}") for name in ("guiders", "terms"))
    term = terms.GuidanceTerm.execute("a", 1.0, model=tiny.prior(0), conditioning=[[None, {}]]).result[0]
    check(
        terms.GuidanceTerm, {"terms": term, "model": tiny.lora(tiny.prior(0), 1), "conditioning": tiny.conditioning(1)}
    )
    check(guiders.InDomainSampler, {"latent_image": tiny.latent(1), "prior": tiny.prior(0)})
    training = importlib.import_module("indomain_guidance.nodes.training")
    check(training.TrainDomainUNet, {"images": [torch.zeros(1, 8, 8, 3), torch.zeros(2, 9, 8, 3)], "options": [{}]})
    with pytest.raises(ValueError, match="expected images to be an IMAGE of at least one picture and pixel"):
        check(training.TrainDomainUNet, {"images": [torch.zeros(1, 8, 8, 3), torch.zeros(0, 8, 8, 3)]})
    with pytest.raises(ValueError, match="all finite numbers, from another node's output"):
        check(training.TrainDomainUNet, {"images": [torch.full((1, 8, 8, 3), float("nan"))]})
