"""One look for all figures: of evaluations, benchmarks and the documentation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

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


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the suffix: the same bytes for the same figure."""
    undated = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", facecolor="white", metadata=undated)
