"""RPNYS: randomly pivoted Cholesky and Nystrom weights, in batches.

`reference.rpnys` says what is computed: pivots S drawn in proportion to the residual diagonal, then W = H_SS^-1 H_S.
`pivoted_cholesky` draws (the loop of the paper's RPNYS, see `pivots.py`), `nystrom_weights` and `nystrom_sums` solve
(its last line).

The kernel is H_ij = exp(<z_i, z_j>) = D_i G_ij D_j with the Gaussian kernel G_ij = exp(-|z_i - z_j|^2 / 2)
and D_i = exp(|z_i|^2 / 2). G has entries in [0, 1] and is what gets factorised; D overflows float32 for
real keys and never leaves the log domain.

G depends on differences only, so the points may be given around any centre of their own, with `log_scale` for
the D that they really have. Distances come from products, |z_i|^2 + |z_j|^2 - 2 <z_i, z_j>, exact to about
1e-7 |z|^2: a near centre is what keeps G precise.

Source: Schröder and Mackey, "WildCat: Near-Linear Attention in Theory and Practice", arXiv 2602.10056;
randomly pivoted Cholesky is Chen, Epperly, Tropp and Webber, arXiv 2207.06503.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.choices import Weights as Weights
from wildcat_kv.coreset.pivots import TINY, TOLERANCE, Kernel, draw_pivots, half_squares
from wildcat_kv.coreset.tensors import keep_where_

LARGEST_WEIGHT = 1e4
LARGEST_EXPONENT = 80.0  # its exponential, and that of its negative, are normal numbers of float32

# Rows of a large factor at a time: their temporaries stay in the cache.
_SLOTS_AT_ONCE = 64


class Factor(NamedTuple):
    """A partial Cholesky factorisation of G.

    Attributes:
        pivots: int64 (..., r), pivots in the order of the draws; arbitrary where not `valid`.
        valid: bool (..., r), False for slots past the numerical rank or the number of points.
        rows: float32 (..., r, n), F with G close to F^T F; zero where not `valid`, and in columns of points that do
            not take part.
        triangle: float32 (..., r, r), F at the pivots, upper triangular: arbitrary below the diagonal, zero where
            not `valid`.
    """

    pivots: Tensor
    valid: Tensor
    rows: Tensor
    triangle: Tensor


def pivoted_cholesky(
    points: Tensor,
    noise: Tensor,
    *,
    valid: Tensor | None = None,
    log_importance: Tensor | None = None,
    log_scale: Tensor | None = None,
    ranks: Tensor | None = None,
    half_square: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Factor:
    """Draw pivots by the residual diagonal of H, and factorise G.

    The loop of RPNYS: a pivot is drawn with a probability in proportion to its residual. O(n r (d + r)) time and O(n r)
    memory a batch entry; r sequential steps, no host synchronisation.

    Args:
        points: float32 (..., n, d), the scaled keys z.
        noise: float32 (..., r, n), standard Gumbel noise, fresh for every step; r is the rank.
        valid: bool (..., n), True for points that take part; all by default.
        log_importance: float32 (..., n), added to the log of the residual diagonal (weighted points).
        log_scale: float32 (..., n), log D^2 up to a constant of the batch entry; |z|^2 by default.
        ranks: int64 (...), a rank of its own, at most r, for each batch entry.
        half_square: float32 (..., n), |z|^2 / 2 where it is known already.
        tolerance: residual of G at or below which a point is exhausted. So is a point at or below the rounding of
            its own distances, which is more where |z|^2 is above 10.

    Returns:
        A Factor with as many slots as `noise` has steps.
    """
    *batch, rank, n = noise.shape
    kernel = Kernel.of(points, valid, log_importance, log_scale, tolerance, half_square)
    drawn = draw_pivots(kernel, noise.reshape(-1, rank, n), tolerance)
    pivots, found, rows = (tensor.unflatten(0, batch) if batch else tensor.squeeze(0) for tensor in drawn)
    if ranks is not None:
        found = found & (torch.arange(rank, device=rows.device) < ranks.unsqueeze(-1))
        keep_where_(rows, found.unsqueeze(-1))
    if valid is not None:
        keep_where_(rows, valid.unsqueeze(-2))
    triangle = keep_where_(rows.gather(-1, pivots.unsqueeze(-2).expand(*batch, rank, -1)), found.unsqueeze(-2))
    return Factor(pivots, found, rows, triangle)


def nystrom_weights(
    points: Tensor,
    factor: Factor,
    *,
    valid: Tensor | None = None,
    log_scale: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Compute W = H_SS^-1 H_S, points as combinations of pivots.

    Args:
        points: float32 (..., n, d), the scaled keys z that were factorised.
        factor: factorisation with r slots.
        valid: bool (..., n), True for the points that took part.
        log_scale: float32 (..., n), log D^2 as in `pivoted_cholesky`.
        order: int64 (..., r), a permutation of the slots: row i of the result belongs to slot order[i].

    Returns:
        float32 (..., r, n). Rows of slots that are not valid, and columns of points that are not, are 0.
        W[:, S] = I. Entries may be negative; none is larger than 1e4 in magnitude.
    """
    pivots, found, rows, _ = factor
    rank = pivots.shape[-1]
    log_scale = 2 * half_squares(points) if log_scale is None else log_scale
    level = slot_levels(factor, log_scale)
    relative = relative_rows(rows, log_scale, level)
    # T, as `relative_triangle` computes it from fewer numbers.
    triangle = relative.gather(-1, pivots.unsqueeze(-2).expand(*pivots.shape, -1))
    triangle = keep_where_(triangle, found.unsqueeze(-2))
    if order is None:
        order = torch.arange(rank, device=rows.device).expand(pivots.shape)
    permutation = torch.zeros_like(triangle).scatter_(-1, order.unsqueeze(-1), 1.0)
    unmix = torch.linalg.solve_triangular(triangle, permutation, upper=True, left=False, unitriangular=True)
    weights = torch.matmul(unmix, relative).nan_to_num_(0.0).clamp_(-LARGEST_WEIGHT, LARGEST_WEIGHT)

    others = not_drawn(factor)
    weights = weights.mul_((others if valid is None else keep_where_(others, valid)).unsqueeze(-2))
    drawn = found.to(rows.dtype)
    pivots, drawn = pivots.gather(-1, order), drawn.gather(-1, order)
    return weights.scatter_add_(-1, pivots.unsqueeze(-1), drawn.unsqueeze(-1))


