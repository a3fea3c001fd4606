"""Draw the three questions that Query WildCat asks of a text, for docs/method.md."""

from __future__ import annotations

from fractions import Fraction

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from eval.style import BLUE, DARK, GREY, ORANGE
from wildcat_kv.compressors import QueryWildCat

_WORDS = [
    "The",
    "special",
    "magic",
    "number",
    "for",
    "Sanaa",
    "is",
    "84606",
    ".",
    "Conversations",
    "with",
    "corp",
    "dev",
]
_METHOD = QueryWildCat()
_TOPS = (77, 45, 13)  # of the three rows
_HEIGHT = 7
_BEHIND = 111
_PALE = "#f1f1f1"


def picture() -> Figure:
    """Draw the words of a text three times: where a query is asked from, and which tokens it marks."""
    figure = Figure(figsize=(8.6, 4.9))
    axes = figure.subplots()
    axes.set_xlim(-1, 146)
    axes.set_ylim(2, 101)
    axes.set_axis_off()
    both = _METHOD.attended + _METHOD.recalled
    rows = (
        ("1  What do queries attend to?", _METHOD.attended, ORANGE, {5: 0.35, 7: 0.5, 9: 0.25, 11: 0.9, 12: 0.6}),
        ("2  What would be looked up?", _METHOD.recalled, BLUE, {7: 0.95, 3: 0.3, 12: 0.55}),
        ("3  Anything else", 1 - both, GREY, dict.fromkeys(set(range(len(_WORDS))) - {7, 11}, 0.25)),
    )
    places = [_words(axes, top, *row) for top, row in zip(_TOPS, rows, strict=True)]
    _moved_behind(axes, places[0])
    _next_token(axes, places[1])
    _bins(axes, places[2])
    return figure


def _words(
    axes: Axes, top: float, title: str, share: float, colour: str, marks: dict[int, float]
) -> list[tuple[float, float]]:
    """Draw a row of words, shaded by their marks, and give their edges."""
    axes.text(0, top + _HEIGHT + 12.5, title, fontsize=10, fontweight="bold", color=colour, va="center")
    axes.text(
        146, top + _HEIGHT + 12.5, f"{Fraction(share)} of the slots", fontsize=9, color=colour, va="center", ha="right"
    )
    at, edges = 0.0, []
    for place, word in enumerate(_WORDS):
        width = 1.35 * len(word) + 2.4
        axes.add_patch(Rectangle((at, top), width, _HEIGHT, facecolor=_PALE, edgecolor="white", zorder=0))
        axes.add_patch(Rectangle((at, top), width, _HEIGHT, facecolor=colour, alpha=marks.get(place, 0.0), zorder=1))
        dark = marks.get(place, 0.0) > 0.7
        axes.text(
            at + width / 2,
            top + _HEIGHT / 2,
            word,
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else DARK,
        )
        edges.append((at, at + width))
        at += width + 0.4
    axes.text(at + 0.6, top + _HEIGHT / 2, "…", fontsize=9, va="center")
    return edges


def _moved_behind(axes: Axes, places: list[tuple[float, float]]) -> None:
    top = _TOPS[0] + _HEIGHT
    for place in (3, 8, 12):
        start = sum(places[place]) / 2
        _arrow(axes, (start, top + 0.5), (_BEHIND + 10, top + 1.5), GREY, -0.09, dotted=True)
    axes.text(
        _BEHIND + 12, top - 1, f"some queries,\nmoved {_METHOD.ahead} tokens\nbehind the text", fontsize=8, va="top"
    )
    for place, width in ((11, 1.8), (12, 1.2), (7, 1.0)):
        _arrow(axes, (_BEHIND + 10, _TOPS[0] - 4), (sum(places[place]) / 2, _TOPS[0] - 0.4), ORANGE, -0.08, width)


def _next_token(axes: Axes, places: list[tuple[float, float]]) -> None:
    top = _TOPS[1] + _HEIGHT
    asking, found = (sum(places[place]) / 2 for place in (6, 7))
    _arrow(axes, (asking, top + 0.5), (_BEHIND + 10, top + 1.5), GREY, -0.09, dotted=True)
    axes.text(
        _BEHIND + 12,
        top - 1,
        f"each token's query,\n{_METHOD.apart} tokens away,\nasks the next key",
        fontsize=8,
        va="top",
    )
    _arrow(axes, (_BEHIND + 10, _TOPS[1] - 4), (found, _TOPS[1] - 0.4), BLUE, -0.08, 1.8)


def _bins(axes: Axes, places: list[tuple[float, float]]) -> None:
    top = _TOPS[2]
    for first, last in ((0, 4), (5, 8), (9, 12)):
        start, end = places[first][0], places[last][1]
        middle = (start + end) / 2
        for slot in (-3.2, 0, 3.2):
            axes.add_patch(Rectangle((middle + slot - 1.3, top - 9.5), 2.6, 4.2, facecolor=GREY))
        for edge in (start, end):
            axes.plot(
                [edge, middle + (4.5 if edge > middle else -4.5)], [top - 0.5, top - 5], color=GREY, linewidth=0.7
            )
    axes.text(_BEHIND + 12, top + _HEIGHT - 1, "WildCat of the rest:\nbins, pivots, weights", fontsize=8, va="top")


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    bend: float,
    width: float = 0.9,
    *,
    dotted: bool = False,
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            *(start, end),
            arrowstyle="-|>",
            mutation_scale=7,
            connectionstyle=f"arc3,rad={bend}",
            color=colour,
            linewidth=width,
            linestyle=":" if dotted else "-",
            shrinkA=0,
            shrinkB=0,
        )
    )
