"""The frontier: scores over bytes held, and the best cell at each number of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from eval.cells import EXACT
from eval.statistics import Difference, Scores, average_difference
from eval.summary import AVERAGES, Budget, describe, measured_tasks, score_frame
from eval.tables import BYTES, Table, TableCell, bytes_note, held_cell, unit_and_direction

OURS = ("rereading_wildcat", "query_wildcat", "wildcat")  # compressors of this project
LEVELS = (0.2, 0.15, 0.1, 0.075, 0.05, 0.04, 0.03)

_LIKELIHOOD = "nll"  # the metric of lm-eval's tasks beside their own

Verdict = Literal["first", "tied", "behind", ""]


@dataclass(frozen=True)
class Measure:
    """Name the score of a task.

    Attributes:
        task: name of the task, or of an average of tasks.
        metric: name of the metric.
        about: its direction, unit and digits.
        scale: factor of the tasks' scores: 100 where an average counts points.
    """

    task: str
    metric: str
    about: Mapping[str, Any]
    scale: int = 1

    @property
    def higher_is_better(self) -> bool:
        """True if it is."""
        return bool(self.about["higher_is_better"])

    def written(self, value: float) -> str:
        """Write a value of the metric."""
        return f"{value:.{self.about['digits']}f}"


@dataclass(frozen=True)
class Point:
    """One cell in one task: bytes held and score.

    Attributes:
        measure: task and metric.
        family: name that the cell's variants with other bits share.
        method: name of the cell's method.
        compressor: name of the compressor; None for the exact cache.
        ratio: share of the tokens kept, or None.
        max_tokens: most tokens, or None.
        bits: bits of a stored number; None for the model's dtype.
        share: bytes over the exact cache's on the same samples.
        mean: mean score; of an average in points of 100.
        low: lower end of the paired 95 % interval to the exact cache, around its mean; None if there is none.
        high: upper end, or None.
        scores: scores of each of the tasks, by sample.
    """

    measure: Measure
    family: str
    method: str
    compressor: str | None
    ratio: float | None
    max_tokens: int | None
    bits: int | None
    share: float
    mean: float
    low: float | None
    high: float | None
    scores: Sequence[Scores] = field(repr=False)

    @property
    def plain(self) -> bool:
        """True if all tokens are kept, in fewer bits."""
        return self.ratio == 1

    @property
    def label(self) -> str:
        """Method and budget."""
        if self.compressor is None:
            return self.method
        return f"{self.method}, {Budget(self.ratio, self.max_tokens)}"


@dataclass(frozen=True)
class Best:
    """The best cells of a task within a number of bytes.

    Attributes:
        measure: task and metric.
        level: largest share of the exact cache's bytes.
        ours: best cell of this project's methods; None if none is as small.
        other: best of the other cells, plain quantisation among them; None if none is as small.
        difference: score of `ours` minus that of `other`, over the samples that both have; None without both.
        verdict: place of `ours`: "first", "tied", "behind"; "" where that is not known. It is "first" where no other
            cell is as small, and "behind" where none of ours is.
    """

    measure: Measure
    level: float
    ours: Point | None
    other: Point | None
    difference: Difference | None
    verdict: Verdict


def frontier_points(manifest: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[Point]:
    """List every cell of every task with its bytes and score, the exact cache's first in each task.

    A task is told by its first metric. Tasks that an average is of are left out beside it. The average is of their
    `nll` if all have it, which ranks cells where a small model's scores are 0 or 1. Cells whose bytes or the exact
    cache's are not known are left out.

    Args:
        manifest: description of the run.
        records: records of the run.

    Raises:
        ValueError: no records, or a task that the manifest does not describe.
    """
    frame = score_frame(manifest, records)
    tasks = list(measured_tasks(manifest, frame))
    averaged = {member for name, members in tasks if name in AVERAGES for member in members}
    groups = dict(iter(frame.groupby(["task", "metric", "method", "budget"], sort=False)))
    cells = {_cell(record): record for record in sorted(records, key=lambda record: record["method"] != EXACT)}
    points = []
    for name, members in tasks:
        if name in averaged:
            continue
        measure, metrics = _measure(manifest, name, members)
        exact: list[Scores] = []
        for cell, record in cells.items():
            keys = [(member, of, *cell) for member, of in zip(members, metrics, strict=True)]
            if not all(key in groups for key in keys):
                continue
            point = _point(measure, record, [groups[key] for key in keys], exact)
            if point is not None:
                points.append(point)
                exact = list(point.scores) if point.compressor is None else exact
    return points


def _measure(manifest: dict[str, Any], name: str, members: list[str]) -> tuple[Measure, list[str]]:
    """Choose what a task or an average is told by, and the metric of each of its members."""
    about = [manifest["metrics"][member] for member in members]
    firsts = [next(iter(metrics)) for metrics in about]
    if name not in AVERAGES:
        return Measure(name, firsts[0], about[0][firsts[0]]), firsts
    if all(_LIKELIHOOD in metrics for metrics in about):
        return Measure(name, _LIKELIHOOD, about[0][_LIKELIHOOD]), [_LIKELIHOOD] * len(members)
    [(metric, meaning)] = describe(manifest, name).items()
    return Measure(name, metric, meaning, scale=100), firsts


def _cell(record: dict[str, Any]) -> tuple[str, str]:
    """Name a record's cell as `score_frame` does: method and budget."""
    exact = record["method"] == EXACT
    return record["method"], "" if exact else str(Budget(record["ratio"], record["max_tokens"]))


