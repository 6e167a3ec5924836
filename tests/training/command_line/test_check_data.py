"""What `check-data` reports, and by what it judges."""

from __future__ import annotations

import json
import tarfile

from indomain_guidance.training.mini_world.assets import domain_unets_dir


def test_check_data_reports_and_its_status_says_whether_all_is_well(run, tmp_path):
    folder = tmp_path / "images"
    status, out, _ = run("mini-data", folder, "--count", 6, "--json")
    assert status == 0 and json.loads(out) == {"folder": str(folder), "count": 6}
    status, out, _ = run("check-data", folder, "--resolution", 64, "--json")
    report = json.loads(out)
    assert status == 0 and (report["total"], report["ok"], report["bad"]) == (6, 6, 0)
    (folder / "torn.png").write_bytes((folder / "handwriting-0000.png").read_bytes()[:-40])
    status, out, _ = run("check-data", folder, "--resolution", 64)
    assert status == 1 and "torn.png" in out and "6 can be used, 1 cannot" in out
    (folder / "torn.png").unlink()
    shard = tmp_path / "images.tar"
    with tarfile.open(shard, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    assert run("check-data", shard, "--resolution", 64)[0] == 0
    with tarfile.open(shard) as archive:
        second = archive.getmembers()[1].offset
    shard.write_bytes(shard.read_bytes()[:second])
    status, out, _ = run("check-data", shard, "--resolution", 64)
    assert status == 1 and "1 can be used, 0 cannot" in out and "may be missing" in out
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("check-data", empty)[0] == 1
    status, _, err = run("check-data", tmp_path / "missing")
    assert status == 1 and "missing" in err


def test_check_data_judges_by_what_will_be_trained_or_says_by_what(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("mini-data", "digits", "--count", 3)[0] == 0
    (tmp_path / "settings.json").write_text(json.dumps({"base": "mini_world", "min_side": 65, "steps": 9}))
    for options, resolution, upscaled, words in (
        ((), 512, 3, "the default of train; --base or --config says what will be trained"),
        (("--base", "mini_world"), 64, 0, "64 px, which mini_world was made for"),
        (
            ("--base", domain_unets_dir().parent / "prior_unet.safetensors"),
            64,
            0,
            "which prior_unet.safetensors was made",
        ),
        (("--config", "mini_world"), 64, 0, "judged at 64 px, as given"),
        (("--config", "settings.json", "--min-side", 0), 64, 0, "64 px, which mini_world was made for"),
        (("--base", "mini_world", "--resolution", 128), 128, 3, "judged at 128 px, as given"),
    ):
        status, out, err = run("check-data", "digits", *options)
        assert status == 0 and words in out.splitlines()[-1], (out, err)
        report = json.loads(run("check-data", "digits", *options, "--json")[1])
        assert (report["resolution"], len(report["upscaled"])) == (resolution, upscaled) and words in report[
            "resolution_from"
        ]
    assert run("check-data", "digits", "--config", "settings.json")[0] == 1  # min_side
    (tmp_path / "settings.json").write_text("{")
    assert run("check-data", "digits", "--config", "settings.json")[0] == 2
