"""The numbers of a run: a tidy summary, and the tables that are read.

`summarise` says what was measured, one row a task, group, metric, budget and method. `make_tables` lays it out, and
`markdown` writes one of the tables down; the HTML report writes the same tables its own way.
"""

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

# Benchmarks that are reported as the mean of their tasks, by how the names of the tasks start.
AVERAGES = {"longbench average": ("longbench_",), "ruler average": ("niah_", "ruler_")}
_AVERAGE = {"average": {"higher_is_better": True, "digits": 1, "unit": "points of 100"}}

_MOST_LENGTHS = 12  # more are lengths that samples happen to have, not lengths that were asked for
_SYMBOLS = {"better": "▲", "worse": "▼", "tie": "=", "": ""}
_NOTHING = "–"


@dataclass(frozen=True)
class Budget:
    """What a compressed cell may keep; neither is set where a run has nothing but the exact cache.

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
        """As it is called in file names."""
        if self.ratio is not None:
            return f"{self.ratio:g}"
        return f"{self.max_tokens}-tokens" if self.max_tokens is not None else "exact"


@dataclass(frozen=True)
class TableCell:
    """One cell of a table.

    Attributes:
        text: all that it says.
        mark: what it says about the method beside WildCat: "better", "worse", "tie", or "".
        best: whether it is the best of the compressed methods, as far as it is printed.
        order: what to sort a column by; None for cells that go last.
    """

    text: str
    mark: str = ""
    best: bool = False
    order: float | str | None = None


@dataclass(frozen=True)
class Table:
    """A table to read; the first cell of each row is the method.

    Attributes:
        task: that it is about; None for the overview of all.
        budget: of the compressed methods.
        title: what was measured, on what, and how many samples.
        notes: units, and what is better.
        header: one cell a column.
        rows: in the manifest's order of methods.
    """

    task: str | None
    budget: Budget
    title: str
    notes: str
    header: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]


def find_budgets(records: Sequence[dict[str, Any]]) -> list[Budget]:
    """The budgets of a run, shares first, the largest first."""
    found = {Budget(record["ratio"], record["max_tokens"]) for record in records if record["method"] != EXACT}
    return sorted(found, key=lambda budget: (-(budget.ratio or 0), -(budget.max_tokens or 0)))


def find_methods(manifest: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
    """The methods that were measured, in the manifest's order."""
    measured = dict.fromkeys(record["method"] for record in records)
    return [method for method in dict.fromkeys([*manifest["methods"], *measured]) if method in measured]


