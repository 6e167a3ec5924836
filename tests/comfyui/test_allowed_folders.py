"""What prompts may name on a server that others reach: the input folder, what the owner allows, and nothing else."""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace

import pytest


@pytest.mark.parametrize(
    ("listen", "others"),
    [
        ("127.0.0.1", False),
        ("127.2.2.2", False),
        ("::1", False),
        ("0:0:0:0:0:0:0:1", False),
        ("localhost", False),
        ("LOCALHOST", False),
        ("127.0.0.1,::1", False),
        ("::ffff:127.0.0.1", False),
        ("[::1]", False),
        ("0.0.0.0", True),
        ("0.0.0.0,::", True),
        ("::", True),
        ("", True),
        ("127.0.0.1,", True),
        (",", True),
        ("127.0.0.1,192.168.1.7", True),
        ("10.0.0.1", True),
        ("fe80::1", True),
        ("::ffff:10.0.0.1", True),
        ("my-computer", True),
        ("127.0.0.1.example.org", True),
        ("127.1", True),
        ("0", True),
        (" 127.0.0.1", True),
    ],
)
def test_only_addresses_that_are_sure_to_be_the_machines_own_are_private(comfyui, listen, others):
    policy = importlib.import_module("indomain_guidance.nodes.comfy_internals.allowed_folders")
    assert policy.reached_by_others(listen) is others


