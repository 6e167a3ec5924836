"""Paths as people and other systems write them."""

from __future__ import annotations

import os
import unicodedata

import pytest
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.engine.paths import meant_path
from indomain_guidance.training.engine.settings import ConfigProblem

posix = pytest.mark.skipif(os.name != "posix", reason="readings of POSIX")


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with a space and a composed letter in its path, the current one and a variable leading near it."""
    folder = tmp_path / "my pictures" / "caf\u00e9"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("PICTURES", "my pictures")
    return folder


@posix
@pytest.mark.parametrize(
    "written",
    [
        "my pictures/caf\u00e9",
        "  my pictures/caf\u00e9 \n",
        '"my pictures/caf\u00e9"',
        "'my pictures/caf\u00e9'",
        "\u201cmy pictures/caf\u00e9\u201d",
        ' "my pictures/caf\u00e9" ',
        "file://{0}/my%20pictures/caf%C3%A9",
        "FILE://localhost{0}/my%20pictures/caf%c3%a9",
        "~/my pictures/caf\u00e9",
        "$PICTURES/caf\u00e9",
        "${{PICTURES}}/caf\u00e9",
        "my pictures\\caf\u00e9",
        "~\\my pictures\\caf\u00e9",
        ".\\my pictures\\caf\u00e9",
        "my pictures/cafe\u0301",
        "{0}/my pictures/cafe\u0301",
        "'my pictures\\cafe\u0301'",
    ],
)
def test_a_path_is_found_however_it_is_written(there, tmp_path, written):
    assert os.path.samefile(meant_path(written.format(tmp_path)), there)
    config = TrainConfig(
        base="mini_world ", data=(written.format(tmp_path),), export_to=written.format(tmp_path)
    ).absolute()
    assert config.base == "mini_world"
    for path in (*config.data, config.export_to):
        assert os.path.isabs(path) and os.path.samefile(path, there)


@posix
def test_paths_of_windows_that_lead_nowhere_stay_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert meant_path("\\\\?\\C:\\nowhere") == "C:\\nowhere"
    assert meant_path(f"\\\\?\\{tmp_path}\\here") == f"{tmp_path}/here"
    assert meant_path("file://\u2100/y") == "file://\u2100/y"


@posix
def test_names_that_are_on_the_disk_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("'quoted'", " blanks ", "back\\slash", "$HOME", "cafe\u0301", "file:"):
        (tmp_path / name).mkdir()
        assert meant_path(name) == name
    (tmp_path / "link").symlink_to("nowhere")
    assert meant_path("link") == "link"  # whoever opens it says what it is


@posix
def test_folders_to_be_made_are_read_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "caf\u00e9").mkdir()
    assert meant_path("'runs/first'") == "runs/first"
    assert meant_path("runs\\first") == "runs/first"
    assert meant_path("file:///new/runs%20of%20mine") == "/new/runs of mine"
    assert meant_path("$UNSET_HERE/runs") == "$UNSET_HERE/runs"
    assert meant_path("shard-{0000..0003}.tar") == "shard-{0000..0003}.tar"
    assert meant_path('""') == '""' and meant_path("") == ""
    config = TrainConfig(base="m", output='"runs\\first" ').absolute()
    assert config.output == str(tmp_path / "runs" / "first")


@posix
def test_a_path_of_windows_is_told_unless_it_is_mounted(tmp_path, monkeypatch):
    with pytest.raises(ConfigProblem, match=r"base: expected a path of this system, found one of Windows.*--base"):
        TrainConfig(base="C:\\models\\sd15.safetensors").absolute()
    with pytest.raises(ConfigProblem, match=r"export_to: .*one of Windows, 'D:/models'.*--export-to"):
        TrainConfig(base="m", export_to="D:/models").absolute()
    for path in ("\\\\server\\models\\a.safetensors", "file:///C:/models/a.safetensors", "'C:\\a.safetensors'"):
        with pytest.raises(ConfigProblem, match="base: .*found one of Windows"):
            TrainConfig(base=path).absolute()
    real = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: path == "/mnt/c/models/a.safetensors" or real(path))
    assert TrainConfig(base='"C:\\models\\a.safetensors"').absolute().base == "/mnt/c/models/a.safetensors"


@posix
def test_decomposed_letters_of_a_file_in_a_composed_folder(tmp_path):
    folder = tmp_path / unicodedata.normalize("NFD", "\u00fcbung")
    folder.mkdir()
    (folder / unicodedata.normalize("NFC", "th\u00e9i\u00e8re.png")).touch()
    other = (
        tmp_path / unicodedata.normalize("NFC", "\u00fcbung") / unicodedata.normalize("NFD", "th\u00e9i\u00e8re.png")
    )
    assert not other.exists() and os.path.isfile(meant_path(str(other)))
