"""What a cache holds and what a generation took, counted alike for every cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer


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


@dataclass(frozen=True)
class Timing:
    """Times of one `generate()`.

    Attributes:
        first_token_seconds: from the call to the first new token: the prompt is read in it.
        tokens: new tokens.
        tokens_per_second: of the tokens after the first; 0 where there are none.
    """

    first_token_seconds: float
    tokens: int
    tokens_per_second: float


class TimedStreamer(BaseStreamer):
    """Hands on every new token as it comes, and keeps the time.

    Args:
        on_token: called with the id of each new token.
    """

    def __init__(self, on_token: Callable[[int], None] = lambda token: None) -> None:
        self._on_token = on_token
        self._start = time.perf_counter()
        self._times: list[float] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Called by `generate()`: the prompt first, then each token (rows,), of which there is one row."""
        if self._prompt:
            self._prompt = False
            return
        self._times.append(time.perf_counter())
        self._on_token(int(value.flatten()[0]))

    def end(self) -> None:
        """Called by `generate()` at the end."""

    @property
    def timing(self) -> Timing:
        """What was measured."""
        if not self._times:
            return Timing(0.0, 0, 0.0)
        later = self._times[-1] - self._times[0]
        speed = (len(self._times) - 1) / later if later > 0 else 0.0
        return Timing(self._times[0] - self._start, len(self._times), speed)
