"""Names of model files as prompts of other systems and older days have them, and files that change behind a name."""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import unicodedata
from types import SimpleNamespace

import pytest


def module(name: str):
    return importlib.import_module(f"indomain_guidance.{name}")


@pytest.fixture
def files(comfyui, tmp_path, monkeypatch):
    """Two folders of one kind of model, and the module that looks through them."""
    folder_paths = importlib.import_module("folder_paths")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(
        folder_paths,
        "folder_names_and_paths",
        {**folder_paths.folder_names_and_paths, "odd": ([str(first), str(second)], {".safetensors"})},
    )
    internals = module("nodes.comfy_internals.models.folders")

    def write(name, folder=second, text="x"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})  # core looks again once a folder has changed
        return path

    odd = internals.ModelFolder(("odd",), "Node")

    return SimpleNamespace(first=first, second=second, write=write, find=odd.find, fingerprint=odd.fingerprint)


def refusal(files, name) -> str:
    with pytest.raises(module("guidance.files").FileProblem) as caught:
        files.find(name)
    text = str(caught.value)
    assert text.startswith("Node: ") and text.endswith(".") and len(text) <= 500, text
    assert text.isprintable(), text
    return text


ACCENTED = "é/Zażółć Ünter.safetensors"


@pytest.mark.parametrize(
    "name, on_disk",
    [
        ("sub\\file.safetensors", "sub/file.safetensors"),
        ("a\\b\\file.safetensors", "a/b/file.safetensors"),
        ("Sub/FILE.SafeTensors", "sub/file.safetensors"),
        ("SUB\\File.safetensors", "sub/file.safetensors"),
        ("sub//file.safetensors", "sub/file.safetensors"),
        (unicodedata.normalize("NFD", ACCENTED), unicodedata.normalize("NFC", ACCENTED)),
        (unicodedata.normalize("NFC", ACCENTED), unicodedata.normalize("NFD", ACCENTED)),
        (unicodedata.normalize("NFD", ACCENTED).replace("/", "\\").upper(), ACCENTED),
    ],
)
def test_a_name_as_another_system_writes_it(files, name, on_disk):
    path = files.write(on_disk)
    assert files.find(on_disk) == path and files.find(name) == path
    assert files.fingerprint(name) == files.fingerprint(on_disk) != "missing"
    if not os.path.exists(os.path.join(files.second, name)):  # no file of that very name on this system
        files.write(f"{on_disk.removesuffix('file.safetensors')}other.safetensors")
        assert files.find(name) == path


@pytest.mark.skipif(os.path.normcase("A") == "a", reason="names differ by case")
def test_what_may_be_several_files_is_none(files):
    lower, upper = files.write("sub/file.safetensors"), files.write("sub/File.safetensors")
    assert files.find("sub\\File.safetensors") == upper and files.find("sub/file.safetensors") == lower
    text = refusal(files, "SUB/FILE.safetensors")
    assert "may be any of" in text and "'sub/file.safetensors'" in text and "'sub/File.safetensors'" in text
    if os.name == "posix":  # where a backslash is a letter like others
        odd = files.write("sub\\file.safetensors", files.first)
        assert files.find("sub\\file.safetensors") == odd


def test_all_folders_are_named_and_where_a_file_went(files):
    text = refusal(files, "gone.safetensors")
    assert f"{files.first} or {files.second}, found none; put it there, or pick a listed file" in text
    files.write("elsewhere/Gone.safetensors", files.first)
    assert "'elsewhere/Gone.safetensors' is listed, pick it if it is the same" in refusal(files, "old/gone.safetensors")
    for name in ("", "x\ud800\x1b[2J.safetensors", "a\0b", "n" * 5000, "../secret.safetensors"):
        refusal(files, name)
    (files.first.parent / "secret.safetensors").write_text("x")
    for name in ("../secret.safetensors", "..\\secret.safetensors", str(files.first.parent / "secret.safetensors")):
        refusal(files, name)


