"""Plots of a run: accuracy against kept share, needles by depth and length, errors by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

from eval.cells import BASELINE, EXACT
from eval.frontier import differ_in_bytes, frontier_points
from eval.frontier_plot import frontier_plot
from eval.style import COLOURS, DARK, GREY, GRID, MISSING, house_style, save
from eval.summary import Budget, find_budgets, find_methods, score_frame
from eval.tables import unit_and_direction

FRONTIER = "frontier"  # name of that plot

# Told apart without colour, too.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_MARKERS = "os^vDP<>Xph8dH*"
_LEFT, _RIGHT = 0.1, 0.74  # of the axes, in a figure that has its labels on the right


def save_plots(manifest: dict[str, Any], records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write every plot that the records allow, with the same bytes for the same records.

    `accuracy-TASK.png` for every task; `TASK-BUDGET.png` for tasks with depths; `layers-BUDGET.png` where records have
    layers; `frontier.png` where cells differ in bytes. A budget is `0.25`, or `1024-tokens`.

    Args:
        manifest: description of the run.
        records: records of the run.
        folder: to write to; made if it is not there.

    Returns:
        The files, in that order.

    Raises:
        ValueError: no records, or a task that the manifest does not describe.
    """
    frame, methods = score_frame(manifest, records), find_methods(manifest, records)
    budgets = find_budgets(records) or [Budget()]
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure | None] = {}
    with house_style():
        tasks = {}
        for task in frame["task"].unique():
            part = frame[frame["task"] == task]
            metric = next(name for name in manifest["metrics"][task] if name in set(part["metric"]))
            tasks[task] = (part[part["metric"] == metric], metric, manifest["metrics"][task][metric])
        for task, (part, metric, meaning) in tasks.items():
            figures[f"accuracy-{task}"] = accuracy_plot(part, methods, task, _label(metric, meaning))
        for task, (part, metric, meaning) in tasks.items():
            for budget in budgets:
                figures[f"{task}-{budget.slug}"] = needle_plot(
                    part[part["budget"].isin(["", str(budget)])],
                    methods,
                    f"{task}, {budget}",
                    _label(metric, meaning),
                    lower=not meaning["higher_is_better"],
                    digits=meaning["digits"],
                )
        for budget in budgets:
            figures[f"layers-{budget.slug}"] = layer_plot(manifest, records, budget)
        points = frontier_points(manifest, records)
        if differ_in_bytes(points):
            dtype = manifest["model"].get("dtype") or ""
            figures[FRONTIER] = frontier_plot(points, title=manifest["model"]["name"], bytes_of=dtype)
        paths = []
        for name, figure in figures.items():
            if figure is not None:
                paths.append(folder / file_name(name))
                save(figure, paths[-1])
    return paths


