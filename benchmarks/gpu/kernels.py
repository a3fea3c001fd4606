"""One operation alone: attention of a token, folds, attention of all to all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.lab import Lab, noting_error
from benchmarks.gpu.layers import Heads, OneLayer
from benchmarks.gpu.shapes import Shape
from wildcat_kv.attention import NearWildCat, WildCatAttention

_COPIED = 2**31
_COPIED_ON_CPU = 2**26
_FOLD_BUDGET = 5.0
_KEPT = 0.25
FOLDED = ("wildcat", "query_wildcat", "snapkv")


def copy_rate(lab: Lab) -> Iterator[dict[str, Any]]:
    """Measure the bytes that a copy moves in a second, read and written."""
    size = _COPIED if lab.device.type == "cuda" else _COPIED_ON_CPU
    source = torch.zeros(size, dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    measured = lab.repeated(lambda: target.copy_(source), budget=0.1)
    yield {"kernel": "copy", "bytes": 2 * size, **measured}


@torch.no_grad()
def attention_of_a_token(lab: Lab, shape: Shape, rows: int, stored: int) -> Iterator[dict[str, Any]]:
    """Time one token's attention to stored entries, of every kind; bytes are those of the entries."""
    queries = Heads.random(shape, rows, 1, lab.device, lab.dtype).queries
    exact = Heads.random(shape, rows, stored, lab.device, lab.dtype)
    plain = partial(scaled_dot_product_attention, queries, exact.keys, exact.values, enable_gqa=True)
    moved = exact.keys.nbytes + exact.values.nbytes
    yield noting_error({"kernel": "torch, no weights"}, partial(_timed, lab, plain, moved))
    del exact, plain
    for method, more in (
        ("wildcat", {}),
        ("query_wildcat", {}),
        ("wildcat", {"bits": 4}),
        ("query_wildcat", {"bits": 4}),
    ):

        def work(method: str = method, more: dict[str, Any] = more) -> dict[str, Any]:
            one = OneLayer(shape, method, ratio=_KEPT, **more)
            heads = Heads.random(shape, 1, round(stored / _KEPT), lab.device, lab.dtype)
            one.read(heads)
            one.fold(heads)
            del heads
            one.cache.batch_repeat_interleave(rows)
            return _timed(lab, partial(one.attend, queries), _entry_bytes(one))

        yield noting_error({"kernel": f"{method}, {more['bits']} bits" if more else method}, work)


def _timed(lab: Lab, work: Callable[[], object], moved: int) -> dict[str, Any]:
    row: dict[str, Any] = {"bytes": moved, **lab.repeated(work)}
    places = lab.stalls(work)
    if places is not None:
        row |= {"stalls": sum(places.values()), "places": places}
    # A recording fails at an operation that waits, and then leaves the generator of random numbers unfit for use.
    if places is not None and not places and (alone := lab.replayed(work)) is not None:
        row["graph_seconds"] = alone
    return row


def _entry_bytes(one: OneLayer) -> int:
    """Count the bytes of the columns in use: keys, values and weights, or their codes and scales."""
    storage = one.layer.state.storage
    if not hasattr(storage, "allocated"):  # bands: all that they hold, a little free room included
        return sum(tensor.nbytes for tensor in storage.tensors())
    entries = storage.entries
    return sum(tensor.nbytes for tensor in (entries.keys, entries.values, entries.weights))


@torch.no_grad()
def folds(lab: Lab, shape: Shape, tokens: int) -> Iterator[dict[str, Any]]:
    """Time the fold of one layer's prompt, by method; bytes are those of its keys and values."""
    heads = Heads.random(shape, 1, tokens, lab.device, lab.dtype)
    moved = heads.keys.nbytes + heads.values.nbytes
    for method in FOLDED:
        yield noting_error({"cache": method, "bytes": moved}, partial(_fold, lab, shape, heads, method))


def _fold(lab: Lab, shape: Shape, heads: Heads, method: str) -> dict[str, Any]:
    """Fold the same prompt some times, each in a new cache, after one to warm up."""
    samples: list[float] = []
    row: dict[str, Any] = {}
    for turn in range(-1, 3):
        one = OneLayer(shape, method, ratio=_KEPT)
        one.read(heads)
        with lab.peak(row):
            seconds = lab.seconds(partial(one.fold, heads))
        if turn < 0:
            row["first_seconds"] = seconds
        else:
            samples.append(seconds)
        if seconds * (turn + 2) > _FOLD_BUDGET or lab.left < 0:
            break
    return row | {"samples": samples, "seconds": statistics.median(samples or [row["first_seconds"]])}


@torch.no_grad()
def attention_of_all(lab: Lab, shape: Shape, tokens: int) -> Iterator[dict[str, Any]]:
    """Time attention of all to all, not causal: exact, and by weighted coresets."""
    heads = Heads.random(shape, 1, tokens, lab.device, lab.dtype)
    groups = shape.heads // shape.kv_heads
    keys, values = (each.repeat_interleave(groups, 1) for each in (heads.keys, heads.values))
    bins = max(1, tokens // 512)
    ways: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: scaled_dot_product_attention(heads.queries, keys, values),
        "wildcat, 64 slots a bin of 512": lambda: WildCatAttention(rank=64 * bins, bins=bins)(
            heads.queries, keys, values
        ),
        "near_wildcat": lambda: NearWildCat()(heads.queries, keys, values),
    }
    for name, way in ways.items():

        def work(way: Callable[[], Tensor] = way) -> dict[str, Any]:
            row: dict[str, Any] = {}
            with lab.peak(row):
                row |= lab.repeated(way, budget=0.3, most=20)
            return row

        yield noting_error({"attention": name}, work)
