"""What lies in a run's folder."""

from __future__ import annotations

from indomain_guidance.training.engine.folder import has_saved


def test_models_of_others_are_not_what_the_run_saved(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"x")
    assert not has_saved(tmp_path, "mine")
    (tmp_path / "mine.safetensors").write_bytes(b"x")
    assert has_saved(tmp_path, "mine")
