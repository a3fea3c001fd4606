"""Measurement of candidates on a layer's own queries, keys and values, while the model attends exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from wildcat_kv.attention.base import Attention, wide
from wildcat_kv.attention.exact import Exact


@dataclass
class Tally:
    """Sums over the calls of one layer; nothing of a call is kept.

    Attributes:
        exact: the sum of squares of the exact output, float64 (kv_heads,); None before the first call.
        exact_cost: operations of exact attention in one key head.
        squares: for every candidate the sum of squares of its error, float64 (kv_heads,).
        costs: for every candidate the operations of one key head.
        refusals: what a candidate said that could not attend, by its place.
    """

    exact: Tensor | None = None
    exact_cost: int = 0
    squares: list[Tensor] = field(default_factory=list)
    costs: list[int] = field(default_factory=list)
    refusals: dict[int, str] = field(default_factory=dict)

    @property
    def kv_heads(self) -> int:
        """Number of key heads."""
        return 0 if self.exact is None else len(self.exact)

    def error(self, candidate: int, head: int | None = None) -> float:
        """Give a candidate's relative error in one key head, or in all; infinite where it could not attend."""
        if candidate in self.refusals or self.exact is None:
            return math.inf
        heads = slice(None) if head is None else slice(head, head + 1)
        wrong, whole = float(self.squares[candidate][heads].sum()), float(self.exact[heads].sum())
        if wrong == 0:
            return 0.0
        return math.sqrt(wrong / whole) if whole > 0 and math.isfinite(wrong) else math.inf


@dataclass(frozen=True, eq=False)
class Recorder(Attention):
    """Attend exactly, and measure candidates beside it.

    Attributes:
        candidates: the methods to measure.
        tallies: the layers' sums; `for_layer` adds one, so that they have the order of the layers.
        tally: sums of the recorder's own layer.
    """

    name: ClassVar[str] = "recorder"
    complexity: ClassVar[str] = "the sum of its candidates'"

    candidates: tuple[Attention, ...]
    tallies: list[Tally] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    @override
    def for_layer(self, layer: int) -> Self:
        made = type(self)(tuple(one.for_layer(layer) for one in self.candidates), self.tallies)
        self.tallies.append(made.tally)
        return made

    @override
    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        exact = Exact()(query, key, value, *args, **kwargs)
        tally, kv_heads = self.tally, key.shape[-3]
        padding = kwargs.get("key_padding_mask")
        if tally.exact is None:
            none = torch.zeros(kv_heads, dtype=torch.float64)
            tally.exact, tally.squares = none, [none] * len(self.candidates)
            tally.costs = [0] * len(self.candidates)
        tally.exact = tally.exact + _squares(exact, kv_heads, padding)
        tally.exact_cost += _cost(Exact(), query, key, value, padding)
        for place, candidate in enumerate(self.candidates):
            if place in tally.refusals:
                continue
            try:
                found = candidate(query, key, value, *args, **kwargs)
                tally.costs[place] += _cost(candidate, query, key, value, padding)
            except ValueError as error:  # such as more bins than this layer has keys
                tally.refusals[place] = str(error)
                continue
            tally.squares[place] = tally.squares[place] + _squares(wide(found) - wide(exact), kv_heads, padding)
        return exact


def _squares(tensor: Tensor, kv_heads: int, padding: Tensor | None) -> Tensor:
    """Sum the squares of (..., heads, q, d_v) for every key head, float64; padding counts for nothing."""
    squares = wide(tensor).square().sum(-1).cpu().double()  # not every device has float64
    if padding is not None and padding.shape[-1] == squares.shape[-1]:  # queries are the keys' own tokens
        squares = squares.masked_fill(padding.unsqueeze(-2).cpu(), 0.0)
    heads = squares.sum(-1).reshape(-1, squares.shape[-2]).sum(0)
    return heads.view(kv_heads, -1).sum(-1)


def _cost(method: Attention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> int:
    """Count the operations of one key head with the queries of its group, over all rows."""
    asked = query.shape[-2] * (query.shape[-3] // key.shape[-3])
    rows = [key.shape[-2]] * math.prod(key.shape[:-3]) if padding is None else (~padding).sum(-1).flatten().tolist()
    return sum(method.cost(n, key.shape[-1], queries=asked, value_dim=value.shape[-1]) for n in rows if n)
