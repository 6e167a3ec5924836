"""Whole training runs on a prior of nothing and drawn images, in processes of their own, and a way to kill them.

    python training/bootstrap.py tests/training/tiny_run.py train FOLDER '{"steps": 20}'
    python training/bootstrap.py tests/training/tiny_run.py kill FOLDER --kills 10

`kill` trains once without interruption and once killed (SIGKILL) at random moments and resumed, and says whether the
two ended with the same bits; `train` is one process of it, and what `accelerate launch` starts in the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from indomain_guidance.guidance.files import read_metadata, read_state_dict
from indomain_guidance.guidance.networks.autoencoder import Autoencoder, AutoencoderConfig
from indomain_guidance.guidance.networks.unet import UNet
from indomain_guidance.guidance.networks.unet_config import UNetConfig
from indomain_guidance.guidance.null_text import NullContext
from indomain_guidance.training.domain.config import TrainConfig
from indomain_guidance.training.domain.train import train
from indomain_guidance.training.engine.checkpoints import find_checkpoints, latest_checkpoint
from indomain_guidance.training.prior.opening import prior_from_tensors
from indomain_guidance.training.prior.prior import Prior
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
UNET = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=(1, 1),
    transformer_depth=(0, 1),
    transformer_depth_middle=1,
    transformer_depth_output=(1, 0, 0, 0),
    context_dim=32,
    num_heads=2,
)
AUTOENCODER = AutoencoderConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, attention=False)


def tiny_base(prediction_type: str = "epsilon") -> Prior:
    """A prior with random weights: the real topology, 64 channels at most."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet, autoencoder = UNet(UNET), Autoencoder(AUTOENCODER)
        torch.nn.init.normal_(unet.out[2].weight, std=0.05)  # zero at first, as training would begin
        null = NullContext(torch.randn(1, 7, UNET.context_dim))
    return prior_from_tensors(
        unet.state_dict(),
        UNET,
        latent_format="tiny",
        prediction_type=prediction_type,
        zero_snr=False,
        null_context=null,
        autoencoder=autoencoder.state_dict(),
        latent_scale=1.0,
        name="tiny",
    )


def draw_images(folder: Path, count: int = 14, sizes: tuple[tuple[int, int], ...] = ((64, 64), (96, 48))) -> Path:
    """Circles on coloured ground, PNG files of these (width, height) in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        dice = random.Random(number)
        width, height = sizes[number % len(sizes)]
        image = Image.new("RGB", (width, height), tuple(dice.randrange(256) for _ in range(3)))
        left, top = dice.randrange(width // 2), dice.randrange(height // 2)
        fill = tuple(dice.randrange(256) for _ in range(3))
        ImageDraw.Draw(image).ellipse([left, top, left + 20, top + 20], fill=fill)
        image.save(folder / f"circle-{number}.png")
    return folder


def tiny_config(folder: Path, **changes: object) -> TrainConfig:
    """A short run on the CPU in FOLDER/run, on the images in FOLDER/images."""
    return TrainConfig(
        **{
            "base": "tiny",
            "data": (str(folder / "images"),),
            "output": str(folder / "run"),
            "cache": str(folder / "cache"),
            "name": "circles",
            "resolution": 64,
            "bucket_step": 8,
            "flip": True,
            "steps": 16,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "warmup": 4,
            "schedule": "cosine",
            "ema": 0.9,
            "noise_offset": 0.1,
            "checkpoint_every": 2,
            "keep_checkpoints": 2,
            "sample_every": 8,
            "sample_count": 1,
            "sample_steps": 2,
            "validate_every": 8,
            "held_out_share": 0.2,
            "log_every": 1,
            "file_dtype": "fp32",
            "device": "cpu",
            "precision": "fp32",
            **changes,
        }
    )


def command(folder: Path, **changes: object) -> list[str]:
    """The command line of one training process; it prints its events as JSON lines."""
    bootstrap = str(ROOT / "training" / "bootstrap.py")
    return [sys.executable, bootstrap, str(Path(__file__).resolve()), "train", str(folder), json.dumps(changes)]


def fingerprint(run: Path, names: tuple[str, ...] = ("weights", "average", "optimizer")) -> dict[str, str]:
    """SHA-256 of what the finished file holds, and of each of these parts of the last checkpoint."""
    _, state = latest_checkpoint(run)
    (finished,) = run.glob("*.safetensors")
    # Not of its bytes: safetensors writes metadata in any order.
    parts = {"file": {"weights": read_state_dict(finished), "metadata": read_metadata(finished)}}
    parts |= {name: state[name] for name in names}
    result = {}
    for name, part in parts.items():
        digest = hashlib.sha256()
        _digest(part, digest)
        result[name] = digest.hexdigest()
    return result


def _digest(value: object, digest) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _digest(value[key], digest)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _digest(part, digest)
    else:
        digest.update(repr(value).encode())


def run_killed(folder: Path, kills: int, dice: random.Random, **changes: object) -> list[int]:
    """Train in FOLDER/run, killing the process `kills` times; the steps after which it died.

    The moments spread over the whole run: after a drawn number of further steps, and a drawn part of a step later, so
    that it hits forward passes, the optimizer, and files being written alike. The last process is left to finish.
    """
    steps = int(changes.get("steps", tiny_config(folder).steps))
    died, done = [], 0
    while True:
        kills_left = kills - len(died)
        target = dice.randint(done, done + (steps - done) // (kills_left + 1)) if kills_left else None
        with subprocess.Popen(command(folder, **changes), stdout=subprocess.PIPE, text=True) as process:
            last, stamp, pace = done, time.monotonic(), 0.05
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] in ("started", "step"):
                    pace = max(0.005, time.monotonic() - stamp) if event["event"] == "step" else pace
                    last, stamp = event["step"], time.monotonic()
                    if target is not None and last >= target:
                        time.sleep(dice.random() * 1.5 * pace)
                        process.kill()
                        break
            process.stdout.read()
        if target is None or process.returncode == 0:
            if process.returncode != 0:
                raise RuntimeError(f"The training process failed with exit code {process.returncode}.")
            return died
        died.append(last)
        done = max((step for step, _ in find_checkpoints(folder / "run")), default=0)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="one training run, events as JSON lines")
    one.add_argument("folder", type=Path)
    one.add_argument("changes", type=json.loads, nargs="?", default={})
    kill = commands.add_parser("kill", help="train, kill, resume, compare")
    kill.add_argument("folder", type=Path)
    kill.add_argument("--kills", type=int, default=10)
    kill.add_argument("--steps", type=int, default=60)
    kill.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.command == "train":

        def tell(event) -> None:
            print(json.dumps(event.to_dict()), flush=True)

        train(tiny_config(options.folder, **options.changes), base=tiny_base(), listener=tell)
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    whole, killed = options.folder / "whole", options.folder / "killed"
    for folder in (whole, killed):
        draw_images(folder / "images")
    subprocess.run(command(whole, steps=options.steps), check=True, stdout=subprocess.DEVNULL)
    died = run_killed(killed, options.kills, random.Random(options.seed), steps=options.steps)
    print(f"killed {len(died)} times, after the steps {', '.join(map(str, died))} of {options.steps}")
    left, right = fingerprint(whole / "run"), fingerprint(killed / "run")
    for name, value in left.items():
        print(f"{name:<10} {'identical' if value == right[name] else 'DIFFERENT'}  {value[:16]} {right[name][:16]}")
    return 0 if left == right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
