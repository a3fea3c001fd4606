"""Draw the first page's figure: numbers found over bytes held, on the 0.5B model.

    python -m docs.first_figure            # writes docs/images/answers-per-byte.svg
    python -m docs.first_figure --png DIR  # also as PNG, to be looked at

Nothing is measured: the samples are those of two runs in results/eval.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from eval.records import Folder
from eval.style import BLUE, GREEN, GREY, GRID, OCHRE, ORANGE, house_style, save

_ROOT = Path(__file__).resolve().parent.parent
_RUNS = tuple(_ROOT / "results" / "eval" / name for name in ("frontier_default_qwen", "frontier_qwen"))
_IMAGE = _ROOT / "docs" / "images" / "answers-per-byte.svg"
_TASK, _METRIC = "needle_4", "exact_match"
_EXACT = "exact"


class _Line(NamedTuple):
    label: str
    colour: str
    width: float
    style: str
    at: tuple[float, float]  # of the label: share of the bytes, numbers found


# Families of the runs. Left out is `query_wildcat`, the default without its profile.
_LINES = {
    "default": _Line("ours, the default:\none reading", BLUE, 2.4, "-", (0.088, 27)),
    "rereading_wildcat": _Line("ours, two\nreadings", BLUE, 1.4, "--", (0.0365, 24)),
    "kvzip": _Line("KVzip,\ntwo readings", GREEN, 1.4, "-", (0.0335, 35)),
    "wildcat": _Line("WildCat, the paper's", ORANGE, 1.4, "-", (0.103, 19)),
    "keydiff": _Line("KeyDiff", OCHRE, 1.4, "-", (0.103, 12)),
    "quantised": _Line("all tokens, quantised:\n2, 3, 4, 8 bits", "black", 1.4, ":", (0.2, 28)),
}


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--png", type=Path, metavar="DIR", help="write a PNG file as well, to this folder")
    folder = parser.parse_args().png
    with house_style():
        drawn = figure()
        save(drawn, _IMAGE, small=True)
        print(_IMAGE)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save(drawn, folder / f"{_IMAGE.stem}.png")


def figure() -> Figure:
    """Draw a line a method, slots in 4 bits, and the plain quantised cache."""
    found = _found()
    drawn = Figure(figsize=(6.6, 3.5))
    axes = drawn.subplots()
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for family, line in _LINES.items():
        points = sorted(found[family])
        axes.plot(*zip(*points, strict=True), line.style, color=line.colour, linewidth=line.width, marker="o", ms=4.5)
        weight = "bold" if family == "default" else "normal"
        axes.text(*line.at, line.label, color=line.colour, va="center", fontsize=9, weight=weight)
    ((share, count),) = found[_EXACT]
    axes.plot(share, count, "D", color=GREY, ms=6, clip_on=False)
    axes.text(share, count - 2.3, "exact cache", color=GREY, ha="right", va="center", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(0.032, 1.03)
    axes.set_ylim(-1, 41.5)
    axes.xaxis.set_major_locator(FixedLocator([0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.set_xlabel("bytes held, of the exact cache's in bfloat16")
    axes.set_ylabel("numbers found, of 40")
    drawn.tight_layout()
    return drawn


def _found() -> dict[str, list[tuple[float, int]]]:
    """Count what each cell of the runs found, with its share of the exact cache's bytes, by family."""
    hits: dict[tuple[str, float | None, int | None], dict[int, tuple[float, float]]] = defaultdict(dict)
    for run in _RUNS:
        for record in Folder(run).records():
            if record["task"] == _TASK:
                cell = (record["family"], record["ratio"], record["bits"])
                hits[cell][record["sample"]] = (record["memory_bytes"], record["scores"][_METRIC])
    exact = hits[_EXACT, None, None]
    result: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for (family, *_), samples in hits.items():
        assert samples.keys() == exact.keys(), f"{family} was measured on other samples"
        share = sum(held for held, _ in samples.values()) / sum(held for held, _ in exact.values())
        result[family].append((share, int(sum(hit for _, hit in samples.values()))))
    return result


if __name__ == "__main__":
    main()
