"""Progress of a run: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PAUSE = 10.0  # seconds between two lines of a log, at least


class Shown(Protocol):
    """Something that shows how far a run is."""

    def skip(self, count: int) -> None:
        """Count measurements that an earlier run has made."""

    def advance(self, task: str, cell: str) -> None:
        """Count one measurement of a cell, made just now."""


@contextmanager
def progress(total: int, *, show: bool) -> Iterator[Shown]:
    """Show progress on stderr: a bar on a terminal, lines elsewhere, nothing unless `show`.

    Args:
        total: measurements of the run.
        show: True in the one process that shows something.
    """
    console = Console(stderr=True)
    if not show:
        yield _Log(total, lambda line: None)
    elif not console.is_terminal:
        yield _Log(total, lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False))
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=console) as bar:
            yield _Bar(bar, total)


class _Bar:
    def __init__(self, bar: Progress, total: int) -> None:
        self._bar, self._line = bar, bar.add_task("", total=total)

    def skip(self, count: int) -> None:
        self._bar.update(self._line, advance=count)

    def advance(self, task: str, cell: str) -> None:
        self._bar.update(self._line, advance=1, description=task)


class _Log:
    """Lines of plain text, at most one every ten seconds, and one for each new task.

    Args:
        total: measurements of the run.
        write: function that writes a line.
        clock: function that gives seconds.
    """

    def __init__(self, total: int, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._write, self._clock = total, write, clock
        self._done = self._measured = 0
        self._start, self._last = clock(), -_PAUSE
        self._tasks: set[str] = set()

    def skip(self, count: int) -> None:
        self._done += count

    def advance(self, task: str, cell: str) -> None:
        self._done, self._measured = self._done + 1, self._measured + 1
        now = self._clock()
        if task in self._tasks and now - self._last < _PAUSE and self._done < self._total:
            return
        self._last = now
        self._tasks.add(task)
        each = (now - self._start) / self._measured
        left = f", about {_duration(each * (self._total - self._done))} left" if self._done < self._total else ""
        self._write(f"{task} {cell}: {self._done:,} of {self._total:,}, {each:.1f} s each{left}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
