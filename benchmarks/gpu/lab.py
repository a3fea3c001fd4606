"""The device, the clock, and the models and caches that several cases share."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Shape, Sizes
from benchmarks.turns import Stopwatch, synchronize
from wildcat_kv import CompressedCache
from wildcat_kv.hook.keyword import CACHE

_SLOW = 2.0  # seconds of a call that is made once
_SYNCHRONISES = "synchroniz"  # a word of the warning of torch's debug mode


@dataclass
class Lab:
    """Hold the device, the sizes and the time that all cases share.

    Attributes:
        device: device that is measured.
        sizes: lengths and rows.
        layers: layers of a random model; the figures of all its layers are reckoned from these.
        deadline: time, of `time.perf_counter`, at which no case begins any more.
        path: model with real weights in place of random ones; None for random ones.
    """

    device: torch.device
    sizes: Sizes
    layers: int
    deadline: float
    path: str | None = None
    _shape: Shape | None = None
    _model: Any = None
    _tokenizer: Any = None
    _filled: dict[Any, CompressedCache] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and caches."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()

    def model(self, shape: Shape) -> Any:
        """Give the model of a shape; the one of another shape is dropped."""
        if self._shape != shape:
            self.drop()
            if self.path is None:
                self._model = shape.model(min(self.layers, shape.layers), self.device, self.dtype)
            else:
                from wildcat_kv.models import load_model

                self._model, self._tokenizer = load_model(self.path, self.dtype, str(self.device))
            self._shape = shape
        return self._model

    def drop(self) -> None:
        """Drop model and caches."""
        self._shape = self._model = self._tokenizer = None
        self._filled.clear()
        self.sweep()

    def sweep(self) -> None:
        """Give unused memory back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def ids(self, shape: Shape, tokens: int) -> Tensor:
        """Make a prompt, int64 (1, tokens): of essays for real weights, of random tokens otherwise."""
        model = self.model(shape)
        if self._tokenizer is not None:
            from benchmarks.options import Subject

            return Subject(model, self._tokenizer, str(self.dtype)).prompt(tokens)
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(1, model.config.vocab_size, (1, tokens), generator=generator).to(self.device)

    @torch.no_grad()
    def filled(self, shape: Shape, tokens: int, method: str, **settings: Any) -> CompressedCache:
        """Give a compressed cache that has read a prompt in one row; a copy that the caller may use up."""
        key = (shape, tokens, method, tuple(sorted(settings.items())))
        if key not in self._filled:
            if len(self._filled) >= 4:  # they are needed in the order that they were made in
                del self._filled[next(iter(self._filled))]
            model = self.model(shape)
            cache = CompressedCache(model.config, compressor=method, sink=4, **settings)
            model(self.ids(shape, tokens), **{CACHE: cache}, logits_to_keep=1)
            self._filled[key] = cache
        return self._filled[key].clone()

    # Time and memory

    def seconds(self, work: Callable[[], object]) -> float:
        """Time one call, the device's work included."""
        with Stopwatch(self.device) as watch:
            work()
        return watch.seconds

    def repeated(self, work: Callable[[], object], budget: float = 0.2, most: int = 200) -> dict[str, float]:
        """Time calls one after the other, within about `budget` seconds after two to warm up.

        Returns:
            Seconds of a call, of the first call, and the number of calls.
        """
        first = self.seconds(work)
        if first > _SLOW:  # not worth the others' time
            return {"seconds": first, "first_seconds": first, "calls": 1}
        once = self.seconds(work)
        calls = max(1, min(most, int(budget / max(once, 1e-7))))

        def all_calls() -> None:
            for _ in range(calls):
                work()

        return {"seconds": self.seconds(all_calls) / calls, "first_seconds": first, "calls": calls}

    def replayed(self, work: Callable[[], object]) -> float | None:
        """Time a call as a CUDA graph: the device's own time, without launches; None where it cannot be one."""
        if self.device.type != "cuda":
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(8):
                    work()
            return self.repeated(graph.replay, budget=0.1)["seconds"] / 8
        except Exception:  # what synchronises cannot be captured, and says so in many ways
            return None

    def held(self) -> int:
        """Count the bytes that torch has allocated on the device; 0 on the CPU, where nobody counts."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    @contextmanager
    def peak(self, row: dict[str, Any]) -> Iterator[None]:
        """Note in `row` the most bytes above what was allocated before."""
        if self.device.type != "cuda":
            yield
            return
        before = self.held()
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        row["peak_bytes"] = torch.cuda.max_memory_allocated(self.device) - before

    def stalls(self, work: Callable[[], object]) -> dict[str, int] | None:
        """Count by place how often the host waits for the device; None on the CPU."""
        if self.device.type != "cuda":
            return None
        synchronize(self.device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places: dict[str, int] = {}
        for each in caught:
            if _SYNCHRONISES in str(each.message):
                place = f"{'/'.join(each.filename.split('/')[-3:])}:{each.lineno}"
                places[place] = places.get(place, 0) + 1
        return places


def noting_error(row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Add what a contender measures to its row, or its error: the other contenders are worth having."""
    try:
        return row | work()
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


class Marks:
    """Moments on the device's own clock: setting one waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._moments: list[Any] = []

    def set(self) -> None:
        """Mark this moment."""
        if not self._cuda:
            self._moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._moments.append(event)

    def gaps(self) -> list[float]:
        """Give the seconds between neighbours; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in zip(self._moments, self._moments[1:], strict=False)]
        return [b - a for a, b in zip(self._moments, self._moments[1:], strict=False)]