def test_long_and_many_folders_stay_short(files, tmp_path, monkeypatch):
    folder_paths = importlib.import_module("folder_paths")
    places = [tmp_path / ("deep" * 40) / f"models{number}" for number in range(9)]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "odd", ([str(place) for place in places], {".pt"}))
    text = refusal(files, "gone.pt" * 40)
    assert "deep/models0 or ..." in text and "models3 or 5 more folders" in text and "found none" in text


@pytest.mark.skipif(os.name != "posix", reason="links need rights")
def test_a_link_to_nothing_is_called_so(files, tmp_path):
    (files.second / "far.safetensors").symlink_to(tmp_path / "drive" / "far.safetensors")
    text = refusal(files, "far.safetensors")
    assert f"found in {files.second} a link to " in text and "drive/far.safetensors, where nothing is" in text
    assert files.fingerprint("far.safetensors") == "missing"
    (tmp_path / "elsewhere").symlink_to(tmp_path / "secret")  # not in a model folder: nobody's to ask about
    for name in (str(tmp_path / "elsewhere"), os.path.relpath(tmp_path / "elsewhere", files.second)):
        text = refusal(files, name)
        assert "secret" not in text and "found none" in text
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "far.safetensors").write_text("x")
    assert files.find("far.safetensors") == files.second / "far.safetensors"
    assert files.fingerprint("far.safetensors") != "missing"


def test_a_replacement_of_equal_size_and_time_is_noticed(files, tmp_path):
    def now():
        return files.fingerprint("a.safetensors")

    path = files.write("a.safetensors", text="first")
    seen = [now()]
    assert now() == seen[0]
    times = path.stat()
    other = tmp_path / "other"
    other.write_text("other")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, path)  # as a download or a copy by a file manager ends
    seen.append(now())
    path.write_text("third")  # in place: the same inode
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    seen.append(now())
    copy = tmp_path / "copy"
    shutil.copy2(path, copy)
    path.unlink()
    assert now() == "missing"
    if os.name == "posix":
        path.symlink_to(copy)
        seen.append(now())
        again = tmp_path / "again"
        shutil.copy2(copy, again)
        os.replace(again, copy)  # behind the link
        seen.append(now())
    assert len(set(seen)) == len(seen)


def test_the_loaders_take_such_names_from_a_prompt(files, monkeypatch):
    """Core compares a prompt's names with the list itself, unless the node does."""
    nodes, inputs = module("nodes.loaders"), module("nodes.inputs")
    monkeypatch.setattr(module("nodes.comfy_internals.models.folders").DOMAIN_UNETS, "names", ("odd",))
    files.write("sub/file.safetensors")
    assert nodes.LoadDomainUNet.validate_inputs("sub\\FILE.safetensors") is True
    assert "found none" in nodes.LoadDomainUNet.validate_inputs("gone.safetensors")
    for wrong in (3, ["a"], True, "n" * 200_000):
        assert "expected" in inputs.found(wrong, files.find)
    assert nodes.LoadDomainUNet.validate_inputs() is True  # over a link: known when it runs


def test_core_lets_such_a_prompt_through(files, monkeypatch):
    """The whole of core's own check of a prompt, which is what a server answers with."""
    execution, registry = importlib.import_module("execution"), importlib.import_module("nodes")
    node = module("nodes.generators").LoadGenerator
    monkeypatch.setitem(registry.NODE_CLASS_MAPPINGS, "InDomainLoadGenerator", node)
    monkeypatch.setattr(module("nodes.comfy_internals.models.folders").GENERATORS, "names", ("odd",))
    files.write("sub/file.safetensors")

    def answer(name):
        prompt = {"1": {"class_type": "InDomainLoadGenerator", "inputs": {"generator_name": name}}}
        valid, _, _, errors = asyncio.run(execution.validate_prompt("id", prompt, None))
        return valid, str(errors)

    for name in ("sub/file.safetensors", "sub\\File.safetensors"):
        assert answer(name) == (True, "{}")
    valid, errors = answer("gone.safetensors")
    assert not valid and f"{files.first} or {files.second}, found none" in errors
