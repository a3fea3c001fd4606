"""The largest batch of long texts before memory ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.decoding import DYNAMIC, Setting, eager, random_cache
from benchmarks.gpu.lab import Lab, noting_error
from benchmarks.gpu.shapes import Shape
from wildcat_kv.cache.sizes import cache_bytes

_KEPT = 0.25


def largest_batch(lab: Lab, shape: Shape) -> Iterator[dict[str, Any]]:
    """Find the most rows that can decode a token, for a cache of each kind, with all layers of the model."""
    before = lab.layers
    lab.drop()
    lab.layers = shape.layers
    try:
        yield from _search(lab, shape)
    finally:
        lab.drop()
        lab.layers = before


def _search(lab: Lab, shape: Shape) -> Iterator[dict[str, Any]]:
    model = lab.model(shape)

    def exact(rows: int) -> Any:
        return random_cache(lab, Setting(shape, lab.sizes.batch, 1.0, rows))

    def compressed(method: str, **settings: Any) -> Callable[[int], Any]:
        def make(rows: int) -> Any:
            cache = lab.filled(shape, lab.sizes.batch, method, ratio=_KEPT, **settings)
            cache.batch_repeat_interleave(rows)
            return cache

        return make

    makers = {DYNAMIC: exact, "wildcat": compressed("wildcat"), "wildcat, 4 bits": compressed("wildcat", bits=4)}
    for name, make in makers.items():

        def work(make: Callable[[int], Any] = make) -> dict[str, Any]:
            rows, ended = _most(lab, model, make)
            return {"rows": rows, "ended_by": ended, "layers_held": model.config.num_hidden_layers}

        yield noting_error({"cache": name}, work)


def _most(lab: Lab, model: Any, make: Callable[[int], Any]) -> tuple[int, str]:
    """Double the rows until they do not fit, then halve the gap until it is a sixteenth."""
    fits, fails = 0, 0
    ended = "memory"
    while not fails or fails - fits > max(1, fits // 16):
        rows = (fits + fails) // 2 if fails else max(1, 2 * fits)
        if lab.left < 0 or rows > lab.sizes.most_rows:
            ended = "time" if lab.left < 0 else "the search, which ends here"
            break
        if _fits(lab, model, make, rows):
            fits = rows
        else:
            fails = rows
    return fits, ended


@torch.no_grad()
def _fits(lab: Lab, model: Any, make: Callable[[int], Any], rows: int) -> bool:
    """Tell whether so many rows can be held, and decode two tokens."""
    lab.sweep()
    try:
        cache = make(rows)
        step = eager(model, cache)
        for _ in range(2):
            step(torch.ones(rows, 1, dtype=torch.int64, device=lab.device))
        return cache_bytes(cache) > 0
    except torch.cuda.OutOfMemoryError:
        return False
