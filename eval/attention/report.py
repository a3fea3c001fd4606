"""Tables and plots of a run of attention methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval.attention.plots import save_plots
from eval.markdown import escape_markdown, markdown_table

SUMMARY = "summary.md"
_SHARES = {"slots": "slots", "attention": "time", "work": "work", "forward": "whole"}
_READING = (
    "Scores are means; ± is the standard deviation between the seeds' means, and the number in brackets that of the "
    "worst input. *time* and *work* are attention's seconds and operations over those of exact attention, *whole* the "
    "whole model's *seconds* over those of the exact one. Seconds are of the processor, {threads}: {processor}."
)


def write_report(manifest: dict[str, Any], records: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Write `summary.md` and the plots; the same bytes for the same run.

    Args:
        manifest: description of the run; one that is not finished says so.
        records: records of the run.
        folder: folder to write to.

    Returns:
        Path of the summary.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError(f"output={str(folder)!r} holds no measurement yet")
    frame = pd.DataFrame(records)
    origin = f"`{manifest['command']}`, {manifest['started']}, commit {manifest['commit']}."
    threads = manifest["config"]["threads"]
    reading = _READING.format(
        threads="one thread" if threads == 1 else f"{threads} threads", processor=manifest["machine"]["processor"]
    )
    parts = [f"# {manifest['name']}\n", f"{origin}\n", f"{reading}\n"]
    if not manifest.get("finished"):
        parts.append("**This run has not finished.**\n")
    for task, about in manifest["tasks"].items():
        for group in frame[frame["task"] == task]["group"].unique():
            rows = frame[(frame["task"] == task) & (frame["group"] == group)]
            parts.append(_table(manifest, about, group, rows))
    parts += [f"![{path.stem}]({path.name})\n" for path in save_plots(manifest, frame, folder)]
    (folder / SUMMARY).write_text("\n".join(parts), encoding="utf-8")
    return folder / SUMMARY


def _table(manifest: dict[str, Any], about: dict[str, Any], group: str, rows: pd.DataFrame) -> str:
    metrics, measured = about["metrics"], rows["shares"].iloc[0]
    shares = {name: title for name, title in _SHARES.items() if name in measured}
    header = ["method", *(metric["title"] for metric in metrics.values()), *shares.values()]
    header += ["seconds"] * ("forward" in shares)
    lines = []
    for method in [name for name in manifest["methods"] if name in set(rows["method"])]:
        own = rows[rows["method"] == method]
        cells = [_cell(own, name, rising=metric["rising"]) for name, metric in metrics.items()]
        cells += [f"{own['shares'].map(lambda share, name=name: share[name]).mean():.3f}" for name in shares]
        if "forward" in shares:
            cells.append(f"{own['seconds'].map(lambda seconds: seconds['forward']).mean():.2f}")
        lines.append([escape_markdown(method), *cells])
    inputs, seeds = rows["input"].nunique(), rows["seed"].nunique()
    notes = f"{inputs} input{'s' * (inputs > 1)}, {seeds} seed{'s' * (seeds > 1)}."
    right = [False, *[True] * (len(header) - 1)]
    return markdown_table(f"{about['title']}: {group}", notes, header, lines, right=right)


def _cell(rows: pd.DataFrame, metric: str, *, rising: bool) -> str:
    """Write a score: mean, deviation between seeds, worst input."""
    scores = rows.assign(score=rows["scores"].map(lambda found: found[metric]))
    by_seed, by_input = (scores.groupby(name)["score"].mean() for name in ("seed", "input"))
    spread = f" ±{_number(by_seed.std())}" if len(by_seed) > 1 else ""
    worst = f" ({_number(by_input.min() if rising else by_input.max())})" if len(by_input) > 1 else ""
    return f"{_number(scores['score'].mean())}{spread}{worst}"


def _number(value: float) -> str:
    """Write a number with three places, or with two figures where that would be 0."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"
