"""Randomly pivoted Cholesky in blocks, for large ranks: the same law as step by step, in matrix products.

Each round proposes a block of points from the residual diagonal as it stands, and goes through them in order: one is
accepted with the probability that its residual has kept since. Accepted proposals are distributed exactly like
pivots drawn one at a time, and the rows of a round are computed together; rejected ones cost no row.

Source: Epperly, Tropp and Webber, "Embrace rejection: kernel matrix approximation by accelerated randomly pivoted
Cholesky", arXiv 2410.03969.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wildcat_kv.coreset.rpnys import TOLERANCE, Factor, half_squares, residual_floor

# Proposals of a round. It must not depend on the rest of a batch, or neither would the draws.
BLOCK = 64

Uniforms = Callable[[int], Tensor]


def accelerated_cholesky(
    points: Tensor,
    uniforms: Uniforms,
    rank: int,
    *,
    valid: Tensor | None = None,
    log_importance: Tensor | None = None,
    log_scale: Tensor | None = None,
    ranks: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Factor:
    """Draw pivots in proportion to the residual diagonal of H, and factorise G along them, in blocks.

    O(n r (d + r)) operations a batch entry, nearly all in matrix products, and O(n r) memory. Looks at the device
    once a round, and needs about r / 64 rounds; more where few points hold most of the mass.

    Args:
        points: float32 (..., n, d), the scaled keys z.
        uniforms: called with the number of the round, gives uniform noise, (..., 3, 64), in (0, 1): the leading and
            the trailing digits of where to propose, and what decides on acceptance.
        rank: r, slots.
        valid: as in `pivoted_cholesky`; so are the arguments below.
        log_importance: float32 (..., n).
        log_scale: float32 (..., n).
        ranks: int64 (...).
        tolerance: of exhausted points.

    Returns:
        The factor, with `rank` slots.
    """
    *batch, n, d = points.shape
    z = points.reshape(-1, n, d)
    half_square = half_squares(z)
    floor = residual_floor(half_square, tolerance, valid)
    importance = 2 * half_square if log_scale is None else log_scale.reshape(-1, n)
    if log_importance is not None:
        importance = importance + log_importance.reshape(-1, n)

    present = None if valid is None else valid.reshape(-1, n).to(z.dtype)
    entries = range(z.shape[0])
    wanted = [rank] * len(entries) if ranks is None else ranks.reshape(-1).tolist()
    counts = [0] * len(entries)
    pivots = torch.zeros(len(entries), rank, dtype=torch.int64, device=z.device)
    rows = z.new_empty(len(entries), rank, n)
    triangle = z.new_zeros(len(entries), rank, rank)
    residual = torch.ones_like(half_square)
    turn = 0
    while any(count < most for count, most in zip(counts, wanted, strict=True)):
        noise = uniforms(turn).reshape(len(entries), 3, BLOCK)
        turn += 1
        exhausted = residual <= floor
        proposed = _propose(residual.log().add_(importance).masked_fill_(exhausted, -torch.inf), noise[:, :2])

        # The residual of G among the proposals.
        index = proposed.unsqueeze(-1)
        near = z.gather(1, index.expand(-1, -1, d))
        halves, started = half_square.gather(1, proposed), residual.gather(1, proposed)
        block = torch.bmm(near, near.mT).sub_(halves.unsqueeze(1)).sub_(halves.unsqueeze(2)).clamp_max_(0.0).exp_()
        if turn > 1:
            past = torch.stack([own[: max(counts)].index_select(1, of) for own, of in zip(rows, proposed, strict=True)])
            block.baddbmm_(past.mT, past, alpha=-1)
        # What rounding has left of it: a point whose own entry is exhausted must not be proposed for ever.
        residual.scatter_(1, proposed, torch.minimum(block.diagonal(dim1=1, dim2=2), started))

        limit = torch.maximum(noise[:, 2] * started, floor.gather(1, proposed))
        limit.masked_fill_(exhausted.gather(1, proposed), torch.inf)
        accepted = _accept_(block, limit)
        room = torch.tensor([most - count for count, most in zip(counts, wanted, strict=True)]).to(z.device)
        accepted &= accepted.cumsum(-1) <= room.unsqueeze(-1)
        order = accepted.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        taken, left = torch.stack((accepted.sum(-1), (residual > floor).sum(-1))).tolist()
        for entry, count in enumerate(taken):
            if not left[entry]:
                wanted[entry] = counts[entry]
            if not count:
                continue
            start, stop = counts[entry], counts[entry] + count
            chosen = order[entry, :count]
            drawn = proposed[entry, chosen]
            lower = block[entry].index_select(0, chosen).index_select(1, chosen).tril_()
            lower = lower * lower.diagonal().rsqrt()
            fresh = torch.mm(z[entry, drawn], z[entry].mT)
            fresh.sub_(half_square[entry, drawn].unsqueeze(1)).sub_(half_square[entry]).clamp_max_(0.0).exp_()
            if present is not None:
                fresh.mul_(present[entry])
            if start:
                before = past[entry, :start].index_select(1, chosen)
                fresh.addmm_(before.mT, rows[entry, :start], alpha=-1)
                triangle[entry, :start, start:stop] = before
            fresh = torch.linalg.solve_triangular(lower, fresh, upper=False, out=rows[entry, start:stop])
            triangle[entry, start:stop, start:stop] = fresh.index_select(1, drawn)
            residual[entry].sub_(fresh.square().sum(0)).index_fill_(0, drawn, 0.0)
            pivots[entry, start:stop] = drawn
            counts[entry] = stop
        for entry, count in enumerate(counts):
            rows[entry, count : max(counts)] = 0

    rows[:, max(counts) :] = 0
    found = torch.arange(rank, device=z.device) < torch.tensor(counts, device=z.device).unsqueeze(-1)
    return Factor(
        pivots.view(*batch, rank),
        found.view(*batch, rank),
        rows.view(*batch, rank, n),
        triangle.view(*batch, rank, rank),
    )


def _propose(log_mass: Tensor, noise: Tensor) -> Tensor:
    """Indices (..., k) in proportion to exp(log_mass), (..., n), by inversion; noise (..., 2, k)."""
    # Sums over n points in float32 would be coarser than the masses.
    wide = torch.float32 if log_mass.device.type == "mps" else torch.float64
    mass = (log_mass - log_mass.amax(-1, keepdim=True)).exp_().nan_to_num_(0.0).to(wide)
    sums = mass.cumsum(-1)
    place = noise[..., 0, :].to(wide) + (noise[..., 1, :].to(wide) - 0.5) * 2.0**-23
    index = torch.searchsorted(sums, place * sums[..., -1:], right=True)
    return index.clamp_max_(log_mass.shape[-1] - 1)


def _accept_(block: Tensor, limit: Tensor) -> Tensor:
    """Eliminate in order those whose residual is above `limit` when their turn comes: bool (..., k).

    Args:
        block: (batch, k, k), the residual of G. Overwritten: below the diagonal, the column of each accepted one is
            what it was at its turn.
        limit: (batch, k), positive.
    """
    size = block.shape[-1]
    accepted = torch.empty_like(limit)
    for turn in range(size):
        height = block[:, turn, turn]
        keep = torch.gt(height, limit[:, turn], out=accepted[:, turn])
        rest = block[:, turn + 1 :, turn]
        share = rest * (keep / torch.maximum(height, limit[:, turn])).unsqueeze(-1)
        block[:, turn + 1 :, turn + 1 :].addcmul_(share.unsqueeze(2), rest.unsqueeze(1), value=-1)
    return accepted > 0
