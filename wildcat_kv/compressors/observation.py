"""The queries that methods learn from: those since the last fold, and as many from before it as are asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Observation:
    """Which queries a method wants to see at a fold.

    Attributes:
        latest: number of the newest ones; None for all since the last fold, and those carried.
        carried: number that is kept from one fold to the next.
    """

    latest: int | None
    carried: int
