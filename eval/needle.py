"""Needles in essays, compressed before the question is known: how likely is the right answer still?

    python -m eval.needle --samples 20 --ratio 0.25

Every sample is a stretch of essays with four needles. The context is read and compressed first; then each
needle is asked for on a copy of the cache, and the answer's digits are scored by their negative
log-likelihood (nats a token, lower is better; guessing digits gives ln 10 = 2.30). All methods get the same
samples. Intervals are paired bootstrap intervals of the difference to WildCat.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy.stats
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from transformers import Cache, DynamicCache

from wildcat_kv import CompressedCache, WildCatCache
from wildcat_kv.accounting import stored_tokens
from wildcat_kv.compressors import Uniform
from wildcat_kv.haystack import Needle, build_context, make_needles
from wildcat_kv.models import load_model
from wildcat_kv.prompts import encode_question

NEEDLES = 4
LENGTHS = (1200, 1500)  # tokens of the context

Method = Callable[[Any], Cache]


def methods(ratio: float) -> dict[str, Method]:
    """The caches to compare, by name; each takes the model's config."""
    return {
        "exact": lambda config: DynamicCache(config=config),
        "uniform": lambda config: CompressedCache(config, compressor=Uniform(), ratio=ratio),
        "wildcat": lambda config: WildCatCache(config, ratio=ratio),
        "wildcat, clipped weights": lambda config: WildCatCache(config, ratio=ratio, weights="clipped"),
        "wildcat, theory temperature": lambda config: WildCatCache(config, ratio=ratio, temperature="theory"),
    }


def split_prompt(tokenizer: Any, context: str, needle: Needle) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (1, n) of the context, of what follows it up to the answer, and of the answer."""
    lead = needle.sentence.removesuffix(f"{needle.value}.")
    before, question = encode_question(tokenizer, context, needle.question, lead)
    return before, question, tokenizer(needle.value, return_tensors="pt", add_special_tokens=False).input_ids


def answer_loss(model: Any, cache: Cache, question: torch.Tensor, answer: torch.Tensor) -> float:
    """Mean negative log-likelihood of the answer's tokens, in nats, after the question (both (1, n))."""
    logits = model(torch.cat((question, answer), dim=-1), past_key_values=cache).logits
    predicted = logits[0, question.shape[-1] - 1 : -1]
    return float(torch.nn.functional.cross_entropy(predicted.float(), answer[0]))


@torch.no_grad()
def score_sample(model: Any, tokenizer: Any, makers: dict[str, Method], seed: int) -> dict[str, tuple[float, int]]:
    """Mean loss over the sample's needles, and tokens stored after the context, by method."""
    needles = make_needles(NEEDLES, seed)
    context = build_context(tokenizer, random.Random(seed).randint(*LENGTHS), needles, seed=seed)
    prompts = [split_prompt(tokenizer, context, needle) for needle in needles]
    result = {}
    for name, make in makers.items():
        cache = make(model.config)
        model(prompts[0][0].to(model.device), past_key_values=cache, logits_to_keep=1)
        stored = stored_tokens(cache)
        losses = [
            answer_loss(model, copy.deepcopy(cache), question.to(model.device), answer.to(model.device))
            for _, question, answer in prompts
        ]
        result[name] = (float(np.mean(losses)), stored)
    return result


def results_table(results: list[dict[str, tuple[float, int]]], title: str) -> Table:
    """One line a method; the difference to WildCat with its paired bootstrap 95 % interval."""
    table = Table(title=title)
    for column in ("method", "nats a digit", "to wildcat (95 %)", "tokens stored"):
        table.add_column(column, justify="left" if column == "method" else "right")
    ours = np.array([sample["wildcat"][0] for sample in results])
    for name in results[0]:
        losses = np.array([sample[name][0] for sample in results])
        difference = ""
        if name != "wildcat" and len(results) > 2:
            interval = scipy.stats.bootstrap((losses - ours,), np.mean, rng=0).confidence_interval
            difference = f"{np.mean(losses - ours):+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"
        stored = np.mean([sample[name][1] for sample in results])
        table.add_row(name, f"{losses.mean():.2f}", difference, f"{stored:.0f}")
    return table


def main(
    samples: Annotated[int, typer.Option(min=1, help="stretches of essays")] = 20,
    ratio: Annotated[float, typer.Option(help="share of the tokens to keep")] = 0.25,
    model: Annotated[
        str | None, typer.Option(help="hub id, folder or GGUF file; the default model if left out")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="a method to run, repeatable; wildcat always runs")] = None,
    output: Annotated[Path | None, typer.Option(help="file for one JSON line a sample")] = None,
) -> None:
    """Compare methods by the likelihood of needles that were compressed before they were asked for."""
    makers = {name: make for name, make in methods(ratio).items() if not only or name in {*only, "wildcat"}}
    loaded, tokenizer = load_model(model)
    results = []
    console = Console(stderr=True)
    columns = ("needle", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for seed in progress.track(range(samples)):
            results.append(score_sample(loaded, tokenizer, makers, seed))
            if output:
                with output.open("a") as lines:
                    lines.write(json.dumps({"seed": seed, "ratio": ratio, **results[-1]}) + "\n")
    title = f"{NEEDLES} needles in {LENGTHS[0]} to {LENGTHS[1]} tokens, {ratio:.0%} kept, {samples} samples"
    Console().print(results_table(results, title))


if __name__ == "__main__":
    typer.run(main)
