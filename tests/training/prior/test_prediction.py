"""What a checkpoint predicts: markers, the user's word, or a measurement."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.diffusion import NoiseSchedule
from indomain_guidance.guidance.files import write_safetensors
from indomain_guidance.training.prior import prediction as predictions
from indomain_guidance.training.prior.opening import open_checkpoint, open_mini_world
from indomain_guidance.training.prior.prediction import measured_prediction


@pytest.fixture(scope="module")
def mini():
    return open_mini_world()


@pytest.mark.parametrize(
    "markers, prediction, expected",
    [
        ({}, "auto", ("epsilon", False)),
        ({"v_pred": torch.zeros(1)}, "auto", ("v_prediction", False)),
        ({"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, "auto", ("v_prediction", True)),
        ({"v_pred": torch.zeros(1)}, "epsilon", ("epsilon", False)),
        ({"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, "v_prediction", ("v_prediction", False)),
        ({"ztsnr": torch.zeros(1)}, "auto", ("epsilon", False)),
        ({}, "v_prediction_zero_snr", ("v_prediction", True)),
        ({}, "sample", ("sample", False)),
    ],
)
def test_prediction_type_comes_from_markers_or_the_user(markers, prediction, expected, tiny_checkpoint, tmp_path):
    path = write_safetensors(tmp_path / "prior.safetensors", tiny_checkpoint("sd1").tensors | markers)
    base = open_checkpoint(path, prediction=prediction)
    assert (base.prediction_type, base.zero_snr) == expected
    assert torch.equal(base.schedule.sigmas, NoiseSchedule.scaled_linear(zero_snr=expected[1]).sigmas)
    assert any("ztsnr" in note for note in base.notes) == ("ztsnr" in markers and not expected[1])


def test_measures_the_prediction_type_of_silent_2x_files(mini, tiny_checkpoint, monkeypatch):
    """The mini world predicts noise e; rewritten as a v-model it gives (e - sqrt(1 - abar) x) / sqrt(abar)."""
    context = mini.null_context.tensor
    kind, agreement = measured_prediction(mini.unet, mini.config, context, 8)
    assert kind == "epsilon" and agreement > 0.95
    prior = mini.load_unet()
    abar = float(mini.schedule.alphas_cumprod[-1])

    def as_v(x, timesteps, **cond):
        return (prior(x, timesteps, **cond) - (1 - abar) ** 0.5 * x) / abar**0.5

    monkeypatch.setattr(predictions, "load_unet", lambda *_: as_v)
    kind, agreement = measured_prediction(mini.unet, mini.config, context, 8)
    assert kind == "v_prediction" and abs(agreement) < 0.4
    monkeypatch.undo()
    silent = open_checkpoint(tiny_checkpoint("sd2").path)  # random weights know nothing of the noise
    assert silent.prediction_type == "v_prediction" and "measured v_prediction" in silent.notes[0]


def test_a_silent_1x_file_counts_as_epsilon_and_says_when_it_looks_otherwise(tiny_checkpoint, monkeypatch):
    path = tiny_checkpoint("sd1").path
    base = open_checkpoint(path)  # random weights know nothing of the noise
    (note,) = base.notes
    assert base.prediction_type == "epsilon" and "looks like v_prediction" in note and "Set prediction to" in note
    for prediction in ("epsilon", "v_prediction"):
        base = open_checkpoint(path, prediction=prediction)
        assert (base.prediction_type, base.notes) == (prediction, ())
    monkeypatch.setattr(predictions, "measured_prediction", lambda *_: ("epsilon", 0.99))
    assert open_checkpoint(path).notes == ()
