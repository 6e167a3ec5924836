"""Writes lora_in_diffusers.safetensors beside this file: what diffusers makes of our LoRA files.

    python training/bootstrap.py tests/guidance/files/golden/make_lora.py

Needs the packages diffusers and peft. Each family's LoRA on all layers is loaded by its pipeline; the UNet's output is
kept, and in the metadata the names of the layers that the LoRA reached.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from indomain_guidance.guidance.files import write_safetensors
from indomain_guidance.tests.guidance.files.diffusers_pipelines import names, output, with_lora
from indomain_guidance.tests.guidance.files.lora_cases import CONFIGS, GOLDEN, write_lora


def main() -> None:
    outputs, reached = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for family in CONFIGS:
            pipe = with_lora(family, write_lora(Path(folder) / f"{family}.safetensors", family))
            outputs[family], reached[family] = output(pipe, family), json.dumps(names(pipe))
    write_safetensors(GOLDEN, outputs, reached)


if __name__ == "__main__":
    main()
