"""What a cache holds and what a generation took, counted alike for every cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a Transformers cache holds, free room included; shared memory counts once."""
    storages = {}
    positions = cache.rope.tensors() if hasattr(cache, "rope") else []
    for tensor in (*positions, *(tensor for layer in cache.layers for tensor in layer_tensors(layer))):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def layer_tensors(layer: Any) -> list[Tensor]:
    """All tensors that a layer of a Transformers cache holds, ours or theirs."""
    return layer.tensors() if hasattr(layer, "tensors") else _tensors(list(vars(layer).values()))


def _tensors(value: Any) -> list[Tensor]:
    """The tensors among the attributes of one of Transformers' layers, in lists and dicts too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def stored_entries(layer: Any) -> int:
    """Columns of keys that a layer of a Transformers cache holds."""
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if isinstance(keys, Tensor) and keys.numel() else 0


def stored_tokens(cache: Any) -> float:
    """Entries that a key head holds, on average over rows, heads and compressed layers; padding is none.

    Of a cache that is not ours, columns of keys in the fullest layer.
    """
    states = [layer.state for layer in cache.layers if hasattr(layer, "state")]
    if not states:
        return max(map(stored_entries, cache.layers), default=0)
    held = [state.storage.entries.valid.sum(-1).cpu().double().mean() for state in states if state.storage is not None]
    return float(torch.stack(held).mean()) if held else 0.0
