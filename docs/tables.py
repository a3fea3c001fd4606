"""The tables of README.md and docs/ that are made of records in results/.

    python -m docs.tables           # writes them into the pages
    python -m docs.tables --check   # writes nothing; fails if a page shows something else

A page says where a table goes, and which one, by two comments: `<!-- table: choices -->` and `<!-- /table -->`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from eval.cells import EXACT
from eval.kvpress.table import tables as comparison_tables
from eval.records import Folder
from eval.statistics import average_difference
from eval.summary import held_shares

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"(<!-- table: (\w+) -->\n\n).*?(\n\n<!-- /table -->)", re.DOTALL)

Row = tuple[str, ...]
Sample = dict[str, Any]


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not up to date")
    check = parser.parse_args().check
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            if check:
                sys.exit(f"{page}: a table differs from its records; run: python -m docs.tables")
            page.write_text(new, encoding="utf-8")
            print(page)


def filled(text: str) -> str:
    """Put every table of a page in its place.

    Raises:
        KeyError: a page names a table that there is not.
    """
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}{place[3]}", text)


# Choices of a user, and their figures


@dataclass(frozen=True)
class Choice:
    """A row of the table of choices.

    Attributes:
        call: the code that makes it.
        about: what it is for.
        method: name of its cell in results/eval/first_page.
        ratio: share of the tokens that its cell keeps.
        contender: its name in results/benchmarks/choices.json.
    """

    call: str
    about: str
    method: str
    ratio: float | None
    contender: str


CHOICES = (
    Choice("`DynamicCache`", "all tokens", EXACT, None, "DynamicCache"),
    Choice('`preset="bytes_30"`', "all tokens, 4 bits", "quantised_4bit", 1.0, "bytes_30"),
    Choice("**the default**", "half of the tokens, 4 bits", "default_4bit", 0.5, "default"),
    Choice('`preset="bytes_9"`', "a quarter, 4 bits", "default_4bit", 0.25, "bytes_9"),
    Choice('`preset="bytes_5"`', "an eighth, 4 bits: the gist", "default_4bit", 0.125, "bytes_5"),
    Choice(
        "`reads=2, ratio=0.25, bits=4`",
        "a quarter, 4 bits, read twice",
        "two readings_4bit",
        0.25,
        "two readings, bytes_9",
    ),
    Choice('`preset="published"`', "a quarter, the paper's method", "published", 0.25, "published"),
)
FIRST_PAGE = RESULTS / "eval" / "first_page"
FACTS = 3  # asked for in each text of the lookups
SPEED = RESULTS / "benchmarks" / "choices" / "choices.json"


def choices() -> str:
    """Tabulate bytes, facts found, drift and time of each choice."""
    samples = _samples(FIRST_PAGE)
    texts = sum(sample["task"] == "lookup" for sample in _of(samples, EXACT, None))
    rows = []
    for choice in CHOICES:
        own = _of(samples, choice.method, choice.ratio)
        found = FACTS * sum(sample["scores"]["exact_match"] for sample in own if sample["task"] == "lookup")
        drift = statistics.fmean(sample["scores"]["kl"] for sample in own if sample["task"] == "drift")
        reading, step = (_seconds(choice.contender, name) for name in ("prefill_seconds", "seconds_per_step"))
        rows.append(
            (
                choice.call,
                choice.about,
                f"{100 * _share(own, samples):.0f} %",
                f"{found:.0f}",
                f"{drift:.3f}",
                f"{reading:.0f} s",
                f"{1 / step:.1f}",
            )
        )
    header = ("cache", "keeps", "bytes", f"facts found, of {FACTS * texts}", "drift", "prefill", "tokens/s")
    return _table(header, rows, words=2)


def _seconds(contender: str, quantity: str) -> float:
    """Find the median of a quantity that was timed."""
    records = json.loads(SPEED.read_text(encoding="utf-8"))["records"]
    (found,) = [r for r in records if (r["quantity"], r["labels"]["contender"]) == (quantity, contender)]
    return statistics.median(found["samples"])


# All methods

# Runs on the same samples. The first has WildCat, which the others are held against.
SMOKE = tuple(RESULTS / "eval" / name for name in ("smoke_query_wildcat", "smoke", "smoke_later"))
HELD = RESULTS / "bytes" / "held.json"
_COLUMNS = (
    ("needle", "nll", 2),
    ("needle", "exact_match", 2),
    ("drift", "kl", 3),
    ("attention_error", "error", 2),
    ("niah_single_1", "score", 2),
    ("niah_single_1", "nll", 2),
)


def all_methods(ratio: float) -> str:
    """Tabulate every method of the smoke runs at a ratio, with verdicts against WildCat."""
    rows: dict[str, Row] = {}
    base = _of(_samples(SMOKE[0]), "wildcat", ratio)
    for run in SMOKE:
        manifest, samples = Folder(run).manifest, _samples(run)
        for method in manifest["methods"]:
            if method not in rows:
                own = _of(samples, method, None if method == EXACT else ratio)
                rows[method] = (_named(method), _held(method, ratio, own, samples), *_cells(manifest, own, base))
    header = ("method", "bytes", "needle", "found", "drift", "error", "RULER found", "RULER")
    return _table(header, list(rows.values()), words=1)


def _named(method: str) -> str:
    name, comma, more = method.partition(",")
    return "exact cache" if method == EXACT else f"`{name}`{comma}{more}"


def _cells(manifest: dict[str, Any], own: Sequence[Sample], base: Sequence[Sample]) -> list[str]:
    """Write the scores of a method, each with its verdict."""
    cells = []
    for task, metric, digits in _COLUMNS:
        mine, theirs = (_scores(samples, task, metric) for samples in (own, base))
        mark = ""
        if own[0]["method"] != "wildcat":
            mark = f" {_verdict(mine, theirs, manifest['metrics'][task][metric]['higher_is_better'])}"
        cells.append(f"{statistics.fmean(mine.values()):.{digits}f}{mark}")
    return cells


def _held(method: str, ratio: float, own: Sequence[Sample], samples: Sequence[Sample]) -> str:
    """Write the share of the bytes: of the samples, or of a text of the same length where a run has none."""
    if method == EXACT:
        return "100 %"
    if any(sample.get("memory_bytes") for sample in own):
        return f"{100 * _share(own, samples):.0f} %"
    share = json.loads(HELD.read_text(encoding="utf-8"))["caches"][f"{method}, {ratio}"]["share"]
    return f"{100 * share:.0f} %"


def _verdict(mine: dict[int, float], theirs: dict[int, float], higher_is_better: bool) -> str:
    difference = average_difference([(mine, theirs)])
    if not difference.finding:
        return "="
    return "▲" if (difference.mean > 0) == higher_is_better else "▼"


# Beside kvpress

KVPRESS = RESULTS / "comparison" / "kvpress"
UNFINISHED = "**This run has not finished**: both sides run, and so few texts decide nothing."


def kvpress() -> str:
    """Write the tables of every model that was measured beside kvpress, each below its name and its record."""
    return "\n\n".join(_beside(path.parent) for path in sorted(KVPRESS.glob("*/run.json")))


def _beside(folder: Path) -> str:
    run = Folder(folder)
    parts = [f"### {run.manifest['model']['name']}", f"Record: `{folder.relative_to(ROOT)}`."]
    parts += [] if run.manifest["finished"] else [UNFINISHED]
    tables = re.sub(r"^### (.+)$", r"**\1**", comparison_tables(run.records()), flags=re.MULTILINE)
    return "\n\n".join([*parts, tables.strip()])


# Transformers' quantised caches

TRANSFORMERS = RESULTS / "eval" / "comparison_transformers"


def transformers() -> str:
    """Tabulate Transformers' quantised caches beside the default."""
    manifest, samples = Folder(TRANSFORMERS).manifest, _samples(TRANSFORMERS)
    cells = dict.fromkeys((sample["method"], sample["ratio"]) for sample in samples)
    rows = []
    for method, ratio in sorted(cells, key=lambda cell: manifest["methods"].index(cell[0])):
        own = _of(samples, method, ratio)
        needle, drift = (_scores(own, *of).values() for of in (("needle_4", "nll"), ("drift", "kl")))
        name = method if ratio in (None, 1.0) else f"{method}, {ratio:g}"
        share = f"{100 * _share(own, samples):.1f} %"
        rows.append((name, share, f"{statistics.fmean(needle):.2f}", f"{statistics.fmean(drift):.3f}"))
    return _table(("cache", "bytes", "needle", "drift"), rows, words=1)


