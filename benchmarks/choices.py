"""The presets a user chooses from, beside the exact cache: a prefill, a decoded token, and bytes, in one run.

A turn reads the prompt into an empty cache of each choice, and then decodes greedily from it. Nothing is shared between
choices, so that a figure is what a user waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from benchmarks.caches import DYNAMIC, held_bytes
from benchmarks.options import Options, Subject
from benchmarks.records import Label, Record
from benchmarks.turns import Stopwatch, take_turns
from wildcat_kv import Context, WildCatCache, load_preset
from wildcat_kv.hook.keyword import CACHE

TOKENS = (4096,)
STEPS = 48
PRESETS = ("bytes_30", "default", "bytes_9", "bytes_5", "published")
TWO_READINGS = "two readings, bytes_9"
UNITS = {"prefill_seconds": "s", "seconds_per_step": "s", "cache_bytes": "B"}


def measure(options: Options) -> Iterator[Record]:
    """Measure every choice at every length."""
    for dtype in options.dtypes:
        subject = Subject.load(options, dtype)
        for tokens in options.lengths(*TOKENS):
            ids, steps = subject.prompt(tokens), options.steps or STEPS
            runs = {name: _run(fill, ids, subject.model, steps) for name, fill in _fillers(subject, ids).items()}
            title = f"choices, {dtype}, {tokens} tokens"
            for name, quantities in take_turns(runs, options.turns, title=title).items():
                labels: dict[str, Label] = {"dtype": dtype, "tokens": tokens, "steps": steps, "contender": name}
                for quantity, samples in quantities.items():
                    yield Record(quantity=quantity, unit=UNITS[quantity], labels=labels, samples=tuple(samples))


def _fillers(subject: Subject, ids: Tensor) -> dict[str, Callable[[], Cache]]:
    """Name the choices, each with a function that reads `ids` (1, n) into a new cache."""
    model = subject.model

    def read(make: Callable[[], Cache]) -> Callable[[], Cache]:
        def filled() -> Cache:
            cache = make()
            model(ids, **{CACHE: cache}, logits_to_keep=1)
            return cache

        return filled

    def read_twice() -> Cache:
        settings = load_preset("bytes_9").settings
        return Context(model, ids).compress(settings, compressor="rereading_wildcat", tokenizer=subject.tokenizer)

    def preset(name: str) -> Callable[[], Cache]:
        return read(lambda: WildCatCache(model.config, preset=name))

    choices = {name: preset(name) for name in PRESETS}
    return {DYNAMIC: read(lambda: DynamicCache(config=model.config)), **choices, TWO_READINGS: read_twice}


def _run(fill: Callable[[], Cache], ids: Tensor, model: Any, steps: int) -> Callable[[], dict[str, float]]:
    """Make a turn of a choice: read, count the bytes, decode."""

    @torch.no_grad()
    def turn() -> dict[str, float]:
        with Stopwatch(ids.device) as reading:
            cache = fill()
        held, token = held_bytes(cache), ids[:, -1:]
        with Stopwatch(ids.device) as decoding:
            for _ in range(steps):
                token = model(token, **{CACHE: cache}, logits_to_keep=1).logits.argmax(-1)
        return {
            "prefill_seconds": reading.seconds,
            "seconds_per_step": decoding.seconds / steps,
            "cache_bytes": held,
        }

    return turn
