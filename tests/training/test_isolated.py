"""Training in a process of its own: the same bits, a stop that saves, and deaths that are told in a sentence."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from indomain_guidance.guidance.files import FileProblem, read_domain_file
from indomain_guidance.training import isolated
from indomain_guidance.training.adaptation.config import AdaptConfig
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.domain.train import train
from indomain_guidance.training.engine.events import Step, read_log
from indomain_guidance.training.mini_world.pictures import export_pictures
from indomain_guidance.training.prior.base import open_mini_world
from indomain_guidance.training.prior.exported_base import ExportedBase

BOOTSTRAP = Path(isolated.__file__).with_name("bootstrap.py")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("isolated") / "pictures"
    export_pictures(folder, count=6)
    return folder


@pytest.fixture
def config(pictures, tmp_path):
    return TrainConfig(
        base="mini_world",
        data=(str(pictures),),
        name="made",
        output=str(tmp_path / "run"),
        resolution=64,
        steps=5,
        batch_size=2,
        learning_rate=1e-3,
        warmup=0,
        sample_every=0,
        validate_every=0,
        held_out_share=0.0,
        log_every=1,
        checkpoint_every=2,
        cache=str(pictures.parent / "latents"),
        device="cpu",
        file_dtype="fp32",
    )


@pytest.fixture
def job(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    return folder


@pytest.fixture
def children(monkeypatch):
    """The processes that were started; none of them may outlive its test."""
    started = []

    class Watched(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(isolated.subprocess, "Popen", Watched)
    yield started
    assert all(process.poll() is not None for process in started)


def same_bits(a, b) -> bool:
    ours, theirs = read_domain_file(a)[0], read_domain_file(b)[0]
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_stopped_and_continued_in_other_processes_it_ends_with_the_bits_of_one_run(
    config, job, children, tmp_path, monkeypatch
):
    # The order of a sum depends on how many threads share it.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    here = train(config.with_changes(output=str(tmp_path / "here")))
    seen = []
    stopped = isolated.run_isolated(
        config, folder=job, listener=seen.append, should_stop=lambda: any(isinstance(event, Step) for event in seen)
    )
    assert stopped.status == "stopped" and stopped.path is None and 1 <= stopped.step < 5
    kinds = [type(event).__name__ for event in seen]
    assert kinds[0] != "Step" and "Started" in kinds and kinds[-1] == "Stopped"

    # The second half with the prior as a file, as for a prior that exists only in memory.
    mini = open_mini_world()
    exported = ExportedBase(
        unet=mini.unet,
        config=mini.config,
        prediction_type="epsilon",
        zero_snr=False,
        latent_format="mini_world",
        latent_scale=mini.latent_scale,
        autoencoder=mini.autoencoder.state_dict(),
        null_context=mini.null_context,
    )
    finished = isolated.run_isolated(config, folder=job, resume=True, base=exported.write(job / isolated.BASE))
    assert (finished.status, finished.step, finished.run) == ("finished", 5, Path(config.output).absolute())
    assert finished.plot.is_file() and finished.loss is not None
    assert same_bits(finished.path, here.path)


def test_a_killed_process_is_told_with_the_step_to_continue_from(config, job, children):
    def kill(event):
        if isinstance(event, Step) and event.step == 4:
            children[0].kill()

    with pytest.raises(
        isolated.IsolatedProblem, match=r"ended unexpectedly \(.*\); run again to continue from step [24]"
    ):
        isolated.run_isolated(config.with_changes(steps=500), folder=job, listener=kill)


def test_the_processes_own_error_arrives_as_it_is(config, job, children, tmp_path):
    (tmp_path / "empty").mkdir()
    config = config.with_changes(data=(str(tmp_path / "empty"),))
    with pytest.raises(ValueError) as expected:
        train(config.with_changes(output=str(tmp_path / "here")))
    with pytest.raises(isolated.IsolatedProblem) as caught:
        isolated.run_isolated(config, folder=job)
    assert str(caught.value) == str(expected.value)


def test_a_listener_that_raises_ends_the_process(config, job, children):
    def refuse(event):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        isolated.run_isolated(config.with_changes(steps=5000), folder=job, listener=refuse)


PARENT = """
import sys
from pathlib import Path
from indomain_guidance.training.config import TrainConfig
from indomain_guidance.training.events import Step
from indomain_guidance.training.isolated import run_isolated
run_isolated(TrainConfig.read(sys.argv[1]), folder=Path(sys.argv[2]),
             listener=lambda event: print(type(event).__name__, flush=True))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a way to die without a word")
def test_when_its_parent_dies_the_process_saves_and_leaves(config, job, tmp_path):
    config.with_changes(steps=100_000, checkpoint_every=0).write_json(tmp_path / "config.json")
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(BOOTSTRAP), str(tmp_path / "parent.py"), str(tmp_path / "config.json"), str(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert any(line.strip() == "Step" for line in parent.stdout)
        parent.kill()
    log, deadline = Path(config.output) / "log.jsonl", time.monotonic() + 120
    while "Stopped" not in [type(event).__name__ for event in read_log(log)]:
        assert time.monotonic() < deadline, "the process did not notice that its parent is gone"
        time.sleep(0.2)
    stopped = read_log(log)[-1]
    assert stopped.step >= 1 and Path(stopped.path).is_file()


HANGING = """#!/bin/sh
echo '{"event": "result", "status": "stopped", "step": 3, "loss": null, "path": null, "run": "/r", "samples": null, "plot": null}'
exec 1>&-
exec sleep 300
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs shell scripts")
def test_a_process_that_hangs_after_its_result_is_ended(config, job, children, tmp_path, monkeypatch):
    monkeypatch.setattr(isolated, "EXIT_S", 0.5)
    script = tmp_path / "python"
    script.write_text(HANGING)
    script.chmod(0o755)
    result = isolated.run_isolated(config, folder=job, python=str(script))
    assert (result.status, result.step) == ("stopped", 3) and children[0].returncode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs shell scripts")
def test_a_process_that_does_not_stop_is_waited_for_once(config, job, children, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 300\n")
    script.chmod(0o755)
    began = time.monotonic()
    with pytest.raises(isolated.IsolatedProblem, match="to stop within 2 s, it did not and was ended"):
        isolated.run_isolated(config, folder=job, python=str(script), should_stop=lambda: True, patience_s=1.5)
    assert time.monotonic() - began < 2.8


def test_jobs_are_files(config, tmp_path):
    isolated.Job(config, "auto", tmp_path / "base.safetensors").write(tmp_path)
    assert isolated.Job.read(tmp_path) == isolated.Job(config, "auto", tmp_path / "base.safetensors")
    adaptation = AdaptConfig(generator="mini_world", base="mini_world", prompt="a red seven")
    job = isolated.Job(adaptation, True, generator=tmp_path / "generator.safetensors")
    job.write(tmp_path)
    assert isolated.Job.read(tmp_path) == job
    with pytest.raises(FileProblem, match="job.json: expected the description of a training job"):
        isolated.Job.read(tmp_path / "nowhere")
