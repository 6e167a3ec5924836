"""The checks that weights must pass before they are used or written: finite, in range, named and shaped as expected."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import FileProblem, Problem
from .inert_pickle import shown

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def check_shapes(
    shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], what: str, source: str | os.PathLike
) -> None:
    """Raise FileProblem where names or shapes are not the `expected` ones of `what` ("a StyleGAN2 generator")."""
    differences = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
    }
    if any(differences.values()):
        found = " and ".join(
            f"{kind} {', '.join(map(shown, keys[:3]))}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            for kind, keys in differences.items()
            if keys
        )
        raise FileProblem(
            f"{source}: expected the {len(expected)} tensors of {what}, found {found}; the file is damaged or of "
            "another network."
        )
    for key, shape in expected.items():
        if list(shapes[key]) != list(shape):
            raise FileProblem(
                f"{source}: expected {key} of the shape {list(shape)}, found {list(shapes[key])}; the file is damaged "
                "or of another network."
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
