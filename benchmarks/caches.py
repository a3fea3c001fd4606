"""The caches that are compared, ours and Transformers', filled from one reading of a text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache, StaticCache, cache_utils

from wildcat_kv import CompressedCache
from wildcat_kv.cache.sizes import layer_tensors

DYNAMIC, STATIC, WILDCAT = "DynamicCache", "StaticCache", "wildcat"
SAME_LENGTH = "DynamicCache of the stored length"
# Transformers' backends of quantized caches: the name here, its arguments, the package it needs.
QUANTIZED: dict[str, tuple[dict[str, Any], str | None]] = {
    "QuantizedCache, fp8": ({"backend": "fp8"}, None),
    "QuantizedCache, quanto 4-bit": ({"backend": "quanto", "nbits": 4}, "optimum.quanto"),
    "QuantizedCache, hqq 4-bit": ({"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1}, "hqq"),
}


def theirs(config: Any, capacity: int) -> dict[str, Callable[[], Cache]]:
    """List makers of Transformers' empty caches by name, without quantized ones that lack a package.

    Args:
        config: config of the model.
        capacity: tokens that the static cache has room for.
    """
    makers: dict[str, Callable[[], Cache]] = {
        DYNAMIC: lambda: DynamicCache(config=config),
        STATIC: lambda: StaticCache(config=config, max_cache_len=capacity),
    }
    for name, (arguments, _) in QUANTIZED.items():
        if name not in missing():
            makers[name] = partial(QuantizedCache, config=config, **arguments)
    return makers


def missing() -> dict[str, str]:
    """List the quantized caches that cannot be had here, by name, and why."""
    reasons = {}
    for name, (arguments, package) in QUANTIZED.items():
        if package is not None and not _installed(package):
            reasons[name] = f"{package.replace('.', '-')} is not installed"
        elif package is None and not hasattr(cache_utils, "Fp8QuantizedLayer"):
            reasons[name] = f"this Transformers has no backend {arguments['backend']}"
    return reasons


def fill(cache: Cache, source: CompressedCache, rows: int = 1, length: int | None = None) -> Cache:
    """Fill one of Transformers' caches with the first `length` tokens of an exact `source`, in `rows` equal rows."""
    for index, layer in enumerate(source.layers):
        keys, values = layer.keys[:, :, :length], layer.values[:, :, :length]
        cache.update(keys.repeat_interleave(rows, 0), values.repeat_interleave(rows, 0), index)
    return cache


def held_bytes(cache: Cache) -> int:
    """Count the bytes of all tensors that a cache holds, free room included."""
    if isinstance(cache, CompressedCache):
        return cache.memory_bytes()
    tensors = [part for layer in cache.layers for tensor in layer_tensors(layer) for part in _parts(tensor)]
    return sum({part.untyped_storage()._cdata: part.untyped_storage().nbytes() for part in tensors}.values())


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _parts(tensor: Tensor) -> list[Tensor]:
    """Take a tensor apart: quanto's are wrappers, and their own storage has the size before quantising."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]
