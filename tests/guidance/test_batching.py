"""Which calls may be one, and that one call answers as several do."""

from __future__ import annotations

import pytest
import torch
from indomain_guidance.guidance.batching import Piece, evaluate, in_few_calls
from indomain_guidance.guidance.errors import GuidanceError
from indomain_guidance.guidance.terms import Source


def model(x, sigma, context, y=None, strength=1.0):
    assert len(context) == len(x)
    level = sigma.reshape(-1, 1, 1, 1) if isinstance(sigma, torch.Tensor) else sigma
    return strength * x / (1 + level) + context.mean((1, 2)).reshape(-1, 1, 1, 1)


def piece(rows: int = 2, sigma=1.0, x=None, of=model, **arguments) -> Piece:
    return Piece(Source(of), torch.randn(rows, 4, 3, 3) if x is None else x, sigma, arguments)


def test_one_call_answers_as_several_do():
    one = torch.tensor([2.0])
    for left, right in (
        (piece(2, 1.5, context=torch.randn(2, 7, 5)), piece(3, 1.5, context=torch.randn(3, 7, 5))),
        (
            piece(2, torch.tensor([1.0, 2.0]), context=torch.randn(2, 7, 5)),
            piece(1, torch.tensor([3.0]), context=torch.randn(1, 7, 5)),
        ),
        (
            piece(3, one, context=torch.randn(3, 7, 5), strength=0.5),
            piece(3, one, context=torch.randn(3, 7, 5), strength=0.5),
        ),
    ):
        assert left.fits(right) and right.fits(left) and in_few_calls([left, right]) == [[left, right]]
        (call,) = evaluate([left, right])
        for own, together in call:
            torch.testing.assert_close(together, model(own.x, own.sigma, **own.arguments))


def test_what_differs_takes_calls_of_its_own():
    text = torch.randn(2, 7, 5)
    own = piece(2, 1.0, context=text, y=None, flags="a")
    for other in (
        piece(2, 1.0, context=text, flags="a"),
        piece(2, 1.0, context=text, y=None, flags="b"),
        piece(2, 2.0, context=text, y=None, flags="a"),
        piece(2, torch.ones(2), context=text, y=None, flags="a"),
        piece(2, 1.0, context=text[:, :6], y=None, flags="a"),
        piece(2, 1.0, context=text.half(), y=None, flags="a"),
        piece(2, 1.0, context=text[:1], y=None, flags="a"),  # no entry per latent
        piece(2, 1.0, x=torch.randn(2, 4, 3, 2), context=text, y=None, flags="a"),
    ):
        assert not own.fits(other) and not other.fits(own)
        assert len(in_few_calls([own, other, own])) == 2
    listed = piece(2, 1.0, context=text, controls=[1])
    assert not listed.fits(listed)


def test_models_that_return_something_else_are_refused():
    for broken, message in (
        (lambda x, sigma, context: None, "a tensor, the denoised x, got NoneType"),
        (lambda x, sigma, context: x[:2], r"return the shape \[4, 4, 3, 3\], got \[2, 4, 3, 3\]"),
    ):
        with pytest.raises(GuidanceError, match=message):
            list(evaluate([piece(2, 1.0, of=broken, context=torch.zeros(2, 1, 1))] * 2))
