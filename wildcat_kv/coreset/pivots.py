"""The pivots of RPNYS: drawn one after the other, in proportion to the residual diagonal of H.

There are two ways, to the same pivots. On a host each step computes the one row of the factor that it needs. On a
device the residual of all of G is kept: more arithmetic, less than half the launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.launching import is_launched

# A residual of G at or below this is rounding: float32 squares and sums leave about 1e-6 at rank 100.
TOLERANCE = 1e-5

# Rounding of an entry of G in float32, for every unit of |z|^2 in its distance.
ROUNDING = 8 * 2.0**-23

NEVER = -1e36  # a score that loses to every other one; infinity times 0 would be NaN
TINY = 1e-30
HIDDEN = 2.0**100  # no residual is above it; its root is exact

# With at most this many points for each step, one product for all of G is faster than a row at every step.
_WHOLE_KERNEL = 6

# With at most this many points for each step, a device is faster with the residual of all of G.
_WHOLE_RESIDUAL = 24

# Products with fewer terms take a slow path of torch's on CPU; rows of zeros cost less.
_FEWEST_TERMS = 8


class Kernel(NamedTuple):
    """The kernel of a flat batch of points.

    Attributes:
        points: float32 (batch, n, d), z.
        half_square: float32 (batch, n), |z|^2 / 2.
        floor: float32 (batch, n), the residual of G at which a point is exhausted; `HIDDEN` for points that do
            not take part.
        log_mass: float32 (batch, n), log D^2 and the log importance: with the log residual, the log probability of a
            draw up to a constant.
    """

    points: Tensor
    half_square: Tensor
    floor: Tensor
    log_mass: Tensor

    @staticmethod
    def of(
        points: Tensor,
        valid: Tensor | None,
        log_importance: Tensor | None,
        log_scale: Tensor | None,
        tolerance: float,
        half_square: Tensor | None = None,
    ) -> Kernel:
        """Flatten the batch of `pivoted_cholesky`'s arguments."""
        n = points.shape[-2]
        z = points.reshape(-1, n, points.shape[-1])
        half_square = half_squares(z) if half_square is None else half_square.reshape(-1, n)
        floor = (half_square * (2 * ROUNDING)).clamp_(tolerance, max(tolerance, 0.5))
        if valid is not None:
            floor = torch.where(valid, floor.view(valid.shape), HIDDEN).view(floor.shape)
        log_mass = 2 * half_square if log_scale is None else log_scale.reshape(-1, n)
        if log_importance is not None:
            log_mass = log_mass + log_importance.reshape(-1, n)
        return Kernel(z, half_square, floor, log_mass)


