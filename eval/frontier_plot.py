"""The figure of the frontier: scores over bytes held, a panel a task, a line a family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from eval.frontier import OURS, Measure, Point
from eval.style import BLUE, COLOURS, DARK, GREY, GRID, ORANGE
from eval.tables import unit_and_direction

# By the share of the tokens kept, the largest first.
_MARKERS = "sD^v<>pPXd"  # polygons: small files
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_PLAIN = (("black", (0, (1, 1))), ("#555555", (0, (4, 1.5))), ("#999999", (0, (4, 1, 1, 1))), ("#bbbbbb", "-"))
_SHARES = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
_SCORES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10)
_SPARSE = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
_WIDTH, _HEIGHT = 5.0, 2.5  # inches; of a panel
_WIDE = 8  # times the smallest score: from there on an axis is logarithmic


def frontier_plot(points: Sequence[Point], *, title: str = "", bytes_of: str = "") -> Figure | None:
    """Draw scores over bytes, both with paired 95 % intervals to the exact cache.

    A line joins the cells of a family in its usual bits; a mark's shape is the share of the tokens kept. Cells in other
    bits are hollow, with their number beside them if they are quantised. Plain quantisation, all tokens in fewer bits,
    is black, with a mark for each number of bits; a second library's is grey. The exact cache's score is dashed.

    Args:
        points: from `frontier_points`, of one run or several of one model.
        title: heading of the figure.
        bytes_of: dtype of the exact cache, for the axis.

    Returns:
        The figure; None without a compressed cell.
    """
    measures = list({point.measure.task: point.measure for point in points if point.compressor is not None}.values())
    if not measures:
        return None
    looks = _looks(points)
    ratios = sorted({point.ratio for point in points if point.ratio and not point.plain}, reverse=True)
    markers = {ratio: _MARKERS[at % len(_MARKERS)] for at, ratio in enumerate(ratios)}
    figure = Figure(figsize=(_WIDTH, _HEIGHT * len(measures)))
    panels = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
    for axes, measure in zip(panels, measures, strict=True):
        own = [point for point in points if point.measure.task == measure.task]
        _draw(axes, measure, own, looks, markers)
    _scale_bytes(panels[-1], points, bytes_of)
    if title:
        figure.suptitle(title, fontsize=9.5, x=0.5, y=0.995)
    figure.tight_layout(h_pad=0.6)
    _legend(figure, looks, markers, points)
    return figure


def _looks(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Choose the look of each family: ours thick, plain quantisation black and grey, the others thin."""
    looks: dict[str, dict[str, Any]] = {}
    others = [colour for colour in COLOURS if colour not in (BLUE, ORANGE)]
    ours = thin = plain = 0
    for point in points:
        if point.compressor is None or point.family in looks:
            continue
        if point.plain:
            colour, dash = _PLAIN[plain % len(_PLAIN)]
            looks[point.family] = {"color": colour, "linewidth": 1.6, "linestyle": dash, "zorder": 4}
            plain += 1
        elif point.compressor in OURS and ours < 2:
            looks[point.family] = {"color": (BLUE, ORANGE)[ours], "linewidth": 2.0, "linestyle": "-", "zorder": 5}
            ours += 1
        else:
            dash = _DASHES[thin // len(others) % len(_DASHES)]
            looks[point.family] = {
                "color": others[thin % len(others)],
                "linewidth": 1.1,
                "linestyle": dash,
                "zorder": 3,
            }
            thin += 1
    return looks


def _draw(
    axes: Axes, measure: Measure, points: Sequence[Point], looks: dict[str, dict[str, Any]], markers: dict[float, str]
) -> None:
    """Draw one task."""
    for family, look in looks.items():
        own = [point for point in points if point.family == family and point.compressor is not None]
        plain = [point for point in own if point.plain]
        for part in filter(None, (plain, [point for point in own if not point.plain])):
            usual = _usual_bits(part)
            line = sorted(
                (point for point in part if point.plain or point.bits == usual), key=lambda point: point.share
            )
            axes.plot([point.share for point in line], [point.mean for point in line], **look)
            ends = [(point.share, end) for point in part for end in (point.low, point.high, math.nan)]
            ends = [(share, math.nan if end is None else end) for share, end in ends]
            axes.plot(*zip(*ends, strict=True), color=look["color"], linewidth=0.9, alpha=0.55, zorder=2)
            for point in part:
                _mark(axes, point, look, markers, usual)
    exact = next((point for point in points if point.compressor is None), None)
    values = [point.mean for point in points if point.compressor is not None and point.mean > 0]
    logarithmic = len(values) > 0 and not measure.higher_is_better and max(values) > _WIDE * min(values)
    beside = ""
    if logarithmic:
        _scale_scores(axes, points)
    if exact is not None and (exact.mean > 0 or not logarithmic):
        axes.axhline(exact.mean, color=GREY, linewidth=1.1, linestyle=(0, (6, 3)), zorder=1)
    elif exact is not None:
        beside = f"; exact cache: {exact.mean:g}"
    axes.set_title(
        f"{measure.task}: {measure.metric}, {unit_and_direction(dict(measure.about))}{beside}",
        loc="left",
        fontsize=9,
    )
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5)