def nystrom_sums(factor: Factor, values: Tensor, *, log_scale: Tensor) -> Tensor:
    """Compute W V without W.

    This takes O(n r) operations for each channel of V, where W takes O(n r^2).

    Args:
        factor: factorisation with r slots.
        values: float32 (..., n, c), V. Numbers of points that do not take part have no effect.
        log_scale: float32 (..., n), log D^2 as in `pivoted_cholesky`.

    Returns:
        float32 (..., r, c), 0 for slots that are not valid.
    """
    pivots, found, rows, _ = factor
    level = slot_levels(factor, log_scale)
    others = values * not_drawn(factor).unsqueeze(-1)
    parts = [
        torch.matmul(relative_rows(some, log_scale, levels), others)
        for some, levels in zip(rows.split(_SLOTS_AT_ONCE, dim=-2), level.split(_SLOTS_AT_ONCE, dim=-1), strict=True)
    ]
    triangle = relative_triangle(factor, log_scale, level)
    sums = torch.linalg.solve_triangular(triangle, torch.cat(parts, dim=-2), upper=True, unitriangular=True)
    sums = sums.nan_to_num_(0.0)
    own = values.gather(-2, pivots.unsqueeze(-1).expand_as(sums))
    return torch.addcmul(sums, own, found.unsqueeze(-1).to(own.dtype))


def slot_levels(factor: Factor, log_scale: Tensor) -> Tensor:
    """Compute log(F_ss D_s) of slots s, float32 (..., r).

    Arbitrary where a slot is not valid.
    """
    root = factor.triangle.diagonal(dim1=-2, dim2=-1)
    return torch.add(root.clamp_min(TINY).log_(), log_scale.gather(-1, factor.pivots), alpha=0.5)


def relative_rows(rows: Tensor, log_scale: Tensor, level: Tensor) -> Tensor:
    """Compute C_sl = F_sl D_l / (F_ss D_s), float32 (..., r, n).

    A factor of H, each row over the entry at its own pivot. A pivot drawn in proportion to the residual diagonal of H
    seldom leaves larger residuals behind: the entries are moderate, however far D ranges.

    Args:
        rows: float32 (..., r, n), F.
        log_scale: float32 (..., n), log D^2.
        level: float32 (..., r), the result of `slot_levels`.
    """
    # Laid out as the rows are, whichever way that is.
    exponent = torch.sub(log_scale.unsqueeze(-2) / 2, level.unsqueeze(-1), out=torch.empty_like(rows))
    relative = exponent.clamp_(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp_().mul_(rows)
    return relative.clamp_(-LARGEST_WEIGHT, LARGEST_WEIGHT)


def relative_triangle(factor: Factor, log_scale: Tensor, level: Tensor) -> Tensor:
    """Compute T = C[:, S], which gives W = T^-1 C.

    T is float32 (..., r, r), unit upper triangular; its entries on and below the diagonal are arbitrary.
    """
    return relative_rows(factor.triangle, log_scale.gather(-1, factor.pivots), level)


def not_drawn(factor: Factor) -> Tensor:
    """Mark pivots by 0, other points by 1: float32 (..., n)."""
    ones = torch.ones_like(factor.rows[..., 0, :])
    others = torch.logical_not(factor.valid, out=torch.empty_like(factor.valid, dtype=ones.dtype))
    return ones.scatter_reduce_(-1, factor.pivots, others, "prod")