TABLES: dict[str, Callable[[], str]] = {
    "choices": choices,
    "transformers": transformers,
    "all_methods_quarter": lambda: all_methods(0.25),
    "all_methods_tenth": lambda: all_methods(0.1),
    "kvpress": kvpress,
}


# Helpers


@cache
def _samples(folder: Path) -> Sequence[Sample]:
    return Folder(folder).records()


def _of(samples: Sequence[Sample], method: str, ratio: float | None) -> list[Sample]:
    """Pick the samples of a cell."""
    return [sample for sample in samples if (sample["method"], sample["ratio"]) == (method, ratio)]


def _scores(samples: Sequence[Sample], task: str, metric: str) -> dict[int, float]:
    return {sample["sample"]: sample["scores"][metric] for sample in samples if sample["task"] == task}


def _share(own: Sequence[Sample], samples: Sequence[Sample]) -> float:
    """Average the bytes of a cell over the exact cache's on the same samples, where they are recorded."""
    shares = held_shares([*_of(samples, EXACT, None), *own])[-len(own) :]
    return statistics.fmean(share for share in shares if not math.isnan(share))


def _table(header: Row, rows: Sequence[Row], words: int) -> str:
    """Write a table, the first columns on the left and the others on the right."""
    rule = ["---" if column < words else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


if __name__ == "__main__":
    main()
