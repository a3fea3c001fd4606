"""The command `python -m benchmarks gpu`."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.gpu.plan import PARTS
from benchmarks.gpu.shapes import FULL, LLAMA, QWEN, SMALL, TINY, Shape

_SHAPES = {"llama": (LLAMA,), "qwen": (QWEN,), "both": (LLAMA, QWEN), "tiny": (TINY,)}


def main(
    output: Annotated[Path, typer.Option(help="Folder of the results; those of an earlier run are replaced.")],
    minutes: Annotated[float, typer.Option(help="Time for all; what does not fit is skipped.", min=0.1)] = 8.0,
    parts: Annotated[str, typer.Option(help=f"With commas between, of {', '.join(PARTS)}.")] = ",".join(PARTS),
    shape: Annotated[str, typer.Option(help="llama, qwen, both, or tiny for a rehearsal.")] = "both",
    layers: Annotated[int, typer.Option(help="Layers to build; the whole model is reckoned from them.", min=1)] = 4,
    model: Annotated[Path | None, typer.Option(help="Folder of a model with real weights, in place of shapes.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
    check: Annotated[
        list[Path] | None,
        typer.Option(help="Script of the part checks, repeatable; run as SCRIPT OUT.json SECONDS."),
    ] = None,
    plots: Annotated[bool, typer.Option(help="Draw the plots at the end.")] = True,
) -> None:
    """Measure a GPU within a few minutes: correctness, time, memory.

    Weights are random, which is honest for time and memory and worthless for quality. The most important cases come
    first. Nothing is lost if the run is ended: the JSON is written with every row.
    """
    chosen = _checked(parts, shape, [*(check or ()), *((model,) if model else ())])
    from transformers import AutoConfig

    from benchmarks.gpu.lab import Lab
    from benchmarks.gpu.plan import plan
    from benchmarks.gpu.report import write_report
    from benchmarks.gpu.run import Journal, about, deadline, measure

    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sizes = SMALL if shape == "tiny" else FULL
    shapes = _SHAPES[shape] if model is None else (Shape.of(AutoConfig.from_pretrained(model), model.name),)
    # Layers that are run: of a real model all, of a random one no more than the shape has.
    built = shapes[0].layers if model is not None else min(layers, *(each.layers for each in shapes), layers)
    lab = Lab(target, sizes, layers, deadline(minutes), None if model is None else str(model))
    output.mkdir(parents=True, exist_ok=True)
    options = {"minutes": minutes, "parts": chosen, "shape": shape, "built": built, "model": str(model or "")}
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    journal = Journal(output, **about(command, options, target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights and long texts; `Lab.stalls` lets its own through
        try:
            measure(plan(shapes, sizes, chosen, check or ()), lab, journal)
        finally:
            journal.finish()
            write_report(output, plots=plots)


def _checked(parts: str, shape: str, paths: list[Path]) -> list[str]:
    """Refuse options before any work; give the parts.

    Raises:
        ValueError: names the option, its value and the choice.
    """
    chosen = [name.strip() for name in parts.split(",") if name.strip()]
    for name in chosen:
        if name not in PARTS:
            raise ValueError(f"parts={name!r}: no such part; there are {', '.join(PARTS)}")
    if shape not in _SHAPES:
        raise ValueError(f"shape={shape!r}: no such shape; there are {', '.join(_SHAPES)}")
    for path in paths:
        if not path.exists():
            raise ValueError(f"{str(path)!r}: no such file or folder")
    return chosen
