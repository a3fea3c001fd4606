"""COMPRESSKV for all bins of all heads at once, in float32.

For every bin: scale the keys, draw pivots and solve for W (RPNYS), sum V and 1 over W. Bins are taken as many at a time
as a workspace holds.

Source: Schröder and Mackey, "WildCat: Near-Linear Attention in Theory and Practice", arXiv 2602.10056.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.draws import Draws
from wildcat_kv.coreset.launching import is_launched
from wildcat_kv.coreset.pivots import half_squares, kernel_columns
from wildcat_kv.coreset.rpnys import Factor, nystrom_sums, nystrom_weights, pivoted_cholesky
from wildcat_kv.coreset.rpnys_blocked import accelerated_cholesky
from wildcat_kv.coreset.temperature import constant_temperature, squared_temperature
from wildcat_kv.coreset.tensors import saturate_
from wildcat_kv.coreset.tokens import KernelOptions, Slots, WeightedTokens

# From this rank of a bin on, drawing in blocks is faster than one step a pivot.
BLOCKED_RANK = 64

# Bytes to work with at a time: a quarter of the keys and values, within these bounds; on a device always as many.
_WORKSPACE = (32 * 2**20, 128 * 2**20)
_WORKSPACE_ON_DEVICE = 256 * 2**20

# Arrays (bin_rank, t) for every bin that are alive at once.
_FACTOR_BUFFERS = 5


class _Options(TypedDict):
    """Arguments that both ways to draw pivots take."""

    valid: Tensor | None
    log_importance: Tensor | None
    log_scale: Tensor
    half_square: Tensor
    ranks: Tensor | None


@dataclass(frozen=True)
class BinnedCompression:
    """COMPRESSKV of rows with any lengths, ranks and numbers of bins.

    Attributes:
        tokens: keys and values to compress.
        layout: bins of the rows.
        draws: source of the randomness.
        options: settings of the kernel.
    """

    tokens: WeightedTokens
    layout: BinLayout
    draws: Draws
    options: KernelOptions

    def slots(self) -> Slots:
        """Compute the slots of all bins: (rows, heads, bins, bin_rank, ...)."""
        heads, bins = self._spans()
        return Slots.join([self._head_slots(some, bins) for some in heads], dim=1)

    def used(self, heads: range, bins: range) -> Tensor:
        """Mark the places that take part: bool (rows, heads, bins, t)."""
        used = self.layout.used[bins.start : bins.stop]
        used = used.expand(self.tokens.keys.shape[0], len(heads), -1, -1)
        valid = self.tokens.valid
        return used if valid is None else used & self.layout.gather(_take_heads(valid, heads), bins)

    def _present(self, heads: range, bins: range) -> tuple[Tensor, Tensor]:
        """Mark the places that take part by 1, float32 (rows, heads, bins, t), and count them (..., bins, 1)."""
        if self.tokens.valid is not None:
            present = self.used(heads, bins).to(torch.float32)
            return present, present.sum(-1, keepdim=True)
        chosen, batch = slice(bins.start, bins.stop), (self.tokens.keys.shape[0], len(heads), -1, -1)
        return self.layout.present[chosen].expand(batch), self.layout.counts[chosen].expand(batch)

    def _spans(self) -> tuple[list[range], list[range]]:
        """Choose heads and bins to take at once.

        As many as the workspace holds, at least one bin of one head.
        """
        keys, values, layout, blocked = self.tokens.keys, self.tokens.values, self.layout, self.options.blocked
        rows, heads = keys.shape[:2]
        size = keys.numel() * keys.element_size() + values.numel() * values.element_size()
        least, most = _WORKSPACE if not is_launched(keys.device) else (_WORKSPACE_ON_DEVICE,) * 2
        numbers = (most if blocked else min(max(size // 4, least), most)) // 4
        # Numbers for each token: the factor once, or more and a row of G where that is computed whole.
        factor = layout.bin_rank if blocked else _FACTOR_BUFFERS * layout.bin_rank
        kernel = 0 if blocked else kernel_columns(layout.longest, layout.bin_rank, layout.device)
        per_token = keys.shape[-1] + 2 * values.shape[-1] + factor + kernel
        bins = numbers // (rows * layout.longest * per_token)  # of a single head
        if bins >= heads:
            return [range(heads)], _chunks(layout.bins, bins // heads)
        return _chunks(heads, max(1, bins)), _chunks(layout.bins, 1)

    def _head_slots(self, heads: range, spans: list[range]) -> Slots:
        """Compute the slots of some heads, span after span of bins."""
        sums, counts = [], []
        for bins in spans:
            keys = self._gather(self.tokens.keys, heads, bins)
            present, count = self._present(heads, bins)
            sums.append(torch.matmul(present.unsqueeze(-2), keys).squeeze(-2))
            counts.append(count)
        total, count = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in (sums, counts))
        mean = total / (count if self.tokens.valid is None else count.clamp_min(1))
        whole = self.layout.tokens.total if self.tokens.valid is None else count.sum(2).clamp_min_(1)
        offset = mean - (total.sum(2) / whole).unsqueeze(2)
        parts = []
        for bins in spans:
            if len(spans) > 1:
                keys = self._gather(self.tokens.keys, heads, bins)
            chosen = slice(bins.start, bins.stop)
            parts.append(self._bin_slots(keys, mean[:, :, chosen], offset[:, :, chosen], heads, bins))
        return Slots.join(parts, dim=2)

    def _bin_slots(self, keys: Tensor, mean: Tensor, offset: Tensor, heads: range, bins: range) -> Slots:
        """Compute the slots of some bins of some heads.

        Args:
            keys: float32 (rows, heads, bins, t, d), overwritten.
            mean: float32 (rows, heads, bins, d), mean key of each bin.
            offset: float32 (rows, heads, bins, d), this mean less the mean of the head.
            heads: range of the heads.
            bins: range of the bins.
        """
        tokens = self.tokens
        used = self.used(heads, bins)
        ranks = self.layout.rank[bins.start : bins.stop].expand(used.shape[:-1])
        points, log_scale, half_square = self._scaled(keys, used, mean, offset, heads)
        values = self._gather(tokens.values, heads, bins)
        mass = None if tokens.weights is None else self._gather(tokens.weights, heads, bins)
        importance = None if mass is None else _log_importance(mass, values, _bound(tokens.value_bound, heads))
        everywhere = tokens.valid is None and self.layout.tokens.even
        options = _Options(
            valid=None if everywhere else used,
            log_importance=importance,
            log_scale=log_scale,
            half_square=half_square,
            ranks=None if self.layout.slots.even else ranks,
        )
        factor = self._factorise(points, options, heads, bins)

        pivots, found, computed = factor.pivots, factor.valid, None
        if self.layout.mixed or tokens.valid is not None:  # bins that need no compression keep their tokens as they are
            lossless = (used.sum(-1) <= ranks).unsqueeze(-1)
            everything, present = take_all(used, self.layout.bin_rank)
            pivots, found = torch.where(lossless, everything, pivots), torch.where(lossless, present, found)
            computed = found & ~lossless
        order = position_order(pivots, found)
        summed, weights = self._sums(points, factor, log_scale, values, mass, order)
        return Slots(
            pivots.gather(-1, order),
            found.gather(-1, order),
            None if computed is None else computed.gather(-1, order),
            saturate_(summed, tokens.values.dtype),
            weights,
        )

    def _factorise(self, points: Tensor, options: _Options, heads: range, bins: range) -> Factor:
        """Draw the pivots of some bins and factorise along them."""
        if not self.options.blocked:
            return pivoted_cholesky(points, self.draws.gumbel(heads, bins), **options)
        uniforms = partial(self.draws.uniform, heads, bins)
        return accelerated_cholesky(points, uniforms, self.layout.bin_rank, **options)

    def _scaled(
        self, keys: Tensor, used: Tensor, mean: Tensor, offset: Tensor, heads: range
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the scaled keys z, log D^2 and |z|^2 / 2.

        z is around the mean of each bin, log D^2 around the mean of the head, up to a constant of the bin. G knows no
        centre, and is most precise around a near one; D is what the centre of the head makes it.
        """
        mean, offset = mean.unsqueeze(-2), offset.unsqueeze(-1)
        scale, rule = self.options.scale, self.options.temperature
        query_norm = _bound(self.options.query_norm, heads)
        known = constant_temperature(rule) if query_norm is None else None
        if known is not None:  # in one pass
            root = (scale / known) ** 0.5
            points = torch.add(mean * -root, keys, alpha=root, out=keys)
            return points, *_log_scale(points, offset * root)
        points = keys.sub_(mean)
        square = _log_scale(points, offset)[0].add_(offset.squeeze(-1).square().sum(-1, keepdim=True))
        key_norm = square.masked_fill_(~used, 0.0).amax(-1).clamp_min_(0.0).sqrt_()
        if query_norm is not None:
            query_norm = query_norm.unsqueeze(-1).expand_as(key_norm)
        tau2 = squared_temperature(key_norm, query_norm, used.sum(-1), scale, rule)
        roots = (scale / tau2).sqrt_()[..., None, None]
        points = points.mul_(roots)
        return points, *_log_scale(points, offset * roots)

    def _sums(
        self, points: Tensor, factor: Factor, log_scale: Tensor, values: Tensor, mass: Tensor | None, order: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute U = W V and w = W 1, float32.

        The slots are in `order`. Where tokens carry weights `mass`, w = W mass.
        """
        if self.options.blocked and self.options.weights_rule == "nystrom":  # W itself would be as large as the factor
            ones = torch.ones_like(log_scale) if mass is None else mass
            both = nystrom_sums(factor, torch.cat((values, ones.unsqueeze(-1)), dim=-1), log_scale=log_scale)
            both = both.gather(-2, order.unsqueeze(-1).expand_as(both))
            return both[..., :-1], both[..., -1]
        matrix = nystrom_weights(points, factor, log_scale=log_scale, order=order)
        if self.options.weights_rule == "clipped":
            matrix = matrix.clamp_min_(0.0)
        if mass is None:
            return torch.matmul(matrix, values), matrix.sum(-1)
        return torch.matmul(matrix, values), torch.matmul(matrix, mass.unsqueeze(-1)).squeeze(-1)

    def _gather(self, tokens: Tensor, heads: range, bins: range) -> Tensor:
        return self.layout.gather(_take_heads(tokens, heads), bins, torch.float32)


def position_order(pivots: Tensor, found: Tensor) -> Tensor:
    """Sort slots (..., r) of bins by position, empty ones last."""
    return torch.where(found, pivots, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)


def take_all(used: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Give pivots and validity that make every token a slot."""
    places = (~used).to(torch.int8).argsort(dim=-1, stable=True)[..., :slots]
    places = torch.nn.functional.pad(places, (0, slots - places.shape[-1]))
    fits = torch.arange(slots, device=used.device) < used.sum(-1, keepdim=True)
    return places, fits


def _log_scale(points: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Compute |z + o|^2 - |o|^2, and |z|^2 / 2, both (..., t).

    Args:
        points: z, float32 (..., t, d).
        offset: o, float32 (..., d, 1).
    """
    half_square = half_squares(points)
    return torch.matmul(offset.mT, points.mT).squeeze(-2).add_(half_square).mul_(2), half_square


def _log_importance(weights: Tensor, values: Tensor, value_bound: Tensor | None) -> Tensor:
    """Compute log importances, 0 for exact tokens, more for heavy slots."""
    importance = 2 * weights.abs().log()
    if value_bound is not None:
        tiny = torch.finfo(torch.float32).tiny
        by_value = values.square().sum(-1).log() - value_bound.clamp_min(tiny).log()[:, :, None, None]
        importance = torch.maximum(importance, by_value)
    # A slot of weight 0 that is nonetheless valid must stay drawable.
    return importance.clamp_min(-80.0)


def _take_heads(tensor: Tensor, heads: range) -> Tensor:
    return tensor[:, heads.start : heads.stop]


def _bound(bound: Tensor | None, heads: range) -> Tensor | None:
    """Take some heads of a bound (rows, heads), where there is one."""
    return None if bound is None else _take_heads(bound, heads)


def _chunks(total: int, most: int) -> list[range]:
    """Cut range(total) into ranges of at most `most`."""
    return [range(start, min(start + most, total)) for start in range(0, total, most)]
