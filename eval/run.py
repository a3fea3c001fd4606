"""A run: every sample of every task, read once, measured for every cell, written at once."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress, TextColumn

from eval.cells import Cell, code_of
from eval.config import RunConfig
from eval.machine import commit, machine, versions
from eval.progress import progress
from eval.records import Folder, Key, key_of
from eval.report import write_report
from eval.tasks.base import Outcome, Sample, Setting, Task
from wildcat_kv.models import load_model

_PATIENCE = timedelta(weeks=1)  # one process may have long been done when another is not


def run(config: RunConfig, output: Path, *, command: str, resume: bool) -> None:
    """Measure, and write records, tables, plots and report into `output`.

    Under `accelerate launch` the samples are shared out, and one process merges and reports.

    Args:
        config: description of the run.
        output: folder of the run.
        command: command line, for the record.
        resume: True if the folder may hold the beginning of this run.

    Raises:
        ValueError: something cannot be measured as asked; before anything long begins, with nothing written.
    """
    state = PartialState(cpu=config.device == "cpu" or not torch.cuda.is_available(), timeout=_PATIENCE)
    cells, tasks = config.cells(), config.make_tasks()
    for cell in cells:
        cell.check_tasks(streams=any(task.streams for task in tasks))
    folder = Folder(output, state.process_index)
    folder.check(resume=resume)
    model, tokenizer = load_model(config.model, getattr(torch, config.dtype), _device(config, state), config.device_map)
    for cell in cells:
        cell.check_model(model.config)
    for task in tasks:
        task.check_model(model.config)
    planned = plan_samples(config, tasks, model, tokenizer, show=state.is_main_process)
    for cell in cells:
        cell.check_tasks(streams=any(task.streams for task in tasks))
    manifest = _manifest(config, command, model, tasks, cells, state.num_processes)
    folder.compare(manifest)
    hashes = {key_of(record): record["prompt_hash"] for record in folder.records()}
    _check_hashes(planned, hashes)
    state.wait_for_everyone()
    if state.is_main_process:
        folder.begin(manifest)
    state.wait_for_everyone()
    own = in_rounds(planned[state.process_index :: state.num_processes])
    _measure(config, own, cells, model, tokenizer, folder, set(hashes), show=state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        folder.merge(_keys(planned, cells))
        write_report(folder.finish(_now()), folder.records(), output)
        Console(stderr=True).print(f"\n{output}/report.html", soft_wrap=True, highlight=False)


def plan_samples(
    config: RunConfig, tasks: list[Task], model: Any, tokenizer: Any, *, show: bool
) -> list[tuple[Task, Sample]]:
    """Make all samples of all tasks, in the order of the records.

    Raises:
        ValueError: a task's data is missing, or a sample is longer than the model can read.
    """
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or sys.maxsize
    setting = Setting(
        tokenizer=tokenizer,
        seed=config.seed,
        protocol=config.protocol,
        positions=positions,
        limit=config.limit,
        chat_template=config.chat_template,
        data_dir=config.data_dir,
        half=config.half,
    )
    planned = []
    console = Console(stderr=True)
    show = show and console.is_terminal  # elsewhere it would leave an empty line
    with Progress(TextColumn("{task.description}"), console=console, transient=True, disable=not show) as bar:
        line = bar.add_task("")
        for task in tasks:
            bar.update(line, description=f"{task.name}: making the samples")
            for sample in task.samples(setting):
                if sample.tokens > positions:
                    raise ValueError(
                        f"task={task.name!r}, sample {sample.index}: it needs {sample.tokens} tokens and the model has "
                        f"{positions} positions; choose shorter lengths, or truncate: middle where the task takes it"
                    )
                planned.append((task, sample))
    return planned


def in_rounds(planned: list[tuple[Task, Sample]]) -> list[tuple[Task, Sample]]:
    """Order samples so that an interrupted run has a part of everything.

    Each task's samples go by turns through its lengths, depths and other facets; the tasks keep step with each other.
    """
    turns: Counter[tuple[Any, ...]] = Counter()
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)  # by task: turn, place in the plan
    for place, (task, sample) in enumerate(planned):
        kind = (task.name, *sorted(sample.facets.items()))
        places[task.name].append((turns[kind], place))
        turns[kind] += 1
    order = [((at + 0.5) / len(own), place) for own in places.values() for at, (_, place) in enumerate(sorted(own))]
    return [planned[place] for _, place in sorted(order)]


def _measure(
    config: RunConfig,
    planned: list[tuple[Task, Sample]],
    cells: list[Cell],
    model: Any,
    tokenizer: Any,
    folder: Folder,
    done: set[Key],
    *,
    show: bool,
) -> None:
    with progress(len(planned) * len(cells), show=show) as shown, torch.no_grad():
        missing_of = [[cell for cell in cells if key_for(task, sample, cell) not in done] for task, sample in planned]
        shown.skip(len(planned) * len(cells) - sum(map(len, missing_of)))  # at once, for the estimate of what is left
        for (task, sample), missing in zip(planned, missing_of, strict=True):
            if not missing:
                continue
            measure = sample.open(model, tokenizer)
            for cell in missing:
                folder.append(record_of(config, task, sample, cell, measure(cell)))
                shown.advance(task.name, str(cell))
            del measure  # two contexts at once may be more than a device holds


def record_of(config: RunConfig, task: Task, sample: Sample, cell: Cell, outcome: Outcome) -> dict[str, Any]:
    """Write a measurement as a line of the records."""
    return {
        "task": task.name,
        "sample": sample.index,
        "method": cell.method,
        "family": cell.family,
        "compressor": cell.compressor,
        "bits": cell.bits,
        "ratio": cell.ratio,
        "max_tokens": cell.max_tokens,
        "protocol": config.protocol,
        "seed": config.seed,
        "prompt_hash": sample.prompt_hash,
        "prediction": outcome.prediction,
        "reference": outcome.reference,
        "scores": outcome.scores,
        "seen_tokens": outcome.seen_tokens,
        "stored_tokens": outcome.stored_tokens,
        "memory_bytes": outcome.memory_bytes,
        "facets": dict(sample.facets),
        "layers": outcome.layers,
        "seconds": dict(outcome.seconds),
    }


def key_for(task: Task, sample: Sample, cell: Cell) -> Key:
    """Make the key of a measurement to be made."""
    return (task.name, sample.index, *cell.key)


def _keys(planned: list[tuple[Task, Sample]], cells: list[Cell]) -> Iterator[Key]:
    return (key_for(task, sample, cell) for task, sample in planned for cell in cells)


def _check_hashes(planned: list[tuple[Task, Sample]], found: dict[Key, str]) -> None:
    """Refuse to go on with a run whose prompts were others."""
    prompts = {(task.name, sample.index): sample.prompt_hash for task, sample in planned}
    for key, prompt_hash in found.items():
        if prompts.get(key[:2]) != prompt_hash:
            raise ValueError(
                f"task={key[0]!r}, sample {key[1]}: the folder has it with another prompt; the data, the tokenizer or "
                "lm-eval has changed since, so choose another folder"
            )


def _manifest(
    config: RunConfig, command: str, model: Any, tasks: list[Task], cells: list[Cell], processes: int
) -> dict[str, Any]:
    return {
        "name": config.name,
        "command": command,
        "started": _now(),
        "finished": None,
        "protocol": config.protocol,
        "model": {
            "name": config.model or "SmolLM2-135M-Instruct",
            "parameters": model.num_parameters(),
            "dtype": config.dtype,
        },
        "methods": list(dict.fromkeys(cell.method for cell in cells)),
        "code": code_of(cells),
        "metrics": {task.name: {name: asdict(metric) for name, metric in task.metrics.items()} for task in tasks},
        "versions": versions(),
        "commit": commit(),
        "machine": {**machine(), "processes": processes},
        "config": config.model_dump(mode="json"),
    }


def device_of(config: RunConfig) -> str:
    """Name the device of a run in one process."""
    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _device(config: RunConfig, state: PartialState) -> torch.device | str:
    if state.num_processes > 1:
        return state.device
    return device_of(config)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