def describe(manifest: dict[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """The metrics of a task or of an average, the first one first: direction, unit and digits of each."""
    return _AVERAGE if task in AVERAGES else manifest["metrics"][task]


def unit_and_direction(metric: dict[str, Any]) -> str:
    """A metric's unit and direction, as a heading or an axis says them."""
    direction = f"{'higher' if metric['higher_is_better'] else 'lower'} is better"
    return f"{metric['unit']}, {direction}" if metric.get("unit") else direction


def score_frame(manifest: dict[str, Any], records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Every score of a run.

    Args:
        manifest: of the run; metrics that it does not describe are left out.
        records: of the run. Where a cell has the same sample twice, the later one counts.

    Returns:
        One row a record and metric: task, metric, method, budget ("" for the exact cache), sample (what pairs are made
        by), score (NaN where it is missing or null), the facets length and depth, kept (the share of the tokens seen),
        stored_tokens, seen_tokens, and `seconds_` and what they went by.

    Raises:
        ValueError: no records, or a task that the manifest does not describe.
    """
    if not records:
        raise ValueError("records=[]: the run has measured nothing yet, so there is nothing to report")
    rows = {}
    for record in records:
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
                "depth": facets.get("depth"),
                "kept": stored / seen if seen else math.nan,
                "stored_tokens": stored,
                "seen_tokens": seen,
                **{f"seconds_{what}": seconds for what, seconds in (record.get("seconds") or {}).items()},
            }
    if not rows:
        raise ValueError("records: none has a score of a metric that the manifest describes")
    frame = pd.DataFrame(list(rows.values()))
    frame["length"] = pd.Series([row["length"] for row in rows.values()], dtype=object)  # 1000 stays 1000, not 1000.0
    return frame


def summarise(manifest: dict[str, Any], records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """What was measured, tidy.

    A task with samples of several lengths has a group for each of them beside the group "all". LongBench and RULER,
    where more than one of their tasks is there, are tasks of their own: the mean of the tasks' first metrics, times
    100, without the methods that lack one of the tasks.

    Args:
        manifest: of the run.
        records: of the run.

    Returns:
        One row a task, group, metric, budget and method, and the exact cache at every budget. `mean` is over the scores
        that are finite; `n` counts them, `not_finite` the others. `difference`, `low`, `high`, `tie`: to WildCat at the
        same budget, as in `eval.statistics.Difference`, over `pairs` samples, without `pairs_left_out`; missing where
        there is no WildCat, and in its own row. `kept`, `stored_tokens`, `seen_tokens` and the `seconds_` columns are
        means over the samples.

    Raises:
        ValueError: no records, or a task that the manifest does not describe.
    """
    frame = score_frame(manifest, records)
    # In the order of a record that has them all: the exact cache has nothing to compress.
    times = list(max((record.get("seconds") or {} for record in records), key=len))
    seconds = sorted(frame.filter(regex="^seconds_"), key=lambda name: _place(name.removeprefix("seconds_"), times))
    cells = dict(iter(frame.groupby(["task", "metric", "budget", "method"], sort=False)))
    rows = []
    for task, members in _tasks(manifest, frame):
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
                            **_means(strata, ["kept", "stored_tokens", "seen_tokens", *seconds]),
                            **_scores(strata, of.get(BASELINE) if method != BASELINE else None),
                        }
                    )
                    if task in AVERAGES:
                        for field in ("mean", "difference", "low", "high"):
                            rows[-1][field] *= 100
    table = pd.DataFrame(rows)
    order = ["task", "group", "metric", "budget", "ratio", "max_tokens", "method", "mean", "n", "not_finite"]
    order += ["difference", "low", "high", "pairs", "pairs_left_out", "tie", "kept", "stored_tokens", "seen_tokens"]
    types = {"ratio": "float64", "max_tokens": "Int64", "tie": "boolean"}
    return table[order + seconds].astype(types)


def _tasks(manifest: dict[str, Any], frame: pd.DataFrame) -> Iterator[tuple[str, list[str]]]:
    """Each task alone, then the averages with the tasks that they are of."""
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
    """The metrics of a task by what they are called in it and in its members, in each group."""
    groups = [f"length {length}" for length in _lengths(frame, members)]
    for metric in describe(manifest, task):
        own = [metric] if task not in AVERAGES else [next(iter(manifest["metrics"][member])) for member in members]
        yield from ((metric, own, group) for group in [EVERY, *groups])


def _lengths(frame: pd.DataFrame, tasks: list[str]) -> list[Any]:
    """The lengths that all of the tasks have, if they are several, the shortest first."""
    shared = set.intersection(*(set(frame.loc[frame["task"] == task, "length"].dropna()) for task in tasks))
    if not 1 < len(shared) <= _MOST_LENGTHS:
        return []
    return sorted(shared, key=lambda length: (isinstance(length, str), length))


def _strata(
    cells: dict[Any, pd.DataFrame], tasks: list[str], metrics: list[str], budget: str, method: str, group: str
) -> list[pd.DataFrame]:
    """A method's scores in each of the tasks; nothing where it lacks one of them."""
    strata = []
    for task, metric in zip(tasks, metrics, strict=True):
        cell = cells.get((task, metric, budget, method))
        if cell is not None and group != EVERY:
            cell = cell[[f"length {length}" == group for length in cell["length"]]]
        if cell is None or cell.empty:
            return []
        strata.append(cell)
    return strata


def _means(strata: list[pd.DataFrame], columns: list[str]) -> dict[str, float]:
    """Means of the tasks' means."""
    return {column: sum(cell[column].mean() for cell in strata) / len(strata) for column in columns}


def _scores(strata: list[pd.DataFrame], baseline: list[pd.DataFrame] | None) -> dict[str, Any]:
    """What the summary says of a method's scores, and of their difference to the baseline's."""
    finite = [cell.loc[cell["score"].map(math.isfinite), "score"] for cell in strata]
    n = sum(map(len, finite))
    row = {
        "mean": sum(scores.mean() for scores in finite) / len(finite),
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


def make_tables(manifest: dict[str, Any], summary: pd.DataFrame) -> list[Table]:
    """An overview of each budget, then for each task and budget a table, and one by length for each metric.

    Args:
        manifest: of the run.
        summary: from `summarise`.
    """
    parts = list(summary.groupby(["ratio", "max_tokens"], sort=False, dropna=False))
    budgets = [
        (Budget(None if pd.isna(ratio) else ratio, None if pd.isna(most) else int(most)), part)
        for (ratio, most), part in parts
    ]
    tables = [_overview(manifest, budget, part[part["group"] == EVERY]) for budget, part in budgets]
    for task in summary["task"].unique():
        for budget, part in budgets:
            rows = part[part["task"] == task]
            if rows.empty:
                continue
            tables.append(_task_table(manifest, task, budget, rows[rows["group"] == EVERY]))
            if rows["group"].nunique() > 1:
                tables += [
                    _length_table(manifest, task, metric, budget, rows[rows["metric"] == metric])
                    for metric in rows["metric"].unique()
                ]
    return tables


def markdown(table: Table) -> str:
    """The table with its heading, as GitHub's Markdown."""

    def written(cell: TableCell, column: int) -> str:
        text = escape_markdown(cell.text)
        return f"`{text}`" if column == 0 else f"**{text}**" if cell.best else text

    lines = [[escape_markdown(name) for name in table.header]]
    lines += [["---", *["---:"] * (len(table.header) - 1)]]
    lines += [[written(cell, column) for column, cell in enumerate(row)] for row in table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {escape_markdown(table.title)}\n\n{escape_markdown(table.notes)}\n\n{body}\n"


def escape_markdown(text: str) -> str:
    """Text that can neither end a cell or a line, nor be HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _overview(manifest: dict[str, Any], budget: Budget, part: pd.DataFrame) -> Table:
    """The first metric of every task, and how often each method is better or worse than WildCat."""
    tasks = list(part["task"].unique())
    metrics = {task: _first(manifest, part, task) for task in tasks}
    firsts = {task: part[(part["task"] == task) & (part["metric"] == metrics[task])] for task in tasks}
    entries = {task: {entry["method"]: entry for entry in firsts[task].to_dict("records")} for task in tasks}
    compared = part["difference"].notna().any()
    rows = []
    for method in _methods(manifest, part):
        cells, marks = [], []
        for task in tasks:
            entry, metric = entries[task].get(method), describe(manifest, task)[metrics[task]]
            if entry is None:
                cells.append(TableCell(_NOTHING))
                continue
            mark = _mark(entry, metric)
            cell = _mean_cell(entry, metric, entries[task].values())
            text = f"{cell.text} {_SYMBOLS[mark]}".strip()
            cells.append(TableCell(text, mark, cell.best, cell.order))
            marks += [mark] if task not in AVERAGES else []
        if compared:
            cells.append(_tally(method, marks))
        rows.append((TableCell(method, order=method), *cells))
    notes = [
        f"{task}: {metrics[task]}, {unit_and_direction(describe(manifest, task)[metrics[task]])}, "
        f"n = {_samples(firsts[task])}."
        for task in tasks
    ]
    return Table(
        None,
        budget,
        f"Overview, {_setting(manifest, budget)}",
        " ".join(notes),
        (
            "method",
            *(f"{task} {_arrow(describe(manifest, task)[metrics[task]])}" for task in tasks),
            *([f"to {BASELINE}"] if compared else []),
        ),
        tuple(rows),
    )


def _tally(method: str, marks: list[str]) -> TableCell:
    """In how many tasks a method is better, worse, or neither."""
    counts = {mark: marks.count(mark) for mark in ("better", "worse", "tie")}
    if method == BASELINE or not any(counts.values()):
        return TableCell("")
    text = ", ".join(f"{count} {_SYMBOLS[mark]}" for mark, count in counts.items() if count)
    return TableCell(text, order=counts["better"] - counts["worse"])


def _task_table(manifest: dict[str, Any], task: str, budget: Budget, part: pd.DataFrame) -> Table:
    """All metrics of a task over all of its samples."""
    metrics = {name: metric for name, metric in describe(manifest, task).items() if name in set(part["metric"])}
    columns = [(f"{name} {_arrow(metric)}", part[part["metric"] == name], metric) for name, metric in metrics.items()]
    seconds = [name for name in part if name.startswith("seconds_") and part[name].notna().any()]
    extra = ["n"] if "to" in _samples(part) else []
    header, rows = _compared(manifest, part, columns)
    whole = []
    for row in rows:
        entry = part[part["method"] == row[0].text].iloc[0]
        samples = int(entry["n"] + entry["not_finite"])
        cells = [TableCell(f"{samples:,}", order=samples)] if extra else []
        cells.append(
            TableCell(
                f"{entry['kept']:.1%} ({entry['stored_tokens']:,.0f} of {entry['seen_tokens']:,.0f})",
                order=_number(entry["kept"]),
            )
        )
        if seconds:
            times = [_NOTHING if pd.isna(entry[name]) else f"{entry[name]:.2f}" for name in seconds]
            cells.append(TableCell(" + ".join(times), order=float(entry[seconds].fillna(0).sum())))
        whole.append((*row, *cells))
    kept = "kept (stored tokens of seen)"
    took = [f"seconds ({' + '.join(name.removeprefix('seconds_') for name in seconds)})"] if seconds else []
    return Table(
        task,
        budget,
        f"{task}, {_setting(manifest, budget)}, n = {_samples(part)}",
        " ".join(f"{name}: {unit_and_direction(metric)}." for name, metric in metrics.items()),
        (*header, *extra, kept, *took),
        tuple(whole),
    )


def _length_table(manifest: dict[str, Any], task: str, name: str, budget: Budget, part: pd.DataFrame) -> Table:
    """One metric of a task at every length."""
    metric = describe(manifest, task)[name]
    groups = [group for group in part["group"].unique() if group != EVERY]
    columns = [(group, part[part["group"] == group], metric) for group in groups]
    header, rows = _compared(manifest, part, columns)
    counts = [_samples(entries) for _, entries, _ in columns]
    same = len(set(counts)) == 1
    samples = f"{counts[0]} at each length" if same else f"{', '.join(counts)} at the lengths in order"
    return Table(
        task,
        budget,
        f"{task} by length: {name}, {_setting(manifest, budget)}, n = {samples}",
        f"{name}: {unit_and_direction(metric)}.",
        header,
        rows,
    )


def _compared(
    manifest: dict[str, Any], part: pd.DataFrame, columns: list[tuple[str, pd.DataFrame, dict[str, Any]]]
) -> tuple[tuple[str, ...], tuple[tuple[TableCell, ...], ...]]:
    """Header and rows with a column for each measure, and one for its difference to WildCat if there is one."""
    header, compared = ["method"], part["difference"].notna().any()
    for name, _, _ in columns:
        header += [name, f"to {BASELINE} (95 %)"] if compared else [name]
    measures = [
        ({entry["method"]: entry for entry in entries.to_dict("records")}, metric) for _, entries, metric in columns
    ]
    rows = []
    for method in _methods(manifest, part):
        cells = [TableCell(method, order=method)]
        for entries, metric in measures:
            entry = entries.get(method)
            cells.append(_mean_cell(entry, metric, entries.values()) if entry else TableCell(_NOTHING))
            if compared:
                cells.append(_difference_cell(entry, metric) if entry else TableCell(""))
        rows.append(tuple(cells))
    return tuple(header), tuple(rows)


def _mean_cell(entry: dict[str, Any], metric: dict[str, Any], entries: Any) -> TableCell:
    digits = metric["digits"]
    if not math.isfinite(entry["mean"]):
        return TableCell(f"{_NOTHING} ({entry['not_finite']} not finite)")
    means = [round(other["mean"], digits) for other in entries if other["method"] != EXACT]
    means = [mean for mean in means if math.isfinite(mean)]
    mean = round(entry["mean"], digits)
    text = f"{mean + 0.0:.{digits}f}"  # without the sign of -0.0
    if entry["not_finite"]:
        text += f" ({entry['not_finite']} not finite)"
    best = entry["method"] != EXACT and mean == (max if metric["higher_is_better"] else min)(means)
    return TableCell(text, best=best and len(means) > 1, order=entry["mean"])


def _difference_cell(entry: dict[str, Any], metric: dict[str, Any]) -> TableCell:
    if not math.isfinite(entry["difference"]):
        return TableCell("" if entry["method"] == BASELINE else "no pairs")
    digits, mark = metric["digits"], _mark(entry, metric)
    inside = ["no interval"]
    if not math.isnan(entry["low"]):
        inside = [f"{entry['low']:+.{digits}f} to {entry['high']:+.{digits}f}", *([mark] if mark else [])]
    if entry["pairs"] != entry["n"]:
        inside.append(f"{entry['pairs']} pairs")
    return TableCell(f"{entry['difference']:+.{digits}f} ({', '.join(inside)})", mark, order=entry["difference"])


def _mark(entry: dict[str, Any], metric: dict[str, Any]) -> str:
    """What the interval says; nothing without one, nor of a difference that is too small to be printed."""
    if pd.isna(entry["tie"]):
        return ""
    if entry["tie"]:
        return "tie"
    if round(entry["difference"], metric["digits"]) == 0:
        return ""
    return "better" if (entry["difference"] > 0) == metric["higher_is_better"] else "worse"


def _arrow(metric: dict[str, Any]) -> str:
    return "↑" if metric["higher_is_better"] else "↓"


def _first(manifest: dict[str, Any], part: pd.DataFrame, task: str) -> str:
    """The first metric of a task that was measured."""
    measured = set(part.loc[part["task"] == task, "metric"])
    return next(metric for metric in describe(manifest, task) if metric in measured)


def _methods(manifest: dict[str, Any], part: pd.DataFrame) -> list[str]:
    measured = list(part["method"].unique())
    return [method for method in dict.fromkeys([*manifest["methods"], *measured]) if method in measured]


def _setting(manifest: dict[str, Any], budget: Budget) -> str:
    return f"{budget}, {manifest['protocol']}, {manifest['model']['name']}"


def _samples(part: pd.DataFrame) -> str:
    """How many samples there are, with and without a finite score, and a range if not the same for all."""
    counts = part["n"] + part["not_finite"]
    low, high = int(counts.min()), int(counts.max())
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def _place(name: str, names: list[str]) -> int:
    """Where a name is among others; last if it is not."""
    return names.index(name) if name in names else len(names)


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