@pytest.fixture
def world(comfyui, tmp_path, monkeypatch):
    """A server that others reach: an input folder with a folder of images, and secrets beside it."""
    folder_paths = importlib.import_module("folder_paths")
    policy = importlib.import_module("indomain_guidance.nodes.comfy_internals.allowed_folders")
    for name in ("input/faces/deep", "secret/pictures", "allowed/more", "home"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "secret" / "one.png").write_bytes(b"x")
    monkeypatch.setattr(policy.args, "listen", "0.0.0.0")
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.delenv(policy.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    return SimpleNamespace(
        tmp=tmp_path,
        policy=policy,
        folder_paths=folder_paths,
        pictures=importlib.import_module("indomain_guidance.nodes.comfy_internals.runs.pictures"),
        node=importlib.import_module("indomain_guidance.nodes.training").TrainDomainUNet,
    )


def refusal(world, name: str) -> str:
    with pytest.raises(ValueError) as refused:
        world.pictures.resolve_data(name)
    return str(refused.value).replace(repr(name), "NAME")


def link(there, to) -> None:
    try:
        os.symlink(to, there)
    except OSError:
        pytest.skip("no links here")


def test_what_lies_in_the_input_folder_may_be_named_in_any_way(world):
    inside = str(world.tmp / "input" / "faces")
    for name in ("faces", "./faces", "faces/", "faces/deep/..", inside, f"{inside}/../faces", "../input/faces"):
        assert world.pictures.resolve_data(name) == (inside,), name
    assert world.pictures.resolve_data(".") == (str(world.tmp / "input"),)


def test_paths_as_they_are_pasted_are_found(world, monkeypatch):
    inside = str(world.tmp / "input" / "faces")
    url = (world.tmp / "input" / "faces").as_uri()
    quoted = [f'"{inside}"', "'faces'", "\u201cfaces\u201d", f"'{inside}' ", '"faces" ']
    for name in (*quoted, url, f"file://localhost{url[7:]}"):
        assert world.pictures.resolve_data(name) == (inside,), name
    assert world.pictures.resolve_data(f"'faces'; {url}") == (inside, inside)
    (world.tmp / "input" / "'faces'").mkdir()
    assert world.pictures.resolve_data("'faces'") == (str(world.tmp / "input" / "'faces'"),)
    secret = world.tmp / "secret"
    for name in (secret.as_uri(), f"'{secret}'", f'"{secret}"', "\u201c../secret\u201d", f"'{secret}/nothing'"):
        assert "INDOMAIN_ALLOWED_FOLDERS" in refusal(world, name), name
    assert "found nothing at" in refusal(world, "file://\u2100/faces")  # no host, says Python
    monkeypatch.setattr(world.policy.args, "listen", "127.0.0.1")
    for name in (secret.as_uri(), f"'{secret}'"):
        assert world.pictures.resolve_data(name) == (str(secret),)


def test_what_lies_outside_is_refused_in_one_sentence_whether_it_is_there_or_not(world):
    link(world.tmp / "input" / "way", world.tmp / "secret")
    link(world.tmp / "input" / "file.png", world.tmp / "secret" / "one.png")
    link(world.tmp / "input" / "lost", world.tmp / "secret" / "nothing")
    link(world.tmp / "input" / "faces" / "up", "../..")
    secret = str(world.tmp / "secret")
    names = [
        secret,
        f"{secret}/nothing",
        f"{secret}/one.png",
        "/",
        "/etc",
        "/etc/passwd",
        "/nowhere/at/all",
        "..",
        "../secret",
        "faces/../../secret",
        "way",
        "way/pictures",
        "way/nothing",
        "file.png",
        "lost",
        "lost/x",
        "~",
        "~/pictures",
        "faces/up/secret",
        "faces/up/nothing",
        str(world.tmp / "input") + "x",
        str(world.tmp / "inpu"),
        "..\\secret",
        "faces\\..\\..\\secret",
        "faces\\..\\..\\nothing",
        "../secret/*.png",
        "../secret/{one,two}.png",
        "/etc/*",
        "/{etc,nothing}",
        "way/*",
        "faces/*/../../../secret",
        "way/../../secret",
    ]
    said = {name: refusal(world, name) for name in names}
    sentence = said[secret]
    assert {name: other for name, other in said.items() if other != sentence} == {}
    assert "INDOMAIN_ALLOWED_FOLDERS" in sentence and "indomain_allowed_folders" in sentence and "NAME" in sentence
    assert str(world.tmp) not in sentence and "\n" not in sentence and ". " not in sentence


def test_nothing_outside_is_looked_at(world, monkeypatch):
    looked = []
    for name in ("stat", "lstat", "scandir", "readlink", "listdir"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda path=".", *a, o=original, **k: (looked.append(str(path)), o(path, *a, **k))[1]
        )
    for name in ("/nowhere/x", "../secret/one.png", str(world.tmp / "secret" / "pictures"), "../secret/*"):
        refusal(world, name)
        assert world.node.fingerprint_inputs(image_folder=[name]) != world.node.fingerprint_inputs(image_folder=[name])
    assert not [path for path in looked if "nowhere" in path or "secret" in path]


def test_homes_of_others_and_names_of_the_environment_are_plain_names(world):
    for name in (
        "way/../secret",
        "faces/{a,..}/../secret",
        "~root",
        "~nobody-of-this-name",
        "$HOME/x",
        "%USERPROFILE%",
        "C:name",
    ):
        assert "found nothing at" in refusal(world, name)


@pytest.mark.parametrize("name", ["x\ud800", "x\0y", "/etc\0", "x" * 5000, "../" * 2000])
def test_what_can_be_no_path_is_refused_without_a_look(world, name):
    assert "which can be none" in refusal(world, name)


def test_the_owner_allows_more_by_a_variable_and_by_extra_model_paths(world, monkeypatch):
    allowed, more = world.tmp / "allowed", world.tmp / "secret" / "pictures"
    assert "INDOMAIN_ALLOWED_FOLDERS" in refusal(world, str(allowed))
    monkeypatch.setenv(world.policy.VARIABLE, os.pathsep.join(["", str(world.tmp / "not there"), str(allowed), "~"]))
    for name in (str(allowed), str(allowed / "more"), "../allowed/more", "~"):
        assert world.pictures.resolve_data(name)
    assert "found nothing at" in refusal(world, str(allowed / "nothing"))
    assert "INDOMAIN_ALLOWED_FOLDERS" in refusal(world, str(more))
    world.folder_paths.add_model_folder_path(world.policy.KEY, str(more))
    assert world.pictures.resolve_data(str(more)) == (str(more),)
    assert "INDOMAIN_ALLOWED_FOLDERS" in refusal(world, str(more.parent))


def test_a_link_to_the_input_folder_or_an_allowed_one_is_that_folder(world, monkeypatch):
    link(world.tmp / "other name", world.tmp / "allowed")
    monkeypatch.setenv(world.policy.VARIABLE, str(world.tmp / "other name"))
    for name in ("other name/more", "allowed/more"):
        assert world.pictures.resolve_data(str(world.tmp / name)) == (str(world.tmp / name),)
    link(world.tmp / "input" / "there", world.tmp / "allowed" / "more")
    assert world.pictures.resolve_data("there")


def test_on_a_server_of_ones_own_any_folder_may_be_named(world, monkeypatch):
    monkeypatch.setattr(world.policy.args, "listen", "127.0.0.1,::1")
    assert world.policy.allowed_folders() is None
    secret = str(world.tmp / "secret")
    assert world.pictures.resolve_data(secret) == (secret,)
    assert world.pictures.data_of([secret], None, world.tmp)["within"] == ()


def test_links_below_an_allowed_folder_are_not_followed_out_of_it(world):
    from indomain_guidance.training.data.sources import search
    from indomain_guidance.training.data.walking import Watch
    from PIL import Image

    Image.new("RGB", (8, 8)).save(world.tmp / "input" / "faces" / "good.png")
    Image.new("RGB", (8, 8)).save(world.tmp / "secret" / "pictures" / "bad.png")
    link(world.tmp / "input" / "faces" / "way", world.tmp / "secret")
    link(world.tmp / "input" / "faces" / "file.png", world.tmp / "secret" / "one.png")
    data = world.pictures.data_of(world.pictures.resolve_data("faces"), None, world.tmp)
    found = search(data["data"], Watch(within=data["within"]))
    assert [entry.name for entry in found.entries] == ["good.png"]
    assert found.ignored == {"links that leave the allowed folders": 2}
    before = world.node.fingerprint_inputs(image_folder=["faces"])
    Image.new("RGB", (9, 9)).save(world.tmp / "secret" / "pictures" / "bad.png")
    assert world.node.fingerprint_inputs(image_folder=["faces"]) == before
    Image.new("RGB", (9, 9)).save(world.tmp / "input" / "faces" / "good.png")
    assert world.node.fingerprint_inputs(image_folder=["faces"]) != before


def test_a_look_for_changes_has_an_end(world, monkeypatch):
    monkeypatch.setattr(world.pictures, "MOST_LOOKED_FOR_CHANGES", 20)
    for number in range(30):
        (world.tmp / "input" / "faces" / f"{number}.png").touch()
    found = world.node.fingerprint_inputs(image_folder=["faces"])
    assert found != found  # not a number: asked again, and so run again, each time
