"""RPNYS in blocks, for large ranks: the same law, in matrix products.

Each round proposes a block of points from the residual diagonal as it stands, and goes through them in order: one is
accepted with the probability that its residual has kept since. Accepted proposals are distributed exactly like
pivots drawn one at a time, and the rows of a round are computed together; rejected ones cost no row.

Source: Epperly, Tropp and Webber, "Embrace rejection: kernel matrix approximation by accelerated randomly pivoted
Cholesky", arXiv 2410.03969. It stands in for the loop of RPNYS in arXiv 2602.10056.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wildcat_kv.coreset.pivots import TOLERANCE, Kernel
from wildcat_kv.coreset.rpnys import Factor

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
    half_square: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Factor:
    """Draw pivots by the residual diagonal of H, in blocks.

    O(n r (d + r)) operations a batch entry, nearly all in matrix products, and O(n r) memory. Looks at the device
    once a round, and needs about r / 64 rounds; more where few points hold most of the mass.

    Args:
        points: float32 (..., n, d), the scaled keys z.
        uniforms: function from the number of a round to uniform noise in (0, 1), (..., 3, 64): the leading and the
            trailing digits of the places to propose, then the thresholds of acceptance.
        rank: r, the number of slots.
        valid: bool (..., n), see `pivoted_cholesky` for this and the arguments below.
        log_importance: float32 (..., n).
        log_scale: float32 (..., n).
        ranks: int64 (...).
        half_square: float32 (..., n).
        tolerance: residual of G at or below which a point is exhausted.

    Returns:
        A Factor with `rank` slots.
    """
    *batch, n, _ = points.shape
    kernel = Kernel.of(points, valid, log_importance, log_scale, tolerance, half_square)
    growing = _GrowingFactor(kernel, valid, rank, ranks)
    turn = 0
    while growing.incomplete:
        growing.round(uniforms(turn).reshape(-1, 3, BLOCK))
        turn += 1
    pivots, found, rows, triangle = growing.finish()
    return Factor(
        pivots.view(*batch, rank),
        found.view(*batch, rank),
        rows.view(*batch, rank, n),
        triangle.view(*batch, rank, rank),
    )


class _GrowingFactor:
    """The factorisation of a flat batch, grown block by block.

    Attributes:
        counts: pivots of each entry so far.
        wanted: pivots of each entry in the end; lowered where no more can be found.
        residual: float32 (batch, n), the residual diagonal of G.
    """

    def __init__(self, kernel: Kernel, valid: Tensor | None, rank: int, ranks: Tensor | None) -> None:
        z, n = kernel.points, kernel.points.shape[1]
        batch = z.shape[0]
        self._kernel = kernel
        self._present = None if valid is None else valid.reshape(-1, n).to(z.dtype)
        self.wanted = [rank] * batch if ranks is None else ranks.reshape(-1).tolist()
        self.counts = [0] * batch
        self.residual = torch.ones_like(kernel.half_square)
        self._pivots = torch.zeros(batch, rank, dtype=torch.int64, device=z.device)
        self._rows = z.new_empty(batch, rank, n)
        self._triangle = z.new_zeros(batch, rank, rank)

    @property
    def incomplete(self) -> bool:
        """True if an entry wants more pivots."""
        return any(count < most for count, most in zip(self.counts, self.wanted, strict=True))

    def round(self, noise: Tensor) -> None:
        """Propose a block for every entry, and append what is accepted.

        Args:
            noise: uniform float32 (batch, 3, BLOCK).
        """
        _, _, floor, log_mass = self._kernel
        exhausted = self.residual <= floor
        proposed = _propose(self.residual.log().add_(log_mass).masked_fill_(exhausted, -torch.inf), noise[:, :2])
        started = self.residual.gather(1, proposed)
        block, past = self._residual_block(proposed)
        # What rounding has left of it: a point whose own entry is exhausted must not be proposed for ever.
        self.residual.scatter_(1, proposed, torch.minimum(block.diagonal(dim1=1, dim2=2), started))

        limit = torch.maximum(noise[:, 2] * started, floor.gather(1, proposed))
        limit.masked_fill_(exhausted.gather(1, proposed), torch.inf)
        accepted = _accept_(block, limit)
        room = torch.tensor([most - count for count, most in zip(self.counts, self.wanted, strict=True)])
        accepted &= accepted.cumsum(-1) <= room.to(block.device).unsqueeze(-1)
        order = accepted.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        taken, left = torch.stack((accepted.sum(-1), (self.residual > floor).sum(-1))).tolist()
        for entry, count in enumerate(taken):
            if not left[entry]:
                self.wanted[entry] = self.counts[entry]
            if count:
                chosen = order[entry, :count]
                before = None if past is None else past[entry, : self.counts[entry]].index_select(1, chosen)
                self._append(entry, proposed[entry, chosen], block[entry][:, chosen][chosen], before)
        for entry, count in enumerate(self.counts):  # read by other entries' rounds
            self._rows[entry, count : max(self.counts)] = 0

    def finish(self) -> Factor:
        """Clear the slots that stay empty."""
        rank = self._pivots.shape[1]
        self._rows[:, max(self.counts) :] = 0
        counts = torch.tensor(self.counts, device=self._rows.device)
        found = torch.arange(rank, device=self._rows.device) < counts.unsqueeze(-1)
        return Factor(self._pivots, found, self._rows, self._triangle)

    def _residual_block(self, proposed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the residual of G among the proposals (batch, k).

        Returns:
            The residual (batch, k, k), and the rows so far at the proposals (batch, c, k), None in the first round.
        """
        z, half_square = self._kernel.points, self._kernel.half_square
        near = z.gather(1, proposed.unsqueeze(-1).expand(-1, -1, z.shape[-1]))
        halves = half_square.gather(1, proposed)
        block = torch.bmm(near, near.mT).sub_(halves.unsqueeze(1)).sub_(halves.unsqueeze(2)).clamp_max_(0.0).exp_()
        longest = max(self.counts)
        if not longest:
            return block, None
        past = [own[:longest].index_select(1, of) for own, of in zip(self._rows, proposed, strict=True)]
        stacked = torch.stack(past)
        return block.baddbmm_(stacked.mT, stacked, alpha=-1), stacked

    def _append(self, entry: int, drawn: Tensor, block: Tensor, before: Tensor | None) -> None:
        """Append the rows of accepted pivots to an entry.

        Args:
            entry: index in the batch.
            drawn: int64 (k,), the pivots.
            block: float32 (k, k), the eliminated residual among them, valid on and below the diagonal.
            before: float32 (c, k), the rows so far at the pivots; None in the first round.
        """
        z, half_square = self._kernel.points[entry], self._kernel.half_square[entry]
        start, stop = self.counts[entry], self.counts[entry] + len(drawn)
        rows, triangle, residual = self._rows[entry], self._triangle[entry], self.residual[entry]
        lower = block.tril()
        lower = lower * lower.diagonal().rsqrt()
        fresh = torch.mm(z[drawn], z.mT)
        fresh.sub_(half_square[drawn].unsqueeze(1)).sub_(half_square).clamp_max_(0.0).exp_()
        if self._present is not None:
            fresh.mul_(self._present[entry])
        if start and before is not None:
            fresh.addmm_(before.mT, rows[:start], alpha=-1)
            triangle[:start, start:stop] = before
        fresh = torch.linalg.solve_triangular(lower, fresh, upper=False, out=rows[start:stop])
        triangle[start:stop, start:stop] = fresh.index_select(1, drawn)
        residual.sub_(fresh.square().sum(0)).index_fill_(0, drawn, 0.0)
        self._pivots[entry, start:stop] = drawn
        self.counts[entry] = stop


