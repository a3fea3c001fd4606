"""The demo: facts in a text, asked for with the exact cache and with smaller ones."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import Cache, DynamicCache

from wildcat_kv.cache.sizes import cache_bytes
from wildcat_kv.cli.figures import MIB
from wildcat_kv.cli.generate import decode
from wildcat_kv.cli.streaming import layers_seen, steps
from wildcat_kv.config import BUDGETS
from wildcat_kv.contexts.compressed_context import compress_context
from wildcat_kv.contexts.prompts import encode_question
from wildcat_kv.contexts.reading import read
from wildcat_kv.data.haystack import build_context, make_needles

_EXACT = "exact cache"


class _Fact(NamedTuple):
    """A fact of the text.

    Attributes:
        sentence: sentence to plant.
        question: question to ask.
        answer: words that an answer must have.
    """

    sentence: str
    question: str
    answer: str


# Beside a number that the seed chooses. Unlike ones: a small model mixes up facts that are alike.
_FACTS = (
    _Fact("The password of the library is blue lantern.", "What is the password of the library?", "blue lantern"),
    _Fact("The captain of the ship Aurora is Maria Lund.", "Who is the captain of the ship Aurora?", "Maria Lund"),
    _Fact("The recipe of Aunt Olga needs three cups of barley.", "What does the recipe of Aunt Olga need?", "barley"),
)


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

    def found(self, facts: Sequence[_Fact]) -> int:
        """Count the facts that were found."""
        return sum(fact.answer in answer for fact, answer in zip(facts, self.answers, strict=True))


def run_demo(
    model: Any, tokenizer: Any, choice: dict[str, Any], tokens: int, max_new_tokens: int, seed: int, *, note: str
) -> None:
    """Plant facts in essays, and ask every cache for them.

    It prints what they answered. The caches are the exact one, all tokens in 4 bits, the chosen one, and the published
    method in the same budget.

    Args:
        model: a Transformers decoder.
        tokenizer: the model's tokenizer.
        choice: keyword arguments of `compress_context`.
        tokens: length of the text, in tokens.
        max_new_tokens: most tokens of an answer.
        seed: seed of the essays and the facts.
        note: a remark on the figures; may be empty.
    """
    (needle,) = make_needles(1, seed)
    facts = (_Fact(needle.sentence, needle.question, needle.value), *_FACTS)
    text = build_context(tokenizer, tokens, facts, seed=seed)
    with steps() as progress:
        runs = {
            name: _run(model, tokenizer, make, text, facts, max_new_tokens, progress, name.splitlines()[0])
            for name, make in _caches(model, tokenizer, text, choice).items()
        }
    console = Console(highlight=False)
    console.print(
        f"\n{tokens:,} tokens of essays hold {len(facts)} sentences such as: [bold]{facts[0].sentence}[/bold]\n"
        "Each cache has read and compressed them before it is asked.\n"
    )
    console.print(_table(facts, runs))
    console.print(_verdict(facts, runs), soft_wrap=True)
    if note:
        console.print(note, style="dim", soft_wrap=True)


def _caches(model: Any, tokenizer: Any, text: str, choice: dict[str, Any]) -> dict[str, Callable[[], Cache]]:
    """Name the caches to compare, each with a function that reads the text into it."""

    def exact() -> Cache:
        cache = DynamicCache(config=model.config)
        read(model, cache, encode_question(tokenizer, text, "")[0].to(model.device))
        return cache

    def compressed(**chosen: Any) -> Callable[[], Cache]:
        return lambda: compress_context(model, tokenizer, text, **chosen).cache

    budget = {name: choice[name] for name in (*BUDGETS, "bits") if name in choice}
    return {
        _EXACT: exact,
        "all tokens\nin 4 bits": compressed(ratio=1.0, bits=4),
        _name(choice): compressed(**choice),
        "published\nmethod": compressed(preset="published", **budget),
    }


@torch.no_grad()
def _run(
    model: Any,
    tokenizer: Any,
    make: Callable[[], Cache],
    text: str,
    facts: Sequence[_Fact],
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
    asking = progress.add_task(f"{name}: asking", total=len(facts))
    for fact in facts:
        ids = torch.cat(encode_question(tokenizer, text, fact.question), dim=-1).to(model.device)
        pieces: list[str] = []
        timing = decode(model, tokenizer, copy.deepcopy(cache), ids, max_new_tokens, pieces.append, ["\n"])
        progress.advance(asking)
        answers.append("".join(pieces).strip())
        speeds.append(timing.tokens_per_second)
    return _Run(answers, cache_bytes(cache), seconds, sum(speeds) / len(speeds))


def _table(facts: Sequence[_Fact], runs: dict[str, _Run]) -> Table:
    """Make a table with a column a cache: answers, then figures."""
    exact = runs[_EXACT]
    table = Table("", *runs, show_lines=True)
    for index, fact in enumerate(facts):
        table.add_row(f"{fact.question} ({fact.answer})", *(_marked(fact, run.answers[index]) for run in runs.values()))
    for name, figure in (
        ("facts found", lambda run: f"{run.found(facts)} of {len(facts)}"),
        ("cache, MiB", lambda run: f"{run.nbytes / MIB:.1f} ({run.nbytes / exact.nbytes:.0%})"),
        ("reading, s", lambda run: f"{run.read_seconds:.1f}"),
        ("tokens/s", lambda run: f"{run.tokens_per_second:.1f}"),
    ):
        table.add_row(name, *map(figure, runs.values()))
    return table


def _marked(fact: _Fact, answer: str) -> str:
    """Show an answer, in green where it has the fact."""
    answer = answer.replace("[", r"\[")
    return f"[green]{answer}[/green]" if fact.answer in answer else answer


def _name(choice: dict[str, Any]) -> str:
    """Name what was chosen, by preset, method and budget."""
    words = {"preset": "preset", "compressor": "method"}
    parts = [f"{word} {choice[name]}" for name, word in words.items() if choice[name] is not None]
    parts += [f"{name}={choice[name]}" for name in (*sorted(BUDGETS), "min_tokens", "bits") if name in choice]
    return "\n".join(parts) or "default"


def _verdict(facts: Sequence[_Fact], runs: dict[str, _Run]) -> str:
    """Say in one line how many facts each cache gave, and in how many bytes."""
    exact = runs[_EXACT]
    told = [
        f"{' '.join(name.split())} {run.found(facts)} in {run.nbytes / exact.nbytes:.0%} of the bytes"
        for name, run in runs.items()
    ]
    return f"\nOf {len(facts)} facts: {'; '.join(told)}."
