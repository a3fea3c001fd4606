"""The methods of an evaluation: names and settings, which may grow with the number of keys."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from typing_extensions import Self, override

from eval.code import fingerprint
from wildcat_kv.attention import Attention, Exact, attention_method

PICTURE = "picture"
_CHANNELS = 64
Value = int | float | str | bool | None
Grid = tuple[int, int]


class Choice(BaseModel):
    """A method and its settings.

    Args:
        method: name that `wildcat_kv.attention.available` lists.
        label: name in tables; method and settings by default.
        settings: fields of the method. {times: t, power: p} is t * n ** p, rounded. {work: w} is the largest number
            with which the method takes at most the share w of exact attention's operations, in heads of 64 channels;
            one setting may be so. A `multiple` beside these rounds to multiples of it. The word "picture" for `grid`
            and `prefix` means the patches of a picture and its class token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _read_settings(cls, entry: Any) -> Any:
        """Take a name alone, and settings that stand beside the name."""
        if isinstance(entry, str):
            return {"method": entry}
        if not isinstance(entry, dict) or "settings" in entry:
            return entry
        own = {name: entry[name] for name in ("method", "label") if name in entry}
        return {**own, "settings": {name: value for name, value in entry.items() if name not in own}}

    method: str
    label: str = ""
    settings: dict[str, Value | dict[str, float]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _rules_are_whole(self) -> Self:
        for name, value in self.settings.items():
            if isinstance(value, Mapping) and set(value) - {"multiple"} not in ({"times", "power"}, {"work"}):
                raise ValueError(f"{name}={value}: a setting that depends on n has times and power, or work")
        if len(self._by_work()) > 1:
            raise ValueError(f"{' and '.join(self._by_work())} both follow the work; give one of them a number")
        return self

    @property
    def name(self) -> str:
        """Name in tables, unique in a run."""
        shown = [f"{name} {_shown(value)}" for name, value in self.settings.items() if value != PICTURE]
        return self.label or " ".join([self.method, *shown])

    @property
    def draws(self) -> bool:
        """True if the method takes a seed; others are measured once."""
        return any(one.name == "seed" for one in fields(attention_method(self.method)))

    def build(self, n: int, seed: int = 0, grid: Grid | None = None) -> Attention:
        """Make the method.

        Args:
            n: number of keys.
            seed: seed, for methods that have one.
            grid: rows and columns of the patches after the class token; None for tokens in a line.

        Raises:
            ValueError: an unknown method or setting, or one that does not fit.
        """
        own: dict[str, Any] = {"seed": seed} if self.draws else {}
        for name, value in self.settings.items():
            if value == PICTURE:
                own[name] = grid if name == "grid" else int(grid is not None)
            elif not isinstance(value, Mapping):
                own[name] = value
            elif "work" not in value:
                own[name] = _grown(value, n)
        for name in self._by_work():
            own[name] = self._at_work(name, own, n)
        return attention_method(self.method, **own)

    def code(self) -> str | None:
        """Make the fingerprint of the method's code and settings; None for a foreign package's."""
        return fingerprint([type(self.build(n=4096))], {"method": self.method, "settings": self.settings})

    def _by_work(self) -> list[str]:
        """List the settings that follow the work."""
        return [name for name, value in self.settings.items() if isinstance(value, Mapping) and "work" in value]

    def _at_work(self, name: str, others: Mapping[str, Any], n: int) -> int:
        """Find a setting's largest value within the work, by halving; the smallest if none is."""
        rule: Any = self.settings[name]
        multiple, limit = round(rule.get("multiple", 1)), rule["work"] * Exact().cost(n, _CHANNELS)
        low, high = 1, max(2, n // multiple + 1)
        while high - low > 1:
            middle = (low + high) // 2
            fits = attention_method(self.method, **others, **{name: middle * multiple}).cost(n, _CHANNELS) <= limit
            low, high = (middle, high) if fits else (low, middle)
        return low * multiple


def _grown(growth: Mapping[str, float], n: int) -> int:
    """Compute a setting that grows with the number of keys, at least 1 and a multiple of `multiple`.

    Example:
        >>> _grown({"times": 4, "power": 0.5}, 1024), _grown({"times": 1.1, "power": 0.5, "multiple": 2}, 100)
        (128, 12)
    """
    multiple = round(growth.get("multiple", 1))
    return multiple * max(1, round(growth["times"] * n ** growth["power"] / multiple))


def _shown(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return f"at {value['work']:g} work" if "work" in value else f"{value['times']:g} n^{value['power']:g}"


@dataclass(frozen=True, eq=False)
class Clocked(Attention):
    """Another method, which notes how long its calls take.

    Attributes:
        inner: the method.
        seconds: seconds of every call so far: of the processor, or of a GPU's clock on the wall.
    """

    name: ClassVar[str] = "clocked"
    complexity: ClassVar[str] = "that of the other method"

    inner: Attention
    seconds: list[float] = field(default_factory=list)

    @override
    def for_layer(self, layer: int) -> Clocked:
        return Clocked(self.inner.for_layer(layer), self.seconds)

    @override
    def forward(self, query: Tensor, *arguments: Any, **named: Any) -> Tensor:
        start = _now(query.device)
        output: Tensor = self.inner(query, *arguments, **named)
        self.seconds.append(_now(query.device) - start)
        return output


@dataclass(frozen=True, eq=False)
class Recorded(Attention):
    """Another method, which keeps the queries, keys and values of its calls.

    Attributes:
        inner: the method.
        calls: query, key, value and scale of every call so far.
    """

    name: ClassVar[str] = "recorded"
    complexity: ClassVar[str] = "that of the other method"

    inner: Attention
    calls: list[tuple[Tensor, Tensor, Tensor, float | None]] = field(default_factory=list)

    @override
    def for_layer(self, layer: int) -> Recorded:
        return Recorded(self.inner.for_layer(layer), self.calls)

    @override
    def forward(self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **named: Any) -> Tensor:
        self.calls.append((query, key, value, named.get("scale")))
        output: Tensor = self.inner(query, key, value, *arguments, **named)
        return output


def _now(device: torch.device) -> float:
    """Read the clock: the processor's own time on CPU, which other programs do not change."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
