"""What is said about a prompt that ComfyUI refuses."""

from __future__ import annotations

from indomain_guidance.nodes.host.client import describe_rejection


def test_refusal_names_node_and_input():
    body = {
        "error": {"message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {"4": {"class_type": "KSampler", "errors": [{"message": "Value too big", "details": "steps"}]}},
    }
    assert describe_rejection(body, {}) == "node 4 (KSampler): Value too big: steps"
    assert describe_rejection({"error": body["error"]}, {}) == "Prompt outputs failed validation"
    assert describe_rejection({"error": "plain"}, {}) == "plain"
    assert "without saying why" in describe_rejection({}, {})
