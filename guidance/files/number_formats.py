"""The number formats of weights by name, and the checks that weights must pass before they are used or written."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import FileProblem, Problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_finite(tensors: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Raise FileProblem naming the first tensor that holds NaN or infinity; `source` is what to call the file."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and not tensor.is_complex():
            continue
        values = tensor.half() if tensor.element_size() == 1 else tensor  # torch has no isfinite for fp8
        finite = values.isfinite()
        if not bool(finite.all()):
            bad = finite.numel() - int(finite.sum())
            raise FileProblem(
                f"{source}: expected finite weights, found NaN or infinity in {bad} of the {finite.numel()} numbers of "
                f"{key}; the training that made the file diverged or the file is damaged, use an earlier one."
            )


def file_tensors(weights: Mapping[str, Tensor], dtype: str, source: str | os.PathLike) -> dict[str, Tensor]:
    """Weights on the CPU in the number format of a file, a name in DTYPES; whole numbers stay as they are.

    Raises Problem for an unknown format, FileProblem for weights that are not finite or too large for fp16. `source`
    is what to call the file.
    """
    if dtype not in DTYPES:
        raise Problem(f"Expected the number format to be one of {', '.join(DTYPES)}, found {dtype!r}.")
    check_finite(weights, source)
    tensors = {}
    for key, tensor in weights.items():
        tensor = tensor.detach().cpu()
        tensors[key] = tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
        if dtype == "fp16" and not bool(tensors[key].isfinite().all()):
            raise FileProblem(
                f"{source}: expected weights up to 65504, the largest number of fp16, found "
                f"{float(tensor.abs().max()):.0f} in {key}; write bf16 or fp32."
            )
    return tensors
