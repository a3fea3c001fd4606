"""Entries of a compressed cache, head by head, and as rectangles of one length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.coreset.tensors import saturate_


@dataclass(frozen=True)
class HeadEntries:
    """Entries of one head, without padding.

    Attributes:
        keys: (n, d).
        numerators: float32 (n, d_v), U.
        weights: float32 (n,), w.
    """

    keys: Tensor
    numerators: Tensor
    weights: Tensor


@dataclass(frozen=True)
class LayerEntries:
    """Entries of a layer's heads.

    Attributes:
        heads: entries of each key head.
        scale: factor b of the scores.
        dtype: dtype of the values.
    """

    heads: list[HeadEntries]
    scale: float
    dtype: torch.dtype

    @property
    def longest(self) -> int:
        """Entries of the head with most."""
        return max(len(head.weights) for head in self.heads)

    @property
    def is_weighted(self) -> bool:
        """True if a weight is not 1."""
        return any(bool((head.weights != 1).any()) for head in self.heads)

    def padded(self, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make rectangles of `slots` entries; what is missing weighs nothing.

        Returns:
            Keys (heads, slots, d), numerators (heads, slots, d_v) in the dtype of the values, and weights float32
            (heads, slots).
        """
        columns = []
        for head in self.heads:
            more = slots - len(head.weights)
            columns.append(
                (
                    torch.cat((head.keys, head.keys[-1:].expand(more, -1))),  # a key that is near the others
                    torch.nn.functional.pad(head.numerators, (0, 0, 0, more)),
                    torch.nn.functional.pad(head.weights, (0, more)),
                )
            )
        keys, numerators, weights = (torch.stack(column) for column in zip(*columns, strict=True))
        return keys, saturate_(numerators, self.dtype), weights


def entries_of(cache: Any) -> list[LayerEntries]:
    """Collect the entries of a cache, unpacked.

    Args:
        cache: a `WildCatCache` with one row.

    Raises:
        ValueError: a batch of rows, or a layer that is none of full attention.
    """
    found = []
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, WildCatLayer):
            raise ValueError(
                f"layer {index} is a {type(layer).__name__}: its state is no list of entries, which is all that a "
                "prefix in an engine can hold; ask the context through Transformers"
            )
        if layer.batch_rows != 1:
            raise ValueError(f"the cache has {layer.batch_rows} rows; export the context of one text")
        state = layer.state
        held = state.entries
        numerators = held.numerators()
        heads = []
        for head in range(held.keys.shape[1]):
            at = held.valid[0, head].nonzero().squeeze(1)
            heads.append(
                HeadEntries(
                    held.keys[0, head, at].cpu(),
                    numerators[0, head, at].float().cpu(),
                    held.weights[0, head, at].float().cpu(),
                )
            )
        found.append(LayerEntries(heads, state.progress.scale, held.values.dtype))
    return found
