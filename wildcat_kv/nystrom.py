"""Randomly pivoted Cholesky and Nystrom weights for the exponential kernel. Pure tensors.

The kernel is H_ij = exp(<z_i, z_j>) = D_i G_ij D_j with the Gaussian kernel G_ij = exp(-|z_i - z_j|^2 / 2)
and D_i = exp(|z_i|^2 / 2). G has entries in [0, 1] and is what gets factorised; D overflows float32 for
real keys and never leaves the log domain.

Source: Schröder and Mackey, "WildCat: Near-Linear Attention in Theory and Practice", arXiv 2602.10056;
randomly pivoted Cholesky is Chen, Epperly, Tropp and Webber, arXiv 2207.06503.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# A residual of G at or below this is rounding: float32 squares and sums leave about 1e-6 at rank 100.
TOLERANCE = 1e-5

_LOG_LARGEST_WEIGHT = math.log(1e4)


class Factor(NamedTuple):
    """A partial Cholesky factorisation of G.

    Attributes:
        pivots: int64 (..., r), the drawn points in the order of the draws; arbitrary where not `valid`.
        valid: bool (..., r), False for slots past the numerical rank or the number of points.
        rows: float32 (..., r, n), G is close to rows^T rows; zero where not `valid`.
    """

    pivots: Tensor
    valid: Tensor
    rows: Tensor


def pivoted_cholesky(
    points: Tensor,
    noise: Tensor,
    *,
    valid: Tensor | None = None,
    log_importance: Tensor | None = None,
    ranks: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Factor:
    """Draw pivots in proportion to the residual diagonal of H, and factorise G along them.

    O(n r (d + r)) time and O(n r) memory a batch entry; r sequential steps, no host synchronisation.

    Args:
        points: float32 (..., n, d), the scaled keys z.
        noise: float32 (..., r, n), standard Gumbel noise, fresh for every step; r is the rank.
        valid: bool (..., n), points that take part; all by default.
        log_importance: float32 (..., n), added to the log of the residual diagonal (weighted points).
        ranks: int64 (...), a rank of its own, at most r, for each batch entry.
        tolerance: points whose residual of G is at or below it are exhausted.

    Returns:
        The factor, with as many slots as `noise` has steps.
    """
    *batch, rank, n = noise.shape
    z = points.reshape(-1, n, points.shape[-1])
    entries = torch.arange(z.shape[0], device=z.device)
    log_scale = torch.linalg.vector_norm(z, dim=-1).square_()  # log D_i^2
    if log_importance is not None:
        log_scale = log_scale + log_importance.reshape(-1, n)
    score = noise.reshape(-1, rank, n) + log_scale.unsqueeze(1)

    # Points that cannot be drawn have residual 0: the logarithm masks them whatever the noise.
    residual = torch.ones_like(log_scale) if valid is None else valid.reshape(-1, n).to(z.dtype)
    rows = z.new_empty(z.shape[0], rank, n)
    pivots, heights = [], []
    for step in range(rank):
        pivot = (residual.log() + score[:, step]).max(-1, keepdim=True).indices
        height = residual.gather(-1, pivot)  # 0 when nothing is left: the slot and its row are dropped below
        pivots.append(pivot)
        heights.append(height)

        # By differences: the expanded form loses the residual once |z|^2 reaches the hundreds.
        chosen = z[entries, pivot.squeeze(-1)].unsqueeze(1)
        distance = torch.cdist(chosen, z, compute_mode="donot_use_mm_for_euclid_dist")
        row = distance.square_().mul_(-0.5).exp_()
        if step:
            before = rows[:, :step]
            row = torch.baddbmm(row, before[entries, :, pivot.squeeze(-1)].unsqueeze(1), before, alpha=-1)
        row = torch.mul(row.squeeze(1), height.clamp_min(tolerance).rsqrt_(), out=rows[:, step])
        residual = torch.threshold(torch.addcmul(residual, row, row, value=-1), tolerance, 0.0)
        residual.scatter_(-1, pivot, 0.0)

    found = torch.cat(heights, dim=-1) > 0
    if ranks is not None:
        found &= torch.arange(rank, device=z.device) < ranks.reshape(-1, 1)
    rows.masked_fill_(~found.unsqueeze(-1), 0.0)
    drawn = torch.cat(pivots, dim=-1)
    return Factor(drawn.view(*batch, rank), found.view(*batch, rank), rows.view(*batch, rank, n))


def nystrom_weights(points: Tensor, factor: Factor, *, valid: Tensor | None = None) -> Tensor:
    """W = H_SS^-1 H_S, every point as a combination of the pivots; W[:, S] is the identity.

    Args:
        points: float32 (..., n, d), the scaled keys z that were factorised.
        factor: of `pivoted_cholesky`, with r slots.
        valid: bool (..., n), the points that took part.

    Returns:
        float32 (..., r, n). Rows of slots that are not valid, and columns of points that are not, are 0.
        Entries may be negative; none is larger than 1e4.
    """
    pivots, found, rows = factor
    n = rows.shape[-1]
    # Upper triangular: a drawn point's residual is 0, so later rows vanish at it.
    triangle = rows.gather(-1, pivots.unsqueeze(-2).expand(*rows.shape[:-1], pivots.shape[-1]))
    triangle = triangle.masked_fill(~found.unsqueeze(-2), 0.0)
    triangle = triangle + torch.diag_embed((~found).to(rows.dtype))
    solution = torch.linalg.solve_triangular(triangle, rows, upper=True)  # G_SS^-1 G_S

    half_norms = torch.linalg.vector_norm(points, dim=-1).square_() / 2
    exponent = half_norms.unsqueeze(-2) - half_norms.gather(-1, pivots).unsqueeze(-1)
    exponent = exponent.add_(solution.abs().log_()).clamp_max_(_LOG_LARGEST_WEIGHT)
    weights = exponent.exp_().copysign_(solution)

    drawn = torch.zeros(*rows.shape[:-2], n, device=rows.device).scatter_add_(-1, pivots, found.to(rows.dtype))
    drop = drawn > 0 if valid is None else (drawn > 0) | ~valid
    weights = weights.masked_fill_(drop.unsqueeze(-2), 0.0)
    return weights.scatter_add_(-1, pivots.unsqueeze(-1), found.unsqueeze(-1).to(weights.dtype))
