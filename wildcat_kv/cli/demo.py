"""The demo: one text, asked with the exact cache and with a compressed one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import Cache, DynamicCache

from wildcat_kv.cache.sizes import cache_bytes
from wildcat_kv.cli.figures import MIB
from wildcat_kv.cli.generate import decode
from wildcat_kv.cli.streaming import layers_seen, steps
from wildcat_kv.contexts.compressed_context import compress_context
from wildcat_kv.contexts.prompts import encode_question
from wildcat_kv.contexts.reading import read
from wildcat_kv.data.haystack import Needle, build_context, make_needles

_OVERVIEW = "What is this text about?"


@dataclass(frozen=True)
class _Run:
    """Answers with one cache, and its figures.

    Attributes:
        answers: the answer to each question.
        nbytes: bytes of the cache after the text.
        read_seconds: time to read the text, and to compress it.
        tokens_per_second: mean speed of the answers.
    """

    answers: list[str]
    nbytes: int
    read_seconds: float
    tokens_per_second: float


def run_demo(
    model: Any, tokenizer: Any, choice: dict[str, Any], tokens: int, max_new_tokens: int, seed: int, *, note: str
) -> None:
    """Plant a fact in essays, and ask both caches for it.

    It prints what they answered.

    Args:
        model: a Transformers decoder.
        tokenizer: the model's tokenizer.
        choice: keyword arguments of `compress_context`.
        tokens: length of the text, in tokens.
        max_new_tokens: most tokens of an answer.
        seed: seed of the essays and the fact.
        note: a remark on the figures; may be empty.
    """
    (needle,) = make_needles(1, seed)
    text = build_context(tokenizer, tokens, [needle], seed=seed)
    questions = [needle.question, _OVERVIEW]

    def exact() -> Cache:
        cache = DynamicCache(config=model.config)
        read(model, cache, encode_question(tokenizer, text, "")[0].to(model.device))
        return cache

    def compressed() -> Cache:
        return compress_context(model, tokenizer, text, **choice).cache

    with steps() as progress:
        runs = [
            _run(model, tokenizer, make, text, questions, max_new_tokens, progress, name)
            for name, make in (("exact", exact), ("compressed", compressed))
        ]
    console = Console(highlight=False)
    console.print(f"\n{tokens:,} tokens of essays hold this sentence: [bold]{needle.sentence}[/bold]\n")
    console.print(_table(questions, dict(zip(("exact cache", _name(choice)), runs, strict=True))))
    console.print(_verdict(needle, *runs), soft_wrap=True)
    if note:
        console.print(note, style="dim", soft_wrap=True)


@torch.no_grad()
def _run(
    model: Any,
    tokenizer: Any,
    make: Callable[[], Cache],
    text: str,
    questions: list[str],
    max_new_tokens: int,
    progress: Progress,
    name: str,
) -> _Run:
    """Read the text once, then answer each question on a copy of the cache."""
    task = progress.add_task(f"{name}: reading", total=None)
    start = time.perf_counter()
    with layers_seen(model, progress, task):
        cache = make()
    seconds = time.perf_counter() - start
    answers, speeds = [], []
    for question in questions:
        ids = torch.cat(encode_question(tokenizer, text, question), dim=-1).to(model.device)
        writing = progress.add_task(f"{name}: {question}", total=None)
        pieces: list[str] = []
        timing = decode(model, tokenizer, copy.deepcopy(cache), ids, max_new_tokens, pieces.append, ["\n"])
        progress.update(writing, total=1, completed=1)
        answers.append("".join(pieces).strip())
        speeds.append(timing.tokens_per_second)
    return _Run(answers, cache_bytes(cache), seconds, sum(speeds) / len(speeds))


def _table(questions: list[str], runs: dict[str, _Run]) -> Table:
    """Make a table with a column a cache: answers, then figures."""
    exact = next(iter(runs.values()))
    table = Table("", *runs, show_lines=True)
    for index, question in enumerate(questions):
        table.add_row(question, *(run.answers[index] for run in runs.values()))
    for name, figure in (
        ("cache, MiB", lambda run: f"{run.nbytes / MIB:.1f} ({run.nbytes / exact.nbytes:.0%})"),
        ("reading, seconds", lambda run: f"{run.read_seconds:.1f}"),
        ("tokens a second", lambda run: f"{run.tokens_per_second:.1f}"),
    ):
        table.add_row(name, *map(figure, runs.values()))
    return table


def _name(choice: dict[str, Any]) -> str:
    """Name what was chosen, by preset, method and budget."""
    words = {"preset": "preset", "compressor": "method"}
    parts = [f"{word} {choice[name]}" for name, word in words.items() if choice[name] is not None]
    budgets = ("ratio", "compression_ratio", "max_tokens", "min_tokens", "max_bytes", "bits")
    return ", ".join([*parts, *(f"{name}={choice[name]}" for name in budgets if name in choice)])


def _verdict(needle: Needle, exact: _Run, compressed: _Run) -> str:
    """Say which cache gave the fact, and what the compressed one holds.

    It is one line.
    """
    found = [needle.value in run.answers[0] for run in (exact, compressed)]
    told = {
        (True, True): f"Both find {needle.value}",
        (True, False): f"The exact cache finds {needle.value}, the compressed one does not",
        (False, True): f"The compressed cache finds {needle.value}, the exact one does not",
        (False, False): f"Neither finds {needle.value}",
    }
    share = compressed.nbytes / exact.nbytes
    return f"\n{told[found[0], found[1]]}; the compressed cache holds {share:.0%} of the exact one's bytes."
