"""Several conditionings of one model in one call: which of them fit together, and the calls themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import GuidanceError
from .terms import Source


@dataclass(frozen=True, eq=False)
class Piece:
    """One source on x [B, ...] at sigma, a number or [B]: the call `source.model(x, sigma, **arguments) -> x0`.

    Tensors whose first dimension is B belong to single latents and are joined along it, where their shapes agree.
    Everything else must be equal to share a call; lists and dicts never share one, since their entries may belong to
    single latents.
    """

    source: Source
    x: Tensor
    sigma: Tensor | float
    arguments: Mapping[str, Any]

    def fits(self, other: Piece) -> bool:
        """Whether one call can serve both."""
        if self.arguments.keys() != other.arguments.keys():
            return False
        pairs = [(self.x, other.x), *((value, other.arguments[key]) for key, value in self.arguments.items())]
        if self.sigma is not other.sigma:
            pairs.append((self.sigma, other.sigma))
        return all(_agree(left, right, len(self.x), len(other.x)) for left, right in pairs)


OfPiece = TypeVar("OfPiece", bound=Piece)


def evaluate(pieces: Sequence[OfPiece]) -> Iterator[list[tuple[OfPiece, Tensor]]]:
    """Every piece with its x0: one list for each call, in as few calls of each model as possible.

    A model with a method `denoise_many(calls) -> list of x0`, calls being (x, sigma, arguments) triples, gets all its
    pieces at once. Raises GuidanceError for another shape than x's.
    """
    by_model: dict[int, list[OfPiece]] = {}
    for piece in pieces:
        by_model.setdefault(id(piece.source.model), []).append(piece)
    for own in by_model.values():
        many = getattr(own[0].source.model, "denoise_many", None)
        for call in [own] if many else in_few_calls(own):
            if many:
                outputs = list(many([(piece.x, piece.sigma, piece.arguments) for piece in call]))
                for piece, output in zip(call, outputs):
                    _check_shape(output, piece.x)
            else:
                outputs = _joined_call(call)
            yield list(zip(call, outputs))


def in_few_calls(pieces: Sequence[OfPiece]) -> list[list[OfPiece]]:
    """One model's pieces sorted into as few calls as their arguments allow."""
    calls: list[list[OfPiece]] = []
    for piece in pieces:
        fitting = next((call for call in calls if call[0].fits(piece)), None)
        if fitting is None:
            calls.append([piece])
        else:
            fitting.append(piece)
    return calls


def for_rows(arguments: Mapping[str, Any], batch: int, rows: Tensor | None) -> dict[str, Any]:
    """A conditioning's keyword arguments for some rows of a batch, [R] whole numbers; None is all of them.

    Tensors with a first dimension of 1 are expanded to the rows, those with one of `batch` are cut to them. Raises
    GuidanceError for another first dimension.
    """
    found = dict(arguments)
    for key, value in found.items():
        if not _is_batched(value):
            continue
        if value.shape[0] == 1:
            found[key] = value.expand(batch if rows is None else len(rows), *value.shape[1:])
        elif value.shape[0] != batch:
            raise GuidanceError(
                f"Expected the tensor {key!r} of a conditioning to have a first dimension of 1 or {batch}, one per "
                f"latent, got shape {list(value.shape)}."
            )
        elif rows is not None:
            found[key] = value[rows.to(value.device)]
    return found


def _joined_call(pieces: Sequence[Piece]) -> Sequence[Tensor]:
    """x0 of each of the pieces, which must fit, from one call."""
    first = pieces[0]
    if len(pieces) == 1:
        x, sigma, arguments = first.x, first.sigma, first.arguments
    else:
        x = torch.cat([piece.x for piece in pieces])
        sigma = _joined([piece.sigma for piece in pieces], len(first.x))
        arguments = {key: _joined([piece.arguments[key] for piece in pieces], len(first.x)) for key in first.arguments}
    output = first.source.model(x, sigma, **arguments)
    _check_shape(output, x)
    return output.split([len(piece.x) for piece in pieces])


def _check_shape(output: Any, x: Tensor) -> None:
    """Raise GuidanceError for what is no denoised x."""
    if not isinstance(output, Tensor):
        raise GuidanceError(f"Expected a model to return a tensor, the denoised x, got {type(output).__name__}.")
    if output.shape != x.shape:
        raise GuidanceError(f"Expected a model to return the shape {list(x.shape)}, got {list(output.shape)}.")


def _is_batched(value: Any) -> bool:
    """Whether a value may have an entry per latent."""
    return isinstance(value, Tensor) and value.ndim > 0


def _joined(values: Sequence[Any], rows: int) -> Any:
    return torch.cat(list(values)) if _is_batched(values[0]) and len(values[0]) == rows else values[0]


def _agree(left: Any, right: Any, left_rows: int, right_rows: int) -> bool:
    if _is_batched(left) and _is_batched(right):
        per_latent = len(left) == left_rows and len(right) == right_rows
        same_kind = left.dtype == right.dtype and left.device == right.device
        return per_latent and same_kind and left.shape[1:] == right.shape[1:]
    return not _is_batched(left) and not _is_batched(right) and _same_value(left, right)


def _same_value(left: Any, right: Any) -> bool:
    """Whether two arguments that carry no batch may be passed once for both."""
    if isinstance(left, (list, tuple, set, Mapping)):
        return False
    if left is right:
        return True
    if isinstance(left, Tensor) and isinstance(right, Tensor):  # 0-d
        return left.dtype == right.dtype and left.device == right.device and bool(left == right)
    return isinstance(left, (str, bytes, int, float)) and type(left) is type(right) and left == right
