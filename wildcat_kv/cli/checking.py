"""Checks of a given model, as `wildcat-kv check` prints them."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table

from wildcat_kv.cli.streaming import steps
from wildcat_kv.integrations.model_checks import Result, names, run_checks
from wildcat_kv.models.support import cache_layers, decoder_config

_MARKS = {
    "passed": "[green]passed[/green]",
    "failed": "[red]failed[/red]",
    "not applicable": "[dim]does not apply[/dim]",
}


def check_model(model: Any, dtype: str) -> bool:
    """Print what works with a compressed cache of a model.

    Args:
        model: a Transformers decoder.
        dtype: the name of its dtype, to be shown.

    Returns:
        False if a check failed.

    Raises:
        ValueError: a model that cannot be compressed.
    """
    compressed, layers = _compressed(model.config)
    start, results = time.perf_counter(), _results(model)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, wraps in (("check", False), ("result", False), ("", True)):
        table.add_column(name, no_wrap=not wraps)
    for result in results:
        table.add_row(result.name, _MARKS[result.status], result.reason)
    console = Console(highlight=False)
    console.print(
        f"{type(model).__name__}, {dtype} on {model.device}: {compressed} of {layers} layers are compressed\n"
    )
    console.print(table)
    failed = [result.name for result in results if result.status == "failed"]
    verdict = (
        f"[red]{len(failed)} of {len(results)} checks failed[/red]" if failed else "[green]No check failed[/green]"
    )
    console.print(f"\n{verdict}, in {time.perf_counter() - start:.0f} s. The prompts were random tokens.")
    return not failed


def _compressed(config: Any) -> tuple[int, int]:
    """Count the compressed layers and all layers."""
    layers, full = cache_layers(decoder_config(config))
    return len(full), len(layers)


def _results(model: Any) -> list[Result]:
    with steps() as progress:
        task, results = progress.add_task("checking", total=len(names())), []
        for result in run_checks(model):
            results.append(result)
            progress.update(task, advance=1, description=result.name)
    return results
