"""Tokens a second after a long context, and the bytes that the caches hold."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from benchmarks.gpu.lab import Lab, Marks, noting_error
from benchmarks.gpu.shapes import Shape
from wildcat_kv import WildCatConfig
from wildcat_kv.cache.budget import block_size
from wildcat_kv.cache.sizes import cache_bytes
from wildcat_kv.hook.keyword import CACHE

DYNAMIC, SAME_LENGTH = "DynamicCache", "DynamicCache of the stored length"
_BUDGET = 4.0  # seconds of a contender's steps
_WARM_UPS = 4

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """A context, a share of it and a batch.

    Attributes:
        shape: model.
        tokens: tokens of the context.
        kept: share of them that is kept.
        rows: rows of the batch.
    """

    shape: Shape
    tokens: int
    kept: float
    rows: int


def decoding(lab: Lab, setting: Setting) -> Iterator[dict[str, Any]]:
    """Decode with every cache in its turn; one at a time is on the device."""
    yield {"cache": "", **fixed_costs(lab, setting)}
    contenders: list[tuple[str, str | None, dict[str, Any]]] = [
        (DYNAMIC, None, {}),
        ("wildcat", "wildcat", {}),
        ("wildcat, 4 bits", "wildcat", {"bits": 4}),
        ("query_wildcat", "query_wildcat", {}),
        ("query_wildcat, 4 bits", "query_wildcat", {"bits": 4}),
        (SAME_LENGTH, None, {}),
    ]
    stored = setting.tokens
    for name, method, more in contenders:
        if lab.left < 0:
            return

        def work(name: str = name, method: str | None = method, more: dict[str, Any] = more) -> dict[str, Any]:
            nonlocal stored
            model = lab.model(setting.shape)
            if method is None:
                cache: Any = random_cache(lab, setting if name == DYNAMIC else replace(setting, tokens=stored))
            else:
                cache = lab.filled(setting.shape, setting.tokens, method, ratio=setting.kept, **more)
                stored = cache.stored_length() if name == "wildcat" else stored
                cache.batch_repeat_interleave(setting.rows)
            return decode(lab, setting, cache, eager(model, cache), folds=method is not None)

        yield noting_error({"cache": name}, work)
        lab.sweep()


def eager(model: Any, cache: Cache) -> Step:
    """Make a step of the model as it is."""
    return lambda ids: model(ids, **{CACHE: cache}, logits_to_keep=1).logits


@torch.no_grad()
def random_cache(lab: Lab, setting: Setting, cache: Cache | None = None) -> Cache:
    """Fill one of Transformers' caches with random numbers, a `DynamicCache` by default."""
    config = lab.model(setting.shape).config
    cache = DynamicCache(config=config) if cache is None else cache
    heads, dim = config.num_key_value_heads, getattr(config, "head_dim", None)
    dim = dim or config.hidden_size // config.num_attention_heads
    for index in range(config.num_hidden_layers):
        keys = torch.randn(setting.rows, heads, setting.tokens, dim, device=lab.device, dtype=lab.dtype)
        cache.update(keys, torch.randn_like(keys), index)
    return cache


@torch.no_grad()
def decode(lab: Lab, setting: Setting, cache: Any, step: Step, *, folds: bool) -> dict[str, Any]:
    """Decode the tokens between two folds, or as many as the time allows.

    Returns:
        The row: seconds of the first steps, of the median step, of the slowest, of all; bytes; waits of the host.
    """
    held = cache_bytes(cache)
    ids = torch.ones(setting.rows, 1, dtype=torch.int64, device=lab.device)
    first = [lab.seconds(lambda: step(ids)) for _ in range(_WARM_UPS)]
    period = block_size(WildCatConfig(ratio=setting.kept))  # with one fold in any so many steps
    count = max(2, min(period, int(min(_BUDGET, max(lab.left, 1.0)) / max(first[-1], 1e-6))))
    marks = Marks(lab.device)

    def run() -> None:
        token = ids
        marks.set()
        for _ in range(count):
            token = step(token).argmax(-1)
            marks.set()

    whole = lab.seconds(run)
    gaps = marks.gaps()
    row = {
        "cache_bytes": held,
        "steps": count,
        "first_seconds": first,
        "step_seconds": whole / count,
        "median_seconds": statistics.median(gaps),
        "slowest_seconds": max(gaps),
        "tokens_per_second": setting.rows * count / whole,
        "whole_period": count == period or not folds,
    }
    if folds and lab.device.type == "cuda":
        row |= _stalls(lab, step, ids, count)
    return row


def _stalls(lab: Lab, step: Step, ids: Tensor, count: int) -> dict[str, Any]:
    """Count waits of the host: in a step without a fold, the lesser of two, and in as many steps as were timed."""

    def count_waits(times: int) -> dict[str, int]:
        return lab.stalls(lambda: [step(ids) for _ in range(times)]) or {}

    one, other, many = count_waits(1), count_waits(1), count_waits(count)
    places = min(one, other, key=lambda found: sum(found.values()))
    return {
        "stalls": sum(places.values()),
        "places": places,
        "all_stalls": sum(many.values()),
        "all_places": many,
        "all_steps": count,
    }


@torch.no_grad()
def fixed_costs(lab: Lab, setting: Setting) -> dict[str, Any]:
    """Time what does not grow with the layers: the table of embeddings, the last norm and the logits."""
    model = lab.model(setting.shape)
    ids = torch.ones(setting.rows, 1, dtype=torch.int64, device=lab.device)
    table, head, norm = model.get_input_embeddings(), model.get_output_embeddings(), model.model.norm
    once = lab.repeated(lambda: head(norm(table(ids))).argmax(-1), budget=0.05)
    weights = {weight.data_ptr(): weight.nbytes for weight in model.parameters()}
    outer = {weight.data_ptr(): weight.nbytes for weight in (table.weight, head.weight)}
    return {
        "fixed_seconds": once["seconds"],
        "fixed_bytes": head.weight.nbytes,
        "layer_bytes": (sum(weights.values()) - sum(outer.values())) / model.config.num_hidden_layers,
    }
