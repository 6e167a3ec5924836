"""The graph editor in a real browser: the shared workflow opens from the template browser's address and runs."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SD15 = "v1-5-pruned-emaonly-fp16.safetensors"
# No sandbox, because CI runs as root; the rest keeps the browser from looking for anything on the internet.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: start with `python run.py test`")
    path = os.environ.get("INDOMAIN_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser found ({', '.join(BROWSERS)}): install chromium, or name one in INDOMAIN_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(server, browser):
    """A page with the editor loaded; what it logs as an error is kept in `page.problems`."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    yield page
    context.close()


def open_template(page, url: str, name: str) -> None:
    """Open the editor with a template of this pack, the way its template browser links it."""
    page.goto(f"{url}/?template={name}&source=in-domain-guidance", wait_until="domcontentloaded")
    page.wait_for_function("() => window.app?.graph?.nodes?.length > 3", timeout=120_000)
    # The graph is complete when its number of nodes no longer changes.
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 1.0:
        count = page.evaluate("() => window.app.graph.nodes.length")
        if count != last:
            last, since = count, time.monotonic()
        page.wait_for_timeout(100)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "workflows").glob("*.json")))
def test_template_opens_and_says_the_same_as_the_api_workflow(server, page, name):
    open_template(page, server.url, name)
    shared = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    unknown = page.evaluate(
        "() => window.app.graph.nodes.filter(n => !(n.type in window.LiteGraph.registered_node_types)).map(n => n.type)"
    )
    assert [kind for kind in unknown if kind not in ("Note", "MarkdownNote")] == []
    # Newer editors mark nodes whose file the server has not.
    wanting = {node["class_type"] for node in shared.values() if SD15 in node["inputs"].values()}
    assert set(page.evaluate("() => window.app.graph.nodes.filter(n => n.has_errors).map(n => n.type)")) <= wanting
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def essence(graph: dict) -> dict:
        return {
            i: (node["class_type"], {k: v for k, v in node["inputs"].items() if v not in (None, "")})
            for i, node in graph.items()
        }

    # Options that a node got after the graph was saved come last and keep their defaults.
    for i, node in prompt.items():
        known = shared.get(i, node)["inputs"]
        if node["class_type"] == "InDomainAdaptOptions":
            node["inputs"] = {name: value for name, value in node["inputs"].items() if name in known}
    assert essence(prompt) == essence(shared)
    # Below this scale the classic editor draws no text.
    assert page.evaluate("() => window.app.canvas.ds.scale") >= 0.6
    assert unreadable(page.evaluate(CLASSIC_BOXES)) == []
    use_vue_nodes(page, True)
    try:
        assert unreadable(page.evaluate(VUE_BOXES)) == []
    finally:
        use_vue_nodes(page, False)
    assert page.problems == []


# Groups and nodes as the editor shows them: [title, left, top, right, bottom]; notes lie outside of groups.
NODES = "window.app.graph.nodes.filter(n => n.type !== 'MarkdownNote')"
GROUPS = """window.app.graph.groups.map(g => {
    const [x, y, w, h] = g.bounding ?? g._bounding;
    return [g.title, x, y, x + w, y + h];
})"""
CLASSIC_BOXES = f"""() => ({{groups: {GROUPS}, nodes: {NODES}.map(n => {{
    const [x, y] = n.pos, [w, h] = n.size;
    return [n.title, x, y - 30, x + w, y + (n.flags?.collapsed ? 0 : h)];
}})}})"""
VUE_BOXES = f"""() => {{
    const {{scale, offset}} = window.app.canvas.ds, canvas = window.app.canvas.canvas.getBoundingClientRect();
    const x = value => (value - canvas.left) / scale - offset[0], y = value => (value - canvas.top) / scale - offset[1];
    return {{groups: {GROUPS}, nodes: {NODES}.map(n => {{
        const box = document.querySelector(`[data-node-id="${{n.id}}"]`).getBoundingClientRect();
        return [n.title, x(box.left), y(box.top), x(box.right), y(box.bottom)];
    }})}};
}}"""


def use_vue_nodes(page, wanted: bool) -> None:
    """Nodes 2.0, or the classic ones, of the graph that is open."""
    page.evaluate("wanted => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', wanted)", wanted)
    if wanted:
        page.wait_for_function(
            '() => window.app.graph.nodes.every(n => document.querySelector(`[data-node-id="${n.id}"]`))',
            timeout=60_000,
        )
        page.wait_for_timeout(1000)


def unreadable(shown: dict) -> list[str]:
    """Nodes that lie outside of their group, or over each other; a few pixels do not matter."""
    wrong = []
    for index, (title, left, top, right, bottom) in enumerate(shown["nodes"]):
        inside = [
            group
            for group, x, y, x2, y2 in shown["groups"]
            if x - 2 <= left and y - 2 <= top and right <= x2 + 2 and bottom <= y2 + 2
        ]
        if len(inside) != 1:
            wrong.append(f"{title} lies in {inside or 'no group'}: {left:.0f} {top:.0f} {right:.0f} {bottom:.0f}")
        for other, left2, top2, right2, bottom2 in shown["nodes"][:index]:
            if left + 2 < right2 and left2 + 2 < right and top + 2 < bottom2 and top2 + 2 < bottom:
                wrong.append(f"{title} covers {other}")
    return wrong


@pytest.mark.parametrize("name", ["in_domain_text_to_image", "adapt_generator"])
def test_workflow_runs_from_the_editor(server, page, tmp_path, name):
    open_template(page, server.url, name)
    # Fewer steps than the workflow has, set in the widgets as a person would.
    page.evaluate(
        "() => window.app.graph.nodes.forEach(n => n.widgets?.filter(w => w.name === 'steps')"
        ".forEach(w => { w.value = 3; w.callback?.(3); }))"
    )
    before = set(server.client.get("/history"))
    button = page.get_by_test_id("queue-button")
    button.first.click()
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        new = [entry for key, entry in server.client.get("/history").items() if key not in before]
        if new:
            break
        page.wait_for_timeout(250)
    assert new, "the editor's Run button queued nothing"
    assert new[0]["status"]["status_str"] == "success", new[0]["status"]
    pictures = [image for output in new[0]["outputs"].values() for image in output.get("images", [])]
    assert len(pictures) >= 3
    # The pictures appear in the graph's own preview.
    page.wait_for_function(
        "() => window.app.graph.nodes.filter(n => n.type === 'SaveImage' && n.imgs?.length).length >= 3", timeout=60_000
    )
    page.screenshot(path=str(tmp_path / "editor.png"))
    assert page.problems == []
