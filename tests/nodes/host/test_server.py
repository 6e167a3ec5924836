"""The server's private folders: the link to the checkout is made, kept, and never takes the checkout with it."""

from __future__ import annotations

import shutil

import pytest
from indomain_guidance.nodes.host.server import PACK_NAME, ComfyServer, link_folder, unlink_folder


def make_checkout(folder):
    folder.mkdir()
    (folder / "precious.txt").write_text("kept", encoding="utf-8")
    return folder


def test_unlinking_leaves_what_the_link_points_at(tmp_path):
    checkout = make_checkout(tmp_path / "checkout")
    link_folder(tmp_path / "link", checkout)
    assert (tmp_path / "link" / "precious.txt").read_text(encoding="utf-8") == "kept"
    unlink_folder(tmp_path / "link")
    assert not (tmp_path / "link").exists() and (checkout / "precious.txt").exists()
    unlink_folder(tmp_path / "link")  # nothing there is nothing to do


@pytest.mark.parametrize("fate", ["same", "another checkout", "moved away"])
def test_a_kept_base_directory_follows_the_checkout(tmp_path, fate):
    old, base = make_checkout(tmp_path / "old"), tmp_path / "base"
    for checkout in (old, old if fate == "same" else make_checkout(tmp_path / "new")):
        server = ComfyServer(tmp_path, base, checkout=checkout)
        server.base = base
        server._prepare_base()
        if fate == "moved away":
            shutil.rmtree(old, ignore_errors=True)
    assert (base / "custom_nodes" / PACK_NAME).resolve() == checkout.resolve()
    assert (checkout / "precious.txt").exists()
    server.stop()  # a base directory that was given is kept
    assert (base / "custom_nodes" / PACK_NAME / "precious.txt").exists()
