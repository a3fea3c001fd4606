"""The command `python -m eval.kvpress`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from wildcat_kv.cli import run_app

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def compare(
    reference: Annotated[Path, typer.Option(help="Python of the environment with kvpress and optimum-quanto.")],
    output: Annotated[Path, typer.Option(help="Folder of the results.")],
    model: Annotated[str | None, typer.Option(help="Name or folder. Default: SmolLM2-135M-Instruct.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a text.", min=256)] = 1500,
    needles: Annotated[int, typer.Option(help="Essays with four numbers each.", min=1)] = 10,
    lookups: Annotated[int, typer.Option(help="Texts of six forms with three questions each.", min=1)] = 6,
    threads: Annotated[int, typer.Option(help="Of torch, on both sides.", min=1)] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
) -> None:
    """Measure this package beside kvpress: the same texts, questions, answers and bytes."""
    from eval.kvpress.run import Plan, run  # it takes seconds to load, and --help needs none of it

    plan = Plan(reference, model, length, needles, lookups, threads)
    run(plan, output, command=shlex.join(["python", "-m", "eval.kvpress", *sys.argv[1:]]), resume=resume)


if __name__ == "__main__":
    run_app(app, "python -m eval.kvpress")
