"""The tables of a run, for Markdown and HTML alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from eval.cells import EXACT
from eval.markdown import escape_markdown, markdown_table
from eval.summary import AVERAGES, EVERY, FACETS, Budget, baseline_of, describe

_SYMBOLS = {"better": "▲", "worse": "▼", "tie": "=", "": ""}
_NOTHING = "–"
_ARROWS = " ↑↓"
_MIB = 2**20
BYTES = "bytes of exact"  # a column's head


@dataclass(frozen=True)
class TableCell:
    """One cell of a table.

    Attributes:
        text: text of the cell.
        mark: verdict on the method beside the baseline: "better", "worse", "tie", or "".
        best: True if it is the best of the compressed methods, as printed.
        order: key to sort a column by; None for cells that go last.
    """

    text: str
    mark: str = ""
    best: bool = False
    order: float | str | None = None


@dataclass(frozen=True)
class Table:
    """A table to read; the first cell of each row is the method.

    Attributes:
        task: name of the task; None for the overview of all.
        budget: budget of the compressed methods.
        title: heading, with model, protocol and number of samples.
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


def unit_and_direction(metric: dict[str, Any]) -> str:
    """Write a metric's unit and direction, for a heading or an axis."""
    direction = f"{'higher' if metric['higher_is_better'] else 'lower'} is better"
    return f"{metric['unit']}, {direction}" if metric.get("unit") else direction


def make_tables(manifest: dict[str, Any], summary: pd.DataFrame) -> list[Table]:
    """Make an overview of each budget, a table of each task and budget, and one by length or form.

    Args:
        manifest: description of the run.
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
            tables += [
                _facet_table(manifest, task, metric, budget, rows[rows["metric"] == metric], facet)
                for facet in FACETS
                if rows["group"].str.startswith(f"{facet} ").any()
                for metric in rows["metric"].unique()
            ]
    return tables


def markdown(table: Table) -> str:
    """Write the table with its heading as Markdown."""

    def written(cell: TableCell, column: int) -> str:
        text = escape_markdown(cell.text)
        return f"`{text}`" if column == 0 else f"**{text}**" if cell.best else text

    rows = [[written(cell, column) for column, cell in enumerate(row)] for row in table.rows]
    right = [column > 0 for column in range(len(table.header))]
    return markdown_table(table.title, table.notes, table.header, rows, right=right)


def _overview(manifest: dict[str, Any], budget: Budget, part: pd.DataFrame) -> Table:
    """Make a table of every task's first metric, and of each method's verdicts."""
    tasks = list(part["task"].unique())
    metrics = {task: _first(manifest, part, task) for task in tasks}
    firsts = {task: part[(part["task"] == task) & (part["metric"] == metrics[task])] for task in tasks}
    entries = {task: {entry["method"]: entry for entry in firsts[task].to_dict("records")} for task in tasks}
    compared, baseline = part["difference"].notna().any(), baseline_of(manifest)
    sized = part["held"].notna().any()
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
            cells.append(_tally(marks) if method != baseline else TableCell(""))
        if sized:
            cells.append(held_cell([entries[task][method]["held"] for task in tasks if method in entries[task]]))
        rows.append((TableCell(method, order=method), *cells))
    notes = [
        f"{task}: {metrics[task]}, {unit_and_direction(describe(manifest, task)[metrics[task]])}, "
        f"n = {_samples(firsts[task])}."
        for task in tasks
    ]
    notes += [bytes_note(manifest)] if sized else []
    return Table(
        None,
        budget,
        f"Overview, {_setting(manifest, budget)}",
        " ".join(notes),
        (
            "method",
            *(f"{task} {_arrow(describe(manifest, task)[metrics[task]])}" for task in tasks),
            *([f"to {baseline}"] if compared else []),
            *([BYTES] if sized else []),
        ),
        tuple(rows),
    )


def _tally(marks: list[str]) -> TableCell:
    """Count the tasks in which a method is better, worse, or neither."""
    counts = {mark: marks.count(mark) for mark in ("better", "worse", "tie")}
    if not any(counts.values()):
        return TableCell("")
    text = ", ".join(f"{count} {_SYMBOLS[mark]}" for mark, count in counts.items() if count)
    return TableCell(text, order=counts["better"] - counts["worse"])


def _task_table(manifest: dict[str, Any], task: str, budget: Budget, part: pd.DataFrame) -> Table:
    """Make a table of all metrics of a task over all of its samples."""
    metrics = {name: metric for name, metric in describe(manifest, task).items() if name in set(part["metric"])}
    columns = [(f"{name} {_arrow(metric)}", part[part["metric"] == name], metric) for name, metric in metrics.items()]
    seconds = [name for name in part if name.startswith("seconds_") and part[name].notna().any()]
    extra = ["n"] if "to" in _samples(part) else []
    first, metric = next(iter(metrics.items()))
    worst = part[part["metric"] == first].set_index("method")["lowest" if metric["higher_is_better"] else "highest"]
    sized = part["memory_bytes"].notna().any()
    header, rows = _compared(manifest, part, columns)
    whole = []
    for row in rows:
        entry = part[part["method"] == row[0].text].iloc[0]
        samples = int(entry["n"] + entry["not_finite"])
        cells = [_worst_cell(worst.get(row[0].text), metric)]
        cells += [TableCell(f"{samples:,}", order=samples)] if extra else []
        cells.append(
            TableCell(
                f"{entry['kept']:.1%} ({entry['stored_tokens']:,.0f} of {entry['seen_tokens']:,.0f})",
                order=_number(entry["kept"]),
            )
        )
        if sized:
            cells.append(_bytes_cell(entry))
        if seconds:
            times = [_NOTHING if pd.isna(entry[name]) else f"{entry[name]:.2f}" for name in seconds]
            cells.append(TableCell(" + ".join(times), order=float(entry[seconds].fillna(0).sum())))
        whole.append((*row, *cells))
    kept = ["kept (stored tokens of seen)", *(["cache, MiB"] if sized else [])]
    took = [f"seconds ({' + '.join(name.removeprefix('seconds_') for name in seconds)})"] if seconds else []
    return Table(
        task,
        budget,
        f"{task}, {_setting(manifest, budget)}, n = {_samples(part)}",
        " ".join(
            [
                *(f"{name}: {unit_and_direction(metric)}." for name, metric in metrics.items()),
                *([bytes_note(manifest, "cache")] if part["held"].notna().any() else []),
            ]
        ),
        (*header, f"worst {first}", *extra, *kept, *took),
        tuple(whole),
    )


def _bytes_cell(entry: pd.Series) -> TableCell:
    """Write the cache's size, and its share of the exact cache's where that was measured."""
    held = entry["memory_bytes"]
    if pd.isna(held):
        return TableCell(_NOTHING)
    share = "" if pd.isna(entry["held"]) else f" ({entry['held']:.1%} of exact)"
    return TableCell(f"{held / _MIB:.1f}{share}", order=float(held))


def held_cell(shares: Sequence[float]) -> TableCell:
    """Write a share of the exact cache's bytes; from the smallest to the largest where they differ."""
    known = [share for share in shares if not pd.isna(share)]
    if not known:
        return TableCell(_NOTHING)
    ends = dict.fromkeys(f"{100 * share:.1f}" for share in (min(known), max(known)))
    return TableCell(f"{' to '.join(ends)} %", order=sum(known) / len(known))


