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
from rich.text import Text
from transformers import Cache, DynamicCache

from wildcat_kv.cache.caches import WildCatCache
from wildcat_kv.cache.sizes import cache_bytes
from wildcat_kv.cli.figures import MIB, kept_in_words
from wildcat_kv.cli.generate import decode
from wildcat_kv.cli.streaming import layers_seen, steps
from wildcat_kv.config import BUDGETS
from wildcat_kv.contexts.compressed_context import compress_context
from wildcat_kv.contexts.prompts import encode_question
from wildcat_kv.contexts.reading import read
from wildcat_kv.data.haystack import build_context, make_needles

_EXACT = "exact"


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
        keeps: share of the tokens that is kept, in words.
        nbytes: bytes of the cache after the text.
        read_seconds: time to read the text, and to compress it.
        tokens_per_second: mean speed of the answers.
    """

    answers: list[str]
    keeps: str
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
    facts, text = planted_text(tokenizer, tokens, seed)
    with steps() as progress:
        runs = {
            name: _run(model, tokenizer, make, text, facts, max_new_tokens, progress, name)
            for name, make in _caches(model, tokenizer, text, choice).items()
        }
    console = Console(highlight=False)
    console.print(
        f"\n{tokens:,} tokens of essays hide {len(facts)} facts.\n"
        "Each cache reads and compresses the text before it is asked."
    )
    for index, fact in enumerate(facts):
        console.print(f"\n[bold]{fact.question}[/bold] [dim]({fact.answer})[/dim]")
        for name, run in runs.items():
            answer = _answer(fact, name, max(map(len, runs)), run.answers[index])
            console.print(answer, no_wrap=True, overflow="ellipsis")
    console.print()
    console.print(_figures(facts, runs))
    console.print(_verdict(facts, runs, _name(choice)), soft_wrap=True)
    for line in filter(None, (_dtype_note(model, runs), note)):
        console.print(line, style="dim", soft_wrap=True)


def planted_text(tokenizer: Any, tokens: int, seed: int) -> tuple[Sequence[_Fact], str]:
    """Plant facts in essays; give the facts, and the text of so many tokens."""
    (needle,) = make_needles(1, seed)
    facts = (_Fact(needle.sentence, needle.question, needle.value), *_FACTS)
    return facts, build_context(tokenizer, tokens, facts, seed=seed)


def _caches(model: Any, tokenizer: Any, text: str, choice: dict[str, Any]) -> dict[str, Callable[[], Cache]]:
    """Name the caches to compare, each with a function that reads the text into it."""

    def exact() -> Cache:
        cache = DynamicCache(config=model.config)
        read(model, cache, encode_question(tokenizer, text, "")[0].to(model.device))
        return cache

    def compressed(**chosen: Any) -> Callable[[], Cache]:
        return lambda: compress_context(model, tokenizer, text, **chosen).cache

    budget = {name: choice[name] for name in (*BUDGETS, "bits") if name in choice}
    caches = {
        _EXACT: exact,
        "all in 4 bits": compressed(ratio=1.0, bits=4),
        _name(choice): compressed(**choice),
    }
    caches.setdefault("published", compressed(preset="published", **budget))  # what was chosen may have that name
    return caches


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
    keeps = kept_in_words(cache.settings) if isinstance(cache, WildCatCache) else "all tokens"
    return _Run(answers, keeps, cache_bytes(cache), seconds, sum(speeds) / len(speeds))


def _answer(fact: _Fact, name: str, width: int, answer: str) -> Text:
    """Write what a cache answered; its name takes `width` columns."""
    mark = ("✓", "green") if fact.answer in answer else ("✗", "red")
    return Text.assemble("  ", mark, f" {name:<{width}} {answer}")


def _figures(facts: Sequence[_Fact], runs: dict[str, _Run]) -> Table:
    """Make a table of the caches' figures."""
    exact = runs[_EXACT]
    table = Table("cache", "keeps", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("size", "of exact", "found", "reading", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, run in runs.items():
        table.add_row(
            name,
            run.keeps,
            f"{run.nbytes / MIB:.1f} MiB",
            f"{run.nbytes / exact.nbytes:.0%}".replace("%", " %"),
            f"{run.found(facts)} of {len(facts)}",
            f"{run.read_seconds:.1f} s",
            f"{run.tokens_per_second:.1f}",
        )
    return table


def _name(choice: dict[str, Any]) -> str:
    """Name what was chosen: a preset, a method, or settings of one's own."""
    names = [str(choice[name]) for name in ("preset", "compressor") if choice[name] is not None]
    own = any(name in choice for name in (*BUDGETS, "min_tokens", "bits"))
    return " ".join(names) or ("yours" if own else "default")


def _verdict(facts: Sequence[_Fact], runs: dict[str, _Run], name: str) -> str:
    """Say in one line what the chosen cache found, and in how many bytes."""
    exact, run = runs[_EXACT], runs[name]
    share = f"{run.nbytes / exact.nbytes:.0%}".replace("%", " %")
    return f"\n{name}: {run.found(facts)} of {len(facts)} facts, in {share} of the exact cache's bytes."


def _dtype_note(model: Any, runs: dict[str, _Run]) -> str:
    """Say how large the exact cache is in half precision, where the demo does not run in it."""
    if model.dtype.itemsize == 2:
        return ""
    half = runs[_EXACT].nbytes * 2 / model.dtype.itemsize
    name = str(model.dtype).removeprefix("torch.")
    return f"The model runs in {name}; in bfloat16 the exact cache would take {half / MIB:.1f} MiB."
