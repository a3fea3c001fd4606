"""`wildcat-kv check`: what works with a compressed cache of a given model."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from wildcat_kv.cli import options
from wildcat_kv.cli.streaming import steps
from wildcat_kv.integrations.model_checks import Result, names, run_checks
from wildcat_kv.models.support import cache_layers, decoder_config

_MARKS = {
    "passed": "[green]passed[/green]",
    "failed": "[red]failed[/red]",
    "not applicable": "[dim]does not apply[/dim]",
}


def check(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder or GGUF file. Default: SmolLM2-135M-Instruct, from PyPI."),
    ] = None,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
) -> None:
    """Check what works with a compressed cache of a model; exit status 1 if something fails."""
    loaded, _ = options.load(model, dtype, device)
    compressed, layers = _compressed(loaded.config)
    start, results = time.perf_counter(), _results(loaded)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, wraps in (("check", False), ("result", False), ("", True)):
        table.add_column(name, no_wrap=not wraps)
    for result in results:
        table.add_row(result.name, _MARKS[result.status], result.reason)
    console = Console(highlight=False)
    console.print(
        f"{type(loaded).__name__}, {dtype} on {loaded.device}: {compressed} of {layers} layers are compressed\n"
    )
    console.print(table)
    failed = [result.name for result in results if result.status == "failed"]
    verdict = (
        f"[red]{len(failed)} of {len(results)} checks failed[/red]" if failed else "[green]No check failed[/green]"
    )
    console.print(f"\n{verdict}, in {time.perf_counter() - start:.0f} s. The prompts were random tokens.")
    if failed:
        raise typer.Exit(1)


def _compressed(config: Any) -> tuple[int, int]:
    """The numbers of compressed layers and of all layers.

    Raises:
        ValueError: a model that cannot be compressed.
    """
    layers, full = cache_layers(decoder_config(config))
    return len(full), len(layers)


def _results(model: Any) -> list[Result]:
    with steps() as progress:
        task, results = progress.add_task("checking", total=len(names())), []
        for result in run_checks(model):
            results.append(result)
            progress.update(task, advance=1, description=result.name)
    return results
