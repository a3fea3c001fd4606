"""Helpers of methods that fit slots to queries."""

from __future__ import annotations

import torch
from torch import Tensor


def spread_evenly(total: int, count: int, device: torch.device, *, centred: bool = False) -> Tensor:
    """Choose `count` of `total` places, evenly spread: int64 (count,), ascending.

    Args:
        total: number of places.
        count: number to choose, at most `total`.
        device: device of the result.
        centred: True for the middles of equal parts, False for their beginnings.
    """
    places = [(2 * step + centred) * total // (2 * count) for step in range(count)]
    return torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True)


def solve_ridge(gram: Tensor, target: Tensor, level: Tensor | float) -> Tensor:
    """Solve (gram + level) x = target, the normal equations of ridge regression.

    Args:
        gram: (..., n, n), products of the regressors or, where these are the fewer, of the observations; overwritten.
        target: (..., n, k).
        level: (..., 1), or a number; positive.

    Returns:
        x, (..., n, k).
    """
    gram.diagonal(dim1=-2, dim2=-1).add_(level)
    return torch.cholesky_solve(target, torch.linalg.cholesky_ex(gram).L)
