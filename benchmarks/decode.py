"""Tokens per second after a long context, from every cache.

The context is read once, and every cache is filled from that reading. A turn decodes greedily from a fresh copy of each
cache in its turn, so that all of them grow by the same tokens and none grows from turn to turn; making the copy is not
timed. The steps of a turn are as many as lie between two folds, so that each of ours folds once in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from benchmarks import rates
from benchmarks.caches import DYNAMIC, SAME_LENGTH, WILDCAT, fill, held_bytes, theirs
from benchmarks.options import Options, Subject
from benchmarks.records import Label, Record
from benchmarks.turns import Stopwatch, take_turns
from wildcat_kv import CompressedCache, Context
from wildcat_kv.cache.budget import block_size
from wildcat_kv.hook.keyword import CACHE

TOKENS = (8000,)
# Of larger batches; the others are compared at one row alone, which is dear enough.
_MAIN = (DYNAMIC, WILDCAT, SAME_LENGTH)


@dataclass(frozen=True)
class Contender:
    """A way to decode.

    Attributes:
        cache: gives a filled cache that nobody else holds.
        step: takes ids (rows, 1) and the cache to logits (rows, 1, vocabulary).
    """

    cache: Callable[[], Cache]
    step: Callable[[Tensor, Cache], Tensor]

    @torch.no_grad()
    def decode(self, ids: Tensor, steps: int) -> dict[str, float]:
        """Decode greedily from `ids` (rows, 1)."""
        cache = self.cache()
        with Stopwatch(ids.device) as watch:
            for _ in range(steps):
                ids = self.step(ids, cache).argmax(-1)
        return {"seconds_per_step": watch.seconds / steps}


def measure(options: Options) -> Iterator[Record]:
    """Time a step of every cache; other methods in the first dtype alone, at one row."""
    yield from rates.measure(torch.device(options.device))
    steps = options.steps or block_size(options.settings)
    for dtype in options.dtypes:
        subject = Subject.load(options, dtype)
        for tokens in options.lengths(*TOKENS):
            context = Context(subject.model, subject.prompt(tokens))
            first = context.next_logits.argmax(-1, keepdim=True)
            for rows in options.rows:
                labels: dict[str, Label] = {"dtype": dtype, "tokens": tokens, "rows": rows, "steps": steps}
                contenders = _caches(subject.model, context, options, rows, tokens + steps)
                ids = first.repeat_interleave(rows, 0)
                title = f"decode, {dtype}, {tokens} tokens, {rows} rows"
                yield from _measure(subject.model, contenders, ids, options.turns, 1, labels, title)
                if rows == min(options.rows) and dtype == options.dtypes[0] and options.others:
                    title = f"{title}, other methods"
                    others = {name: contenders[name] for name in (DYNAMIC, WILDCAT)}
                    others |= {name: _method(subject, context, options, name) for name in options.others}
                    yield from _measure(
                        subject.model, others, ids, options.turns, 0, labels | {"group": "methods"}, title
                    )


def _caches(model: Any, context: Context, options: Options, rows: int, capacity: int) -> dict[str, Contender]:
    """Make contenders that hold the context in `rows` equal rows. A further one is added here."""
    step = _forward(model)
    ours = context.compress(options.settings, compressor=WILDCAT)
    stored = ours.stored_length()
    ours.batch_repeat_interleave(rows)
    quantised = {
        bits: context.compress(options.settings.changed(bits=bits), compressor=WILDCAT) for bits in options.bits
    }
    for cache in quantised.values():
        cache.batch_repeat_interleave(rows)
    source = context.exact
    makers = {name: _filled(make, source, rows) for name, make in theirs(model.config, capacity).items()}
    makers |= {
        WILDCAT: ours.clone,
        SAME_LENGTH: lambda: fill(DynamicCache(config=model.config), source, rows, stored),
    }
    names = [*_MAIN, *(name for name in makers if name not in _MAIN and rows == min(options.rows))]
    makers |= {f"{WILDCAT}, {bits} bits": cache.clone for bits, cache in quantised.items()}
    return {name: Contender(makers[name], step) for name in [*names, *(name for name in makers if " bits" in name)]}


def _method(subject: Subject, context: Context, options: Options, name: str) -> Contender:
    """Make a contender of another method, with one row."""
    cache = context.compress(options.settings, compressor=name, tokenizer=subject.tokenizer)
    return Contender(cache.clone, _forward(subject.model))


def _filled(make: Callable[[], Cache], source: CompressedCache, rows: int) -> Callable[[], Cache]:
    return lambda: fill(make(), source, rows)


def _forward(model: Any) -> Callable[[Tensor, Cache], Tensor]:
    """Make a function that runs the model as it is."""
    return lambda ids, cache: model(ids, **{CACHE: cache}, logits_to_keep=1).logits


def _measure(
    model: Any,
    contenders: dict[str, Contender],
    ids: Tensor,
    turns: int,
    warm_ups: int,
    labels: dict[str, Label],
    title: str,
) -> Iterator[Record]:
    steps = int(labels["steps"])
    runs = {name: _run(contender, ids, steps) for name, contender in contenders.items()}
    for name, quantities in take_turns(runs, turns, warm_ups=warm_ups, title=title).items():
        own = labels | {"contender": name}
        samples = tuple(quantities["seconds_per_step"])
        yield Record(quantity="seconds_per_step", unit="s", labels=own, samples=samples)
        held = held_bytes(contenders[name].cache())
        yield Record(quantity="cache_bytes", unit="B", labels=own, samples=(held,))
        yield Record(quantity="weight_bytes", unit="B", labels=own, samples=(_weight_bytes(model),))


def _run(contender: Contender, ids: Tensor, steps: int) -> Callable[[], dict[str, float]]:
    return lambda: contender.decode(ids, steps)


def _weight_bytes(model: Any) -> int:
    """Count the bytes of weights that a step reads: a table of embeddings counts if it is the output's too."""
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = {weight.data_ptr(): weight.nbytes for weight in model.parameters()}
    return sum(weights.values()) - (0 if table.data_ptr() == output.data_ptr() else table.nbytes)
