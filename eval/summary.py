"""The numbers of a run: one row a task, group, metric, budget and method."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from eval.cells import BASELINE, EXACT
from eval.statistics import average_difference

EVERY = "all"  # the group of all samples of a task
FACETS = ("length", "form")  # other groups: the samples alike in one of these, such as "length 1000"

# Benchmarks that are reported as the mean of their tasks, by how the names of the tasks start.
AVERAGES = {"longbench average": ("longbench_",), "ruler average": ("niah_", "ruler_")}
_AVERAGE = {"average": {"higher_is_better": True, "digits": 1, "unit": "points of 100"}}

_MOST_VALUES = 12  # more are lengths that samples happen to have, not lengths that were asked for


@dataclass(frozen=True)
class Budget:
    """The budget of a compressed cell; neither is set in a run of the exact cache alone.

    Attributes:
        ratio: share of the tokens, or None.
        max_tokens: most tokens, or None.
    """

    ratio: float | None = None
    max_tokens: int | None = None

    def __str__(self) -> str:
        if self.ratio is not None:
            return f"ratio {self.ratio:g}"
        return f"{self.max_tokens:,} tokens" if self.max_tokens is not None else "no compression"

    @property
    def slug(self) -> str:
        """The budget's name in file names."""
        if self.ratio is not None:
            return f"{self.ratio:g}"
        return f"{self.max_tokens}-tokens" if self.max_tokens is not None else "exact"


def find_budgets(records: Sequence[dict[str, Any]]) -> list[Budget]:
    """List the budgets of a run, shares first, the largest first."""
    found = {Budget(record["ratio"], record["max_tokens"]) for record in records if record["method"] != EXACT}
    return sorted(found, key=lambda budget: (-(budget.ratio or 0), -(budget.max_tokens or 0)))


