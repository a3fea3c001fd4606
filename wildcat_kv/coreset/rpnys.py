"""Randomly pivoted Cholesky and Nystrom weights for the exponential kernel. Pure tensors.

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

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.choices import Weights as Weights

# A residual of G at or below this is rounding: float32 squares and sums leave about 1e-6 at rank 100.
TOLERANCE = 1e-5

# What float32 leaves of an entry of G at the distances' rounding, for every unit of |z|^2.
_ROUNDING = 8 * 2.0**-23

_LARGEST_WEIGHT = 1e4
_LARGEST_EXPONENT = 80.0  # its exponential, and that of its negative, are normal numbers of float32
_NEVER = -1e36  # a score that loses to every other one; infinity times 0 would be NaN
_TINY = 1e-30

# Rows of a large factor at a time: their temporaries stay in the cache.
_SLOTS_AT_ONCE = 64

# Up to so many points for each step it is faster to compute all of G, in one product, than a row at every step.
WHOLE_KERNEL = 6

# Products with fewer terms take a slow path of torch's on CPU; rows of zeros cost less.
_FEWEST_TERMS = 8


class Factor(NamedTuple):
    """A partial Cholesky factorisation of G.

    Attributes:
        pivots: int64 (..., r), the drawn points in the order of the draws; arbitrary where not `valid`.
        valid: bool (..., r), False for slots past the numerical rank or the number of points.
        rows: float32 (..., r, n), G is close to rows^T rows; zero where not `valid`, and in
            columns of points that do not take part.
        triangle: float32 (..., r, r), the rows at the pivots, upper triangular: arbitrary below the diagonal, zero
            where not `valid`.
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
    tolerance: float = TOLERANCE,
) -> Factor:
    """Draw pivots in proportion to the residual diagonal of H, and factorise G along them.

    O(n r (d + r)) time and O(n r) memory a batch entry; r sequential steps, no host synchronisation.

    Args:
        points: float32 (..., n, d), the scaled keys z.
        noise: float32 (..., r, n), standard Gumbel noise, fresh for every step; r is the rank.
        valid: bool (..., n), points that take part; all by default.
        log_importance: float32 (..., n), added to the log of the residual diagonal (weighted points).
        log_scale: float32 (..., n), log D^2 up to a constant of the batch entry; |z|^2 by default.
        ranks: int64 (...), a rank of its own, at most r, for each batch entry.
        tolerance: points whose residual of G is at or below it are exhausted; so are points at or below the
            rounding of their own distances, which is more where |z|^2 is above 10.

    Returns:
        The factor, with as many slots as `noise` has steps.
    """
    *batch, rank, n = noise.shape
    z = points.reshape(-1, n, points.shape[-1])
    entries = torch.arange(z.shape[0], device=z.device)
    half_square = half_squares(z)
    kernel_row = _kernel_rows(z, half_square, whole=n <= WHOLE_KERNEL * rank)
    floor = residual_floor(half_square, tolerance, valid)
    importance = 2 * half_square if log_scale is None else log_scale.reshape(-1, n)
    if log_importance is not None:
        importance = importance + log_importance.reshape(-1, n)

    # Steps first: what a step reads and writes is contiguous. Masks are numbers: on CPU much faster than bool ones.
    score = z.new_empty(rank, z.shape[0], n)
    torch.add(noise.reshape(-1, rank, n).transpose(0, 1), importance, out=score)
    rows = z.new_zeros(max(rank, _FEWEST_TERMS), z.shape[0], n)
    residual = torch.ones_like(half_square)
    exhausted = torch.empty_like(residual)
    pivots = torch.empty(rank, z.shape[0], 1, dtype=torch.int64, device=z.device)
    found = z.new_empty(rank, z.shape[0], 1)
    for step in range(rank):
        torch.le(residual, floor, out=exhausted)
        candidates = score[step].add_(residual.clamp_min(_TINY).log_()).add_(exhausted, alpha=_NEVER)
        best, pivot = candidates.max(-1, keepdim=True)
        pivots[step] = pivot
        torch.gt(best, _NEVER / 2, out=found[step])

        row = kernel_row(pivot)
        if step:
            before = rows[: max(step, _FEWEST_TERMS)].transpose(0, 1)
            row = torch.baddbmm(row, before[entries, :, pivot.squeeze(-1)].unsqueeze(1), before, alpha=-1)
        height = residual.gather(-1, pivot).clamp_min_(tolerance)
        row = torch.mul(row.squeeze(1), height.rsqrt_().mul_(found[step]), out=rows[step])
        residual.addcmul_(row, row, value=-1).scatter_(-1, pivot, 0.0)

    pivots, found = pivots.squeeze(-1).T.contiguous(), found.squeeze(-1).T > 0
    rows = rows[:rank].transpose(0, 1)
    if ranks is not None:
        found = found & (torch.arange(rank, device=z.device) < ranks.reshape(-1, 1))
        rows.mul_(found.unsqueeze(-1).to(rows.dtype))
    if valid is not None:
        rows.mul_(valid.reshape(-1, 1, n).to(rows.dtype))
    triangle = rows.gather(-1, pivots.unsqueeze(-2).expand(-1, rank, -1)).mul_(found.unsqueeze(-2).to(rows.dtype))
    return Factor(
        pivots.view(*batch, rank),
        found.view(*batch, rank),
        rows.view(*batch, rank, n),
        triangle.view(*batch, rank, rank),
    )


