"""A long generation under a constant budget: time of a token and bytes held, as it goes on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import Cache

from benchmarks.caches import WILDCAT
from benchmarks.options import Options, Subject
from benchmarks.records import Label, Record
from benchmarks.turns import Stopwatch
from wildcat_kv import WildCatCache
from wildcat_kv.hook.keyword import CACHE

TOKENS = (8000,)
PARTS = 8  # of a generation; thousands by default
_PIECES = 10  # of a part, for its spread


def measure(options: Options) -> Iterator[Record]:
    """Sample token after token; seconds and bytes by eighths, compared with each other: no turns."""
    for dtype in options.dtypes:
        subject = Subject.load(options, dtype)
        for tokens in options.lengths(*TOKENS):
            yield from _generate(subject, tokens, options)


def _generate(subject: Subject, tokens: int, options: Options) -> Iterator[Record]:
    model, ids = subject.model, subject.prompt(options.prompt_tokens)
    cache = WildCatCache(model.config, compressor="wildcat", max_tokens=options.max_tokens, sink=32)
    generator = torch.Generator(subject.device).manual_seed(0)
    ids = _continue(model, cache, ids, generator, 1)
    piece = tokens // (PARTS * _PIECES)
    parts = track(
        range(PARTS), description=f"generation, {subject.dtype}", console=Console(stderr=True), transient=True
    )
    for part in parts:
        labels: dict[str, Label] = {
            "dtype": subject.dtype,
            "tokens": tokens,
            "contender": WILDCAT,
            "max_tokens": options.max_tokens,
            "prompt_tokens": options.prompt_tokens,
            "part": part,
            "generated": (part + 1) * piece * _PIECES,
        }
        seconds, held, stored = [], [], []
        for _ in range(_PIECES):
            with Stopwatch(subject.device) as watch:
                ids = _continue(model, cache, ids, generator, piece)
            seconds.append(watch.seconds / piece)
            held.append(cache.memory_bytes())
            stored.append(max(cache.stored_length(layer) for layer in range(len(cache.layers))))
        yield Record(quantity="seconds_per_token", unit="s", labels=labels, samples=tuple(seconds))
        yield Record(quantity="held_bytes", unit="B", labels=labels, samples=tuple(held))
        yield Record(quantity="stored_tokens", unit="tokens", labels=labels, samples=tuple(stored))


@torch.no_grad()
def _continue(model: Any, cache: Cache, ids: torch.Tensor, generator: torch.Generator, tokens: int) -> torch.Tensor:
    """Read `ids` (1, n) and sample `tokens` more; the last of them, (1, 1)."""
    with warnings.catch_warnings():
        # Beyond the model's positions the text is nonsense, and takes as long.
        warnings.filterwarnings("ignore", message="the text is .* positions")
        for _ in range(tokens):
            logits = model(ids, **{CACHE: cache}, logits_to_keep=1).logits[:, -1]
            ids = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
    return ids
