"""The plots of each benchmark, made from its records alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks import figures
from benchmarks.caches import DYNAMIC, WILDCAT
from benchmarks.figures import Figure
from benchmarks.prefill import ONE_BIN
from benchmarks.records import Record, Run, select
from benchmarks.tables import number
from eval.style import BLUE, DARK, GREEN, GREY, GRID, OCHRE, ORANGE, PINK, SKY, house_style, save

_OURS, _OTHER, _LIMIT = BLUE, GREY, ORANGE
_COLOURS = (BLUE, GREEN, PINK, SKY, OCHRE, GREY)  # orange is a limit's
_OURS_NAMES = (WILDCAT, ONE_BIN)
_MIB = 2**20


def save_plots(run: Run, folder: Path) -> list[Path]:
    """Write the plots of a benchmark, the same bytes for the same records; return the files."""
    with house_style():
        canvases = {
            "prefill": prefill_plots,
            "scaling": scaling_plots,
            "decode": decode_plots,
            "memory": memory_plots,
            "generation": generation_plots,
            "calls": lambda run: {},  # a table says it all
            "choices": lambda run: {},
        }[run.benchmark](run)
        paths = []
        for name, canvas in canvases.items():
            paths.append(folder / f"{run.benchmark}-{name}.png")
            save(canvas, paths[-1])
    return paths


def prefill_plots(run: Run) -> dict[str, Canvas]:
    """Draw WildCat's shares beside their limits, and every method's."""
    shares = figures.prefill_shares(run)
    ours = [figure for figure in shares if "group" not in figure.labels]
    names = [
        f"{figure.labels['contender']}\n{figure.labels['tokens']:,} tokens, {figure.labels['dtype']}" for figure in ours
    ]
    canvases = {}
    if ours:
        canvas, axes = _panel(len(ours), 0.42)
        _draw_dots(axes, names, ours)
        _log(axes, "x", ours)  # the bins of the paper and one bin are two orders of magnitude apart
        axes.set_xlabel("folding, % of the rest of the same prefill (lower is better)")
        canvases["share"] = canvas
    others = [figure for figure in shares if "group" in figure.labels]
    if others:
        place = others[0].labels
        same = [figure for figure in ours if all(figure.labels[name] == place[name] for name in ("dtype", "tokens"))]
        every = sorted([*same, *others], key=lambda figure: figure.value)
        canvas, axes = _panel(len(every))
        _draw_dots(axes, [str(figure.labels["contender"]) for figure in every], every, limits=False)
        _log(axes, "x", every)
        axes.set_xlabel("folding, % of the rest of the same prefill (lower is better)")
        axes.set_title(f"{place['tokens']:,} tokens, {place['dtype']}", loc="left", fontsize=10)
        canvases["methods"] = canvas
    return canvases


def scaling_plots(run: Run) -> dict[str, Canvas]:
    """Draw seconds by tokens and by rank with their fits, and the error of attention."""
    canvases = {}
    for quantity, size, name in (("fold_seconds", "tokens", "tokens"), ("fold_seconds_by_rank", "rank", "rank")):
        records = select(run.records, quantity)
        if not records:
            continue
        fits = {
            figure.labels["dtype"]: figure for figure in figures.scaling_exponents(run) if figure.labels["size"] == size
        }
        canvas = Canvas(figsize=(6.4, 4))
        axes = canvas.subplots()
        for at, dtype in enumerate(dict.fromkeys(record.labels["dtype"] for record in records)):
            own = [record for record in records if record.labels["dtype"] == dtype]
            sizes = np.array([float(record.labels[size]) for record in own])
            times = 1e3 * np.array([_extremes(record) for record in own])
            label = str(dtype)
            if dtype in fits:
                fit = fits[dtype]
                label += f": exponent {fit.value:.2f} ({fit.low:.2f} to {fit.high:.2f})"
                middle = np.exp(np.log(times[:, 0]).mean() - fit.value * np.log(sizes).mean())
                axes.plot(sizes, middle * sizes**fit.value, color=_COLOURS[at], linewidth=0.9)
            _with_extremes(axes, sizes, times, at, label, line=False)
        if size == "tokens":
            _draw_slope(axes, records)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({float(record.labels[size]) for record in records})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        _plain_numbers(axes, "y")
        axes.set_xlabel("tokens" if size == "tokens" else f"slots of a bin, {records[0].labels['tokens']:,} tokens")
        axes.set_ylabel("compression of a layer, ms")
        _finish(axes)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        canvases[name] = canvas
    errors = select(run.records, "relative_error")
    if errors:
        canvases["error"] = _error_plot(errors)
    return canvases


def decode_plots(run: Run) -> dict[str, Canvas]:
    """Draw speed over DynamicCache's: a panel for each dtype and number of rows, one of all methods."""
    canvases = {}
    for name, grouped in (("speed", False), ("methods", True)):
        panels: dict[str, list[Figure]] = {}
        for record in select(run.records, "seconds_per_step"):
            labels = record.labels
            if ("group" in labels) != grouped or labels["contender"] == DYNAMIC:
                continue
            wanted = labels | {"contender": DYNAMIC}
            (exact,) = [other for other in select(run.records, record.quantity, **wanted) if other.labels == wanted]
            rows = f"{labels['rows']} row{'s'[: int(labels['rows']) > 1]}"
            title = f"{labels['tokens']:,} tokens, {labels['dtype']}, {rows}"
            limit = next(
                (
                    found.limit
                    for found in figures.decode_ratios(run)
                    if found.labels == labels and found.limit and found.limit.at_least
                ),
                None,
            )
            figure = Figure.of(str(labels["contender"]), labels, figures.ratios(exact, record), "×", limit)
            panels.setdefault(title, []).append(figure)
        if not panels:
            continue
        heights = [len(panel) for panel in panels.values()]
        canvas = Canvas(figsize=(6.4, sum(0.27 * height + 0.45 for height in heights) + 0.4), layout="constrained")
        drawn = np.atleast_1d(canvas.subplots(len(panels), 1, sharex=True, height_ratios=[h + 0.6 for h in heights]))
        for axes, (title, panel) in zip(drawn, panels.items(), strict=True):
            panel = sorted(panel, key=lambda figure: -figure.value)
            _draw_dots(axes, [figure.what for figure in panel], panel, legend=axes is drawn[0])
            axes.axvline(1, color=_OTHER, linewidth=0.8, zorder=1)
            axes.set_title(title, loc="left", fontsize=9)
        drawn[-1].set_xlim(0)  # now that all have had their say in where it ends
        drawn[-1].set_xlabel(f"tokens per second over {DYNAMIC}'s (higher is better)")
        canvases[name] = canvas
    return canvases


