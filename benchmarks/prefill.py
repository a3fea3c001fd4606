"""The cost of compressing while a prompt is read, as a share of reading it.

The share is of one and the same prefill: the seconds inside its folds over the rest of its seconds. So neither the
noise between two prefills nor the choice of a reference enters it. Exact prefills take turns with the others all the
same, and the ratio of the whole times stands beside the share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks import rates
from benchmarks.caches import DYNAMIC, WILDCAT
from benchmarks.options import Options, Subject
from benchmarks.records import Label, Record
from benchmarks.turns import Stopwatch, take_turns
from wildcat_kv import CompressedCache, Context, WildCatCache, WildCatConfig
from wildcat_kv.cache.budget import exact_ends, kept_tokens
from wildcat_kv.cache.caches import WildCatLayer
from wildcat_kv.compressors.registry import AUTO
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.lm_eval.options import reads_twice

TOKENS = (4096, 8000)
ONE_BIN = "wildcat, one bin"


class FoldClock(Stopwatch):
    """Adds up the seconds that layers spend folding, while `watching`."""

    def watching(self, run: Callable[[], object]) -> None:
        """Run something with the clock around every fold in it."""
        fold = WildCatLayer.after_attention

        def timed(layer: WildCatLayer, query: Tensor, scale: float) -> None:
            with self:
                fold(layer, query, scale)

        try:
            setattr(WildCatLayer, "after_attention", timed)  # noqa: B010
            run()
        finally:
            setattr(WildCatLayer, "after_attention", fold)  # noqa: B010


def measure(options: Options) -> Iterator[Record]:
    """Measure WildCat's prefills of every length; the shortest also in one bin, and by all other methods.

    The other methods in the first dtype alone, half the turns: some are slow.
    """
    yield from rates.measure(torch.device(options.device))
    for dtype in options.dtypes:
        subject = Subject.load(options, dtype)
        lengths = options.lengths(*TOKENS)
        for tokens in lengths:
            ids = subject.prompt(tokens)
            labels: dict[str, Label] = {"dtype": dtype, "tokens": tokens}
            contenders = _protocols(subject.model, ids, options)
            if tokens == min(lengths):
                contenders[ONE_BIN] = _ours(subject.model, ids, _one_bin(tokens, options.settings))
            title = f"prefill, {dtype}, {tokens} tokens"
            yield from _records(take_turns(contenders, options.turns, title=title), labels)
            if ONE_BIN in contenders:
                yield from _counts(subject.model, tokens, options.settings, labels)
            if tokens == min(lengths) and dtype == options.dtypes[0] and options.others:
                others = {name: _method(subject, ids, name, options.settings) for name in options.others}
                turns = take_turns(others, -(-options.turns // 2), warm_ups=0, title=f"{title}, other methods")
                yield from _records(turns, labels | {"group": "methods"})


def _protocols(model: Any, ids: Tensor, options: Options) -> dict[str, Callable[[], dict[str, float]]]:
    """Make contenders: the exact cache and WildCat's published protocol."""
    return {
        DYNAMIC: lambda: _prefill(model, ids, DynamicCache(config=model.config)),
        WILDCAT: _ours(model, ids, options.settings),
    }


def _ours(model: Any, ids: Tensor, settings: WildCatConfig) -> Callable[[], dict[str, float]]:
    return lambda: _prefill(model, ids, WildCatCache(model.config, settings, compressor="wildcat"))


def _method(subject: Subject, ids: Tensor, name: str, settings: WildCatConfig) -> Callable[[], dict[str, float]]:
    """Make a contender of another method; KVzip, which reads twice, compresses after the prompt."""
    model = subject.model
    if name == AUTO or not reads_twice(name):
        return lambda: _prefill(model, ids, CompressedCache(model.config, settings, compressor=name))
    return lambda: _read_twice(subject, ids, name, settings)


@torch.no_grad()
def _prefill(model: Any, ids: Tensor, cache: Any) -> dict[str, float]:
    """Read `ids` (1, n) into an empty cache."""
    whole, folds = Stopwatch(model.device), FoldClock(model.device)
    with whole:
        folds.watching(lambda: model(ids, **{CACHE: cache}, logits_to_keep=1))
    return {"seconds": whole.seconds, "fold_seconds": folds.seconds}


@torch.no_grad()
def _read_twice(subject: Subject, ids: Tensor, name: str, settings: WildCatConfig) -> dict[str, float]:
    """Read `ids` (1, n), then compress; everything after the first reading counts as folding."""
    whole, folds = Stopwatch(subject.device), Stopwatch(subject.device)
    with whole:
        context = Context(subject.model, ids)
        with folds:
            context.compress(settings, compressor=name, tokenizer=subject.tokenizer)
    return {"seconds": whole.seconds, "fold_seconds": folds.seconds}


def _one_bin(tokens: int, settings: WildCatConfig) -> WildCatConfig:
    """Make settings of the same budget and ends, with one bin for all tokens between them."""
    assert settings.share is not None
    rank = kept_tokens(tokens, settings.share) - settings.sink - settings.window
    return settings.model_copy(update={"bin_rank": max(settings.bin_rank, rank)})


def _counts(model: Any, tokens: int, settings: WildCatConfig, labels: dict[str, Label]) -> Iterator[Record]:
    """Count the operations that one bin needs in all heads and layers, the limit of pivoted Cholesky."""
    decoder = model.config.get_text_config(decoder=True)
    assert settings.share is not None
    budget = kept_tokens(tokens, settings.share)
    ends = sum(exact_ends(budget, _one_bin(tokens, settings)))
    rank, points = budget - ends, tokens - ends
    heads = decoder.num_hidden_layers * decoder.num_key_value_heads
    dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    counts = {
        "kernel_flops": heads * 2 * points * rank * dim,  # inner products of all points with the pivots
        # Row i of the factor takes i products a point, each a multiplication and an addition.
        "factor_flops": heads * points * rank**2,
        "weight_flops": heads * points * rank**2,  # one triangular solve
        "value_flops": heads * 2 * points * rank * dim,
    }
    for quantity, count in counts.items():
        place: dict[str, Label] = {"contender": ONE_BIN, "points": points, "rank": rank, "heads": heads}
        yield Record(quantity=quantity, unit="flop", labels=labels | place, samples=(count,))


def _records(turns: dict[str, dict[str, list[float]]], labels: dict[str, Label]) -> Iterator[Record]:
    for contender, quantities in turns.items():
        for quantity, samples in quantities.items():
            yield Record(quantity=quantity, unit="s", labels=labels | {"contender": contender}, samples=tuple(samples))
