"""Scores: how near an approximation is to exact attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_QUERIES = 256  # patches whose nearest neighbours are compared


def cosine(one: Tensor, other: Tensor) -> float:
    """Average the cosines of vectors (..., channels)."""
    return float(F.cosine_similarity(one.double(), other.double(), dim=-1).mean())


def correlation(one: Tensor, other: Tensor) -> float:
    """Compute Pearson's correlation of all numbers of two tensors; 0 where one is constant."""
    first, second = (tensor.double().flatten() for tensor in (one, other))
    first, second = first - first.mean(), second - second.mean()
    both = first.norm() * second.norm()
    return float(first @ second / both) if both > 0 else 0.0


def same_neighbours(one: Tensor, other: Tensor) -> float:
    """Compute the share of patches whose nearest other patch, by cosine, is the same in both.

    Args:
        one: (patches, channels).
        other: the same patches in another run.
    """
    chosen = torch.linspace(0, len(one) - 1, min(_QUERIES, len(one))).long()
    found = []
    for states in (one, other):
        unit = F.normalize(states.float(), dim=-1)
        near = unit[chosen] @ unit.T
        near[torch.arange(len(chosen)), chosen] = -2.0
        found.append(near.argmax(-1))
    return float((found[0] == found[1]).double().mean())


def output_errors(output: Tensor, exact: Tensor, value: Tensor) -> dict[str, float]:
    """Compare the outputs of one layer.

    Returns:
        `relative`, the Frobenius norm of the error over that of the exact output; `largest`, the largest absolute
        error; `bounded`, that over the largest magnitude of a value, as in the guarantee.
    """
    wrong = (output - exact).double()
    largest = float(wrong.abs().max())
    relative = float(wrong.norm() / exact.double().norm())
    return {"relative": relative, "largest": largest, "bounded": largest / float(value.abs().max())}