def _propose(log_mass: Tensor, noise: Tensor) -> Tensor:
    """Draw indices in proportion to exp(log_mass), by inversion.

    Args:
        log_mass: float32 (..., n).
        noise: uniform float32 (..., 2, k), leading and trailing digits.

    Returns:
        int64 (..., k).
    """
    # Sums over n points in float32 would be coarser than the masses.
    wide = torch.float32 if log_mass.device.type == "mps" else torch.float64
    mass = (log_mass - log_mass.amax(-1, keepdim=True)).exp_().nan_to_num_(0.0).to(wide)
    sums = mass.cumsum(-1)
    place = noise[..., 0, :].to(wide) + (noise[..., 1, :].to(wide) - 0.5) * 2.0**-23
    index = torch.searchsorted(sums, place * sums[..., -1:], right=True)
    return index.clamp_max_(log_mass.shape[-1] - 1)


def _accept_(block: Tensor, limit: Tensor) -> Tensor:
    """Eliminate, in order, the proposals with a residual above `limit`.

    Args:
        block: float32 (batch, k, k), the residual of G. Overwritten: on and below the diagonal, the column of each
            accepted proposal is the residual at its turn.
        limit: float32 (batch, k), positive.

    Returns:
        bool (batch, k), True for accepted proposals.
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