def _point(
    measure: Measure, record: dict[str, Any], parts: list[pd.DataFrame], exact: Sequence[Scores]
) -> Point | None:
    """Make a cell's point; None where it has no finite score, or its bytes are not known."""
    scores: list[Scores] = [
        {sample: score for sample, score in zip(part["sample"], part["score"], strict=True) if math.isfinite(score)}
        for part in parts
    ]
    if not all(scores):
        return None
    share = sum(part["held"].mean() for part in parts) / len(parts)
    if math.isnan(share):
        return None
    scale = measure.scale
    mean = scale * _mean(scores)
    low = high = None
    if exact and record["method"] != EXACT:
        found = average_difference(list(zip(scores, exact, strict=True)))
        if found.low is not None and found.high is not None:
            low, high = (mean + scale * (end - found.mean) for end in (found.low, found.high))
    return Point(
        measure=measure,
        family=record.get("family") or record["method"],
        method=record["method"],
        compressor=None if record["method"] == EXACT else record.get("compressor") or record["method"],
        ratio=record["ratio"],
        max_tokens=record["max_tokens"],
        bits=record.get("bits"),
        share=share,
        mean=mean,
        low=low,
        high=high,
        scores=scores,
    )


def _mean(scores: Sequence[Scores]) -> float:
    return sum(sum(own.values()) / len(own) for own in scores) / len(scores)


def differ_in_bytes(points: Iterable[Point]) -> bool:
    """Say if compressed cells hold different numbers of bytes, as printed."""
    return len({f"{point.share:.3f}" for point in points if point.compressor is not None}) > 1


def best_at_bytes(points: Sequence[Point], levels: Sequence[float] = LEVELS, ours: Sequence[str] = OURS) -> list[Best]:
    """Find the best cells of every task within each number of bytes, and where ours stands.

    Args:
        points: points from `frontier_points`, of one run or several of one model.
        levels: shares of the exact cache's bytes.
        ours: compressors that count as ours. A cell that keeps all tokens is never ours: that is plain quantisation.

    Returns:
        One entry a task and level, in the order of the points and levels.
    """
    by_task: dict[str, list[Point]] = {}
    for point in points:
        if point.compressor is not None:
            by_task.setdefault(point.measure.task, []).append(point)
    return [_best(own, level, ours) for own in by_task.values() for level in levels]


