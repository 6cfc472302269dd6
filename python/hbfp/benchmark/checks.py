"""Answers are checked before they are timed: ours bit by bit against the oracle, others' to their format's error."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hbfp import reference
from hbfp.format import HBFP

__all__ = ["WrongAnswer", "close", "exact"]


class WrongAnswer(AssertionError):
    """A contestant computes something else than the product it is timed for."""


def _prefix(n: int, rounding: str) -> list[int]:
    # Random bits belong to places: rows cut from the middle would draw others.
    return list(range(min(2, n))) if rounding == "stochastic" else sorted({0, min(1, n - 1), n - 1})


def exact(
    name: str,
    out: Tensor,
    operands: tuple[Tensor, Tensor],
    formats: tuple[HBFP, HBFP],
    axes: Sequence[int] = (-1, -1),
    roundings: Sequence[str] = ("nearest_even", "nearest_even"),
    seed: int = 0,
    streams: Sequence[int] = (0, 0),
) -> None:
    """Raises WrongAnswer unless sampled rows and columns of `out` [M, N] have the oracle's bits.

    Args:
        operands: a [M, K] and b [N, K]; with axis -2 [K, M] and [K, N].
        roundings, seed, streams: how a and b were encoded.
    """
    encoded, kept = [], []
    for x, format, axis, rounding, stream in zip(operands, formats, axes, roundings, streams, strict=True):
        places = _prefix(x.shape[0 if axis == -1 else 1], rounding)
        part = x.detach()[places] if axis == -1 else x.detach()[:, places]
        part_encoded = reference.encode(part.contiguous().numpy(), format, axis, rounding, seed, stream)
        encoded.append(part_encoded if axis == -1 else part_encoded.T)
        kept.append(places)
    expected = reference.matmul(encoded[0], encoded[1].T)
    found = out[kept[0]][:, kept[1]].contiguous().numpy()
    if not np.array_equal(found.view(np.uint32), expected.view(np.uint32)):
        raise WrongAnswer(f"{name}: {found.tolist()} are not the oracle's bits, {expected.tolist()}")


def close(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises WrongAnswer unless `found` is within `tolerance` of `expected`, relative, in the Frobenius norm."""
    if found.shape != expected.shape:
        raise WrongAnswer(f"{name}: a result of shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    error = float((found - expected).norm() / expected.norm())
    if not error <= tolerance:  # also where the error is no number
        raise WrongAnswer(f"{name}: off by {error:.3g} of the product, at most {tolerance:g} is its format's")
