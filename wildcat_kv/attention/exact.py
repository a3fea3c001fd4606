"""Exact attention: torch's own, behind the interface of the other methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, function_form
from wildcat_kv.attention.kernels import softmax_attention


@dataclass(frozen=True, eq=False)
class Exact(Attention):
    """Softmax attention as it is."""

    name: ClassVar[str] = "exact"
    complexity: ClassVar[str] = "O(n^2 d)"

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return softmax_attention(query, key, value, scale)

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        return q * n * (d + d_v + 1)


exact_attention = function_form(Exact, "exact_attention")
