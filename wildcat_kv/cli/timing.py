"""Times of one `generate()`."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Timing:
    """Times of one `generate()`.

    Attributes:
        first_token_seconds: time from the call to the first new token, the reading of the prompt included.
        tokens: number of new tokens.
        tokens_per_second: speed of the tokens after the first; 0 where there are none.
    """

    first_token_seconds: float
    tokens: int
    tokens_per_second: float


class TimedStreamer(BaseStreamer):
    """Streamer that keeps the time, and hands new tokens on to another streamer.

    Args:
        follower: the other streamer, which does not get the prompt.
    """

    def __init__(self, follower: BaseStreamer | None = None) -> None:
        self._follower = follower
        self._start = time.perf_counter()
        self._times: list[float] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Take what `generate()` gives: the prompt first, then each token, int64 (1,)."""
        if self._prompt:
            self._prompt = False
            return
        self._times.append(time.perf_counter())
        if self._follower is not None:
            self._follower.put(value)

    def end(self) -> None:
        """Take the end of `generate()`."""
        if self._follower is not None:
            self._follower.end()

    @property
    def timing(self) -> Timing:
        """The times so far."""
        if not self._times:
            return Timing(0.0, 0, 0.0)
        later = self._times[-1] - self._times[0]
        speed = (len(self._times) - 1) / later if later > 0 else 0.0
        return Timing(self._times[0] - self._start, len(self._times), speed)
