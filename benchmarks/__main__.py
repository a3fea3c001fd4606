"""The command `python -m benchmarks`."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import launches, merging, structure
from benchmarks.gpu import command as gpu
from benchmarks.gpu.run import FILE as GPU_FILE
from benchmarks.options import NAMES, Options, split_names
from wildcat_kv.cli import run_app
from wildcat_kv.cli.options import DropOption, RatioOption, share

app = typer.Typer(
    help="Measure the speed and memory of compressed caches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_HELP = {
    "prefill": "What compressing costs while a prompt is read.",
    "decode": "Tokens per second after a long context, from every cache.",
    "memory": "Bytes held, and the peak of a prefill.",
    "scaling": "Compression by tokens and by rank, on synthetic heads; its error on smooth data.",
    "generation": "A long generation under a constant budget.",
    "calls": "What the cache's own Python costs: calls and seconds of one decoded token, on a tiny model.",
    "choices": "A prefill, a token and bytes of every preset, beside the exact cache.",
    "all": "All of them, one after the other; half an hour to an hour.",
}


def _command(*names: str) -> Callable[..., None]:
    """Make a command that runs these benchmarks; all take the same options."""

    def run(
        output: Annotated[Path, typer.Option(help="Folder of the results; those of the same benchmark are replaced.")],
        dtype: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: float32 and bfloat16.")] = None,
        tokens: Annotated[
            list[int] | None,
            typer.Option(help="Length of prompt, synthetic data or generation, repeatable. Default: by benchmark."),
        ] = None,
        turns: Annotated[int, typer.Option(help="Turns to count.", min=1)] = 3,
        methods: Annotated[
            str | None,
            typer.Option(
                help="Of prefill and decode: names with commas between. Default: all. Memory has query_wildcat and "
                "auto of them, beside wildcat."
            ),
        ] = None,
        model: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file.")] = None,
        device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: cuda if there is one.")] = None,
        threads: Annotated[int | None, typer.Option(help="Of torch.", min=1)] = None,
        ratio: RatioOption = None,
        compression_ratio: DropOption = None,
        rows: Annotated[list[int] | None, typer.Option(help="Of decode: batch, repeatable. Default: 1 and 4.")] = None,
        steps: Annotated[int | None, typer.Option(help="Of decode: tokens a turn. Default: one fold.", min=1)] = None,
        bits: Annotated[list[int] | None, typer.Option(help="Of decode: bits of slots, too; repeatable.")] = None,
        max_tokens: Annotated[int, typer.Option(help="Of generation: most tokens to store in a layer.")] = 1024,
        prompt_tokens: Annotated[int, typer.Option(help="Of generation: tokens to start from.", min=1)] = 1000,
    ) -> None:
        options = Options(
            dtypes=tuple(dtype or Options.dtypes),
            tokens=tuple(tokens) if tokens else None,
            turns=turns,
            methods=tuple(split_names(methods)),
            model=model,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            threads=threads,
            ratio=share(ratio, compression_ratio).share or Options.ratio,
            max_tokens=max_tokens,
            prompt_tokens=prompt_tokens,
            rows=tuple(rows or Options.rows),
            steps=steps,
            bits=tuple(bits or ()),
        )
        from benchmarks.run import run as measure  # matplotlib and pandas take seconds to load

        measure(names, options, output, command=shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]))

    return run


for _name in NAMES:
    app.command(_name, help=_HELP[_name])(_command(_name))
app.command("all", help=_HELP["all"])(_command(*NAMES))
app.command("launches")(launches.show)
app.command("merging")(merging.main)
app.command("structure")(structure.show)
app.command("gpu")(gpu.main)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of results.")]) -> None:
    """Make the Markdown and the plots of a folder anew, from its JSON."""
    if (folder / GPU_FILE).is_file():
        from benchmarks.gpu.report import write_report as write_gpu_report

        write_gpu_report(folder)
        return
    from benchmarks.report import write_report
    from benchmarks.run import print_limits

    print_limits(write_report(folder))


def main() -> None:
    """Run the command; an error of the user's is one line on stderr, exit status 1."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    run_app(app, "python -m benchmarks")


if __name__ == "__main__":
    main()