def _kernel_rows(z: Tensor, half_square: Tensor, *, whole: bool) -> Callable[[Tensor], Tensor]:
    """What gives the row of G at a point of each entry, (batch, 1, n) for (batch, 1); `whole` computes all at once."""
    first = torch.arange(z.shape[0], device=z.device).unsqueeze(-1) * z.shape[1]

    def between(points: Tensor, half_squares: Tensor) -> Tensor:
        products = torch.baddbmm(half_square.unsqueeze(1), points, z.mT, beta=-1)
        return products.sub_(half_squares.unsqueeze(2)).clamp_max_(0.0).exp_()

    def at(pivot: Tensor, numbers: Tensor) -> Tensor:
        return numbers.flatten(0, 1).index_select(0, (first + pivot).view(-1)).unsqueeze(1)

    if whole:
        kernel = between(z, half_square)
        return lambda pivot: at(pivot, kernel)
    return lambda pivot: between(at(pivot, z), half_square.gather(-1, pivot))


def nystrom_weights(
    points: Tensor,
    factor: Factor,
    *,
    valid: Tensor | None = None,
    log_scale: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """W = H_SS^-1 H_S, every point as a combination of the pivots; W[:, S] is the identity.

    Args:
        points: float32 (..., n, d), the scaled keys z that were factorised.
        factor: of `pivoted_cholesky`, with r slots.
        valid: bool (..., n), the points that took part.
        log_scale: float32 (..., n), as in `pivoted_cholesky`.
        order: int64 (..., r), a permutation of the slots: row i of the result is that of slot order[i].

    Returns:
        float32 (..., r, n). Rows of slots that are not valid, and columns of points that are not, are 0.
        Entries may be negative; none is larger than 1e4.
    """
    pivots, found, rows, _ = factor
    rank = pivots.shape[-1]
    log_scale = 2 * half_squares(points) if log_scale is None else log_scale
    level = slot_levels(factor, log_scale)
    relative = relative_rows(rows, log_scale, level)
    triangle = relative_triangle(factor, log_scale, level)
    if order is None:
        order = torch.arange(rank, device=rows.device).expand(pivots.shape)
    permutation = torch.zeros_like(triangle).scatter_(-1, order.unsqueeze(-1), 1.0)
    unmix = torch.linalg.solve_triangular(triangle, permutation, upper=True, left=False, unitriangular=True)
    weights = torch.matmul(unmix, relative).nan_to_num_(0.0).clamp_(-_LARGEST_WEIGHT, _LARGEST_WEIGHT)

    others = not_drawn(factor)
    weights = weights.mul_((others if valid is None else others * valid.to(rows.dtype)).unsqueeze(-2))
    drawn = found.to(rows.dtype)
    pivots, drawn = pivots.gather(-1, order), drawn.gather(-1, order)
    return weights.scatter_add_(-1, pivots.unsqueeze(-1), drawn.unsqueeze(-1))


def nystrom_sums(factor: Factor, values: Tensor, *, log_scale: Tensor) -> Tensor:
    """W V without W: O(n r) operations for each channel of V, where W takes O(n r^2).

    Args:
        factor: with r slots.
        values: float32 (..., n, c), V. Numbers of points that do not take part are without effect.
        log_scale: float32 (..., n), as in `pivoted_cholesky`.

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
    """log(F_ss D_s) of each slot s, float32 (..., r); arbitrary where not valid."""
    root = factor.triangle.diagonal(dim1=-2, dim2=-1)
    return torch.add(root.clamp_min(_TINY).log_(), log_scale.gather(-1, factor.pivots), alpha=0.5)


def relative_rows(rows: Tensor, log_scale: Tensor, level: Tensor) -> Tensor:
    """C_sl = F_sl D_l / (F_ss D_s), the rows of a factor of H, each over its own pivot's entry.

    A pivot drawn in proportion to the residual diagonal of H seldom leaves larger residuals behind: the entries are
    moderate, however far D ranges.

    Args:
        rows: float32 (..., r, n), F.
        log_scale: float32 (..., n), log D^2.
        level: float32 (..., r), of `slot_levels`.
    """
    # Laid out as the rows are, whichever way that is.
    exponent = torch.sub(log_scale.unsqueeze(-2) / 2, level.unsqueeze(-1), out=torch.empty_like(rows))
    relative = exponent.clamp_(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp_().mul_(rows)
    return relative.clamp_(-_LARGEST_WEIGHT, _LARGEST_WEIGHT)


def relative_triangle(factor: Factor, log_scale: Tensor, level: Tensor) -> Tensor:
    """T = C[:, S], (..., r, r): unit upper triangular, arbitrary on and below the diagonal. W = T^-1 C."""
    return relative_rows(factor.triangle, log_scale.gather(-1, factor.pivots), level)


def not_drawn(factor: Factor) -> Tensor:
    """float32 (..., n), 0 for pivots and 1 for the other points."""
    ones = torch.ones_like(factor.rows[..., 0, :])
    return ones.scatter_reduce(-1, factor.pivots, 1 - factor.valid.to(ones.dtype), "prod")


def half_squares(points: Tensor) -> Tensor:
    """|z|^2 / 2 of points (..., d)."""
    return torch.linalg.vector_norm(points, dim=-1).square_().div_(2)


def residual_floor(half_square: Tensor, tolerance: float, valid: Tensor | None) -> Tensor:
    """The residual of G at which a point is exhausted; points that do not take part are so from the start."""
    floor = (half_square * (2 * _ROUNDING)).clamp_(tolerance, max(tolerance, 0.5))
    return floor if valid is None else floor.masked_fill_(~valid.reshape(floor.shape), math.inf)
