"""KDEformer: exact attention within sorted blocks, samples by the norms of the values for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, at_least, function_form, wide
from wildcat_kv.attention.hashing import Samples, block_attention, sides_of_planes
from wildcat_kv.attention.kernels import softmax_attention
from wildcat_kv.coreset.noise import uniform_rows


@dataclass(frozen=True, eq=False)
class KDEformer(Attention):
    """Attend within blocks of sorted tokens, and to keys sampled by the norms of their values.

    A key is drawn with p in proportion to |[v, 1]| / ||[V, 1]|| + 1 / n and weighs 1 / (s p). Queries of its own block
    do not see it again.

    Attributes:
        block: keys of a block; exact where one holds all.
        samples: s, the number of sampled keys, drawn with replacement.
        planes: number of planes of the hash.
        seed: seed of planes and samples.

    Source: Zandieh, Han, Daliri and Karbasi, "KDEformer: Accelerating Transformers via Kernel Density Estimation",
    arXiv 2302.02451, in the practical form of its authors' code.
    """

    name: ClassVar[str] = "kdeformer"
    paper: ClassVar[str] = "arXiv 2302.02451"
    complexity: ClassVar[str] = "O(n ((block + s) d + d^2 + log n))"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "biggan": {"block": 64, "samples": 128},
        "t2t_1": {"block": 32, "samples": 64},
        "t2t_2": {"block": 32, "samples": 64},
    }

    block: int = 64
    samples: int = 128
    planes: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, block=self.block, samples=self.samples, planes=self.planes)

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.block >= key.shape[2]:
            return softmax_attention(query, key, value, scale)
        query, key, value = wide(query).flatten(2, 3), wide(key), wide(value)
        orders = sides_of_planes(query, key, self.planes, self.seed)
        samples = self.draw(value)
        return block_attention(query, key, value, scale, orders, self.block, samples=samples)[0]

    @torch.no_grad()
    def draw(self, value: Tensor) -> Samples:
        """Draw keys of every head by their values (rows, heads, n, d_v)."""
        rows, heads, n = value.shape[:3]
        shares = sampling_law(value)
        noise = uniform_rows(self.seed, torch.arange(heads, device=value.device), columns=self.samples).to(value.dtype)
        index = torch.searchsorted(shares.cumsum(-1), noise.expand(rows, -1, -1).contiguous()).clamp_max(n - 1)
        return Samples(index, -(shares.gather(-1, index).log() + math.log(self.samples)))

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        if self.block >= n:
            return q * n * (d + d_v + 1)
        norms = n * (d_v + 1) ** 2
        return (q + n) * self.planes * d + norms + q * (self.block + self.samples) * (d + d_v + 1)


def sampling_law(value: Tensor) -> Tensor:
    """Compute the probability to draw each key.

    Args:
        value: (rows, heads, n, d_v).

    Returns:
        (rows, heads, n), the sum of a head 1.
    """
    extended = torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)
    operator_norm = torch.linalg.eigvalsh(extended.mT @ extended)[..., -1:].sqrt()
    shares = extended.norm(dim=-1) / operator_norm + 1 / value.shape[2]
    return shares / shares.sum(-1, keepdim=True)


kdeformer_attention = function_form(KDEformer, "kdeformer_attention")
