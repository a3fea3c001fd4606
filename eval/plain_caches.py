"""Transformers' own caches: their tensors, bytes and copies; needs torch alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def plain_tensors(value: Any) -> list[Tensor]:
    """List the tensors in a value, in its lists, tuples and dicts too; a subclass's inner tensors for itself."""
    if isinstance(value, Tensor):
        if type(value) is Tensor or not hasattr(value, "__tensor_flatten__"):
            return [value]
        names, _ = value.__tensor_flatten__()
        value = [getattr(value, name) for name in names]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in plain_tensors(item)] if isinstance(value, (list, tuple)) else []


def held_bytes(layers: Iterable[Any]) -> int:
    """Count the bytes of all tensors that the layers of a cache hold, packed ones as they are stored."""
    return sum(tensor.nbytes for layer in layers for tensor in plain_tensors(list(vars(layer).values())))


def copied(cache: Any) -> Any:
    """Copy a cache; the two share tensors, which no layer writes into."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