def _usual_bits(points: Sequence[Point]) -> int | None:
    """Find the bits that most cells have."""
    bits = [point.bits for point in points]
    return max(dict.fromkeys(bits), key=bits.count, default=None)


def _mark(axes: Axes, point: Point, look: dict[str, Any], markers: dict[float, str], usual: int | None) -> None:
    """Draw a cell's mark, hollow with its bits where they are not its family's usual ones."""
    hollow = point.bits != usual and not point.plain
    axes.plot(
        point.share,
        point.mean,
        marker="s" if point.plain else markers.get(point.ratio or 0, "p"),
        linestyle="none",
        color=look["color"],
        markerfacecolor="white" if hollow else look["color"],
        markersize=5.5 if look["linewidth"] > 1.5 else 4.5,
        markeredgewidth=1,
        clip_on=False,
        zorder=look["zorder"] + 1,
    )
    if look["color"] == _PLAIN[0][0] or (hollow and point.bits is not None):
        axes.annotate(
            f"{point.bits} bits" if point.plain else str(point.bits),
            (point.share, point.mean),
            xytext=(4, 2),
            textcoords="offset points",
            fontsize=7.5,
            color=look["color"],
            zorder=7,
        )


def _scale_scores(axes: Axes, points: Sequence[Point]) -> None:
    means = [point.mean for point in points if point.mean > 0]
    axes.set_yscale("log")
    axes.set_ylim(0.72 * min(means), 1.3 * max(means))
    axes.yaxis.set_major_locator(FixedLocator(_SPARSE if max(means) > 4 * _WIDE * min(means) else _SCORES))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda score, _: f"{score:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _scale_bytes(axes: Axes, points: Sequence[Point], bytes_of: str) -> None:
    shares = [point.share for point in points if point.compressor is not None]
    low, high = 0.88 * min(shares), 1.13 * max(shares)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([share for share in _SHARES if low <= share <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"bytes held, of the exact cache's{f' in {bytes_of}' if bytes_of else ''}", fontsize=9)


def _legend(
    figure: Figure, looks: dict[str, dict[str, Any]], markers: dict[float, str], points: Sequence[Point]
) -> None:
    """Explain colours, shapes and hollow marks below the panels."""
    usual = {
        family: _usual_bits([point for point in points if point.family == family and not point.plain])
        for family in looks
    }
    plain = {point.family for point in points if point.plain}
    names = {
        family: f"{family}: all tokens" if family in plain else f"{family}{f', {bits} bits' if bits else ''}"
        for family, bits in usual.items()
    }
    lines = [Line2D([], [], **look, label=names[family]) for family, look in looks.items()]
    lines.append(Line2D([], [], color=GREY, linewidth=1.1, linestyle=(0, (6, 3)), label="exact cache"))
    shapes = [
        Line2D([], [], color=DARK, linestyle="", marker=marker, markersize=4.5, label=f"{ratio:g}")
        for ratio, marker in markers.items()
    ]
    height = figure.get_figheight()
    first = figure.legend(
        handles=lines, loc="upper center", ncols=2, frameon=False, fontsize=8.5, bbox_to_anchor=(0.52, 0.0)
    )
    figure.add_artist(first)
    if shapes:
        rows = (len(lines) + 1) // 2
        second = figure.legend(
            handles=shapes,
            title="share of the tokens kept; hollow: unquantised, or in the bits beside it",
            title_fontsize=8,
            loc="upper center",
            ncols=len(shapes),
            frameon=False,
            fontsize=8.5,
            handletextpad=0.2,
            columnspacing=1.2,
            bbox_to_anchor=(0.52, -(0.19 * rows + 0.1) / height),
        )
        figure.add_artist(second)
