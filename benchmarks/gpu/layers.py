"""One cache layer alone, driven without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Shape
from wildcat_kv import CompressedCache


@dataclass(frozen=True)
class Heads:
    """Random heads of one layer.

    Attributes:
        keys: (rows, kv_heads, n, d).
        values: (rows, kv_heads, n, d).
        queries: (rows, heads, n, d).
    """

    keys: Tensor
    values: Tensor
    queries: Tensor

    @staticmethod
    def random(shape: Shape, rows: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Heads:
        """Draw keys, values and queries; the same numbers on every device."""
        generator = torch.Generator(device).manual_seed(tokens)
        sizes = (shape.kv_heads, shape.kv_heads, shape.heads)
        return Heads(
            *(
                torch.randn(rows, heads, tokens, shape.head_dim, device=device, dtype=dtype, generator=generator)
                for heads in sizes
            )
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Heads:
        """Copy to another device and dtype."""
        return Heads(*(each.to(device, dtype) for each in (self.keys, self.values, self.queries)))


class OneLayer:
    """A cache of one layer.

    Args:
        shape: sizes of the layer.
        method: name of the method.
        **settings: settings of the cache.
    """

    def __init__(self, shape: Shape, method: str, **settings: Any) -> None:
        self.cache = CompressedCache(shape.config(1), compressor=method, sink=4, **settings)
        self.scale = shape.head_dim**-0.5

    @property
    def layer(self) -> Any:
        """The layer."""
        return self.cache.layers[0]

    def read(self, heads: Heads) -> None:
        """Take the tokens in, as far as the fold."""
        self.layer.announce(heads.keys.shape[0], heads.keys.shape[2], None)
        self.cache.update(heads.keys, heads.values, 0)

    def fold(self, heads: Heads) -> None:
        """Fold what `read` took in."""
        self.layer.after_attention(heads.queries, self.scale)

    def attend(self, queries: Tensor) -> Tensor:
        """Attend with one token's queries (rows, heads, 1, d)."""
        output: Tensor = self.layer.attend(queries, *self.layer.state.storage.view(), self.scale, {})
        return output
