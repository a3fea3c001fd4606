"""Uniform sampling: plain attention to a few random keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, at_least, function_form
from wildcat_kv.attention.kernels import softmax_attention, take
from wildcat_kv.coreset.noise import uniform_rows


@dataclass(frozen=True, eq=False)
class Uniform(Attention):
    """Attend to random keys, each head to its own.

    The baseline that the papers leave out. Keys are drawn without replacement and weigh the same.

    Attributes:
        rank: r, the number of keys; all where there are no more.
        seed: seed of the draw.
    """

    name: ClassVar[str] = "uniform"
    complexity: ClassVar[str] = "O(n r d)"

    rank: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, rank=self.rank)

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        heads, n = key.shape[1:3]
        if self.rank < n:
            chosen = self.draw(heads, n, key.device)
            key, value = take(key, chosen), take(value, chosen)
        return softmax_attention(query, key, value, scale)

    def draw(self, heads: int, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw the keys of every head, int64 (1, heads, r), in the order of their places."""
        noise = uniform_rows(self.seed, torch.arange(heads, device=device).view(1, -1), columns=n)
        return noise.topk(self.rank, dim=-1).indices.sort(dim=-1).values

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        return q * min(self.rank, n) * (d + d_v + 1)


uniform_attention = function_form(Uniform, "uniform_attention")
