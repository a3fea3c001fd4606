"""Draw errors of attention without a cache, for docs/guarantee.md and near-wildcat.md, from results/attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.records import Folder
from eval.style import BLUE, GREEN, GREY, GRID, OCHRE, ORANGE, PINK, SKY

_RECORDS = Path(__file__).resolve().parent.parent / "results" / "attention"
_SLOTS = (16, 32, 64, 128, 256, 512, 1024)
_LENGTHS = (256, 1024, 4096, 16384)
_DECAYS = {
    "WildCat": ("wildcat rank 10 n^0.2", BLUE),
    "Performer": ("performer features 10 n^0.2", SKY),
    "ScatterBrain": ("scatterbrain band 5 n^0.2 features 5 n^0.2", GREEN),
    "Thinformer (n^0.5)": ("thinformer g 2", PINK),
    "Reformer": ("reformer chunk 10 n^0.2 rounds 4", OCHRE),
    "Uniform": ("uniform rank 10 n^0.2", GREY),
    "HyperAttention": ("hyperattention block 5 n^0.2 samples 5 n^0.2 exact_below 0", ORANGE),
}
_CHANGES = {
    "published": "wildcat rank 256 bins 16",
    "A+B": "near_wildcat A+B 512",
    "A+B+C": "near_wildcat A+B+C 512",
    "A+B+D": "near_wildcat A+B+D 512",
    "A+B+C+D": "near_wildcat A+B+C+D 512",
    "A+B+C+D, 640": "near_wildcat A+B+C+D 640",
}


def guarantee() -> Figure:
    """Draw error, estimate and bound over the slots, and errors over the number of keys."""
    figure = Figure(figsize=(8.6, 3.6))
    left, right = figure.subplots(1, 2)
    _draw_bound(left)
    _draw_decay(right)
    figure.tight_layout()
    return figure


def near() -> Figure:
    """Draw the distance from exact features over the time, for each change of Near WildCat."""
    samples = [sample for sample in _samples("dinov2") if sample["group"] == "896 px, 4,097 tokens"]
    figure = Figure(figsize=(7.2, 3.4))
    axes = figure.subplots()
    for title, method in _CHANGES.items():
        own = [sample for sample in samples if sample["method"] == method]
        time = statistics.fmean(sample["shares"]["attention"] for sample in own)
        photographs = {sample["input"] for sample in own}
        distances = [
            1 - statistics.fmean(sample["scores"]["patches"] for sample in own if sample["input"] == photograph)
            for photograph in photographs
        ]
        mean, worst, colour = statistics.fmean(distances), max(distances), ORANGE if "D" in title else BLUE
        axes.plot([time, time], [mean, worst], color=colour, linewidth=1)
        axes.plot(time, mean, "o", color=colour)
        axes.plot(time, worst, "_", color=colour, markersize=9)
        look = {"fontsize": 8, "color": colour, "ha": "right" if "C+D" in title else "left"}
        axes.annotate(title, (time, mean), xytext=(-7 if "C+D" in title else 7, -3), textcoords="offset points", **look)
    axes.set_yscale("log")
    axes.set_xlim(0.1, 0.58)
    axes.set_xlabel("time of attention, share of exact attention's (DINOv2-S, 4,097 tokens, all layers)", fontsize=8)
    axes.set_ylabel("1 − cosine of the patches' features\n(dot: mean, bar: worst photograph)", fontsize=8)
    axes.grid(color=GRID)
    figure.tight_layout()
    return figure


def _draw_bound(axes: Axes) -> None:
    samples = _samples("guarantee")
    lines = (
        ("bounded, n 4,096, d 4", "bound", "bounded keys: the bound", BLUE, "--"),
        ("bounded, n 4,096, d 4", "error", "bounded keys: measured", BLUE, "-"),
        ("bounded, n 4,096, d 4", "estimate", "32 exact rows say", SKY, ":"),
        ("DINOv2, n 4,097, layer 8", "error", "DINOv2, layer 8: measured", ORANGE, "-"),
        ("DINOv2, n 4,097, layer 8", "estimate", "32 exact rows say", OCHRE, ":"),
    )
    for group, score, title, colour, line in lines:
        own = [sample for sample in samples if sample["group"] == group]
        errors = [
            _mean(own, score, lambda sample, r=slots: sample["method"] == f"wildcat rank {r}") for slots in _SLOTS
        ]
        axes.plot(_SLOTS, errors, line, color=colour, label=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(_SLOTS, [f"{slots:,}" for slots in _SLOTS])
    axes.set_xlabel("slots, of 4,096 keys", fontsize=8)
    axes.set_ylabel("largest error over the largest value", fontsize=8)
    axes.legend(frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1.02, 0.14))
    axes.grid(color=GRID)


def _draw_decay(axes: Axes) -> None:
    samples = _samples("decay")
    for title, (method, colour) in _DECAYS.items():
        own = [sample for sample in samples if sample["method"] == method]
        errors = [_mean(own, "bounded", lambda sample, n=n: sample["n"] == n) for n in _LENGTHS]
        axes.plot(_LENGTHS, errors, "o-", color=colour, markersize=3)
        lift = -8 if title == "Performer" else -2
        axes.annotate(
            title, (_LENGTHS[-1], errors[-1]), xytext=(6, lift), textcoords="offset points", fontsize=8, color=colour
        )
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.set_xticks(_LENGTHS, [f"{length:,}" for length in _LENGTHS])
    axes.set_xlim(200, 200000)
    axes.set_xlabel("bounded keys; slots or features grow as n^0.2", fontsize=8)
    axes.grid(color=GRID)


def _samples(run: str) -> list[dict[str, Any]]:
    return Folder(_RECORDS / run).records()


def _mean(samples: list[dict[str, Any]], score: str, taken: Callable[[dict[str, Any]], bool]) -> float:
    return statistics.fmean(sample["scores"][score] for sample in samples if taken(sample))
