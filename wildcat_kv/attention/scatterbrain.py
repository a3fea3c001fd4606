"""ScatterBrain: exact attention near the diagonal, random features for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, at_least, function_form, wide
from wildcat_kv.attention.features import log_features, orthogonal_directions
from wildcat_kv.attention.kernels import softmax_attention


@dataclass(frozen=True, eq=False)
class ScatterBrain(Attention):
    """Correct random features by exact scores in a band.

    In the band |i - j| < c / 2 the exact e^(b q.k) replaces the features' estimate. Features come in pairs of opposite
    directions. Query i stands at key i, or at i modulo n where there are more queries.

    Attributes:
        band: c, the width of the band; exact where it covers all keys, c >= 2 n.
        features: m, the number of features, even.
        seed: seed of the directions.

    Source: Chen et al., "Scatterbrain: Unifying Sparse and Low-rank Attention", arXiv 2110.15343, with the band of its
    authors' code in place of LSH blocks, as in the experiments of arXiv 2602.10056.
    """

    name: ClassVar[str] = "scatterbrain"
    paper: ClassVar[str] = "arXiv 2110.15343"
    complexity: ClassVar[str] = "O(n (m + c) d)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "biggan": {"band": 32, "features": 128},
        "t2t_1": {"band": 49, "features": 48},
        "t2t_2": {"band": 12, "features": 6},
    }

    band: int = 64
    features: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, band=self.band)
        at_least(2, features=self.features)
        if self.features % 2:
            raise ValueError(f"features={self.features} must be even: directions come in pairs")

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        n = key.shape[2]
        if self.band >= 2 * n:
            return softmax_attention(query, key, value, scale)
        heads, groups, length, d = query.shape[1:]
        query = wide(query)
        directions = self.directions(heads, d, key.device)
        key, value = wide(key), wide(value)
        value = torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)
        of_key = log_features(key, directions, scale)
        highest = of_key.amax((-1, -2), keepdim=True)
        of_key = (of_key - highest).exp() / self.features
        low_rank = of_key.mT @ value
        parts = []
        for start in range(0, length, n):  # queries start + i stand at keys i
            some = query[:, :, :, start : start + n]
            of_query = log_features(some.flatten(2, 3), directions, scale)
            top = of_query.amax(-1, keepdim=True)
            of_query = (of_query - top).exp()
            far = (of_query @ low_rank).unflatten(2, (groups, -1))
            near = _Band(some, of_query.unflatten(2, (groups, -1)), (top + highest).unflatten(2, (groups, -1)))
            both = near.correct(far, key, of_key, value, scale, self.band)
            parts.append(both[..., :-1] / both[..., -1:].clamp_min(torch.finfo(both.dtype).tiny))
        return torch.cat(parts, dim=3)

    def directions(self, heads: int, d: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw pairs of opposite directions, (heads, m, d)."""
        half = orthogonal_directions(self.seed, heads, self.features // 2, d, device)
        return torch.cat((half, -half), dim=1)

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        if self.band >= 2 * n:
            return q * n * (d + d_v + 1)
        return (q + n) * self.features * (d + d_v + 2) + q * min(self.band, n) * (d + d_v + self.features + 2)


@dataclass(frozen=True, eq=False)
class _Band:
    """Queries at the keys 0, 1, ..., and their features.

    Attributes:
        query: (rows, heads, groups, q, d), no more than keys.
        features: (rows, heads, groups, q, m), over e^level.
        level: (rows, heads, groups, q, 1), log of what features of queries and keys were divided by.
    """

    query: Tensor
    features: Tensor
    level: Tensor

    def correct(self, far: Tensor, key: Tensor, of_key: Tensor, value: Tensor, scale: float, band: int) -> Tensor:
        """Add exact less estimated terms of the band to the sums of the features, up to a factor of the query."""
        half, (length, n) = (band + 1) // 2, (self.query.shape[3], key.shape[2])
        parts = []
        for start in range(0, length, max(half, 64)):
            stop = min(start + max(half, 64), length)
            first, last = max(0, start - half + 1), min(n, stop + half - 1)
            keys, features = key[:, :, None, first:last], of_key[:, :, None, first:last]
            distance = torch.arange(start, stop, device=key.device).unsqueeze(-1) - torch.arange(
                first, last, device=key.device
            )
            outside = 2 * distance.abs() >= band
            level = self.level[..., start:stop, :]
            scores = (self.query[..., start:stop, :] @ keys.mT * scale).masked_fill(outside, -torch.inf)
            top = torch.maximum(scores.amax(-1, keepdim=True), level).detach()
            shrink = (level - top).exp()
            estimate = (self.features[..., start:stop, :] @ features.mT).masked_fill(outside, 0.0)
            terms = (scores - top).exp() - estimate * shrink
            parts.append(far[..., start:stop, :] * shrink + terms @ value[:, :, None, first:last])
        return torch.cat(parts, dim=3)


scatterbrain_attention = function_form(ScatterBrain, "scatterbrain_attention")
