"""Queries that methods learn from: those since the last fold, and some older ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Observation:
    """Queries that a method wants to see at a fold.

    Attributes:
        latest: number of the newest ones; None for all since the last fold, and those carried.
        carried: number that is kept from one fold to the next.
    """

    latest: int | None
    carried: int
