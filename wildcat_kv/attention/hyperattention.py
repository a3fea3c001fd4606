"""HyperAttention: exact attention within sorted blocks, uniform samples for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, at_least, function_form, wide
from wildcat_kv.attention.hashing import Samples, block_attention, sides_of_planes
from wildcat_kv.attention.kernels import softmax_attention
from wildcat_kv.coreset.noise import uniform_rows


@dataclass(frozen=True, eq=False)
class HyperAttention(Attention):
    """Attend within blocks of sorted tokens, and to keys sampled uniformly.

    Sampled keys weigh n / s each; queries of their own block do not see them again.

    Attributes:
        block: keys of a block; exact where one holds all.
        samples: s, the number of sampled keys, drawn with replacement.
        planes: number of planes of the hash.
        exact_below: number of keys below which attention is exact.
        seed: seed of planes and samples.

    Source: Han et al., "HyperAttention: Long-context Attention in Near-Linear Time", arXiv 2310.05869.
    """

    name: ClassVar[str] = "hyperattention"
    paper: ClassVar[str] = "arXiv 2310.05869"
    complexity: ClassVar[str] = "O(n ((block + s) d + log n))"

    block: int = 256
    samples: int = 256
    planes: int = 7
    exact_below: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, block=self.block, samples=self.samples, planes=self.planes)
        at_least(0, exact_below=self.exact_below)

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self._is_exact(key.shape[2]):
            return softmax_attention(query, key, value, scale)
        query, key, value = wide(query).flatten(2, 3), wide(key), wide(value)
        orders = sides_of_planes(query, key, self.planes, self.seed)
        samples = self.draw(key)
        return block_attention(query, key, value, scale, orders, self.block, samples=samples)[0]

    def draw(self, key: Tensor) -> Samples:
        """Draw keys (rows, heads, n, d) of every head."""
        rows, heads, n = key.shape[:3]
        noise = uniform_rows(self.seed, torch.arange(heads, device=key.device), columns=self.samples)
        index = (noise * n).long().clamp_max(n - 1).expand(rows, -1, -1)
        return Samples(index, key.new_full(index.shape, math.log(n / self.samples)))

    def _is_exact(self, n: int) -> bool:
        return n <= self.block or n < self.exact_below

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        if self._is_exact(n):
            return q * n * (d + d_v + 1)
        return (q + n) * self.planes * d + q * (self.block + self.samples) * (d + d_v + 1)


hyper_attention = function_form(HyperAttention, "hyper_attention")
