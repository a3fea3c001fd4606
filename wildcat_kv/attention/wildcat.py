"""WILDCAT as published: compress keys and values, then attend to the coreset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, at_least, function_form, wide
from wildcat_kv.attention.fixed_pivots import FixedPivots
from wildcat_kv.attention.kernels import softmax_attention, take, weighted_softmax_attention
from wildcat_kv.coreset.binned import BLOCKED_RANK
from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.choices import Temperature
from wildcat_kv.coreset.compresskv import compress_bins
from wildcat_kv.coreset.draws import KeyedDraws
from wildcat_kv.coreset.tokens import KernelOptions, WeightedTokens


@dataclass(frozen=True, eq=False)
class WildCatAttention(Attention):
    """Attend to a weighted coreset of the keys: WILDCAT, Algorithm 4.

    Keys are recentred, scaled by a temperature and cut into bins. Every bin draws pivots (RPNYS) and weights, which
    carry the values of all keys; outputs are clipped to the range of the values.

    Attributes:
        rank: r, the number of slots, rounded up to a multiple of `bins`; a quarter of the keys by default.
        bins: number of bins of consecutive keys.
        temperature: rule for tau, "released" for the constant in the authors' code, "theory" for the paper's formula.
        seed: seed of the pivots.

    Source: Schröder and Mackey, arXiv 2602.10056, Algorithm 4. Where `bins` does not divide n, bins are as equal as can
    be; the authors' code makes one more of the rest.
    """

    name: ClassVar[str] = "wildcat"
    paper: ClassVar[str] = "arXiv 2602.10056"
    complexity: ClassVar[str] = "O(n r d + n r^2 / bins)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "biggan": {"rank": 96, "bins": 8},
        "t2t_1": {"rank": 224, "bins": 224},
        "t2t_2": {"rank": 196, "bins": 196},
    }

    rank: int | None = None
    bins: int = 1
    temperature: Temperature = "released"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, rank=self.rank, bins=self.bins)
        if self.temperature not in get_args(Temperature):
            rules = ", ".join(map(repr, get_args(Temperature)))
            raise ValueError(f"temperature={self.temperature!r} must be one of {rules}")

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        n = key.shape[2]
        layout = self.layout(n, key.device)
        if layout.lossless:
            return softmax_attention(query, key, value, scale)
        wanted, values = wide(query).flatten(2, 3), wide(value)
        query_norm = wanted.detach().norm(dim=-1).amax(-1).float()
        options = KernelOptions(scale, query_norm, self.temperature, blocked=layout.bin_rank >= BLOCKED_RANK)
        tokens = WeightedTokens(key.detach(), values.detach(), value_bound=None)
        draws = KeyedDraws(layout, self.seed, 0, n, len(key), key.device)
        coreset, source = compress_bins(tokens, layout, draws, options)
        sums, weights = coreset.values, coreset.weights
        needs_gradient = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        if needs_gradient or values.dtype == torch.float64:  # coreset computes in float32, without a graph
            pivots = FixedPivots.of(key, layout, source, coreset.valid, options)
            sums, weights = (layout.collect(part) for part in pivots.combine(key, values))
        output = weighted_softmax_attention(wanted, take(key, source), sums, weights.to(sums.dtype), scale)
        return output.clamp(values.amin(2, keepdim=True), values.amax(2, keepdim=True))

    def layout(self, n: int, device: torch.device | str = "cpu") -> BinLayout:
        """Lay out n keys and their slots in bins."""
        if self.bins > n:
            raise ValueError(f"bins={self.bins} with {n} keys: every bin takes at least one; lower bins")
        return BinLayout.build(n, self._rank(n), self.bins, device)

    def _rank(self, n: int) -> int:
        rank = max(1, n // 4) if self.rank is None else self.rank
        return -(-rank // self.bins) * self.bins

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        rank = self._rank(n)
        if rank >= n:
            return q * n * (d + d_v + 1)
        bin_rank = rank // self.bins
        draws = n * bin_rank * (d + 1) + n * bin_rank**2 // 2
        sums = n * bin_rank * (d_v + 2) + n * bin_rank**2 // 2
        return draws + sums + q * rank * (d + d_v + 3)


wildcat_attention = function_form(WildCatAttention, "wildcat_attention")
