"""Random features of the softmax kernel, and the normal numbers that hashes and features need."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wildcat_kv.coreset.noise import uniform_rows


def normal_rows(seed: int, *counters: Tensor, columns: int) -> Tensor:
    """Draw rows of standard normal numbers, keyed like `coreset.noise.uniform_rows`."""
    return uniform_rows(seed, *counters, columns=columns).mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2.0))


def normal_matrix(seed: int, heads: int, rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw a standard normal matrix for each head, float32 (heads, rows, columns)."""
    head = torch.arange(heads, device=device).unsqueeze(-1)
    return normal_rows(seed, head, torch.arange(rows, device=device), columns=columns)


def orthogonal_directions(seed: int, heads: int, count: int, d: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw directions that are orthogonal in blocks of d, with the lengths of normal vectors.

    Args:
        seed: seed of the draw.
        heads: number of heads.
        count: m, the number of directions.
        d: channels.
        device: device of the result.

    Returns:
        float32 (heads, m, d); every row is standard normal.

    Source: Choromanski et al., arXiv 2009.14794.
    """
    blocks = -(-count // d)
    normal = normal_matrix(seed, heads, 2 * blocks * d, d, device)
    squares, lengths = normal[:, : blocks * d].unflatten(1, (blocks, d)), normal[:, blocks * d :].norm(dim=-1)
    orthogonal, triangle = torch.linalg.qr(squares)
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # makes the law uniform, and unique
    rows = (orthogonal * signs).mT.flatten(1, 2)
    return (rows * lengths.unsqueeze(-1))[:, :count]


def log_features(points: Tensor, directions: Tensor, scale: float) -> Tensor:
    """Compute log(sqrt(m) f(x)) = w.x sqrt(b) - b |x|^2 / 2.

    The mean of f(q) f(k) over directions is e^(b q.k) over a normalised pair: unbiased and positive.

    Args:
        points: (rows, heads, n, d).
        directions: (heads, m, d), w.
        scale: b.

    Returns:
        (rows, heads, n, m).
    """
    points = points * scale**0.5
    return points @ directions.to(points.dtype).mT - points.square().sum(-1, keepdim=True) / 2
