"""Generators, domain models, LoRAs and bases, in every format that they come in."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import pickle_streams as streams
from . import safetensors_damage
from .case import Reader, damaged_bytes, write_bytes
from .safetensors_damage import hole, hostile_headers, settled, split

GOLDEN = Path(__file__).resolve().parents[2] / "guidance" / "files" / "golden"


def saved(content: object, zipped: bool) -> bytes:
    """What torch.save writes, in its new or its old format."""
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


class ModelFiles(Reader):
    """Files by their ending, damaged as suits each. originals: ending -> whole files that can be read."""

    originals: dict[str, list[bytes]]

    @property
    def whole(self) -> list[tuple[str, bytes]]:
        return [(ending, data) for ending, files in self.originals.items() for data in files]

    def damage(self, dice: random.Random) -> tuple[str, Path]:
        ending = dice.choice(list(self.originals))
        data = dice.choice(self.originals[ending])
        if ending == ".safetensors":
            kind, data = safetensors_damage.damaged(data, dice)
        elif ending == ".pkl":
            kind, data = streams.damaged(self.originals[ending], dice)
        else:
            kind, data = damaged_bytes(data, dice)
        path = self.folder / f"hostile{dice.choice(list(self.originals)) if dice.random() < 0.05 else ending}"
        path.write_bytes(data)
        return f"{ending}: {kind}", path


class Generators(ModelFiles):
    name = "generators"

    def __init__(self, folder: Path) -> None:
        from indomain_guidance.guidance.files import write_generator
        from safetensors.torch import load_file

        super().__init__(folder)
        generator = streams.filled()
        golden = load_file(GOLDEN / "rosinality.safetensors")
        weights = {key.removeprefix("g_ema."): value for key, value in golden.items() if key.startswith("g_ema.")}
        checkpoint = {"g_ema": weights, "latent_avg": golden["latent_avg"]}
        own = settled(write_generator(folder / "own.safetensors", generator).read_bytes())
        self.originals = {
            ".pkl": [streams.dump(streams.snapshot(generator), protocol) for protocol in (2, 3, 4, 5)],
            ".pt": [saved(checkpoint, True), saved(checkpoint, False)],
            ".safetensors": [own, (GOLDEN / "stylegan2_ada.safetensors").read_bytes()],
        }
        metadata = split(own)[0]["__metadata__"]
        self.by_hand = {name: write_bytes(data) for name, data in hostile_headers(metadata).items()}
        self.by_hand |= {name: write_bytes(data) for name, (data, _) in streams.attacks().items()}

    def ending(self, name: str, dice: random.Random) -> str:
        return dice.choice((".pkl", ".pt", ".safetensors"))

    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        from indomain_guidance.guidance.files import read_generator
        from indomain_guidance.training.command_line.inspect import inspect_text

        (inspect_text if dice.random() < 0.2 else read_generator)(path)
        return []


class DomainFiles(ModelFiles):
    name = "domain_files"

    def __init__(self, folder: Path) -> None:
        from indomain_guidance.guidance.files import DomainMetadata, write_domain_file
        from indomain_guidance.guidance.networks.unet import UNet
        from indomain_guidance.guidance.networks.unet_config import UNetConfig
        from indomain_guidance.guidance.null_text import NullContext, build_cached, build_constant
        from indomain_guidance.guidance.probes import Probes

        super().__init__(folder)
        config = UNetConfig(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=(1, 1),
            transformer_depth=(0, 1),
            num_heads=4,
            transformer_depth_middle=1,
            transformer_depth_output=(1, 1, 0, 0),
            context_dim=16,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            prior = {key: torch.randn_like(value) * 0.1 for key, value in UNet(config).state_dict().items()}
            null = NullContext(torch.randn(1, 3, 16), {"layer": "-1"})
            probes = Probes(torch.randn(1, 4, 8, 8), torch.tensor([10.0]))
        constant, constant_config, errors = build_constant(prior, config, null, probes)
        forms = {
            "none": (prior, config),
            "cached": build_cached(prior, config, null),
            "constant": (constant, constant_config),
        }
        files = []
        for form, (weights, its) in forms.items():
            described = DomainMetadata(
                its,
                latent_format="mini_world",
                prediction_type="epsilon",
                null_context=null.to_dict(),
                null_text_error={"a": 0.1},
                prior_hash="ab" * 32,
                domain_name="tiny",
                dataset_size=8,
                steps=5,
                ema=0.9,
                resolution=64,
                licence="Apache-2.0",
                dataset_hash="cd" * 32,
                extra={"training": '{"steps": 5}'},
            )
            files.append(settled(write_domain_file(folder / f"{form}.safetensors", weights, described).read_bytes()))
        unet = {f"model.diffusion_model.{key}": value for key, value in prior.items()}
        self.originals = {
            ".safetensors": files,
            ".ckpt": [saved({"state_dict": unet}, True)],
            ".pt": [saved(unet, False)],
        }
        header = split(files[0])[0]
        metadata = header["__metadata__"]
        self.by_hand = {name: write_bytes(data) for name, data in hostile_headers(metadata).items()}
        self.by_hand |= {f"hole: {name}": write for name, write in _holes(header).items()}

    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        from indomain_guidance.guidance.files import read_domain_file
        from indomain_guidance.training.command_line.inspect import inspect_text

        (inspect_text if dice.random() < 0.2 else read_domain_file)(path)
        return []


def _holes(header: dict) -> dict:
    """Files of some hundred megabytes of zeros, whose header makes the most of them."""
    metadata, size = header["__metadata__"], 2**28
    one = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    flags = {"dtype": "BOOL", "shape": [size], "data_offsets": [0, size]}
    small = {"dtype": "F8_E4M3", "shape": [size // 64, 64], "data_offsets": [0, size]}
    return {
        "one tensor of bytes": hole({"input_blocks.0.0.weight": one, "__metadata__": metadata}, size),
        "one tensor of flags": hole({"input_blocks.0.0.weight": flags}, size),
        "one tensor of fp8": hole({"input_blocks.0.0.weight": small, "__metadata__": metadata}, size),
        "nothing refers to it": hole({"__metadata__": metadata}, size),
        "no header": hole(b"", size),
    }


class Loras(ModelFiles):
    """LoRAs and DoRAs on some layers of a tiny UNet, in two number formats and both ways to name layers."""

    name = "loras"

    def __init__(self, folder: Path) -> None:
        from indomain_guidance.guidance.files import lora_tensors, write_safetensors
        from indomain_guidance.guidance.networks.low_rank import add_low_rank
        from indomain_guidance.guidance.networks.unet import UNet
        from indomain_guidance.tests.tiny_checkpoints import randomise, unet_config

        super().__init__(folder)
        files, tensors = [], {}
        self.weights, self.configs = {}, {}
        for family, dora, dtype in (("sd1", False, torch.float16), ("sdxl", True, torch.float32)):
            unet = randomise(UNet(unet_config(family)), 0)
            self.weights[family], self.configs[family] = dict(unet.state_dict()), unet.config
            add_low_rank(unet, 2, layers="middle_block.0.in_layers.2 *.attn1.to_q", dora=dora)
            tensors = {key: value.to(dtype) for key, value in lora_tensors(unet, unet.config).items()}
            metadata = {"prior_hash": "ab" * 32, "training": '{"steps": 5}', "ss_network_dim": "2"}
            files.append(settled(write_safetensors(folder / f"{family}.safetensors", tensors, metadata).read_bytes()))
        self.originals = {".safetensors": files, ".pt": [saved(tensors, True), saved(tensors, False)]}
        header = split(files[0])[0]
        self.by_hand = {name: write_bytes(data) for name, data in hostile_headers(header["__metadata__"]).items()}
        self.by_hand |= {f"rank {rank}": _of_rank(rank) for rank in (0, 2**10, 2**18)}
        down = next(key for key in tensors if key.endswith("lora_down.weight"))
        repeated = {**tensors, down: torch.zeros(1, 1).expand(2**30, 64)}
        self.by_hand["a rank that repeats one number"] = write_bytes(saved(repeated, True))

    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        from indomain_guidance.guidance.files import add_lora, read_lora
        from indomain_guidance.training.command_line.inspect import inspect_text

        if dice.random() < 0.2:
            inspect_text(path)
        else:
            lora, _ = read_lora(path)
            family = "sd1" if any("mid_block" in key for key in lora) else "sdxl"
            add_lora(self.weights[family], lora, self.configs[family], 0.7, path)
        return []


def _of_rank(rank: int):
    """A LoRA of zeros on a layer [64, 64] of Stable Diffusion 1.x and the tiny UNet's."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    half = 64 * rank
    header = {
        f"{name}.lora_up.weight": {"dtype": "F8_E4M3", "shape": [64, rank], "data_offsets": [0, half]},
        f"{name}.lora_down.weight": {"dtype": "F8_E4M3", "shape": [rank, 64], "data_offsets": [half, 2 * half]},
    }
    return hole(header, 2 * half)


