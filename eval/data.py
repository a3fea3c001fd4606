"""Benchmarks from local files, in the format of their authors, where there is no hub."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import datasets


def find_local(task: str, folder: Path, length: str | None = None) -> dict[str, Any] | None:
    """Find the fields to change in a task of lm-eval so that it reads a local file.

    Args:
        task: its name in lm-eval.
        folder: the data folder; `expected_files` tells what is looked for in it.
        length: the version of a benchmark that has several, such as "4k" of BABILong.

    Returns:
        Fields of the task's configuration, or None where the folder does not have it.

    Raises:
        ValueError: the file is there and cannot be read.
    """
    for name in expected_files(task, length):
        for suffix in (".jsonl", ".json"):
            path = folder / f"{name}{suffix}"
            if path.is_file():
                rows = [_as_the_task_has_it(task, row) for row in _read(path)]
                return {
                    "custom_dataset": partial(_dataset, _split(task), rows),
                    "dataset_kwargs": None,
                    "training_split": None,
                    "validation_split": None,
                }
    return None


def expected_files(task: str, length: str | None = None) -> list[str]:
    """List the places of a task's file, without .jsonl or .json; none where it needs the hub.

    Example:
        >>> expected_files("longbench_qasper_e")
        ['longbench/qasper_e', 'longbench/data/qasper_e']
    """
    family, _, rest = task.partition("_")
    if family in ("longbench", "infinitebench"):
        names = [rest, f"{rest}g"] if family == "infinitebench" and rest.endswith("_en") else [rest]
        return [f"{family}/{folder}{name}" for name in names for folder in ("", "data/")]
    if family == "babilong":
        version = length or "0k"
        return [f"babilong/{version}/{rest}", f"babilong/data/{rest}/{version}"]
    return ["wikitext/test"] if task == "wikitext" else []


def _split(task: str) -> str:
    family, _, rest = task.partition("_")
    return rest if family in ("infinitebench", "babilong") else "test"


def _as_the_task_has_it(task: str, row: dict[str, Any]) -> dict[str, Any]:
    if task.startswith("longbench"):  # lm-eval's copy calls the authors' "input" a question
        return {
            **row,
            "question": row.get("question", row.get("input", "")),
            "all_classes": row.get("all_classes") or [],
        }
    if task.startswith("infinitebench"):  # where answers may be numbers, and there may be one without a list
        answers = row.get("answer", [])
        return {**row, "answer": [str(answer) for answer in (answers if isinstance(answers, list) else [answers])]}
    return row


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        # Not splitlines(): texts hold other characters that it takes for ends of lines.
        lines = text.split("\n")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"data_dir: {path} cannot be read: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"data_dir: {path} must hold samples, one JSON object a line, or a list of them")
    return rows


def _dataset(split: str, rows: list[dict[str, Any]], **_: Any) -> dict[str, datasets.Dataset]:
    return {split: datasets.Dataset.from_list(rows)}