def file_name(name: str) -> str:
    """Name a plot's file, such as accuracy-needle.png for accuracy-needle."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name) + ".png"


def accuracy_plot(part: pd.DataFrame, methods: Sequence[str], task: str, label: str) -> Figure | None:
    """Draw a task's score against the share of the tokens kept, one line a method.

    Args:
        part: rows of `score_frame`, one task and metric.
        methods: methods of the run, in order; one looks the same in all plots of a run.
        task: name, for the title.
        label: name of the scores, with unit and direction.

    Returns:
        The figure; None where no score is finite.
    """
    part = part[part["score"].map(math.isfinite)]
    means = part.groupby(["method", "budget"], sort=False)[["kept", "score"]].mean().reset_index()
    if means.empty:
        return None
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    figure.subplots_adjust(left=_LEFT, right=_RIGHT, bottom=0.11, top=0.92)
    ends = []
    for method in _last_on_top(methods):
        line = means[means["method"] == method].sort_values("kept")
        if line.empty:
            continue
        style = _style(method, methods)
        if method == EXACT:  # whatever the others keep, it keeps everything
            axes.axhline(line["score"].iloc[0], **style)
            ends.append((method, None, line["score"].iloc[0], style))
            continue
        axes.plot(line["kept"], line["score"], **style)
        ends.append((method, line["kept"].iloc[-1], line["score"].iloc[-1], style))
    kept = means.loc[means["method"] != EXACT, "kept"]
    if len(kept):
        room = 0.06 * (kept.max() - kept.min()) or 0.1 * kept.max() or 0.1
        axes.set_xlim(kept.min() - room, kept.max() + room)
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axes.set_xlabel("kept (stored tokens of seen)")
    axes.set_ylabel(label)
    axes.set_title(task, loc="left", fontsize=11)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    _label_lines(axes, ends)
    return figure


def needle_plot(
    part: pd.DataFrame, methods: Sequence[str], title: str, label: str, *, lower: bool = False, digits: int = 2
) -> Figure | None:
    """Draw scores by depth and length, one panel a method, in the same colours; bright is good.

    Args:
        part: rows of `score_frame`, one task, metric and budget, and the exact cache.
        methods: methods of the run, in order.
        title: title of the figure.
        label: name of the scores, with unit and direction.
        lower: True if lower is better.
        digits: digits of the numbers in small panels; large ones have no numbers.

    Returns:
        The figure; None where there are no depths, or no score is finite.
    """
    part = part[part["depth"].notna() & part["length"].notna() & part["score"].map(math.isfinite)]
    if part.empty:
        return None
    depths, lengths = sorted(part["depth"].unique()), sorted(part["length"].unique())
    shown = [method for method in methods if method in set(part["method"])]
    grids = {
        method: part[part["method"] == method]
        .pivot_table(index="depth", columns="length", values="score", aggfunc="mean")
        .reindex(index=depths, columns=lengths)
        .to_numpy(dtype=float)
        for method in shown
    }
    low = min(np.nanmin(grid) for grid in grids.values())
    high = max(np.nanmax(grid) for grid in grids.values())
    columns = min(6, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(max(4.5, 1.6 * columns + 1.4), 1.6 * rows + 1.1), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    colours = matplotlib.colormaps["viridis_r" if lower else "viridis"].with_extremes(bad=MISSING)
    for panel in panels.flat[len(shown) :]:
        panel.remove()
    used = list(panels.flat[: len(shown)])
    for at, panel in enumerate(used):
        image = panel.imshow(grids[shown[at]], vmin=low, vmax=high, cmap=colours, aspect="auto")
        panel.set_title(shown[at], fontsize=8, fontweight="bold" if shown[at] == BASELINE else "normal", pad=3)
        panel.set_xticks(range(len(lengths)), [_thousands(length) for length in lengths], fontsize=7)
        panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=7)
        panel.tick_params(length=0)
        panel.label_outer()
        if at + columns >= len(shown):
            panel.tick_params(labelbottom=True)  # where the row below it is not full
        if grids[shown[at]].size <= 40:
            _write_values(panel, grids[shown[at]], image, digits)
    bar = figure.colorbar(image, ax=used, pad=0.015)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if lower:
        bar.ax.invert_yaxis()
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.supxlabel("length (tokens)", fontsize=8)
    figure.supylabel("depth", fontsize=8)
    return figure


def layer_plot(manifest: dict[str, Any], records: Sequence[dict[str, Any]], budget: Budget) -> Figure | None:
    """Draw each method's error by layer, averaged over heads and samples, and WildCat's by head.

    Args:
        manifest: description of the run.
        records: of the run; those of tasks with `layers` count.
        budget: the cells to show. The exact cache is the reference of such errors, and is left out.

    Returns:
        The figure, with a panel for every task and error; None where there are none.
    """
    methods = find_methods(manifest, records)
    found: dict[tuple[str, str], dict[str, list[np.ndarray]]] = {}
    for record in records:
        if record["method"] != EXACT and (record["ratio"], record["max_tokens"]) == (budget.ratio, budget.max_tokens):
            for name, layers in (record.get("layers") or {}).items():
                grids = found.setdefault((record["task"], name), {})
                grids.setdefault(record["method"], []).append(_rectangle(layers))
    means = {key: {method: _mean_of(found[key][method]) for method in methods if method in found[key]} for key in found}
    means = {key: errors for key, errors in means.items() if any(np.isfinite(e).any() for e in errors.values())}
    if not means:
        return None
    heights = [height for errors in means.values() for height in ([4.4, 2.2] if BASELINE in errors else [4.4])]
    figure = Figure(figsize=(8, sum(heights) + 0.6))
    panels = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    figure.subplots_adjust(
        left=_LEFT, right=_RIGHT, top=1 - 0.4 / figure.get_figheight(), bottom=0.5 / figure.get_figheight(), hspace=0.28
    )
    for (task, name), errors in means.items():
        label = _label(name, manifest["metrics"].get(task, {}).get(name))
        axes = panels.pop(0)
        _draw_layers(axes, errors, methods)
        band = f"; band: {BASELINE}'s heads" if BASELINE in errors else ""
        axes.set_title(f"{task}, {budget}: mean over heads and samples{band}", loc="left", fontsize=11)
        axes.set_ylabel(label)
        if BASELINE in errors:
            _draw_heads(figure, panels.pop(0), errors[BASELINE], label)
    return figure


def _draw_layers(axes: Axes, errors: dict[str, np.ndarray], methods: Sequence[str]) -> None:
    """Draw one line a method; the band is from WildCat's lowest head to its highest."""
    lines = {method: _over_heads(np.nanmean, errors[method]) for method in _last_on_top(methods) if method in errors}
    positive = np.concatenate([line[np.isfinite(line)] for line in lines.values()])
    if len(positive) and positive.min() > 0 and positive.max() > 20 * positive.min():
        axes.set_yscale("log")
    ends: list[tuple[str, float | None, float, dict[str, Any]]] = []
    for method, line in lines.items():
        style = _style(method, methods)
        layers = np.arange(len(line))
        axes.plot(
            layers,
            line,
            **style | {"linewidth": style["linewidth"] - 0.4, "markersize": 4},
            markevery=(len(ends) % 3, 3),
        )
        if method == BASELINE:
            low, high = (_over_heads(end, errors[method]) for end in (np.nanmin, np.nanmax))
            axes.fill_between(layers, low, high, color=style["color"], alpha=0.1, linewidth=0)
        known = np.flatnonzero(np.isfinite(line))
        if len(known):
            ends.append((method, float(known[-1]), float(line[known[-1]]), style))
    axes.set_xlim(-0.5, max(map(len, lines.values())) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    _label_lines(axes, ends)


def _draw_heads(figure: Figure, axes: Axes, errors: np.ndarray, label: str) -> None:
    """Draw the errors of every head of every layer."""
    colours = matplotlib.colormaps["viridis_r"].with_extremes(bad=MISSING)
    image = axes.imshow(errors.T, aspect="auto", cmap=colours, interpolation="nearest")
    axes.set_title(f"{BASELINE}, by head", loc="left", fontsize=10)
    axes.set_xlabel("layer")
    axes.set_ylabel("head")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    box = axes.get_position()
    bar = figure.colorbar(image, cax=figure.add_axes((_RIGHT + 0.015, box.y0, 0.018, box.height)))
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _label_lines(axes: Axes, ends: Sequence[tuple[str, float | None, float, dict[str, Any]]]) -> None:
    """Write each line's name on the right, as near to its end as the others allow.

    Args:
        axes: with all lines drawn.
        ends: name, x (None for the right edge), y and style of each line's end.
    """
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())  # the labels are placed for these
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[2])
    wanted = np.array([to_axes.transform((axes.get_xlim()[0], y))[1] for _, _, y, _ in ends])
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    gap = min(11.5 / height, 1 / max(1, len(ends) - 1))  # 11.5 points
    steps = gap * np.arange(len(ends))
    # The least movement that keeps the order and the distance.
    places = isotonic_regression(wanted - steps).x
    places = np.clip(places, 0, max(0.0, 1 - steps[-1])) + steps
    for (name, x, y, style), place in zip(ends, places, strict=True):
        axes.annotate(
            "",
            xy=(axes.get_xlim()[1] if x is None else x, y),
            xytext=(1.05, place),
            textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": style["color"], "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0},
        )
        key = style | {"linewidth": min(style["linewidth"], 2.0), "transform": axes.transAxes, "clip_on": False}
        axes.plot([1.05, 1.075, 1.1], [place] * 3, **key, markevery=[1])
        axes.text(
            1.115,
            place,
            name,
            transform=axes.transAxes,
            va="center_baseline",
            fontsize=9 if name == BASELINE else 8,
            fontweight="bold" if name == BASELINE else "normal",
            color="black" if name == BASELINE else DARK,
        )