def find_methods(manifest: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
    """List the methods that were measured, in the manifest's order."""
    measured = dict.fromkeys(record["method"] for record in records)
    return [method for method in dict.fromkeys([*manifest["methods"], *measured]) if method in measured]


def baseline_of(manifest: dict[str, Any]) -> str:
    """Name the method that all others are compared with: the configuration's, or WildCat."""
    return (manifest.get("config") or {}).get("baseline") or BASELINE


def describe(manifest: dict[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """Look up the metrics of a task or an average, in order: direction, unit and digits."""
    return _AVERAGE if task in AVERAGES else manifest["metrics"][task]


def score_frame(manifest: dict[str, Any], records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Make a frame of every score of a run.

    Args:
        manifest: description of the run; metrics that it does not name are left out.
        records: records of the run. Where a cell has the same sample twice, the later one counts.

    Returns:
        One row a record and metric: task, metric, method, budget ("" for the exact cache), sample (what pairs are made
        by), score (NaN where it is missing or null), the facets length, form and depth, kept (the share of the tokens
        seen), stored_tokens, seen_tokens, memory_bytes (NaN where a record has none), held (memory_bytes over the exact
        cache's on the same sample; NaN without either), and `seconds_` and what they went by.

    Raises:
        ValueError: no records, or a task that the manifest does not describe.
    """
    if not records:
        raise ValueError("records=[]: the run has measured nothing yet, so there is nothing to report")
    rows, shares = {}, held_shares(records)
    for record, held in zip(records, shares, strict=True):
        task, facets = record["task"], record.get("facets") or {}
        if task not in manifest["metrics"]:
            raise ValueError(f"manifest: no metrics of the task {task!r}; there are {', '.join(manifest['metrics'])}")
        exact = record["method"] == EXACT
        budget = "" if exact else str(Budget(record["ratio"], record["max_tokens"]))
        sample = json.dumps([record["seed"], record["sample"], record["prompt_hash"], facets], sort_keys=True)
        seen, stored = record["seen_tokens"], record["stored_tokens"]
        for metric in manifest["metrics"][task]:
            if metric not in record["scores"]:
                continue
            score = record["scores"][metric]
            rows[task, metric, record["method"], budget, sample] = {
                "task": task,
                "metric": metric,
                "method": record["method"],
                "budget": budget,
                "sample": sample,
                "score": math.nan if score is None else float(score),
                "length": facets.get("length"),
                "form": facets.get("form"),
                "depth": facets.get("depth"),
                "kept": stored / seen if seen else math.nan,
                "stored_tokens": stored,
                "seen_tokens": seen,
                "memory_bytes": record.get("memory_bytes", math.nan),
                "held": held,
                **{f"seconds_{what}": seconds for what, seconds in (record.get("seconds") or {}).items()},
            }
    if not rows:
        raise ValueError("records: none has a score of a metric that the manifest describes")
    frame = pd.DataFrame(list(rows.values()))
    frame["length"] = pd.Series([row["length"] for row in rows.values()], dtype=object)  # 1000 stays 1000, not 1000.0
    return frame


def held_shares(records: Sequence[dict[str, Any]]) -> list[float]:
    """Divide each record's bytes by the exact cache's on the same sample; NaN where one of them is missing."""

    def sample(record: dict[str, Any]) -> tuple[Any, ...]:
        return record["task"], record["seed"], record.get("sample"), record["prompt_hash"]

    exact = {sample(record): record.get("memory_bytes") for record in records if record["method"] == EXACT}
    return [(record.get("memory_bytes") or math.nan) / (exact.get(sample(record)) or math.nan) for record in records]


def summarise(manifest: dict[str, Any], records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Summarise a run in tidy rows.

    A task with samples of several lengths or forms has a group for each of them beside the group "all". LongBench and
    RULER, where more than one of their tasks is there, are tasks of their own: the mean of the tasks' first metrics,
    times 100, without the methods that lack one of the tasks.

    Args:
        manifest: description of the run.
        records: records of the run.

    Returns:
        One row a task, group, metric, budget and method, and the exact cache at every budget. `mean`, `lowest` and
        `highest` are of the scores that are finite; `n` counts them, `not_finite` the others. `difference`, `low`,
        `high`, `tie`: to the baseline at the same budget, as in `eval.statistics.Difference`, over `pairs` samples,
        without `pairs_left_out`; missing where there is no baseline, and in its own row. `kept`, `stored_tokens`,
        `seen_tokens`, `memory_bytes`, `held` and the `seconds_` columns are means over the samples.

    Raises:
        ValueError: no records, or a task that the manifest does not describe.
    """
    frame, baseline = score_frame(manifest, records), baseline_of(manifest)
    # In the order of a record that has them all: the exact cache has nothing to compress.
    times = list(max((record.get("seconds") or {} for record in records), key=len))
    seconds = sorted(frame.filter(regex="^seconds_"), key=lambda name: _place(name.removeprefix("seconds_"), times))
    cells = dict(iter(frame.groupby(["task", "metric", "budget", "method"], sort=False)))
    rows = []
    for task, members in measured_tasks(manifest, frame):
        for metric, own, group in _measures(manifest, task, members, frame):
            for budget in find_budgets(records) or [Budget()]:
                of = {
                    method: _strata(cells, members, own, "" if method == EXACT else str(budget), method, group)
                    for method in find_methods(manifest, records)
                }
                for method, strata in of.items():
                    if not strata:
                        continue
                    rows.append(
                        {
                            "task": task,
                            "group": group,
                            "metric": metric,
                            "budget": str(budget),
                            "ratio": budget.ratio,
                            "max_tokens": budget.max_tokens,
                            "method": method,
                            **_means(
                                strata, ["kept", "stored_tokens", "seen_tokens", "memory_bytes", "held", *seconds]
                            ),
                            **_scores(strata, of.get(baseline) if method != baseline else None),
                        }
                    )
                    if task in AVERAGES:
                        for field in ("mean", "lowest", "highest", "difference", "low", "high"):
                            rows[-1][field] *= 100
    table = pd.DataFrame(rows)
    order = ["task", "group", "metric", "budget", "ratio", "max_tokens", "method", "mean", "lowest", "highest"]
    order += ["n", "not_finite", "difference", "low", "high", "pairs", "pairs_left_out", "tie", "kept"]
    order += ["stored_tokens", "seen_tokens", "memory_bytes", "held"]
    types = {"ratio": "float64", "max_tokens": "Int64", "tie": "boolean"}
    return table[order + seconds].astype(types)


def measured_tasks(manifest: dict[str, Any], frame: pd.DataFrame) -> Iterator[tuple[str, list[str]]]:
    """List each task alone, then the averages with their tasks."""
    measured = [task for task in manifest["metrics"] if task in set(frame["task"])]
    yield from ((task, [task]) for task in measured)
    for name, starts in AVERAGES.items():
        members = [
            task
            for task in measured
            if task.startswith(starts) and next(iter(manifest["metrics"][task].values()))["higher_is_better"]
        ]
        if len(members) > 1:
            yield name, members


def _measures(
    manifest: dict[str, Any], task: str, members: list[str], frame: pd.DataFrame
) -> Iterator[tuple[str, list[str], str]]:
    """List a task's metrics, by name in it and in its members, for each group."""
    groups = [f"{facet} {value}" for facet in FACETS for value in _values(frame, members, facet)]
    for metric in describe(manifest, task):
        own = [metric] if task not in AVERAGES else [next(iter(manifest["metrics"][member])) for member in members]
        yield from ((metric, own, group) for group in [EVERY, *groups])


def _values(frame: pd.DataFrame, tasks: list[str], facet: str) -> list[Any]:
    """List the values of a facet that all of the tasks have, if there are several, the smallest first."""
    shared = set.intersection(*(set(frame.loc[frame["task"] == task, facet].dropna()) for task in tasks))
    if not 1 < len(shared) <= _MOST_VALUES:
        return []
    return sorted(shared, key=lambda value: (isinstance(value, str), value))


def _strata(
    cells: dict[Any, pd.DataFrame], tasks: list[str], metrics: list[str], budget: str, method: str, group: str
) -> list[pd.DataFrame]:
    """Collect a method's scores in each of the tasks; nothing where it lacks one."""
    strata = []
    for task, metric in zip(tasks, metrics, strict=True):
        cell = cells.get((task, metric, budget, method))
        if cell is not None and group != EVERY:
            facet, _, _ = group.partition(" ")
            cell = cell[[f"{facet} {value}" == group for value in cell[facet]]]
        if cell is None or cell.empty:
            return []
        strata.append(cell)
    return strata


def _means(strata: list[pd.DataFrame], columns: list[str]) -> dict[str, float]:
    """Average the tasks' means."""
    return {column: sum(cell[column].mean() for cell in strata) / len(strata) for column in columns}


def _scores(strata: list[pd.DataFrame], baseline: list[pd.DataFrame] | None) -> dict[str, Any]:
    """Summarise a method's scores, and their difference to the baseline's."""
    finite = [cell.loc[cell["score"].map(math.isfinite), "score"] for cell in strata]
    n = sum(map(len, finite))
    row = {
        "mean": sum(scores.mean() for scores in finite) / len(finite),
        "lowest": min((scores.min() for scores in finite if len(scores)), default=math.nan),
        "highest": max((scores.max() for scores in finite if len(scores)), default=math.nan),
        "n": n,
        "not_finite": sum(map(len, strata)) - n,
        "difference": math.nan,
        "low": math.nan,
        "high": math.nan,
        "pairs": 0,
        "pairs_left_out": 0,
        "tie": None,
    }
    if baseline:
        found = average_difference(
            [(_by_sample(own), _by_sample(theirs)) for own, theirs in zip(strata, baseline, strict=True)]
        )
        row |= {"difference": found.mean, "pairs": found.n, "pairs_left_out": found.left_out}
        if found.low is not None:
            row |= {"low": found.low, "high": found.high, "tie": found.tie}
    return row


def _by_sample(cell: pd.DataFrame) -> dict[Any, float]:
    return dict(zip(cell["sample"], cell["score"], strict=True))


def _place(name: str, names: list[str]) -> int:
    """Find a name's place among others; the end if it is not there."""
    return names.index(name) if name in names else len(names)
