"""Markdown and plots of a folder of benchmarks, made from its JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import NAMES
from benchmarks.plots import save_plots
from benchmarks.records import Run, read_runs
from benchmarks.tables import limit_table, make_tables
from eval.markdown import escape_markdown

SUMMARY = "summary.md"


def write_report(folder: Path) -> list[Run]:
    """Write `summary.md` and the plots of every benchmark in a folder, which are returned.

    Raises:
        ValueError: there is none, or its JSON is damaged.
    """
    runs = read_runs(folder, NAMES)
    limits = limit_table(runs)
    parts = ["# Benchmarks", *([limits.markdown()] if limits.rows else [])]
    for run in runs:
        parts += [f"## {run.benchmark.capitalize()}", _facts(run)]
        if run.finished is None:
            parts.append("**This benchmark has not finished: the figures are of what was measured so far.**")
        parts += [f"![{path.stem}]({path.name})" for path in save_plots(run, folder)]
        parts += [table.markdown() for table in make_tables(run)]
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    (folder / SUMMARY).write_text(text, encoding="utf-8")
    return runs


def _facts(run: Run) -> str:
    """List what a benchmark was run on, and how."""
    machine = run.machine
    hardware: Sequence[str] = [
        str(machine["processor"]),
        f"{machine['cores']} cores",
        f"{machine['memory_gib']:g} GiB of memory",
        *map(str, machine["devices"]),
    ]
    facts = {
        "command": f"`{run.command}`",
        "commit": run.commit or "",
        "when": f"{run.started} to {run.finished or '?'}",
        "model": run.model,
        "device": f"{run.device}, {run.threads} thread{'s'[: run.threads > 1]}",
        "machine": ", ".join(hardware),
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
    }
    return "\n".join(f"- {name}: {escape_markdown(fact)}" for name, fact in facts.items() if fact)
