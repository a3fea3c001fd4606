"""Sizes of a cache, counted alike for every kind of cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cache_bytes(cache: Any) -> int:
    """Count the bytes of all tensors that a Transformers cache holds.

    Free room counts too. Memory that tensors share counts once.
    """
    storages = {}
    positions = cache.rope.tensors() if hasattr(cache, "rope") else []
    for tensor in (*positions, *(tensor for layer in cache.layers for tensor in layer_tensors(layer))):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def layer_tensors(layer: Any) -> list[Tensor]:
    """List all tensors of a cache layer, compressed or not."""
    return layer.tensors() if hasattr(layer, "tensors") else _tensors_within(list(vars(layer).values()))


def _tensors_within(value: Any) -> list[Tensor]:
    """List the tensors in a value, in its lists and dicts too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors_within(item)] if isinstance(value, (list, tuple)) else []


def stored_entries(layer: Any) -> int:
    """Count the columns of keys that a cache layer holds, padding included."""
    if hasattr(layer, "state"):
        return int(layer.stored)
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if isinstance(keys, Tensor) and keys.numel() else 0


def stored_tokens(cache: Any) -> float:
    """Count the entries of a key head, without padding.

    It is the average over rows, heads and compressed layers. For other caches it is the columns of keys in the
    fullest layer.
    """
    states = [layer.state for layer in cache.layers if hasattr(layer, "state")]
    if not states:
        return max(map(stored_entries, cache.layers), default=0)
    held = [state.storage.entries.valid.sum(-1).cpu().double().mean() for state in states if state.storage is not None]
    return float(torch.stack(held).mean()) if held else 0.0
