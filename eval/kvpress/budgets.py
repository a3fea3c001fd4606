"""The cells of both sides, and which of theirs has the bytes of which of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXACT, QUANTISED, QUARTER, DEFAULT, TENTH = "exact", "all tokens", "unquantised quarter", "default", "bytes_9"
NO_PRESS = "no press"
QUANTO_BITS = 4


@dataclass(frozen=True)
class Ours:
    """One of this package's caches.

    Attributes:
        name: name in tables.
        budget: cell whose bytes it has.
        fields: arguments of `compress_context`; None for Transformers' DynamicCache.
    """

    name: str
    budget: str
    fields: Mapping[str, Any] | None


@dataclass(frozen=True)
class Theirs:
    """A press of kvpress, with a cache.

    Attributes:
        press: name of the press in kvpress's own evaluation; None to keep all tokens.
        bits: bits of Transformers' QuantizedCache (quanto); None for DynamicCache.
        budget: name of the cell of ours whose bytes it is to keep.
    """

    press: str | None
    bits: int | None
    budget: str

    @property
    def name(self) -> str:
        """The name in tables, unique."""
        cache = "" if self.bits is None else f" + quanto {self.bits} bits"
        return f"{self.press or NO_PRESS}{cache}" + ("" if self.press is None else f", bytes of {self.budget}")


_TWICE = {"reads": 2, "ratio": 0.25, "bits": 4}
OURS = (
    Ours(EXACT, EXACT, None),
    Ours("all tokens in 4 bits", QUANTISED, {"preset": "bytes_30"}),
    Ours("a quarter, unquantised", QUARTER, {"ratio": 0.25, "bits": None}),
    Ours("the default", DEFAULT, {}),
    Ours("bytes_9", TENTH, {"preset": "bytes_9"}),
    Ours("bytes_9, two readings", TENTH, _TWICE),
)
# The presses that their leaderboard and this package's own baselines have near the front, by their names there.
PRESSES = ("kvzip", "adakv_compactor", "expected_attention", "keydiff", "snapkv")
THEIRS = (
    Theirs(None, None, EXACT),
    Theirs(None, QUANTO_BITS, QUANTISED),
    *(Theirs(press, None, QUARTER) for press in PRESSES),
    *(Theirs(press, QUANTO_BITS, budget) for budget in (DEFAULT, TENTH) for press in PRESSES),
)
NAMES = [*(cell.name for cell in OURS), *(cell.name for cell in THEIRS)]
TITLES = {
    EXACT: "All tokens",
    QUARTER: "A quarter of the tokens, unquantised",
    DEFAULT: "A sixth of the bytes",
    TENTH: "A tenth of the bytes",
}


def jobs(held: Mapping[str, int], cells: Sequence[Theirs] = THEIRS) -> list[dict[str, Any]]:
    """Describe cells of theirs for their environment, with the share of the bytes that each is to keep.

    Args:
        held: bytes of each cell of ours on the text, by name.
        cells: cells of theirs.
    """
    leading = {cell.budget: cell.name for cell in reversed(OURS)}
    return [
        {
            "name": cell.name,
            "press": cell.press,
            "bits": cell.bits,
            "share": None if cell.press is None else held[leading[cell.budget]] / held[EXACT],
        }
        for cell in cells
    ]