def _write_values(axes: Axes, grid: np.ndarray, image: Any, digits: int) -> None:
    """Write the numbers of a heat map into it."""
    for (row, column), value in np.ndenumerate(grid):
        if math.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            bright = 0.299 * red + 0.587 * green + 0.114 * blue
            axes.text(
                column,
                row,
                f"{value:.{digits}f}",
                ha="center",
                va="center",
                fontsize=6,
                color="black" if bright > 0.5 else "white",
            )


def _style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Choose a line's look: WildCat's stands out, others' depend on their place in the run."""
    if method == EXACT:
        return {"color": GREY, "linewidth": 1.2, "linestyle": (0, (6, 3))}
    if method == BASELINE:
        return {"color": "black", "linewidth": 2.6, "marker": "o", "markersize": 7, "zorder": 5}
    at = [other for other in methods if other not in (BASELINE, EXACT)].index(method)
    return {
        "color": COLOURS[at % len(COLOURS)],
        "linestyle": _DASHES[at // len(COLOURS) % len(_DASHES)],
        "linewidth": 1.2,
        "marker": _MARKERS[at % len(_MARKERS)],
        "markersize": 5,
        "zorder": 3,
    }


def _last_on_top(methods: Sequence[str]) -> list[str]:
    """Put WildCat last."""
    return sorted(methods, key=lambda method: method == BASELINE)


def _label(metric: str, meaning: dict[str, Any] | None) -> str:
    return f"{metric} ({unit_and_direction(meaning)})" if meaning else metric


def _rectangle(layers: Sequence[Sequence[float]]) -> np.ndarray:
    """Make an array of layers by heads, NaN where a layer has fewer heads than others."""
    grid = np.full((len(layers), max(map(len, layers), default=0)), math.nan)
    for row, heads in zip(grid, layers, strict=True):
        row[: len(heads)] = heads
    return grid


def _mean_of(grids: Sequence[np.ndarray]) -> np.ndarray:
    """Average over samples; infinite errors are left out like missing ones."""
    stacked = np.stack(grids)
    return _over_heads(np.nanmean, np.moveaxis(np.where(np.isfinite(stacked), stacked, math.nan), 0, -1))


def _over_heads(reduce: Any, grid: np.ndarray) -> np.ndarray:
    """Reduce the last axis, NaN where it has nothing but NaN."""
    known = np.isfinite(grid).any(axis=-1)
    result = np.full(known.shape, math.nan)
    result[known] = reduce(grid[known], axis=-1)
    return result


def _thousands(length: Any) -> str:
    return f"{length:,}" if isinstance(length, int) else str(length)
