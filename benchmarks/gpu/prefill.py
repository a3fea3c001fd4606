"""Reading a prompt: what compressing adds, and the peak of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.gpu.lab import Lab, Marks
from benchmarks.gpu.shapes import Shape
from wildcat_kv import CompressedCache
from wildcat_kv.cache.caches import WildCatLayer
from wildcat_kv.cache.sizes import cache_bytes
from wildcat_kv.hook.keyword import CACHE

EXACT = "exact"
METHODS = ("wildcat", "query_wildcat", "snapkv")
TURNS = 2
SINK = 4
_BUDGET = 12.0  # seconds of a contender: a slow one does not take the others' time


@contextmanager
def fold_marks(marks: Marks) -> Iterator[None]:
    """Mark beginning and end of every fold within."""
    fold = WildCatLayer.after_attention

    def marked(layer: WildCatLayer, query: Tensor, scale: float) -> None:
        marks.set()
        fold(layer, query, scale)
        marks.set()

    try:
        setattr(WildCatLayer, "after_attention", marked)  # noqa: B010
        yield
    finally:
        setattr(WildCatLayer, "after_attention", fold)  # noqa: B010


def prefill(lab: Lab, shape: Shape, tokens: int) -> Iterator[dict[str, Any]]:
    """Read a prompt into every cache, some turns each after one to warm up."""
    model, ids = lab.model(shape), lab.ids(shape, tokens)
    for name in (EXACT, *METHODS):
        row: dict[str, Any] = {"cache": name, "seconds": [], "fold_seconds": []}
        spent = 0.0
        for turn in range(-1, TURNS):
            seconds = _once(lab, model, ids, name, row, warm_up=turn < 0)
            spent += seconds
            if spent + seconds > _BUDGET and row["seconds"]:
                break
            if turn < 0 and seconds > _BUDGET / 2:  # too slow to do again: the first turn counts
                row["seconds"], row["fold_seconds"] = [seconds], [row["first_fold_seconds"]]
                break
        if lab.left < 0:
            row["cut"] = "time ran out"
        yield row


@torch.no_grad()
def _once(lab: Lab, model: Any, ids: Tensor, name: str, row: dict[str, Any], *, warm_up: bool) -> float:
    """Read the prompt once; note what was measured in `row`."""
    marks = Marks(lab.device)
    cache = (
        DynamicCache(config=model.config)
        if name == EXACT
        else CompressedCache(model.config, compressor=name, ratio=0.25, sink=SINK)
    )
    with lab.peak(row), fold_marks(marks):
        seconds = lab.seconds(lambda: model(ids, **{CACHE: cache}, logits_to_keep=1))
    folds = sum(marks.gaps()[::2])
    if warm_up:
        row |= {"first_seconds": seconds, "first_fold_seconds": folds}
    else:
        row["seconds"].append(seconds)
        row["fold_seconds"].append(folds)
    row["held_bytes"] = cache_bytes(cache)
    return seconds


def stalls(lab: Lab, shape: Shape, tokens: int) -> Iterator[dict[str, Any]]:
    """Count how often the host waits for the device while it reads a prompt."""
    model, ids = lab.model(shape), lab.ids(shape, tokens)
    for name in METHODS:
        cache = CompressedCache(model.config, compressor=name, ratio=0.25, sink=SINK)
        with torch.no_grad():
            places = lab.stalls(partial(model, ids, **{CACHE: cache}, logits_to_keep=1))
        if places is not None:
            yield {"cache": name, "stalls": sum(places.values()), "places": places}
