"""All cases, in the order in which they are worth having."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import batches, compiled, correctness, decoding, kernels, prefill
from benchmarks.gpu.decoding import Setting
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.shapes import Shape, Sizes

PARTS = ("correctness", "prefill", "decoding", "kernels", "compiled", "fold", "attention", "batch", "checks")
_CHECK_SECONDS = 60.0

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        part: part of the command that it belongs to.
        labels: labels of all its rows.
        rank: place in the order; those of the same rank come as they stand in the plan.
        seconds: time that must be left for it to begin.
        run: measures, and yields a row for each thing measured.
    """

    part: str
    labels: dict[str, Any]
    rank: int
    seconds: float
    run: Callable[[Lab], Rows] = field(repr=False)


def plan(shapes: Sequence[Shape], sizes: Sizes, parts: Sequence[str], checks: Sequence[Path]) -> list[Case]:
    """List the cases of some parts, the most important ones first; the first shape comes before the others."""
    cases = [*_correctness(), *_checks(checks)]
    for place, shape in enumerate(shapes):
        cases += _of_shape(shape, sizes, 12 * place)
    chosen = [case for case in cases if case.part in parts]
    return sorted(chosen, key=lambda case: case.rank)


def _correctness() -> list[Case]:
    """List what is compared with references."""

    def case(rank: int, seconds: float, run: Callable[[Lab], Rows]) -> Case:
        return Case("correctness", {}, rank, seconds, run)

    return [
        case(0, 10, correctness.ratio_one),
        case(0, 5, correctness.attention),
        case(0, 5, correctness.folded),
        case(0, 10, partial(correctness.beside_cpu, every=False)),
        case(5, 10, partial(correctness.graphs, inductor=False)),
        case(5, 5, correctness.padding),
        case(5, 10, correctness.beams),
        case(33, 40, partial(correctness.graphs, inductor=True)),
        case(90, 30, partial(correctness.beside_cpu, every=True)),
    ]


def _of_shape(shape: Shape, sizes: Sizes, later: int) -> list[Case]:
    """List what is measured on one model."""

    def case(part: str, rank: int, seconds: float, run: Callable[[Lab], Rows], **labels: Any) -> Case:
        return Case(part, {"shape": shape.name, **labels}, rank + later, seconds, run)

    cases = [case("kernels", 3, 1, kernels.copy_rate)] if not later else []
    for place, tokens in enumerate(sizes.prefill):
        rank = (1, 8, 12)[place]
        cases.append(case("prefill", rank, 8, partial(prefill.prefill, shape=shape, tokens=tokens), tokens=tokens))
    first = sizes.prefill[0]
    cases.append(
        case("prefill", 9, 5, partial(prefill.stalls, shape=shape, tokens=first), tokens=first, counts="stalls")
    )
    for setting, rank in _settings(shape, sizes):
        labels = {"tokens": setting.tokens, "kept": setting.kept, "rows": setting.rows}
        cases.append(case("decoding", rank, 8, partial(decoding.decoding, setting=setting), **labels))
    main = Setting(shape, sizes.decoding[0], sizes.kept[0], sizes.rows[0])
    labels = {"tokens": main.tokens, "kept": main.kept, "rows": main.rows}
    cases.append(case("compiled", 7, 25, partial(compiled.compiled, setting=main, inductor=False), **labels))
    cases.append(case("compiled", 32, 60, partial(compiled.compiled, setting=main, inductor=True), **labels))
    for place, (rows, stored) in enumerate(sizes.kernels):
        run = partial(kernels.attention_of_a_token, shape=shape, rows=rows, stored=stored)
        cases.append(case("kernels", 3 if place < 2 else 10, 4, run, rows=rows, stored=stored))
    for tokens in sizes.folds:
        rank = 6 if tokens <= sizes.decoding[0] else 16 if tokens <= 2**17 else 21
        cases.append(case("fold", rank, 4, partial(kernels.folds, shape=shape, tokens=tokens), tokens=tokens))
    for tokens in sizes.attention:
        cases.append(
            case("attention", 15, 4, partial(kernels.attention_of_all, shape=shape, tokens=tokens), tokens=tokens)
        )
    cases.append(case("batch", 18, 40, partial(batches.largest_batch, shape=shape), tokens=sizes.batch))
    return cases


def _settings(shape: Shape, sizes: Sizes) -> list[tuple[Setting, int]]:
    """List the settings of decoding with their ranks: the first length, share and batch first."""
    found = []
    for tokens in sizes.decoding:
        for kept in sizes.kept:
            for rows in sizes.rows:
                far = (tokens != sizes.decoding[0], kept != sizes.kept[0], rows != sizes.rows[0])
                found.append((Setting(shape, tokens, kept, rows), (2, 11, 19, 25)[sum(far)]))
    return found


def _checks(paths: Sequence[Path]) -> list[Case]:
    return [Case("checks", {"file": path.name}, 4, 20, partial(_script, path=path)) for path in paths]


def _script(lab: Lab, path: Path) -> Rows:
    """Run `python SCRIPT OUT.json SECONDS`, or `python SCRIPT OUT.json tiny` on the CPU, in a process of its own.

    Its rows are those of the JSON that it writes, {"rows": [...]}, or the JSON objects that it prints, one a line. A
    kernel that reads beyond its memory ends the process that it runs in, and nothing else.
    """
    limit = max(5.0, min(_CHECK_SECONDS, lab.left))
    error = ""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        last = "tiny" if lab.device.type == "cpu" else f"{0.7 * limit:.0f}"
        places = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        with (Path(folder) / "printed").open("w+", encoding="utf-8") as printed:
            command = [sys.executable, str(path), str(out), last]
            try:
                child = subprocess.run(
                    command, stdout=printed, stderr=printed, timeout=limit, env=os.environ | {"PYTHONPATH": places}
                )
                error = f"exit status {child.returncode}" if child.returncode else ""
            except subprocess.TimeoutExpired:
                error = f"cut off after {limit:.0f} s"
            printed.seek(0)
            text = printed.read()
        written = _written(out)
    yield from written
    if not written or error:
        yield from _objects(text, rows=not written)
    if error:
        yield {"error": error}


def _written(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a script's file; none where it has written no whole one."""
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError):
        return []


def _objects(text: str, rows: bool) -> Rows:
    """Read the lines that are JSON objects, as rows if asked; the last others become one row."""
    others = []
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict) and rows:
            yield found
        elif not isinstance(found, dict) and line.strip():
            others.append(line)
    if others:
        yield {"printed": "\n".join(others[-40:])[-1500:]}
