"""Plots of a run on a GPU, made from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from benchmarks.gpu import figures
from benchmarks.gpu.figures import Row, pick
from eval.style import BLUE, COLOURS, DARK, GREY, ORANGE, house_style, save

_RANDOM = "random weights: honest for time and memory, worthless for quality"


def save_plots(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots of what was measured; return the files."""
    rows, layers = record["rows"], int(record["options"]["built"])
    subject = f"{record['device']}; " + (str(record["options"]["model"]) or _RANDOM)
    paths = []
    with house_style():
        canvases = {
            "prefill": _prefill(rows, layers),
            **_decodings(rows, layers),
            "kernels": _kernels(rows),
            "fold": _lines(pick(rows, part="fold"), "cache", "one layer's fold, a quarter kept"),
            "attention": _lines(pick(rows, part="attention"), "attention", "attention of all to all"),
        }
        for name, canvas in canvases.items():
            if canvas is not None:
                canvas.text(0.01, 0.005, subject, fontsize=7, color=GREY, va="bottom")
                paths.append(folder / f"gpu-{name}.png")
                save(canvas, paths[-1])
    return paths


def _prefill(rows: Sequence[Row], layers: int) -> Canvas | None:
    """Draw the folds' shares beside their limits."""
    found = [each for each in figures.prefills(rows, layers) if each.row["cache"] != figures.EXACT]
    names = [f"{each.row['cache']}, {each.row['tokens']:,}\n{each.row['shape']}" for each in found]
    values = [100 * each.share for each in found]
    if not found:
        return None
    canvas, axes = _bars(names, values, [_ours(each.row["cache"]) for each in found], "{:.1f} %")
    limits = [figures.fold_limit(each.row) for each in found]
    _marks(canvas, axes, limits, "limit")
    axes.set_xlabel("folds, % of the rest of the same prefill (lower is better)")
    return canvas


def _decodings(rows: Sequence[Row], layers: int) -> dict[str, Canvas | None]:
    """Draw each shape's settings that differ from its first in one thing at most; the table has all."""
    canvases: dict[str, Canvas | None] = {}
    every = [each for each in figures.decodings(rows, layers) if each.speed and each.row["cache"] != figures.DYNAMIC]
    for shape in dict.fromkeys(each.row["shape"] for each in every):
        own = [each for each in every if each.row["shape"] == shape]
        first = own[0].row
        near = [each for each in own if sum(each.row[name] != first[name] for name in ("tokens", "kept", "rows")) <= 1]
        canvases["decoding" if not canvases else f"decoding-{shape.lower()}"] = _decoding(near)
    return canvases


def _decoding(found: Sequence[figures.Decoding]) -> Canvas:
    """Draw the speeds over `DynamicCache`'s, beside what the bytes would give."""
    names = []
    for each in found:
        row = each.row
        names.append(
            f"{row['cache']}\n{row['shape']}, {row['tokens']:,} to {100 * row['kept']:g} %, {figures.rows_of(row)}"
        )
    canvas, axes = _bars(
        names, [each.speed or 0 for each in found], [_ours(each.row["cache"]) for each in found], "{:.2f}"
    )
    _marks(canvas, axes, [each.bytes_ratio for each in found], "as many times fewer bytes")
    axes.axvline(1, color=DARK, linewidth=0.8)
    axes.set_xlabel("speed of decoding over DynamicCache's, whole model reckoned by layer")
    return canvas


def _kernels(rows: Sequence[Row]) -> Canvas | None:
    """Draw each kernel's rate over that of a copy."""
    rate = figures.bandwidth(rows)
    found = [row for row in pick(rows, part="kernels") if row["kernel"] != "copy"]
    if not found or rate is None:
        return None
    names = [f"{row['kernel']}\n{row['shape']}, {figures.rows_of(row)}, {row['stored']:,} entries" for row in found]
    values = [row["bytes"] / figures.own_seconds(row) / rate for row in found]
    canvas, axes = _bars(names, values, [_ours(row["kernel"]) for row in found], "{:.2f}")
    _marks(canvas, axes, [1.0] * len(found), "a copy")
    axes.set_xlabel("bytes read a second, over the rate of a copy (higher is better)")
    return canvas


def _lines(rows: Sequence[Row], label: str, title: str) -> Canvas | None:
    """Draw seconds by tokens, both by powers, a line for each contender."""
    if not rows:
        return None
    canvas = Canvas(figsize=(6.4, 4.2), layout="constrained")
    axes = canvas.subplots()
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for number, name in enumerate(dict.fromkeys(row[label] for row in rows)):
        for shape, style in zip(shapes, ("-", "--", ":"), strict=False):
            own = sorted(pick(rows, **{label: name, "shape": shape}), key=lambda row: row["tokens"])
            places, seconds = [row["tokens"] for row in own], [row["seconds"] for row in own]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(places, seconds, style, marker="o", markersize=3, color=colour, label=f"{name}, {shape}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({row["tokens"] for row in rows})
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("seconds")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)
    canvas.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))  # type: ignore[union-attr,call-arg]
    return canvas


def _bars(names: Sequence[str], values: Sequence[float], colours: Sequence[str], shown: str) -> tuple[Canvas, Axes]:
    """Draw bars, one below the other."""
    canvas = Canvas(figsize=(7.4, 1.3 + 0.34 * len(names)), layout="constrained")
    axes = canvas.subplots()
    bars = axes.barh(range(len(names)), values, color=colours, height=0.7)
    axes.bar_label(bars, [shown.format(value) for value in values], padding=3, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    bottom = 0.25 / (1.3 + 0.34 * len(names))
    canvas.get_layout_engine().set(rect=(0, bottom, 1, 1 - 2 * bottom))  # type: ignore[union-attr,call-arg]
    return canvas, axes


def _marks(canvas: Canvas, axes: Axes, values: Sequence[float | None], name: str) -> None:
    """Mark a value on every bar that has one, with a legend above."""
    label: str | None = name
    for place, value in enumerate(values):
        if value is not None:
            axes.plot([value] * 2, [place - 0.4, place + 0.4], color=ORANGE, linewidth=2, label=label)
            label = None
    if label is None:
        canvas.legend(loc="upper right", frameon=False, fontsize=8)


def _ours(name: str) -> str:
    return BLUE if name.startswith(("wildcat", "query_wildcat")) else GREY
