"""All methods on the same real text: needles and drift, compressed before the question or the continuation is known.

    python -m eval.compare --samples 20 --ratio 0.25 --ratio 0.1

needle: four needles in 1,200 to 1,500 tokens of essays, each asked for in a row of its own after the context; negative
log-likelihood of the answer's digits in nats a digit, lower is better, guessing gives ln 10 = 2.30. drift:
Kullback-Leibler divergence of the next-token distribution from the exact cache's, over the 128 tokens after 1,000 to
1,200 tokens of essays. Each context is read once and compressed by every method. Intervals are paired bootstrap
95 % intervals of the difference to WildCat.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy.stats
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from eval.drift import drift, drift_sample, next_token
from eval.needle import needle_loss, needle_sample
from wildcat_kv import CompressedCache, Context
from wildcat_kv.accounting import stored_tokens
from wildcat_kv.compressors import available
from wildcat_kv.models import load_model

BASELINE = "wildcat"
# Beside the methods as they are by default.
VARIANTS: dict[str, dict[str, Any]] = {
    "wildcat, clipped": {"compressor": "wildcat", "weights": "clipped"},
    "wildcat, theory": {"compressor": "wildcat", "temperature": "theory"},
}
# With the digits to print.
MEASURES = {"needle": 2, "drift": 3}

_WIDTH = 120  # columns of a table in a file

Compress = Callable[[Context], CompressedCache]


def options() -> dict[str, dict[str, Any]]:
    """Every method and variant by name, as `Context.compress` takes them."""
    return {method.name: {"compressor": method.name} for method in available()} | VARIANTS


def methods(ratio: float, tokenizer: Any) -> dict[str, Compress]:
    """The exact cache, and every method at `ratio`, by name."""

    def compress(fields: dict[str, Any]) -> Compress:
        return lambda context: context.compress(ratio=ratio, tokenizer=tokenizer, **fields)

    return {"exact": lambda context: context.exact.clone()} | {
        name: compress(given) for name, given in options().items()
    }


class Reading:
    """The contexts of one seed, read once."""

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        self._model, self._seed = model, seed
        self._needles, self._stretch = needle_sample(tokenizer, seed), drift_sample(tokenizer, seed)
        self._contexts = [Context(model, sample.context.to(model.device)) for sample in (self._needles, self._stretch)]
        self._expected = next_token(model, self._contexts[1].exact.clone(), self._stretch)

    def score(self, name: str, compress: Compress) -> dict[str, Any]:
        """A method's mean loss over the needles, its drift, and the entries it kept of the first context."""
        model, cache = self._model, compress(self._contexts[0])
        kept = stored_tokens(cache)
        loss = needle_loss(model, cache, self._needles.asked)
        moved = drift(self._expected, next_token(model, compress(self._contexts[1]), self._stretch))
        return {"method": name, "seed": self._seed, "needle": loss, "drift": moved, "kept": kept}


def results_table(records: list[dict[str, Any]], title: str) -> Table:
    """One line a method, with the difference to WildCat and its interval for each measure."""
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for measure in MEASURES:
        table.add_column(measure, justify="right")
        table.add_column(f"to {BASELINE} (95 %)", justify="right", no_wrap=True)
    table.add_column("kept", justify="right")
    by_method: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_method.setdefault(record["method"], []).append(record)
    ours = by_method[BASELINE]
    for name, own in by_method.items():
        cells = []
        for measure, digits in MEASURES.items():
            values = np.array([record[measure] for record in own])
            difference = values - [record[measure] for record in ours]
            cells += [f"{values.mean():.{digits}f}", "" if name == BASELINE else _interval(difference, digits)]
        table.add_row(name, *cells, f"{np.mean([record['kept'] for record in own]):.0f}")
    return table


def _interval(difference: np.ndarray, digits: int) -> str:
    """A mean difference with its bootstrap interval; "tie" where the interval crosses 0."""
    mean = f"{difference.mean():+.{digits}f}"
    if len(difference) < 3 or np.ptp(difference) == 0:
        return mean
    interval = scipy.stats.bootstrap((difference,), np.mean, rng=0).confidence_interval
    tie = ", tie" if interval.low <= 0 <= interval.high else ""
    return f"{mean} ({interval.low:+.{digits}f} to {interval.high:+.{digits}f}{tie})"


def main(
    samples: Annotated[int, typer.Option(min=1, help="stretches of essays for each measure")] = 20,
    ratio: Annotated[list[float] | None, typer.Option(help="share of the tokens to keep, repeatable")] = None,
    model: Annotated[
        str | None, typer.Option(help="hub id, folder or GGUF file; the default model if left out")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="a method to run, repeatable; wildcat always runs")] = None,
    output: Annotated[Path | None, typer.Option(help="file for one JSON line a method and sample")] = None,
) -> None:
    """Compare methods by what they still know of a text that was compressed before it was asked about."""
    ratios = ratio or [0.25, 0.1]
    names = ["exact", *options()]
    if unknown := sorted(set(only or ()) - set(names)):
        raise typer.BadParameter(f"only={unknown[0]!r}: there are {', '.join(names)}")
    loaded, tokenizer = load_model(model)
    chosen = {share: methods(share, tokenizer) for share in ratios}
    records: dict[float, list[dict[str, Any]]] = {share: [] for share in ratios}
    columns = ("samples", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for seed in progress.track(range(samples)):
            reading = Reading(loaded, tokenizer, seed)
            for share, every in chosen.items():
                for name, compress in every.items():
                    if only and name not in {*only, BASELINE}:
                        continue
                    records[share].append(reading.score(name, compress))
                    if output:
                        with output.open("a") as lines:
                            lines.write(json.dumps({"ratio": share, **records[share][-1]}) + "\n")
    for share in ratios:
        title = f"{share:.0%} kept, context compressed before the question, {samples} samples"
        console = Console()
        console = console if console.is_terminal else Console(width=_WIDTH)
        console.print(results_table(records[share], title))


if __name__ == "__main__":
    typer.run(main)
