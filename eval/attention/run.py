"""A run: every method on every input, written at once, and its report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from eval.attention.config import RunConfig
from eval.attention.report import write_report
from eval.attention.tasks import Build, Case, Measured, Task, Wanted
from eval.attention.views import save_view
from eval.machine import commit, machine, versions
from eval.progress import progress
from eval.records import Folder

Key = tuple[str, str, str, str, int]


def run(config: RunConfig, output: Path, *, command: str, resume: bool) -> None:
    """Measure, and write records, tables and plots into `output`.

    Args:
        config: description of the run.
        output: folder of the run.
        command: command line, for the record.
        resume: True if the folder may hold the beginning of this run.

    Raises:
        ValueError: something cannot be measured as asked.
        DownloadError: a model or an input is not in the cache and could not be fetched.
    """
    folder = Folder(output)
    folder.check(resume=resume)
    planned = [(task, case) for task in config.tasks for case in task.cases()]
    for _, case in planned:  # settings may fit some lengths and not others
        for choice in config.methods:
            choice.build(case.n, grid=case.grid)
    manifest = _manifest(config, command)
    folder.compare(manifest)
    folder.begin(manifest)
    done = {key_of(record) for record in folder.records()}
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with progress(len(planned) * len(config.plan()), show=True) as shown:
            shown.skip(len(done))
            for task, case in planned:
                for measured in _measure(config, task, case, done):
                    save_view(output, case, measured)
                    folder.append(record_of(task, case, measured))
                    shown.advance(f"{task.task}: {case.group}", measured.method)
    finally:
        torch.set_num_threads(threads)
    write_report(folder.finish(_now()), folder.records(), output)
    Console(stderr=True).print(f"\n{output}/summary.md", soft_wrap=True, highlight=False)


def key_of(record: dict[str, Any]) -> Key:
    """Make the key of a measurement, unique in a run."""
    return record["task"], record["group"], record["input"], record["method"], record["seed"]


def code_of(config: RunConfig) -> dict[str, str]:
    """List the fingerprints of the methods that have one, by their names in tables."""
    return {choice.name: code for choice in config.methods if (code := choice.code()) is not None}


def _measure(config: RunConfig, task: Any, case: Case, done: set[Key]) -> Iterator[Measured]:
    wanted = [
        Wanted(choice.name, seed, builder(choice, seed))
        for choice, seed in config.plan()
        if (task.task, case.group, case.input, choice.name, seed) not in done
    ]
    if wanted:
        yield from task.measure(case, wanted)


def builder(choice: Any, seed: int) -> Build:
    """Make a function that builds a method for a number of keys."""
    return lambda n, grid: choice.build(n, seed, grid)


def record_of(task: Any, case: Case, measured: Measured) -> dict[str, Any]:
    """Write a measurement as a line of the records."""
    fields = {name: value for name, value in asdict(measured).items() if name != "view"}
    return {"task": task.task, "group": case.group, "input": case.input, "n": case.n, **fields}


def _manifest(config: RunConfig, command: str) -> dict[str, Any]:
    return {
        "name": config.name,
        "command": command,
        "started": _now(),
        "finished": None,
        "methods": [choice.name for choice in config.methods],
        "code": code_of(config),
        "tasks": {task.task: _described(task) for task in config.tasks},
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "config": config.model_dump(mode="json"),
    }


def _described(task: Task) -> dict[str, Any]:
    return {"title": task.title, "metrics": {name: metric._asdict() for name, metric in task.metrics.items()}}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