def bytes_note(manifest: dict[str, Any], column: str = BYTES) -> str:
    """Say what bytes are shares of."""
    dtype = manifest["model"].get("dtype")
    return (
        f"{column}: all tensors that the cache holds, over the exact cache's keys and values"
        f"{f' in {dtype}' if dtype else ''} on the same samples."
    )


def _facet_table(
    manifest: dict[str, Any], task: str, name: str, budget: Budget, part: pd.DataFrame, facet: str
) -> Table:
    """Make a table of one metric at every value of a facet, such as each length."""
    metric = describe(manifest, task)[name]
    groups = [group for group in part["group"].unique() if group.startswith(f"{facet} ")]
    columns = [(group, part[part["group"] == group], metric) for group in groups]
    header, rows = _compared(manifest, part, columns)
    counts = [_samples(entries) for _, entries, _ in columns]
    same = len(set(counts)) == 1
    samples = f"{counts[0]} at each {facet}" if same else f"{', '.join(counts)} at the {facet}s in order"
    sized = part["held"].notna().any()
    if sized:
        own = part[part["group"].isin(groups)]
        rows = tuple((*row, held_cell(list(own.loc[own["method"] == row[0].text, "held"]))) for row in rows)
        header = (*header, BYTES)
    return Table(
        task,
        budget,
        f"{task} by {facet}: {name}, {_setting(manifest, budget)}, n = {samples}",
        " ".join([f"{name}: {unit_and_direction(metric)}.", *([bytes_note(manifest)] if sized else [])]),
        header,
        rows,
    )


def _compared(
    manifest: dict[str, Any], part: pd.DataFrame, columns: list[tuple[str, pd.DataFrame, dict[str, Any]]]
) -> tuple[tuple[str, ...], tuple[tuple[TableCell, ...], ...]]:
    """Make header and rows: a column for each measure, and one for its difference to the baseline."""
    header, compared, baseline = ["method"], part["difference"].notna().any(), baseline_of(manifest)
    for name, _, _ in columns:
        header += [name, f"{name.rstrip(_ARROWS)}, to {baseline} (95 %)"] if compared else [name]
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
                cells.append(_difference_cell(entry, metric) if entry and method != baseline else TableCell(""))
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


def _worst_cell(score: float | None, metric: dict[str, Any]) -> TableCell:
    """Write the worst score of a sample."""
    if score is None or not math.isfinite(score):
        return TableCell(_NOTHING)
    return TableCell(f"{score + 0.0:.{metric['digits']}f}", order=score)


def _difference_cell(entry: dict[str, Any], metric: dict[str, Any]) -> TableCell:
    if not math.isfinite(entry["difference"]):
        return TableCell("no pairs")
    digits, mark = metric["digits"], _mark(entry, metric)
    inside = ["no interval"]
    if not math.isnan(entry["low"]):
        inside = [f"{entry['low']:+.{digits}f} to {entry['high']:+.{digits}f}", *([mark] if mark else [])]
    if entry["pairs"] != entry["n"]:
        inside.append(f"{entry['pairs']} pairs")
    return TableCell(f"{entry['difference']:+.{digits}f} ({', '.join(inside)})", mark, order=entry["difference"])


def _mark(entry: dict[str, Any], metric: dict[str, Any]) -> str:
    """Read the verdict from an interval; none without one, or where the difference prints as 0."""
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
    """Find the first metric of a task that was measured."""
    measured = set(part.loc[part["task"] == task, "metric"])
    return next(metric for metric in describe(manifest, task) if metric in measured)


def _methods(manifest: dict[str, Any], part: pd.DataFrame) -> list[str]:
    measured = list(part["method"].unique())
    return [method for method in dict.fromkeys([*manifest["methods"], *measured]) if method in measured]


def _setting(manifest: dict[str, Any], budget: Budget) -> str:
    return f"{budget}, {manifest['protocol']}, {manifest['model']['name']}"


def _samples(part: pd.DataFrame) -> str:
    """Count the samples, finite or not; a range if methods have different numbers."""
    counts = part["n"] + part["not_finite"]
    low, high = int(counts.min()), int(counts.max())
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