def memory_plots(run: Run) -> dict[str, Canvas]:
    """Bytes held over DynamicCache's, and the peak of the prefill."""
    ratios = figures.memory_ratios(run)
    if not ratios:
        return {}
    held, peaks = ([f for f in ratios if f.labels["quantity"] == name] for name in ("held_bytes", "peak_bytes"))
    canvas = Canvas(figsize=(8.4, 0.27 * len(held) + 1.1), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    names = [f"{figure.labels['contender']}, {figure.labels['dtype']}" for figure in held]
    if len({figure.labels["tokens"] for figure in held}) > 1:
        names = [f"{name}, {figure.labels['tokens']:,}" for name, figure in zip(names, held, strict=True)]
    _draw_dots(left, names, held)
    _draw_dots(right, names, peaks)
    left.set_xlim(0)
    right.set_xlim(0)
    left.set_xlabel(f"held, times {DYNAMIC}'s")
    right.set_xlabel(f"peak of the prefill, times {DYNAMIC}'s")
    return {"ratios": canvas}


def generation_plots(run: Run) -> dict[str, Canvas]:
    """Draw milliseconds of a token and MiB held, as a generation goes on."""
    records = select(run.records, "seconds_per_token")
    if not records:
        return {}
    canvas = Canvas(figsize=(6.4, 4.2), layout="constrained")
    above, below = canvas.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    series = list(dict.fromkeys((record.labels["dtype"], record.labels["tokens"]) for record in records))
    for at, (dtype, tokens) in enumerate(series):
        own = select(records, "seconds_per_token", dtype=dtype, tokens=tokens)
        generated = np.array([float(record.labels["generated"]) for record in own])
        label = str(dtype) if len({tokens for _, tokens in series}) == 1 else f"{dtype}, {tokens:,} tokens"
        _with_extremes(above, generated, 1e3 * np.array([_extremes(record) for record in own]), at, label)
        held = select(run.records, "held_bytes", dtype=dtype, tokens=tokens)
        below.plot(
            generated, [max(record.samples) / _MIB for record in held], color=_COLOURS[at], marker="o", markersize=4
        )
        if len(own) > 1:
            above.axhline(
                figures.SLOWER.bound * 1e3 * statistics.median(own[1].samples),
                color=_LIMIT,
                linewidth=1,
                linestyle=(0, (4, 3)),
                label="" if at else f"limits: {figures.SLOWER.bound:g} times the second eighth",
            )
    above.set_ylim(0)
    below.set_ylim(0)
    above.set_ylabel("a token, ms")
    below.set_ylabel("held, MiB")
    below.set_xlabel(f"tokens generated, max_tokens={records[0].labels['max_tokens']}")
    below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    above.legend(frameon=False, fontsize=8, loc="lower left", ncols=len(series) + 1)
    for axes in (above, below):
        _finish(axes)
    return {"time": canvas}


def _error_plot(errors: Sequence[Record]) -> Canvas:
    """Draw errors: left by rank, a line for each number of tokens; right the other way round."""
    canvas = Canvas(figsize=(8.4, 3.6), layout="constrained")
    drawn = canvas.subplots(1, 2, sharey=True)
    for axes, (across, along) in zip(drawn, (("rank", "tokens"), ("tokens", "rank")), strict=True):
        for at, line in enumerate(dict.fromkeys(record.labels[along] for record in errors)):
            own = [record for record in errors if record.labels[along] == line]
            sizes = np.array([float(record.labels[across]) for record in own])
            label = f"{line:,} tokens" if along == "tokens" else f"r = {line}"
            _with_extremes(axes, sizes, np.array([_extremes(record) for record in own]), at, label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({float(record.labels[across]) for record in errors})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("slots r" if across == "rank" else "tokens n")
        _finish(axes)
        if across == "rank":
            axes.legend(frameon=False, fontsize=8, loc="lower left")
        else:
            axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    drawn[0].set_ylabel("relative error of attention, one bin")
    return canvas


def _draw_dots(
    axes: Axes, names: Sequence[str], found: Sequence[Figure], *, limits: bool = True, legend: bool = True
) -> None:
    """Draw a line a figure: median as a dot with its value, extremes as a bar, limit as a stroke."""
    axes.set_yticks(range(len(found)), names, fontsize=8)
    axes.set_ylim(len(found) - 0.4, -0.6)
    for at, figure in enumerate(found):
        ours = figure.labels.get("contender") in _OURS_NAMES
        colour = _OURS if ours else _OTHER
        axes.plot([figure.low, figure.high], [at, at], color=colour, linewidth=3.5, alpha=0.35, solid_capstyle="butt")
        axes.plot(figure.value, at, "o", color=colour, markersize=5, zorder=3)
        end = figure.high
        if limits and figure.limit is not None:
            axes.plot([figure.limit.bound] * 2, [at - 0.4, at + 0.4], color=_LIMIT, linewidth=2, zorder=2)
            if 0 <= figure.limit.bound - end < 0.2 * end:
                end = figure.limit.bound
        axes.annotate(
            f"{number(figure.value)}{figure.unit}",
            (end, at),
            xytext=(6, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=8,
            color="black" if ours else DARK,
        )
    for label, figure in zip(axes.get_yticklabels(), found, strict=False):  # an axis that is shared has none
        if figure.labels.get("contender") in _OURS_NAMES:
            label.set_fontweight("bold")
    if legend and limits and any(figure.limit for figure in found):
        axes.plot([], [], color=_LIMIT, linewidth=2, label="limit")
        axes.legend(
            frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), handlelength=1.0, borderaxespad=0.2
        )
    axes.margins(x=0.12)
    _finish(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _draw_slope(axes: Axes, records: Sequence[Record]) -> None:
    """Draw the limit's slope, from the first median of the slowest."""
    limit = figures.EXPONENT.bound
    sizes = np.array(sorted({float(record.labels["tokens"]) for record in records}))
    start = max(statistics.median(record.samples) for record in records if record.labels["tokens"] == sizes[0])
    axes.plot(
        sizes,
        1e3 * start * (sizes / sizes[0]) ** limit,
        color=_LIMIT,
        linewidth=1,
        linestyle=(0, (4, 3)),
        label=f"limit: exponent {limit:g}",
        zorder=1,
    )


def _with_extremes(axes: Axes, x: np.ndarray, values: np.ndarray, at: int, label: str, *, line: bool = True) -> None:
    """Draw medians as dots, and extremes as bars; `values` is (points, 3): median, least, most."""
    reach = [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]
    axes.errorbar(
        x,
        values[:, 0],
        yerr=reach,
        color=_COLOURS[at % len(_COLOURS)],
        fmt="os^vDP"[at % 6] + ("-" if line else ""),
        markersize=4,
        linewidth=1.2,
        elinewidth=1,
        label=label,
    )


def _extremes(record: Record) -> tuple[float, float, float]:
    return statistics.median(record.samples), min(record.samples), max(record.samples)


def _panel(lines: int, height: float = 0.27) -> tuple[Canvas, Axes]:
    """Make one panel for `lines` lines of dots."""
    canvas = Canvas(figsize=(6.4, height * lines + 0.9), layout="constrained")
    return canvas, canvas.subplots()


def _log(axes: Axes, axis: str, found: Sequence[Figure]) -> None:
    """Make an axis logarithmic, with room for the values' text."""
    axes.set_xscale("log")
    low, high = min(figure.low for figure in found), max(figure.high for figure in found)
    axes.set_xlim(low / 1.5, high * (high / low) ** 0.12)
    _plain_numbers(axes, axis)


def _plain_numbers(axes: Axes, axis: str) -> None:
    drawn = getattr(axes, f"{axis}axis")
    drawn.set_major_locator(LogLocator(subs=(1, 2, 5)))
    drawn.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    drawn.set_minor_locator(NullLocator())


def _finish(axes: Axes) -> None:
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
