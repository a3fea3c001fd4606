"""Results of RULER in the files that the reference library's evaluation writes, to stand beside its own.

The format is that of kvpress (0.4): a folder for each method, budget and length, with `metrics.json`, `predictions.csv`
and `config.yaml`.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from eval.cells import EXACT
from eval.records import Folder
from eval.summary import AVERAGES

_NO_PRESS = "no_press"
# The tasks that it has under another name.
_NAMES = {"ruler_vt": "vt", "ruler_cwe": "cwe", "ruler_fwe": "fwe", "ruler_qa_squad": "qa_1", "ruler_qa_hotpot": "qa_2"}
_COLUMNS = ("task", "answer", "predicted_answer", "compression_ratio")


def write_leaderboard(folder: Path, output: Path) -> list[Path]:
    """Write a run's RULER results as kvpress's evaluation does.

    Args:
        folder: folder of a run, finished or not. Its other tasks and its budgets in tokens are left out: there is no
            place for them.
        output: folder for the results; one that it has already is written anew.

    Returns:
        The folders of the cells.

    Raises:
        ValueError: there is no run, or none of its records is of RULER at a ratio.
    """
    manifest, cells = Folder(folder).manifest, defaultdict(list)
    for record in Folder(folder).records():
        if record["task"].startswith(AVERAGES["ruler average"]) and record["max_tokens"] is None:
            cells[record["method"], record["ratio"], record["facets"]["length"]].append(record)
    if not cells:
        raise ValueError(f"{str(folder)!r} has no task of RULER at a ratio; run configs/eval/leaderboard.yaml")
    return [_write_cell(manifest, *cell, records, output) for cell, records in cells.items()]


def _write_cell(
    manifest: dict[str, Any],
    method: str,
    ratio: float | None,
    length: int,
    records: Sequence[dict[str, Any]],
    output: Path,
) -> Path:
    config = {
        "dataset": "ruler",
        "data_dir": str(length),
        "model": manifest["model"]["name"],
        "press_name": _NO_PRESS if method == EXACT else method,
        "compression_ratio": round(1 - (ratio or 1.0), 4),
        "fraction": 1.0,
        "query_aware": manifest["protocol"] == "full-prompt",
        "seed": records[0]["seed"],
        "press_init_command": json.dumps(manifest["config"], sort_keys=True),
    }
    names = [config["dataset"], config["data_dir"], config["model"].replace("/", "--"), config["press_name"]]
    aware = ["query_aware"] if config["query_aware"] else []
    place = output / "__".join([*names, f"{config['compression_ratio']:.2f}", *aware])
    place.mkdir(parents=True, exist_ok=True)
    metrics = {task: {"string_match": score} for task, score in _scores(manifest, records).items()}
    (place / "metrics.json").write_text(json.dumps(metrics, indent=4), encoding="utf-8")
    (place / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with (place / "predictions.csv").open("w", encoding="utf-8", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(_COLUMNS)
        for record in records:
            task, ratio_dropped = _name(record["task"]), config["compression_ratio"]
            lines.writerow([task, record["reference"], record["prediction"], ratio_dropped])
    return place


def _scores(manifest: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Average each task's first metric, the share of the answers found, in points of 100."""
    found = defaultdict(list)
    for record in records:
        found[record["task"]].append(record["scores"][next(iter(manifest["metrics"][record["task"]]))])
    return {_name(task): round(100 * fmean(scores), 2) for task, scores in sorted(found.items())}


def _name(task: str) -> str:
    return _NAMES.get(task, task)