def draw_pivots(kernel: Kernel, noise: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pivots in proportion to their residual, and factorise along them.

    O(n r (d + r)) time on a host, O(n^2 r) on a device where n is at most 24 r. No host synchronisation.

    Args:
        kernel: kernel of a flat batch.
        noise: float32 (batch, r, n), standard Gumbel noise.
        tolerance: least residual of a pivot.

    Returns:
        Pivots int64 (batch, r), arbitrary where not found; found bool (batch, r), True first; and rows of the factor,
        float32 (batch, r, n), 0 where not found, arbitrary at points that do not take part.
    """
    _, rank, n = noise.shape
    if _keeps_residual(n, rank, noise.device):
        return _draw_by_residual(kernel, noise)
    return _draw_by_rows(kernel, noise, tolerance)


def kernel_columns(n: int, rank: int, device: torch.device | str) -> int:
    """Count the numbers of G, or its residual, that `draw_pivots` holds of each of n points."""
    if _keeps_residual(n, rank, device):
        return 2 * n  # the exponent of G beside it
    return n if n <= _WHOLE_KERNEL * rank else 0


def _keeps_residual(n: int, rank: int, device: torch.device | str) -> bool:
    return n <= _WHOLE_RESIDUAL * rank and is_launched(device)


def _draw_by_residual(kernel: Kernel, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pivots with the residual of all of G at hand: seven launches a step.

    Points are scaled so that each is exhausted at a residual of 1: A_ij = G_ij / (f_i f_j)^1/2 with their floors f. A
    pivot p takes a_p a_p^T / A_pp of it, and its row of the factor is a_p (f / A_pp)^1/2.
    """
    z, half_square, floor, log_mass = kernel
    batch, rank, n = noise.shape
    scale = floor.rsqrt()
    products = torch.baddbmm(half_square.unsqueeze(1), z, z.mT, beta=-1)
    matrix = products.sub_(half_square.unsqueeze(2)).clamp_max_(0.0).exp_()
    # A column more: the diagonal, 0 where exhausted. What a pivot needs is then one row.
    held = z.new_empty(batch, n, n + 1)
    residual, live = held[..., :n], held[..., n]
    torch.mul(matrix.mul_(scale.unsqueeze(1)), scale.unsqueeze(2), out=residual)
    diagonal = residual.diagonal(dim1=-2, dim2=-1)
    score = noise.transpose(0, 1) + floor.log().add_(log_mass)
    best = z.new_empty(rank, batch, 1)
    pivots = torch.empty(rank, batch, 1, dtype=torch.int64, device=z.device)
    rows = z.new_empty(rank, batch, 1, n + 1)
    for step in range(rank):
        torch.threshold(diagonal, 1.0, 0.0, out=live)
        # The logarithm of 0 loses to all. Once all are exhausted, numbers are NaN until the bin's last step.
        torch.max(live.log().add_(score[step]), dim=-1, keepdim=True, out=(best[step], pivots[step]))
        torch.gather(held, 1, pivots[step].unsqueeze(-1).expand(-1, 1, n + 1), out=rows[step])
        if step < rank - 1:
            row, height = rows[step].split((n, 1), dim=-1)
            residual.addcmul_(row.mT, row / height, value=-1)
    found = (best > NEVER).transpose(0, 1)
    factor = rows[..., :n].squeeze(2).transpose(0, 1) * rows[..., n].transpose(0, 1).rsqrt_()
    factor = torch.where(found, factor.mul_(floor.sqrt().unsqueeze(1)), 0.0)
    return pivots.squeeze(-1).T.contiguous(), found.squeeze(-1), factor


def _draw_by_rows(kernel: Kernel, noise: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pivots with a row of the factor at a time."""
    z, _, floor, log_mass = kernel
    batch, rank, n = noise.shape
    entries = torch.arange(batch, device=z.device)
    kernel_row = _kernel_rows(kernel, whole=n <= _WHOLE_KERNEL * rank)
    # Steps first: what a step reads and writes is contiguous. Masks are numbers: on CPU much faster than bool ones.
    score = z.new_empty(rank, batch, n)
    torch.add(noise.transpose(0, 1), log_mass, out=score)
    rows = z.new_zeros(max(rank, _FEWEST_TERMS), batch, n)
    residual = torch.ones_like(log_mass)
    exhausted = torch.empty_like(residual)
    pivots = torch.empty(rank, batch, 1, dtype=torch.int64, device=z.device)
    found = z.new_empty(rank, batch, 1)
    for step in range(rank):
        torch.le(residual, floor, out=exhausted)
        candidates = score[step].add_(residual.clamp_min(TINY).log_()).add_(exhausted, alpha=NEVER)
        best, pivot = candidates.max(-1, keepdim=True)
        pivots[step] = pivot
        torch.gt(best, NEVER / 2, out=found[step])

        row = kernel_row(pivot)
        if step:
            before = rows[: max(step, _FEWEST_TERMS)].transpose(0, 1)
            row = torch.baddbmm(row, before[entries, :, pivot.squeeze(-1)].unsqueeze(1), before, alpha=-1)
        height = residual.gather(-1, pivot).clamp_min_(tolerance)
        row = torch.mul(row.squeeze(1), height.rsqrt_().mul_(found[step]), out=rows[step])
        residual.addcmul_(row, row, value=-1).scatter_(-1, pivot, 0.0)
    return pivots.squeeze(-1).T.contiguous(), found.squeeze(-1).T > 0, rows[:rank].transpose(0, 1)


def _kernel_rows(kernel: Kernel, *, whole: bool) -> Callable[[Tensor], Tensor]:
    """Make the function from points to rows of G.

    The function takes int64 (batch, 1) and gives float32 (batch, 1, n).

    Args:
        kernel: points of a flat batch.
        whole: True to compute all of G at once.
    """
    z, half_square = kernel.points, kernel.half_square
    first = torch.arange(z.shape[0], device=z.device).unsqueeze(-1) * z.shape[1]

    def between(points: Tensor, half_squares: Tensor) -> Tensor:
        products = torch.baddbmm(half_square.unsqueeze(1), points, z.mT, beta=-1)
        return products.sub_(half_squares.unsqueeze(2)).clamp_max_(0.0).exp_()

    def at(pivot: Tensor, numbers: Tensor) -> Tensor:
        return numbers.flatten(0, 1).index_select(0, (first + pivot).view(-1)).unsqueeze(1)

    if whole:
        all_rows = between(z, half_square)
        return lambda pivot: at(pivot, all_rows)
    return lambda pivot: between(at(pivot, z), half_square.gather(-1, pivot))


def half_squares(points: Tensor) -> Tensor:
    """Compute |z|^2 / 2 of points (..., d)."""
    return torch.linalg.vector_norm(points, dim=-1).square_().div_(2)
