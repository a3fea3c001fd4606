"""The choice among measured settings: within an error, or within a cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A setting of a layer or head.

    Attributes:
        error: relative error.
        cost: operations.
    """

    error: float
    cost: int


def within_tolerance(units: Sequence[Sequence[Option]], tolerance: float) -> list[int]:
    """Choose the cheapest option within the tolerance in every unit; of equally cheap ones the one with less error.

    Args:
        units: options of every layer or head; one of each is within the tolerance.
        tolerance: the largest error.

    Returns:
        For every unit the place of its option.

    Example:
        >>> within_tolerance([[Option(0.0, 9), Option(0.1, 4), Option(0.3, 1)]], 0.2)
        [1]
    """
    return [
        min(
            (place for place, one in enumerate(unit) if one.error <= tolerance), key=lambda place: _by_cost(unit[place])
        )
        for unit in units
    ]


def within_cost(units: Sequence[Sequence[Option]], limit: float) -> list[int]:
    """Choose options with a small sum of errors, and with a sum of costs within the limit.

    A greedy choice: every unit begins with its cheapest option. Then, step by step, the change is made that takes the
    most error away for each operation it adds, among all that still fit. The sum of errors need not be the least there
    is, but no single change within the limit makes it smaller.

    Args:
        units: options of every layer or head.
        limit: the largest sum of costs.

    Returns:
        For every unit the place of its option.

    Raises:
        ValueError: the cheapest options together exceed the limit.

    Example:
        >>> within_cost([[Option(0.0, 9), Option(0.1, 4)], [Option(0.0, 9), Option(0.5, 4)]], 13)
        [1, 0]
    """
    finite = [[place for place, one in enumerate(unit) if math.isfinite(one.error)] for unit in units]
    chosen = [min(places, key=lambda place: _by_cost(unit[place])) for places, unit in zip(finite, units, strict=True)]
    spare = limit - sum(unit[place].cost for unit, place in zip(units, chosen, strict=True))
    if spare < 0:
        raise ValueError(f"the cheapest settings take {limit - spare:,.0f} operations, and {limit:,.0f} are allowed")
    while True:
        changes = []
        for number, unit in enumerate(units):
            now = unit[chosen[number]]
            for place in finite[number]:
                gain, price = now.error - unit[place].error, unit[place].cost - now.cost
                if gain > 0 and price <= spare:
                    changes.append((gain / price if price > 0 else math.inf, number, place, price))
        if not changes:
            return chosen
        _, number, place, price = max(changes)
        chosen[number] = place
        spare -= price


def _by_cost(option: Option) -> tuple[int, float]:
    return option.cost, option.error
