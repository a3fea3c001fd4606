"""Plots of attention methods: error over time, error over the number of keys, and a bound over the rank."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from eval.attention.views import view_figures
from eval.style import COLOURS, GREY, GRID, house_style, save

_MARKERS = "os^vDP<>Xph8dH*"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_LEAST = 1e-9  # an error that a logarithmic axis can show


def save_plots(manifest: dict[str, Any], frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write every plot that the records allow, with the same bytes for the same records.

    `TASK.png`: error over time, a panel for each group. `TASK-growth-KIND.png`: error and time over the number of keys,
    where there are three or more. `guarantee.png`: bound, estimate and error over the slots.
    `views-GROUP-INPUT.png`: what the model saw by every method.

    Args:
        manifest: description of the run.
        frame: records of the run, one a row.
        folder: folder to write to; made if it is not there.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with house_style():
        for task, about in manifest["tasks"].items():
            rows = frame[frame["task"] == task]
            figures = _figures(task, about, rows, manifest["methods"])
            views = view_figures(folder, rows["group"].unique(), rows["input"].unique(), manifest["methods"])
            for name, figure in (*figures, *views):
                paths.append(folder / f"{name}.png")
                save(figure, paths[-1])
    return paths


def _figures(task: str, about: dict[str, Any], rows: pd.DataFrame, methods: list[str]) -> Iterator[tuple[str, Figure]]:
    if rows.empty:
        return
    if task == "guarantee":
        yield task, _guarantee(about, rows)
        return
    shown = rows[["group", "n", "method"]].assign(
        kind=rows["group"].map(_kind), time=rows["shares"].map(lambda shares: shares["attention"])
    )
    errors = {}
    for name, metric in about["metrics"].items():
        rising, title = metric["rising"], metric["title"]
        errors[f"1 - {title}" if rising else title] = rows["scores"].map(
            lambda scores, name=name, rising=rising: max(_LEAST, 1 - scores[name] if rising else scores[name])
        )
    shown = shown.assign(**errors)
    looks = {name: _look(i) for i, name in enumerate(methods)}
    yield task, _tradeoff(shown, looks, next(iter(errors)))
    for kind, part in shown.groupby("kind", sort=False):
        if part["n"].nunique() >= 3:
            name = re.sub(r"[^a-z0-9]+", "-", str(kind).lower()).strip("-")
            yield f"{task}-growth-{name}", _growth(part, looks, list(errors))


def _look(number: int) -> dict[str, Any]:
    """Choose colour, marker and dashes: methods are told apart without colour, too."""
    turn, colour = divmod(number, len(COLOURS))
    marker, dashes = _MARKERS[number % len(_MARKERS)], _DASHES[turn % len(_DASHES)]
    return {"color": COLOURS[colour], "marker": marker, "linestyle": dashes}


def _kind(group: str) -> str:
    """Name a group without its number of keys.

    Example:
        >>> _kind("Gaussian, n 4,096, d 64"), _kind("896 px, 4,097 tokens")
        ('Gaussian, d 64', 'pictures')
    """
    return "pictures" if " px" in group else re.sub(r", n [\d,]+\d", "", group)


def _tradeoff(rows: pd.DataFrame, looks: dict[str, dict[str, Any]], label: str) -> Figure:
    """Draw error over time, a panel for each group; the best are down and left."""
    groups = list(rows["group"].unique())
    figure, panels = _panels(len(groups))
    for axes, group in zip(panels, groups, strict=False):
        for method, own in rows[rows["group"] == group].groupby("method", sort=False):
            axes.plot(own["time"].mean(), own[label].mean(), **looks[str(method)], label=str(method))
        axes.axvline(1.0, color=GREY, linewidth=0.8, linestyle=":")
        _dress(axes, group, "attention's time, exact = 1", label)
    _legend(figure, panels[0])
    return figure


def _growth(rows: pd.DataFrame, looks: dict[str, dict[str, Any]], labels: list[str]) -> Figure:
    """Draw errors and time over the number of keys."""
    figure, panels = _panels(len(labels) + 1)
    titles = {**dict(zip(labels, labels, strict=True)), "time": "attention's time, exact = 1"}
    for axes, (field, title) in zip(panels, titles.items(), strict=False):
        for method, own in rows.groupby("method", sort=False):
            mean = own.groupby("n")[field].mean()
            axes.plot(mean.index, mean, **looks[str(method)], markersize=4, label=str(method))
        _dress(axes, str(rows["kind"].iloc[0]), "keys", title)
    _legend(figure, panels[0])
    return figure


def _guarantee(about: dict[str, Any], rows: pd.DataFrame) -> Figure:
    """Draw bound, estimate and error over the share of slots."""
    groups = list(rows["group"].unique())
    figure, panels = _panels(len(groups))
    for axes, group in zip(panels, groups, strict=False):
        own = rows[rows["group"] == group].assign(slots=rows["shares"].map(lambda shares: shares["slots"]))
        for (name, metric), colour in zip(about["metrics"].items(), COLOURS, strict=False):
            scores = own.assign(score=own["scores"].map(lambda found, name=name: max(_LEAST, found[name])))
            mean = scores.groupby("slots")["score"].mean()
            axes.plot(mean.index, mean, "o-", color=colour, markersize=4, label=metric["title"])
        _dress(axes, group, "slots over keys", "error over the largest value")
    _legend(figure, panels[0])
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = 2 if count in (2, 4) else min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(1.0 + 3.4 * max(2, columns), 0.8 + 2.8 * rows), layout="constrained")
    found = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in found[count:]:
        axes.set_visible(False)
    return figure, found


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        decades = abs(float(np.diff(np.log10(axis.get_view_interval()))[0]))
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,)))
        axis.set_major_formatter(lambda number, _: f"{number:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID)
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7)
