"""The demo's reading of its workflow and its contact sheet, without a server."""

from __future__ import annotations

import pytest
from indomain_guidance.nodes.host import demo


@pytest.fixture
def workflow():
    return demo.load_workflow()


def test_columns_are_the_three_ways_of_the_demo_in_order(workflow):
    assert list(demo.columns(workflow)) == ["Prior alone", "Domain model alone", "Multi-guidance"]


def test_only_the_prompt_is_replaced_and_the_empty_base_stays(workflow):
    changed = demo.with_text(workflow, "a blue two")
    texts = {i: node["inputs"]["text"] for i, node in changed.items() if "text" in node["inputs"]}
    before = {i: node["inputs"]["text"] for i, node in workflow.items() if "text" in node["inputs"]}
    assert sorted(before.values()) == ["", "a red seven on a yellow background"]
    assert {i for i in texts if texts[i] != before[i]} == set(demo.prompt_nodes(workflow))
    assert sorted(texts.values()) == ["", "a blue two"]


def test_demo_prompts_use_only_words_that_the_mini_world_knows():
    from indomain_guidance.training.mini_world.tokens import TOKEN_IDS

    assert set(" ".join(demo.PROMPTS).split()) <= TOKEN_IDS.keys()
    assert len(set(demo.PROMPTS)) == len(demo.PROMPTS)


def test_cost_comes_from_the_nearest_sampler_that_reports_it(workflow):
    savers = demo.columns(workflow)
    sampler = {i: node["class_type"] for i, node in workflow.items()}
    outputs = {i: {"samples_per_step": [{"value": 2.5}]} for i, kind in sampler.items() if kind == "InDomainSampler"}
    costs = {title: demo.samples_per_step(workflow, outputs, node) for title, node in savers.items()}
    assert costs == {"Prior alone": 2.0, "Domain model alone": 2.5, "Multi-guidance": 2.5}
    assert demo.samples_per_step(workflow, {}, savers["Multi-guidance"]) is None


def test_contact_sheet_places_each_image_in_its_row_and_column():
    from PIL import Image

    colours = {("one", "A"): (255, 0, 0), ("one", "B"): (0, 255, 0), ("two", "A"): (0, 0, 255), ("two", "B"): (9, 8, 7)}
    rows = [
        (text, {title: [Image.new("RGB", (64, 64), colours[text, title])] * 2 for title in "AB"})
        for text in ("one", "two")
    ]
    sheet = demo.contact_sheet(rows, ["A", "B"])
    counts = {colour: number for number, colour in sheet.getcolors(1 << 20)}
    assert all(counts[colour] == 2 * 128 * 128 for colour in colours.values())
    middle = {colour: _middle(sheet, colour) for colour in colours.values()}
    (ax1, ay1), (bx1, by1) = middle[255, 0, 0], middle[0, 255, 0]
    (ax2, ay2), (bx2, by2) = middle[0, 0, 255], middle[9, 8, 7]
    assert ax1 == ax2 < bx1 == bx2 and ay1 == by1 < ay2 == by2


def _middle(sheet, colour) -> tuple[float, float]:
    import numpy as np

    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(-1))
    return float(columns.mean()), float(rows.mean())
