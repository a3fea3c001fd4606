"""The first page's figure: facts and numbers found over the bytes held, on the 0.5B model.

`python -m docs.figures` draws it with the others, out of samples in results/eval; nothing is measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from docs.tables import FACTS
from eval.cells import EXACT
from eval.records import Folder
from eval.style import BLUE, GREEN, GREY, GRID, OCHRE, ORANGE
from eval.summary import held_shares

_RESULTS = Path(__file__).resolve().parent.parent / "results" / "eval"

Place = tuple[float, float]


class _Look(NamedTuple):
    """A family's line, and its label's place in each panel: share of the bytes, answers found."""

    label: str
    colour: str
    width: float
    style: str
    at: tuple[Place | None, Place | None]


class _Panel(NamedTuple):
    """A task of some runs; each sample stands for `answers` answers."""

    runs: tuple[str, ...]
    task: str
    answers: int
    what: str


_PANELS = (
    _Panel(("first_page",), "lookup", FACTS, "facts in six forms of text, of {}"),
    _Panel(("frontier_default_qwen", "frontier_qwen"), "needle_4", 1, "five-digit numbers in essays, of {}"),
)
# Families of the runs. `query_wildcat` is left out: the default without what was measured of the model.
_LOOKS = {
    "default": _Look("ours: one reading", BLUE, 2.4, "-", ((0.102, 35), (0.084, 26))),
    "two readings": _Look("ours:\ntwo readings", BLUE, 1.6, "--", ((0.03, 27), None)),
    "rereading_wildcat": _Look("ours:\ntwo readings", BLUE, 1.6, "--", (None, (0.023, 14))),
    "kvzip": _Look("KVzip,\ntwo readings", GREEN, 1.4, "-", ((0.03, 54), (0.023, 29))),
    "adakv, compactor": _Look("Compactor with AdaKV", OCHRE, 1.4, "-", ((0.124, 42.5), None)),
    "keydiff": _Look("KeyDiff", OCHRE, 1.4, "-", (None, (0.103, 12))),
    "published": _Look("WildCat as published", ORANGE, 1.4, "-", ((0.3, 29), None)),
    "wildcat": _Look("WildCat", ORANGE, 1.4, "-", (None, (0.103, 19))),
    "quantised": _Look("all tokens in\nfewer bits", "black", 1.4, ":", ((0.345, 62), (0.24, 34))),
}


def first_figure() -> Figure:
    """Draw a line a method, most with slots in 4 bits, and the plain quantised cache."""
    drawn = Figure(figsize=(9.6, 3.6))
    for number, (axes, panel) in enumerate(zip(drawn.subplots(1, 2), _PANELS, strict=True)):
        _draw(axes, panel, number)
    drawn.tight_layout(w_pad=2.5)
    return drawn


def _draw(axes: Axes, panel: _Panel, number: int) -> None:
    found, asked = _found(panel)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for family, look in _LOOKS.items():
        if (at := look.at[number]) is not None:
            points = sorted(found[family])
            axes.plot(*zip(*points, strict=True), look.style, color=look.colour, linewidth=look.width, marker="o", ms=4)
            weight = "bold" if family == "default" else "normal"
            axes.text(*at, look.label, color=look.colour, va="center", fontsize=8.5, weight=weight)
    ((share, count),) = found[EXACT]
    axes.plot(share, count, "D", color=GREY, ms=6, clip_on=False)
    axes.text(share, 0.94 * count, "exact cache", color=GREY, ha="right", va="center", fontsize=8.5)
    axes.set_xscale("log")
    axes.set_xlim(0.022, 1.03)
    axes.set_ylim(-0.02 * count, 1.05 * count)
    axes.xaxis.set_major_locator(FixedLocator([0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.set_xlabel("bytes held, of the exact cache's in bfloat16")
    axes.set_title(f"found: {panel.what.format(asked)}", loc="left", fontsize=9.5)


def _found(panel: _Panel) -> tuple[Mapping[str, list[Place]], int]:
    """Count what each cell found, with its share of the exact cache's bytes, by family; and what was asked for."""
    held: dict[tuple[str, float | None, int | None], dict[int, Place]] = defaultdict(dict)
    for run in panel.runs:
        records = [record for record in Folder(_RESULTS / run).records() if record["task"] == panel.task]
        for record, share in zip(records, held_shares(records), strict=True):
            cell = (record["family"], record["ratio"], record["bits"])
            held[cell][record["sample"]] = (share, record["scores"]["exact_match"])
    exact = held[EXACT, None, None]
    result: dict[str, list[Place]] = defaultdict(list)
    for (family, *_), samples in held.items():
        assert samples.keys() == exact.keys(), f"{family} was measured on other samples"
        shares, hits = zip(*samples.values(), strict=True)
        result[family].append((fmean(shares), panel.answers * sum(hits)))
    return result, panel.answers * len(exact)
