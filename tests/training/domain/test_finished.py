"""The files that a finished run writes."""

from __future__ import annotations

import json

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, read_metadata
from indomain_guidance.training.domain import trainee as parts
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.domain.finished import write_domain_model, write_low_rank
from indomain_guidance.training.prior.opening import open_mini_world


@pytest.fixture(scope="module")
def base():
    return open_mini_world()


@pytest.fixture(scope="module")
def trainee(base):
    return parts.start_model(base, "cached")


def config(**changes):
    return TrainConfig(
        base="/secret/place/prior.safetensors",
        data=("/secret/pictures",),
        name="porcelain",
        resolution=64,
        licence="CC0-1.0",
        **changes,
    )


def test_a_file_takes_the_settings_of_any_folder(base, trainee, tmp_path):
    """The name of an image folder that is not UTF-8 would be found out only after the last step."""
    settings = config().with_changes(data=("/secret/caf\udce9", "/secret/\u78c1\u5668"))
    path = write_domain_model(tmp_path / "m.safetensors", trainee.weights(), trainee.config, base, config=settings)
    assert json.loads(read_metadata(path)["training"]) == settings.public_dict()
    low_rank = parts.start_model(base, "full", "low_rank", additions={"rank": 1})
    path = write_low_rank(tmp_path / "l.safetensors", low_rank, base, config=settings)
    assert json.loads(read_metadata(path)["training"]) == settings.public_dict()


def test_fp16_that_overflows_is_refused(base, trainee, tmp_path):
    weights = trainee.weights()
    weights["out.2.bias"] = torch.full((4,), 1e6)
    for file_dtype, fits in (("fp16", False), ("bf16", True), ("fp32", True)):
        path = tmp_path / f"{file_dtype}.safetensors"
        if fits:
            write_domain_model(path, weights, trainee.config, base, file_dtype=file_dtype)
            continue
        with pytest.raises(FileProblem, match="up to 65504, the largest number of fp16, found 1000000 in out.2.bias"):
            write_domain_model(path, weights, trainee.config, base, file_dtype=file_dtype)
        assert not path.exists()
    weights["out.2.bias"] = torch.full((4,), torch.nan)
    with pytest.raises(FileProblem, match="expected finite weights"):
        write_domain_model(tmp_path / "nan.safetensors", weights, trainee.config, base)