class Bases(ModelFiles):
    """Checkpoints to train from, with their text encoders (most of whose numbers are a hole) and without, which is
    found out when all else has been read."""

    name = "bases"

    def __init__(self, folder: Path) -> None:
        from indomain_guidance.tests import tiny_checkpoints

        super().__init__(folder)
        whole = tiny_checkpoints.make(folder, "sd1")
        without = {key: value for key, value in whole.tensors.items() if not key.startswith("cond_stage_model.")}
        self.originals = {".safetensors": [_safetensors(without)], ".ckpt": [saved({"state_dict": without}, True)]}
        self.checkpoint = whole.path.read_bytes()
        self.by_hand = {name: write_bytes(data) for name, data in hostile_headers({}).items()}

    def warm(self) -> None:
        from indomain_guidance.training.prior.opening import open_checkpoint

        open_checkpoint(self.folder / "sd1.safetensors")
        super().warm()

    def damage(self, dice: random.Random) -> tuple[str, Path]:
        if dice.random() >= 0.05:
            return super().damage(dice)
        kind, data = safetensors_damage.damaged(self.checkpoint, dice)
        path = self.folder / "hostile.safetensors"
        path.write_bytes(data)
        return f"whole: {kind}", path

    def read(self, kind: str, path: Path, dice: random.Random) -> Sequence[str]:
        from indomain_guidance.training.command_line.inspect import inspect_text
        from indomain_guidance.training.prior.opening import open_checkpoint

        if dice.random() < 0.15:
            inspect_text(path)
        else:
            open_checkpoint(path)
        return []


def _safetensors(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save(tensors)
