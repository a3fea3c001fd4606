"""Rates of the machine: reading memory and multiplying matrices, the limit of any implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.records import Record
from benchmarks.turns import Stopwatch, take_turns

_BYTES = 2**29  # far above any processor's caches
_SIDE = 2048
_TURNS = 5


def measure(device: torch.device) -> Iterator[Record]:
    """Measure bytes read and copied a second, and float32 operations a second of a product."""
    source = torch.ones(_BYTES // 4, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(_SIDE, _SIDE, device=device)
    works: dict[str, tuple[Callable[[], object], float, str]] = {
        "read_rate": (source.sum, _BYTES, "B/s"),
        "copy_rate": (lambda: target.copy_(source), 2 * _BYTES, "B/s"),
        "gemm_rate": (lambda: matrix @ matrix, 2 * _SIDE**3, "flop/s"),
    }

    def timed(work: Callable[[], object], amount: float) -> dict[str, float]:
        with Stopwatch(device) as watch:
            work()
        return {"rate": amount / watch.seconds}

    contenders = {
        name: lambda work=work, amount=amount: timed(work, amount) for name, (work, amount, _) in works.items()
    }
    for name, samples in take_turns(contenders, _TURNS, title="rates").items():
        yield Record(quantity=name, unit=works[name][2], labels={}, samples=tuple(samples["rate"]))
