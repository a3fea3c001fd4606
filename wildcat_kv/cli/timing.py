"""Keep the time of one `generate()`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Timing:
    """Times of one `generate()`.

    Attributes:
        first_token_seconds: from the call to the first new token: the prompt is read in it.
        tokens: new tokens.
        tokens_per_second: of the tokens after the first; 0 where there are none.
    """

    first_token_seconds: float
    tokens: int
    tokens_per_second: float


class TimedStreamer(BaseStreamer):
    """Hands on every new token as it comes, and keeps the time.

    Args:
        on_token: called with the id of each new token.
    """

    def __init__(self, on_token: Callable[[int], None] = lambda token: None) -> None:
        self._on_token = on_token
        self._start = time.perf_counter()
        self._times: list[float] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Called by `generate()`: the prompt first, then each token (rows,), of which there is one row."""
        if self._prompt:
            self._prompt = False
            return
        self._times.append(time.perf_counter())
        self._on_token(int(value.flatten()[0]))

    def end(self) -> None:
        """Called by `generate()` at the end."""

    @property
    def timing(self) -> Timing:
        """What was measured."""
        if not self._times:
            return Timing(0.0, 0, 0.0)
        later = self._times[-1] - self._times[0]
        speed = (len(self._times) - 1) / later if later > 0 else 0.0
        return Timing(self._times[0] - self._start, len(self._times), speed)
