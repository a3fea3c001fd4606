"""`wildcat-kv demo`: a long text asked with the exact cache and with WildCat."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import Cache, DynamicCache

from wildcat_kv.cache.caches import WildCatCache
from wildcat_kv.cache.sizes import cache_bytes, stored_tokens
from wildcat_kv.cli import options
from wildcat_kv.cli.generate import decode
from wildcat_kv.cli.streaming import TextStream, layers_seen, steps
from wildcat_kv.cli.timing import TimedStreamer
from wildcat_kv.contexts.prompts import encode_question
from wildcat_kv.contexts.reading import read
from wildcat_kv.data.haystack import build_context, make_needles


def demo(
    ratio: options.RatioOption = None,
    compression_ratio: options.DropOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens of essays to read.", min=500)] = 4000,
    max_new_tokens: Annotated[int, typer.Option(help="Length of each answer.", min=1)] = 48,
    model: options.ModelOption = None,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
    seed: Annotated[int, typer.Option(help="Of the essays, the needle and the pivots.")] = 0,
) -> None:
    """Ask about a long text: with the exact cache, and with WildCat.

    The text is read and compressed before the questions are known.
    """
    settings = options.share(ratio, compression_ratio).changed(seed=seed)
    loaded, tokenizer = options.load(model, dtype, device)
    (needle,) = make_needles(1, seed)
    context = build_context(tokenizer, tokens, [needle], seed=seed)
    questions = [(needle.question, needle.sentence.split(" is ")[0] + " is "), ("What is this text about?", "")]
    caches: dict[str, Callable[[], Cache]] = {
        "exact": lambda: DynamicCache(config=loaded.config),
        f"WildCat {settings.ratio:.0%}": lambda: WildCatCache(loaded.config, settings),
    }
    with steps() as progress:
        runs = {
            name: _ask(loaded, tokenizer, make(), context, questions, max_new_tokens, progress, name)
            for name, make in caches.items()
        }
    console = Console(highlight=False)
    console.print(f"\n{tokens} tokens of essays hold the needle: [bold]{needle.sentence}[/bold]\n")
    console.print(_table(questions, runs))


@dataclass(frozen=True)
class _Run:
    """Answers with one cache; the accounting is of the cache after the context, `stored` in entries a head."""

    answers: list[str]
    stored: float
    mebibytes: float
    prefill_seconds: float
    tokens_per_second: float


@torch.no_grad()
def _ask(
    model: Any,
    tokenizer: Any,
    cache: Cache,
    context: str,
    questions: list[tuple[str, str]],
    max_new_tokens: int,
    progress: Progress,
    name: str,
) -> _Run:
    """Read `context` once, then answer each question (text, beginning of the answer) on a copy of the cache."""
    before, _ = encode_question(tokenizer, context, "")
    before = before.to(model.device)
    task = progress.add_task(f"{name}: reading {before.shape[1]} tokens", total=None)
    reading = TimedStreamer()
    with layers_seen(model, progress, task):
        reading.put(before)
        logits = read(model, cache, before)
        reading.put(logits.argmax(-1))
    stored, mebibytes = stored_tokens(cache), cache_bytes(cache) / 2**20
    answers, speeds = [], []
    for question, beginning in questions:
        _, after = encode_question(tokenizer, context, question, beginning)
        ids = torch.cat((before, after.to(model.device)), dim=-1)
        writing = progress.add_task(f"{name}: {question}", total=max_new_tokens)
        pieces: list[str] = [beginning]
        text = TextStream(tokenizer, pieces.append)

        def on_token(token: int, text: TextStream = text, task: Any = writing) -> None:
            text.put(token)
            progress.advance(task)

        fork = copy.deepcopy(cache)
        timing = decode(model, tokenizer, fork, ids, max_new_tokens, on_token, stop_strings=["\n"])
        progress.update(writing, completed=max_new_tokens)
        answers.append("".join(pieces).strip())
        speeds.append(timing.tokens_per_second)
    return _Run(answers, stored, mebibytes, reading.timing.first_token_seconds, sum(speeds) / len(speeds))


def _table(questions: list[tuple[str, str]], runs: dict[str, _Run]) -> Table:
    """One column a cache: answers, then the accounting."""
    table = Table("", *runs, show_lines=True)
    for index, (question, _) in enumerate(questions):
        table.add_row(question, *(run.answers[index] for run in runs.values()))
    table.add_row("tokens stored", *(f"{run.stored:.0f}" for run in runs.values()))
    table.add_row("cache, MiB", *(f"{run.mebibytes:.1f}" for run in runs.values()))
    table.add_row("prefill, seconds", *(f"{run.prefill_seconds:.1f}" for run in runs.values()))
    table.add_row("tokens per second", *(f"{run.tokens_per_second:.1f}" for run in runs.values()))
    return table
