"""One look for all figures: of evaluations, benchmarks and the documentation."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure

# Told apart with every kind of colour vision (Okabe and Ito).
BLUE, ORANGE, GREEN, PINK, SKY, OCHRE = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, OCHRE)
PALE_BLUE, PALE_PINK = "#9ecae1", "#f0c8de"
GREY, DARK, GRID, MISSING = "#666666", "#333333", "#eeeeee", "#dddddd"

_SETTINGS = {"svg.hashsalt": "wildcat_kv", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_DPI = 110


def house_style() -> AbstractContextManager[None]:
    """Draw in the house's style inside this context, whatever the user's own settings are."""
    return matplotlib.style.context(["default", _SETTINGS])


def save(figure: Figure, path: Path, *, small: bool = False) -> None:
    """Write a figure as PNG or SVG, by the suffix: the same bytes for the same figure.

    Args:
        figure: figure to write.
        path: file to write to.
        small: True to keep an SVG's text as text and its numbers short, for figures with many marks.
    """
    undated = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    short = small and path.suffix == ".svg"
    with matplotlib.rc_context({"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]} if short else {}):
        figure.savefig(path, dpi=_DPI, bbox_inches="tight", facecolor="white", metadata=undated)
    if short:
        path.write_text(_compact(path.read_text(encoding="utf-8")), encoding="utf-8")


def _compact(svg: str) -> str:
    """Shorten an SVG of matplotlib's whose text is text: nothing moves by more than a hundredth of a point."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"\d+\.\d{3,}", _rounded, tag[0]), svg)
    svg = re.sub(r' id="(?!m|p)[^"]*"| transform="rotate\(-?0 [^"]*"', "", svg)  # marks and clips are referred to
    svg = re.sub(r'(<path id="m[^>]*?) style="[^"]*"', r"\1", svg)  # said where the mark is used
    svg = re.sub(r"; stroke-line(join: miter|cap: square)", "", svg)
    svg = re.sub(r"<path [^>]*>", lambda tag: " ".join(tag[0].split()), svg)
    while (less := re.sub(r"<g>\s*(<[^<>]+/>|<text[^<]*</text>)\s*</g>", r"\1", svg)) != svg:
        svg = less
    return re.sub(r"\n\s+", "\n", svg)


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