def _best(points: Sequence[Point], level: float, ours: Sequence[str]) -> Best:
    measure = points[0].measure
    small = [point for point in points if point.share <= level]
    sign = -1 if measure.higher_is_better else 1

    def best_of(own: bool) -> Point | None:
        cells = [point for point in small if (point.compressor in ours and not point.plain) == own]
        return min(cells, key=lambda point: (sign * point.mean, point.share), default=None)

    mine, other = best_of(True), best_of(False)
    if mine is None or other is None:
        only: Verdict = "first" if mine else "behind" if other else ""
        return Best(measure, level, mine, other, None, only)
    difference = average_difference(list(zip(mine.scores, other.scores, strict=True)))
    verdict: Verdict = "tied" if difference.tie else ""
    if difference.finding:
        verdict = "first" if (difference.mean > 0) == measure.higher_is_better else "behind"
    return Best(measure, level, mine, other, difference, verdict)


def frontier_tables(manifest: dict[str, Any], points: Sequence[Point]) -> list[Table]:
    """Make the table of the best at each number of bytes, and one of every cell by its bytes.

    Args:
        manifest: description of the run.
        points: its points.
    """
    return [_best_table(manifest, points), _cells_table(manifest, points)]


def _best_table(manifest: dict[str, Any], points: Sequence[Point]) -> Table:
    rows = []
    for best in best_at_bytes(points):
        mark = {"first": "better", "behind": "worse", "tied": "tie"}.get(best.verdict, "")
        rows.append(
            (
                TableCell(f"{100 * best.level:g} %", order=best.level),
                TableCell(best.measure.task),
                *_named(best.measure, best.ours),
                *_named(best.measure, best.other),
                _difference(best),
                TableCell(best.verdict or "–", mark),
            )
        )
    return Table(
        None,
        Budget(),
        f"Best at each number of bytes, {manifest['protocol']}, {manifest['model']['name']}",
        f"Ours: {', '.join(OURS)} with fewer slots than tokens. Others: all other methods, and all tokens in fewer "
        f"bits. first, tied, behind: ours, by the paired 95 % interval. {bytes_note(manifest)}",
        ("bytes at most", "task", "best of ours", "ours", "best of the others", "others", "ours - others", "ours is"),
        tuple(rows),
    )


def _named(measure: Measure, point: Point | None) -> tuple[TableCell, TableCell]:
    if point is None:
        return TableCell("none as small"), TableCell("–")
    return (
        TableCell(f"{point.label} ({100 * point.share:.1f} %)"),
        TableCell(measure.written(point.mean), order=point.mean),
    )


def _difference(best: Best) -> TableCell:
    found = best.difference
    if found is None or math.isnan(found.mean):
        return TableCell("–")
    scale, digits = best.measure.scale, best.measure.about["digits"]
    inside = "no interval"
    if found.low is not None and found.high is not None:
        inside = f"{scale * found.low:+.{digits}f} to {scale * found.high:+.{digits}f}"
    return TableCell(f"{scale * found.mean:+.{digits}f} ({inside})", order=found.mean)


def _cells_table(manifest: dict[str, Any], points: Sequence[Point]) -> Table:
    """Make a table of every cell, the largest first."""
    measures = list({point.measure.task: point.measure for point in points}.values())
    by_cell: dict[str, dict[str, Point]] = {}
    for point in points:
        by_cell.setdefault(point.label, {})[point.measure.task] = point
    cells = {label: held_cell([point.share for point in own.values()]) for label, own in by_cell.items()}
    rows = []
    for label in sorted(by_cell, key=lambda label: -float(cells[label].order or 0)):
        found = [by_cell[label].get(measure.task) for measure in measures]
        scores = [
            TableCell(point.measure.written(point.mean), order=point.mean) if point else TableCell("–")
            for point in found
        ]
        rows.append((TableCell(label, order=label), cells[label], *scores))
    notes = [f"{of.task}: {of.metric}, {unit_and_direction(dict(of.about))}." for of in measures]
    return Table(
        None,
        Budget(),
        f"Every cell by its bytes, {manifest['protocol']}, {manifest['model']['name']}",
        " ".join([*notes, bytes_note(manifest)]),
        ("cell", BYTES, *(f"{of.task} {'↑' if of.higher_is_better else '↓'}" for of in measures)),
        tuple(rows),
    )
