"""One sentence that says what a run found."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from eval.cells import EXACT
from eval.summary import AVERAGES, EVERY, baseline_of, describe

# Tasks where hits are things found, by how their names start.
_FOUND = {"needle": "needles", "lookup": "facts"}


def conclude(manifest: dict[str, Any], summary: pd.DataFrame) -> str:
    """Say which method did best in the first task at the largest budget.

    A task that counts hits is told by them, others by their first metric.

    Args:
        manifest: description of the run.
        summary: rows from `summarise`.

    Returns:
        The sentence; empty where no compressed method has a finite score.
    """
    whole = summary[(summary["group"] == EVERY) & ~summary["task"].isin(AVERAGES)]
    if whole.empty:
        return ""
    task, budget = whole["task"].iloc[0], whole["budget"].iloc[0]
    rows = whole[(whole["task"] == task) & (whole["budget"] == budget)]
    metrics = describe(manifest, task)
    hits = (name for name in metrics if _counts_hits(metrics[name]) and any(_compressed(_means(rows, name)).values()))
    metric = next(hits, next(iter(metrics)))
    means, about = _means(rows, metric), metrics[metric]
    compressed = _compressed(means)
    if not compressed:
        return ""
    top = (max if about["higher_is_better"] else min)(compressed.values())
    best = [name for name, mean in compressed.items() if mean == top]
    who = best[0] if len(best) == 1 else f"{best[0]} and {len(best) - 1} more"
    among = f", the best of {len(compressed)} methods" if len(compressed) > 2 else ""
    others = [name for name in dict.fromkeys((baseline_of(manifest), EXACT)) if name in means and name not in best]
    beside = "".join(
        f"; {'the exact cache' if name == EXACT else name} {_value(means[name], about)}" for name in others
    )
    said = _said(task, metric, about, _value(top, about), several=len(best) > 1)
    return f"At {budget}, {who} {said}{among}{beside} (n = {int(rows['n'].max())})."


def _means(rows: pd.DataFrame, metric: str) -> dict[str, float]:
    own = rows[rows["metric"] == metric].to_dict("records")
    return {row["method"]: row["mean"] for row in own if math.isfinite(row["mean"])}


def _compressed(means: dict[str, float]) -> dict[str, float]:
    return {method: mean for method, mean in means.items() if method != EXACT}


def _counts_hits(about: dict[str, Any]) -> bool:
    return bool(about["higher_is_better"]) and about.get("unit") == "share"


def _said(task: str, metric: str, about: dict[str, Any], value: str, *, several: bool) -> str:
    what = next((what for start, what in _FOUND.items() if task.startswith(start)), None)
    if _counts_hits(about) and what is not None:
        return f"{'find' if several else 'finds'} {value} of the {what}"
    unit = f" {about['unit']}" if about.get("unit") and not _counts_hits(about) else ""
    return f"{'have' if several else 'has'} {metric} {value}{unit} in {task}"


def _called(method: str) -> str:
    return "the exact cache" if method == EXACT else method


def _value(mean: float, about: dict[str, Any]) -> str:
    if not _counts_hits(about):
        return f"{mean:.{about['digits']}f}"
    return "none" if mean == 0 else f"{100 * mean:.0f} %"
