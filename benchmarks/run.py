"""Running benchmarks one after the other; each leaves its JSON, whatever becomes of the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import calls, choices, decode, generation, memory, prefill, scaling
from benchmarks.caches import missing
from benchmarks.figures import limited
from benchmarks.options import NAMES, Options
from benchmarks.records import Record, Run, now
from benchmarks.report import write_report
from benchmarks.tables import ABOUT_LIMITS, LIMITS, limit_text, spread_of, verdict
from eval.machine import commit, machine, versions
from wildcat_kv.models.shipped import SMOLLM2

BENCHMARKS: dict[str, Callable[[Options], Iterator[Record]]] = {
    "prefill": prefill.measure,
    "decode": decode.measure,
    "memory": memory.measure,
    "scaling": scaling.measure,
    "generation": generation.measure,
    "calls": calls.measure,
    "choices": choices.measure,
}
assert tuple(BENCHMARKS) == NAMES


def run(names: Sequence[str], options: Options, folder: Path, command: str) -> None:
    """Run benchmarks into a folder, and make its report.

    Raises:
        ValueError: folder is a file.
        RuntimeError: a benchmark failed; the others were run all the same.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    failures = []
    for name in names:
        try:
            _run_one(name, options, folder, command)
        except Exception as error:  # whatever one benchmark dies of, the others are worth having
            if len(names) == 1:
                raise
            reason = f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"
            failures.append(reason)
            print(reason, file=sys.stderr)
        finally:
            write_report(folder)
    print_limits(write_report(folder))
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(names)} benchmarks failed: {'; '.join(failures)}")


def check_folder(folder: Path) -> None:
    """Refuse what cannot become a folder.

    Raises:
        ValueError: it, or something above it, is a file.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"output={str(folder)!r}: {nearest} is no folder; choose another")


def print_limits(runs: Sequence[Run]) -> None:
    """Print every figure that has a limit beside it; nothing where none has."""
    table = Table("figure", "measured", "limit", "the median is", title=LIMITS, caption=ABOUT_LIMITS)
    for run in runs:
        for figure in limited(run):
            table.add_row(figure.what, spread_of(figure), limit_text(figure), verdict(figure).strip("*"))
    if table.row_count:
        Console().print(table)


def _run_one(name: str, options: Options, folder: Path, command: str) -> None:
    """Run one benchmark; what it has measured is on disk at every moment."""
    result = Run(
        benchmark=name,
        command=command,
        commit=commit(),
        started=now(),
        model=options.model or SMOLLM2.name,
        device=options.device,
        threads=torch.get_num_threads(),
        machine=machine(),
        versions=versions() | {"scipy": version("scipy")},
        options=asdict(options),
        notes=[f"{cache}: {reason}." for cache, reason in missing().items()] if name in ("decode", "memory") else [],
    )
    result.write(folder)
    for record in BENCHMARKS[name](options):
        result.records.append(record)
        result.write(folder)
    result.finished = now()
    result.write(folder)
