"""The command `python -m eval`."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from wildcat_kv.cli import run_app
from wildcat_kv.config import share_kept

app = typer.Typer(
    help="Measure how much accuracy methods keep at which budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_LIMIT = "Most samples of a task, of each of its lengths and depths; wins over all limits of the file."
_BASELINE = "Method that all others are compared with, such as exact. Default: wildcat."
_PROBE = "Compare the code of each run's commit with today's instead, on a short text; reads no samples."


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, such as configs/eval/smoke.yaml.")],
    model: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file, instead of the file's.")] = None,
    methods: Annotated[str | None, typer.Option(help="Names with commas between, or all.")] = None,
    ratios: Annotated[str | None, typer.Option(help="Shares to keep, with commas between.")] = None,
    compression_ratios: Annotated[str | None, typer.Option(help="Shares to drop, instead of ratios.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Names with commas between.")] = None,
    limit: Annotated[int | None, typer.Option(help=_LIMIT, min=1)] = None,
    baseline: Annotated[str | None, typer.Option(help=_BASELINE)] = None,
    protocol: Annotated[str | None, typer.Option(help="context-only or full-prompt.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local files of benchmarks.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: cuda if there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results. Default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
) -> None:
    """Run an evaluation; records, tables, plots and a report go to the output folder."""
    from eval.config import read_config  # lm-eval takes seconds to load, and --help needs none of it
    from eval.run import run as measure

    given = {
        "model": model,
        "methods": _names(methods),
        "ratios": _shares(ratios, compression_ratios),
        "tasks": _names(tasks),
        "limit": limit,
        "baseline": baseline,
        "protocol": protocol,
        "data_dir": data_dir,
        "device": device,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    chosen = read_config(config, **changes)
    folder = output or Path("runs") / chosen.name
    measure(chosen, folder, command=shlex.join(["python", "-m", "eval", *sys.argv[1:]]), resume=resume)


@app.command()
def attention(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, such as configs/attention/smoke.yaml.")],
    inputs: Annotated[int | None, typer.Option(help="Most inputs of every task, over the file's.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results. Default: runs/attention/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
) -> None:
    """Measure methods of attention in one layer, and in encoders that need no cache."""
    from eval.attention.config import read_config
    from eval.attention.run import run as measure

    chosen = read_config(config, **({} if inputs is None else {"inputs": inputs}))
    folder = output or Path("runs/attention") / chosen.name
    measure(chosen, folder, command=shlex.join(["python", "-m", "eval", *sys.argv[1:]]), resume=resume)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    baseline: Annotated[str | None, typer.Option(help=_BASELINE)] = None,
) -> None:
    """Make tables, plots and report of a run anew, and print the report's path."""
    from eval.config import check_baseline
    from eval.records import Folder
    from eval.report import write_report

    found = Folder(folder)
    manifest, records = found.manifest, found.records()
    if "tasks" in manifest:  # of methods of attention, which have no baseline
        from eval.attention.report import write_report as write_tables

        print(write_tables(manifest, records, folder))
        return
    if baseline is not None:
        check_baseline(baseline, [record["method"] for record in records])
        manifest = {**manifest, "config": {**(manifest.get("config") or {}), "baseline": baseline}}
    print(write_report(manifest, records, folder))


@app.command()
def verify(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs, such as results/eval/smoke.")],
    samples: Annotated[int, typer.Option(help="Samples of each task to make anew.", min=1)] = 2,
    probe: Annotated[bool, typer.Option("--probe", help=_PROBE)] = False,
) -> None:
    """Make a few samples of finished runs anew, or probe their code, and note in run.json that all agrees.

    The exit status is 0 if all runs were verified and agree.
    """
    from eval.probe import probe_all
    from eval.verify import verify_all

    def show(text: str) -> None:
        print(text, flush=True)

    agree = probe_all(folders, show) if probe else verify_all(folders, samples, show)
    raise typer.Exit(int(not agree))


@app.command()
def archive(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
) -> None:
    """Make finished runs small: pack the samples, remove what `report` draws anew from them."""
    from eval.archive import archive_run

    for folder in folders:
        print(f"{folder}: {archive_run(folder):,} bytes")


@app.command()
def leaderboard(
    folder: Annotated[Path, typer.Argument(help="Folder of a run with tasks of RULER, finished or not.")],
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/results_lb"),
) -> None:
    """Write RULER's results as the reference library (kvpress) does, for its leaderboard."""
    from eval.leaderboard import write_leaderboard

    for place in write_leaderboard(folder, output):
        print(place)


@app.command()
def compare(
    method: Annotated[str, typer.Argument(help="The one to compare with all others.")],
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs of one model, on the same samples.")],
) -> None:
    """Print one method's paired differences to all others, over several runs."""
    from eval.compare import compare as differences

    table = differences(method, folders)
    print(table.to_markdown(index=False, floatfmt=".3f", missingval=""))


@app.command(name="tasks")
def list_tasks(
    contains: Annotated[str, typer.Argument(help="Only names that contain this.")] = "",
) -> None:
    """List the tasks: ours, and those of lm-eval with their groups."""
    from eval.config import OURS
    from eval.lm_eval_tasks import known_tasks

    for name in [*OURS, *known_tasks()]:
        if contains in name:
            print(name)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _shares(ratios: str | None, compression_ratios: str | None) -> list[float] | None:
    """Read shares to keep, given as such or as shares to drop; None for the file's own."""
    if ratios is not None and compression_ratios is not None:
        raise ValueError(f"ratios={ratios!r} and compression_ratios={compression_ratios!r}: give one of them")
    if compression_ratios is None:
        return _numbers("ratios", ratios)
    return [share_kept(share) for share in _numbers("compression_ratios", compression_ratios) or []]


def _numbers(name: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise ValueError(f"{name}={text!r}: give numbers with commas between, such as 0.25,0.1") from None


def main() -> None:
    """Run the command; an error of the user's is one line on stderr, exit status 1."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    run_app(app, "python -m eval")


if __name__ == "__main__":
    main()
