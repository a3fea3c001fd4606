"""WildCat with a balanced metric, bins of neighbours, samples of the rest, and exact bins nearby."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, at_least, function_form, wide
from wildcat_kv.attention.bin_slots import BinSlots, bin_slots
from wildcat_kv.attention.kernels import softmax_attention, take, weighted_softmax_attention
from wildcat_kv.attention.metric import balanced_metric
from wildcat_kv.attention.near import Entries, near_attention
from wildcat_kv.attention.order import Grid, check_grid, settled, tile_order
from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.draws import KeyedDraws
from wildcat_kv.coreset.noise import uniform_rows

_KEYS_OF_A_BIN = 256
_MOST_SLOTS = 768
_SLOTS_OF = 8  # keys for each slot


@dataclass(frozen=True, eq=False)
class NearWildCat(Attention):
    """Attend to near bins exactly, and to a weighted coreset of the others.

    WildCat for models that attend locally in some heads and layers, with four changes. A metric balances queries and
    keys, in place of the temperature (`dims`). Bins are neighbours on a grid (`grid`). Some slots are unbiased
    samples of what the pivots miss (`residual`). And each block of queries attends exactly to the bins with the largest
    share of its attention (`near`).

    Attributes:
        rank: r, the number of slots, samples included; an eighth of the keys by default, at most 768.
        bins: number of bins; by default a power of two that makes bins of about 256 keys.
        near: number of bins that a block of queries attends to exactly; exact where it is all of them.
        residual: share of the slots that are samples, in [0, 1). They make numerator and denominator unbiased, and are
            safe only where near bins hold the large terms.
        dims: directions of the metric that distances of keys are measured in; all where there are fewer.
        grid: height and width of the patches of an image, to cut into tiles; "auto" for the largest square that the
            keys can end with, those before it being the prefix; None for keys in a line. With as many queries as keys,
            blocks of queries are tiles, too.
        prefix: tokens before the grid, such as a class token: every query sees these keys, and with as many queries as
            keys these queries see every key.
        seed: seed of pivots and samples.

    Source: arXiv 2602.10056 for the coreset; the changes are this project's.
    """

    name: ClassVar[str] = "near_wildcat"
    paper: ClassVar[str] = "arXiv 2602.10056"
    complexity: ClassVar[str] = "O(n r d + n^2 near d / bins)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fast": {"near": 0, "residual": 0.0},
        "balanced": {"near": 1, "residual": 0.9},
        "accurate": {"near": 2, "residual": 0.9},
    }

    rank: int | None = None
    bins: int | None = None
    near: int = 1
    residual: float = 0.9
    dims: int | None = 32
    grid: Grid = None
    prefix: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, rank=self.rank, bins=self.bins, dims=self.dims)
        at_least(0, near=self.near)
        check_grid(self.grid, self.prefix)
        if not 0 <= self.residual < 1:
            raise ValueError(f"residual={self.residual} must be in [0, 1), the share of the slots that are samples")

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        n, length = key.shape[2], query.shape[3]
        own = settled(self, n)
        if own is not self:
            return own.attend(query, key, value, scale)
        first = self.prefix
        check_grid(self.grid, first, n)
        plan = self.plan(n)
        if plan is None:
            return softmax_attention(query, key, value, scale)
        asked, keys, values = wide(query), wide(key), wide(value)
        same = length == n  # queries of the keys' own tokens
        order = None
        if self.grid is not None:
            assert not isinstance(self.grid, str)
            order = torch.arange(n, device=key.device)
            order[first:] = tile_order(*self.grid, key.device) + first
            keys, values = (take(tensor, order.view(1, 1, -1)) for tensor in (keys, values))
            asked = take(asked.flatten(1, 2), order.view(1, 1, -1)).view_as(asked) if same else asked
        output = self._approximate(asked[:, :, :, first if same else 0 :], keys, values, scale, plan)
        output = output.clamp(values.amin(2)[:, :, None, None], values.amax(2)[:, :, None, None])
        if same and first:
            exact = softmax_attention(asked[:, :, :, :first], keys, values, scale)
            output = torch.cat((exact.unflatten(2, (-1, first)), output), dim=3)
        if same and order is not None:
            output = take(output.flatten(1, 2), order.argsort().view(1, 1, -1)).view_as(output)
        return output

    def _approximate(self, query: Tensor, key: Tensor, value: Tensor, scale: float, plan: _Plan) -> Tensor:
        """Attend with queries (rows, heads, groups, q, d) to keys in the order of the bins."""
        first, d_v = self.prefix, value.shape[-1]
        key = key - key.mean(2, keepdim=True)  # adds the same to all scores of a query
        layout = BinLayout.build(key.shape[2] - first, plan.pivots, plan.bins, key.device)
        body, body_value = key[:, :, first:], value[:, :, first:]
        slots = self._slots(query, body, body_value, scale, layout, plan)
        slot_keys = take(body, slots.places.flatten(2)).view(*slots.places.shape, -1)
        always = (key[:, :, None, :first], value[:, :, None, :first], torch.ones_like(key[:, :, None, :first, 0]))
        if not plan.near:
            every = (slot_keys.flatten(2, 3), slots.sums.flatten(2, 3), slots.weights.flatten(2, 3))
            keys, sums, weights = (
                torch.cat((own.squeeze(2), part), 2) for own, part in zip(always, every, strict=True)
            )
            output = weighted_softmax_attention(query.flatten(2, 3), keys, sums, weights, scale)
            return output.unflatten(2, query.shape[2:4])
        present = layout.used.to(value.dtype).expand(*key.shape[:2], -1, -1)
        whole = Entries.of(layout.gather(body), layout.gather(body_value), present)
        coreset = Entries.of(slot_keys, slots.sums, slots.weights)
        return near_attention(query, coreset, whole, Entries.of(*always), plan.near, d_v, scale)

    def _slots(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, layout: BinLayout, plan: _Plan
    ) -> BinSlots:
        """Compress the keys in bins."""
        metric = balanced_metric(query.flatten(2, 3), key, scale, self.dims).to(key.dtype)
        draws = KeyedDraws(layout, self.seed, 0, key.shape[2], len(key), key.device)
        head = torch.arange(key.shape[1], device=key.device).unsqueeze(-1)
        offset = uniform_rows(self.seed, head, torch.arange(plan.bins, device=key.device), columns=1)
        return bin_slots(key @ metric, value, layout, draws, plan.samples, offset)

    def plan(self, n: int) -> _Plan | None:
        """Share slots out among bins; None where all of n keys are attended to exactly.

        Raises:
            ValueError: there are more bins than keys or slots.
        """
        body = n - settled(self, n).prefix
        rank = min(_MOST_SLOTS, max(1, body // _SLOTS_OF)) if self.rank is None else self.rank
        if rank >= body:
            return None
        bins = self.bins
        if bins is None:
            bins = min(2 ** max(0, round(math.log2(body / _KEYS_OF_A_BIN))), rank)
        if bins > min(rank, body):
            raise ValueError(
                f"bins={bins} with rank={rank} and {body} keys: every bin takes at least one slot; lower "
                "bins, or raise rank"
            )
        if self.near >= bins:
            return None
        slots = rank // bins
        samples = min(round(self.residual * slots), slots - 1)
        return _Plan(bins, rank - samples * bins, samples, self.near)

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        plan = self.plan(n)
        if plan is None:
            return q * n * (d + d_v + 1)
        bin_rank, dims = -(-plan.pivots // plan.bins), min(d, self.dims or d)
        slots, near = plan.pivots + plan.samples * plan.bins, plan.near
        metric = 2 * min(n, 1024) * d * d + n * d * dims
        compression = n * bin_rank * (dims + d_v + bin_rank + 3)
        seen = slots * (plan.bins - near) // plan.bins + near * n // plan.bins + settled(self, n).prefix
        asked = 4 * min(plan.bins, q) * slots * d if near else 0
        return metric + compression + asked + q * seen * (d + d_v + 3)


@dataclass(frozen=True)
class _Plan:
    """Numbers of bins and slots.

    Attributes:
        bins: number of bins.
        pivots: pivots of all bins together.
        samples: samples of each bin.
        near: number of near bins.
    """

    bins: int
    pivots: int
    samples: int
    near: int


near_wildcat_attention = function_form(NearWildCat, "near_wildcat_attention")
