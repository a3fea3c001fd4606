"""The tables of README.md and docs/ that are made of records in results/.

    python -m docs.tables           # writes them into the pages
    python -m docs.tables --check   # writes nothing; fails if a page shows something else

A page says where a table goes, and which one, by two comments: `<!-- table: choices -->` and `<!-- /table -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from eval.records import Folder
from eval.statistics import average_difference

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


# What each choice gives


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
    Choice("`DynamicCache`", "all tokens", "exact", None, "DynamicCache"),
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
SPEED = RESULTS / "benchmarks" / "choices" / "choices.json"


def choices() -> str:
    """Tabulate bytes, facts found, drift and time of each choice."""
    samples = _samples(FIRST_PAGE)
    texts = sum(sample["task"] == "lookup" for sample in _of(samples, "exact", None))
    rows = []
    for choice in CHOICES:
        own = _of(samples, choice.method, choice.ratio)
        found = 3 * sum(sample["scores"]["exact_match"] for sample in own if sample["task"] == "lookup")
        drift = statistics.fmean(sample["scores"]["kl"] for sample in own if sample["task"] == "drift")
        reading, step = (_seconds(choice.contender, name) for name in ("prefill_seconds", "seconds_per_step"))
        rows.append(
            (
                choice.call,
                choice.about,
                f"{100 * _share(own, samples):.0f} %",
                f"{found:.0f}",
                f"{drift:.3f}",
                f"{reading:.1f} s",
                f"{1 / step:.1f}",
            )
        )
    header = ("cache", "keeps", "bytes", f"facts found, of {3 * texts}", "drift", "prefill", "tokens/s")
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
                own = _of(samples, method, None if method == "exact" else ratio)
                rows[method] = (_named(method), _held(method, ratio, own, samples), *_cells(manifest, own, base))
    header = ("method", "bytes", "needle", "found", "drift", "error", "RULER found", "RULER")
    return _table(header, list(rows.values()), words=1)


def _named(method: str) -> str:
    name, *rest = method.split(",", 1)
    return "exact cache" if method == "exact" else f"`{name}`{''.join(f',{more}' for more in rest)}"


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
    if method == "exact":
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


TABLES: dict[str, Callable[[], str]] = {
    "choices": choices,
    "all_methods_quarter": lambda: all_methods(0.25),
    "all_methods_tenth": lambda: all_methods(0.1),
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
    """Divide the bytes of a cell by the exact cache's on the same samples."""
    exact = {(sample["task"], sample["sample"]): sample.get("memory_bytes") for sample in _of(samples, "exact", None)}
    held = [sample for sample in own if sample.get("memory_bytes") is not None]
    whole = sum(exact[sample["task"], sample["sample"]] for sample in held)
    return sum(sample["memory_bytes"] for sample in held) / whole


def _table(header: Row, rows: Sequence[Row], words: int) -> str:
    """Write a table, the first columns on the left and the others on the right."""
    rule = ["---" if column < words else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


if __name__ == "__main__":
    main()
