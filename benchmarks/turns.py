"""Turns, A, B, A, B: whatever else the machine does falls on all contenders alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import track

Sample = Mapping[str, float]  # what one turn gives, by quantity
_Key = TypeVar("_Key")


class Stopwatch:
    """Measures the seconds inside it, a device's work included; may be entered again.

    Attributes:
        seconds: added up over all times that it was entered.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    def __enter__(self) -> Stopwatch:
        """Start."""
        synchronize(self._device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        synchronize(self._device)
        self.seconds += time.perf_counter() - self._start


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of a device; the CPU works as it is asked."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def take_turns(
    contenders: Mapping[_Key, Callable[[], Sample]], turns: int, *, warm_ups: int = 1, title: str = ""
) -> dict[_Key, dict[str, list[float]]]:
    """Run every contender once a turn, in order.

    Args:
        contenders: each runs once and says what it measured.
        turns: turns to count.
        warm_ups: turns before them, which are not counted.
        title: title of the progress bar.

    Returns:
        For every contender and quantity the samples, one a turn: those of one index are of the same turn.
    """
    measured: dict[_Key, dict[str, list[float]]] = {key: {} for key in contenders}
    rounds = [(turn, key) for turn in range(-warm_ups, turns) for key in contenders]
    for turn, key in track(rounds, description=title, console=Console(stderr=True), transient=True):
        sample = contenders[key]()
        if turn >= 0:
            for quantity, value in sample.items():
                measured[key].setdefault(quantity, []).append(value)
    return measured
