"""What a prompt sends to the nodes is what their schemas say, whichever way it came."""

from __future__ import annotations

import importlib
from fractions import Fraction

import numpy as np
import pytest


@pytest.fixture(scope="module")
def node(comfyui):
    io = importlib.import_module("comfy_api.latest").io
    checked = importlib.import_module("indomain_guidance.nodes.inputs").checked

    class Every(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id="Every", display_name="Every Kind", category="tests",
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
            )  # fmt: skip

        @classmethod
        @checked("file")
        def execute(cls, count, name="", **more):
            return io.NodeOutput(count)

    return Every


GOOD = {"count": 4, "share": 0.5, "on": False, "name": "x", "kind": "b", "file": "not listed", "model": object()}


def test_what_the_schema_allows_comes_through(node):
    for more in ({}, {"count": np.int64(8)}, {"share": 1}, {"share": np.float32(0.25)}, {"name": "\ud800"}, {"model": 3}):
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
