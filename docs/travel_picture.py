"""Draw a token's way through one layer, to scale, for docs/how-it-works.md."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

from eval.style import BLUE, DARK, GREEN, GREY, ORANGE, PALE_BLUE, PALE_PINK, PINK
from wildcat_kv import WildCatConfig
from wildcat_kv.cache.budget import FoldPlan, Row, plan_fold

# A prompt, the tokens of an answer, and the place of the token that is followed.
_PROMPT, _WRITTEN, _FOLLOWED = 400, 24, 178
# Lower edges of the strips, from the prompt to the answer, and their height.
_READ, _CUT, _SLOTS, _ANSWER = 78, 56, 29, 3
_HEIGHT = 8
_TEXT = 424


def picture() -> Figure:
    """Draw what a layer holds while a prompt is read, folded and answered, and one token in it."""
    settings = WildCatConfig(ratio=0.25)
    fold = plan_fold(Row().append(_PROMPT), settings, prefill=True)
    assert fold is not None
    bins = -(-fold.rank // settings.bin_rank)
    edges = [fold.sink + edge for edge in _evenly(fold.items, bins)]
    slots = [fold.sink + edge for edge in _evenly(fold.rank, bins)]
    figure = Figure(figsize=(8.2, 4.8))
    axes = figure.subplots()
    axes.set_xlim(-2, 566)
    axes.set_ylim(0, 89)
    axes.set_axis_off()
    own = next(place for place in range(bins) if edges[place] <= _FOLLOWED < edges[place + 1])
    _draw_prompt(axes, fold, edges)
    _draw_folding(axes, edges, slots, own)
    _draw_held(axes, _SLOTS, fold, slots, 0)
    _draw_held(axes, _ANSWER, fold, slots, _WRITTEN)
    _draw_query(axes, fold, slots, own)
    return figure


def _draw_prompt(axes: Axes, fold: FoldPlan, edges: Sequence[int]) -> None:
    _strip(axes, _READ, 0, _PROMPT, PALE_PINK)
    axes.text(8, _READ + _HEIGHT / 2, f"{_PROMPT} tokens, all exact", fontsize=8.5, va="center")
    axes.text(_FOLLOWED, _READ + _HEIGHT + 0.8, "a token", fontsize=8.5, color=ORANGE, ha="center")
    _mark(axes, _READ)
    _say(
        axes,
        *(_READ, "1  Read", "cache.update"),
        "all exact, and seen exactly",
    )
    _arrow(axes, (_FOLLOWED, _READ - 0.6), (_FOLLOWED, _CUT + _HEIGHT + 0.6))
    _strip(axes, _CUT, 0, fold.sink, GREEN)
    for place, (start, end) in enumerate(pairwise(edges)):
        _strip(axes, _CUT, start, end, PALE_BLUE, f"bin {place + 1}")
    _strip(axes, _CUT, edges[-1], _PROMPT, PINK)
    axes.text(0, _CUT - 1, "sink", ha="left", va="top", fontsize=8, color=GREY)
    axes.text(_PROMPT, _CUT - 1, "window", ha="right", va="top", fontsize=8, color=GREY)
    _mark(axes, _CUT)
    _say(
        axes,
        *(_CUT, "2  Fold", "cache/folding.py"),
        "after the layer's attention",
    )


def _draw_folding(axes: Axes, edges: Sequence[int], slots: Sequence[int], own: int) -> None:
    for place in range(len(edges) - 1):
        corners = [(edges[place], _CUT), (edges[place + 1], _CUT)]
        corners += [(slots[place + 1], _SLOTS + _HEIGHT), (slots[place], _SLOTS + _HEIGHT)]
        shade = 0.55 if place == own else 0.22
        axes.add_patch(Polygon(corners, facecolor=PALE_BLUE, alpha=shade, edgecolor="white", zorder=0))
    width = slots[own + 1] - slots[own]
    for part, thickness in ((0.15, 0.8), (0.5, 2.6), (0.8, 1.4)):
        end = (slots[own] + part * width, _SLOTS + _HEIGHT)
        axes.plot([_FOLLOWED, end[0]], [_CUT, end[1]], color=ORANGE, linewidth=thickness, zorder=3)
    axes.text(138, 46, "into the pivots that its key\nis near, in shares W", fontsize=8.5, color=ORANGE, va="top")
    _say(
        axes,
        *(_SLOTS, "3  Slots", "coreset/"),
        "pivots, values and weights",
    )


def _draw_held(axes: Axes, bottom: float, fold: FoldPlan, slots: Sequence[int], written: int) -> None:
    _strip(axes, bottom, 0, fold.sink, GREEN)
    for start, end in pairwise(slots):
        _strip(axes, bottom, start, end, BLUE)
    _strip(axes, bottom, slots[-1], slots[-1] + fold.window, PINK)
    end = slots[-1] + fold.window + written
    if written:
        _strip(axes, bottom, end - written, end, PALE_PINK)
        axes.text(end - written, bottom - 0.7, "tokens since the fold", fontsize=8, color=GREY, va="top")
    else:
        axes.text(end + 5, bottom + _HEIGHT / 2, f"{end} entries are left", fontsize=8.5, va="center", color=DARK)


def _draw_query(axes: Axes, fold: FoldPlan, slots: Sequence[int], own: int) -> None:
    end = slots[-1] + fold.window + _WRITTEN
    at = (62, _ANSWER + _HEIGHT + 9)
    axes.text(at[0] + 5, at[1], "a later query q", fontsize=8.5, fontweight="bold", va="center")
    targets = [(fold.sink / 2, 0.6), (slots[-1] + fold.window / 2, 0.6), (end - _WRITTEN / 2, 0.6)]
    targets += [((start + after) / 2, 1.4) for start, after in pairwise(slots)]
    for target, thickness in targets:
        colour = ORANGE if slots[own] < target < slots[own + 1] else GREY
        _arrow(axes, at, (target, _ANSWER + _HEIGHT + 0.4), colour, thickness)
    _say(
        axes,
        *(_ANSWER, "4  Attention", 'hook/, "wildcat"'),
        "slots by weight, exact by 1",
    )


def _strip(axes: Axes, bottom: float, start: float, end: float, colour: str, text: str = "") -> None:
    axes.add_patch(Rectangle((start, bottom), end - start, _HEIGHT, facecolor=colour, edgecolor="white", linewidth=0.8))
    axes.text((start + end) / 2, bottom + _HEIGHT / 2, text, ha="center", va="center", fontsize=8.5)


def _mark(axes: Axes, bottom: float) -> None:
    axes.add_patch(Rectangle((_FOLLOWED - 1.5, bottom), 3, _HEIGHT, facecolor=ORANGE, zorder=4))


def _say(axes: Axes, bottom: float, title: str, where: str, text: str) -> None:
    axes.text(_TEXT, bottom + _HEIGHT + 1.5, title, fontweight="bold", fontsize=11, va="top")
    axes.text(_TEXT, bottom + _HEIGHT - 3.6, text, fontsize=9, va="top")
    axes.text(_TEXT, bottom + _HEIGHT - 7.6, where, fontsize=8, color=GREY, va="top", family="monospace")


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = ORANGE, width: float = 1.2
) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 7, "color": colour, "linewidth": width}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **look))


def _evenly(total: int, parts: int) -> list[int]:
    """Give the edges of `parts` parts, the longer ones first, as a fold cuts its bins."""
    edges = [0]
    for place in range(parts):
        edges.append(edges[-1] + total // parts + (place < total % parts))
    return edges
