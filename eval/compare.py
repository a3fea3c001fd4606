"""One method against all others, on the samples that several runs share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval.cells import EXACT
from eval.records import Folder
from eval.statistics import paired_difference
from eval.summary import Budget, held_shares


def compare(method: str, folders: Sequence[Path]) -> pd.DataFrame:
    """Compare one method with every other, by task, length, first metric and budget.

    Runs of the same model and seed may have measured different methods: samples are the same where their prompts are.

    Args:
        method: method to compare.
        folders: folders of the runs.

    Returns:
        One row a task, length, budget and other method: the means over the samples that both have, `difference` with
        `low` and `high` as in `eval.statistics.Difference`, `pairs`, and `verdict`: "better", "worse" or "tie", empty
        with fewer than three pairs. `bytes` and `other bytes` are shares of the exact cache's bytes in the model's
        dtype on these samples; NaN where they were not measured.

    Raises:
        ValueError: a folder that holds no run, runs of several models, or a method that none of them measured.
    """
    runs = [Folder(folder) for folder in folders]
    models = {str(run.manifest["model"]) for run in runs}
    if len(models) > 1:
        raise ValueError(f"folders: runs of several models, {', '.join(sorted(models))}; compare those of one")
    metrics: dict[str, Any] = {}
    scores: dict[tuple[str, Any, str], dict[str, dict[Any, float]]] = defaultdict(lambda: defaultdict(dict))
    held: dict[tuple[Any, ...], float] = {}
    for run in runs:
        metrics |= run.manifest["metrics"]
        records = run.records()
        for record, share in zip(records, held_shares(records), strict=True):
            metric = next(iter(run.manifest["metrics"][record["task"]]))
            score = record["scores"].get(metric)
            if record["method"] == EXACT or score is None:
                continue
            group = record["task"], record["facets"].get("length"), str(Budget(record["ratio"], record["max_tokens"]))
            sample = record["seed"], record["prompt_hash"]
            scores[group][record["method"]][sample] = float(score)
            held[group, record["method"], sample] = share
    if not any(method in found for found in scores.values()):
        known = sorted({name for found in scores.values() for name in found})
        raise ValueError(f"method={method!r} was not measured in these runs; there are {', '.join(known)}")
    rows = []
    for group, found in scores.items():
        task, length, budget = group
        name, metric = next(iter(metrics[task].items()))
        for other, theirs in found.items():
            both = found[method].keys() & theirs.keys() if method in found else set()
            if other == method or not both:
                continue
            difference = paired_difference(found[method], theirs)
            higher = bool(metric["higher_is_better"])
            verdict = "tie" if difference.tie else ""
            if difference.finding:
                verdict = "better" if (difference.mean > 0) == higher else "worse"
            rows.append(
                {
                    "task": task,
                    "length": length,
                    "metric": name,
                    "budget": budget,
                    "other": other,
                    "mean": sum(found[method][sample] for sample in both) / len(both),
                    "other mean": sum(theirs[sample] for sample in both) / len(both),
                    "difference": difference.mean,
                    "low": difference.low,
                    "high": difference.high,
                    "pairs": difference.n,
                    "verdict": verdict,
                    "bytes": sum(held[group, method, sample] for sample in both) / len(both),
                    "other bytes": sum(held[group, other, sample] for sample in both) / len(both),
                }
            )
    if not rows:
        raise ValueError(f"method={method!r} shares no samples with another method in these runs")
    return pd.DataFrame(rows)
