"""The way that one token attends on a GPU, chosen once for what a layer holds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.packed import Segment
from wildcat_kv.coreset.decoding import DecodePlan, HeldBand, PackedPart, supports
from wildcat_kv.coreset.wtdattn import AttentionOptions


class _Open(Protocol):
    """What is read of a `Storage`."""

    allocated: Entries
    length: int


class _Lines(Protocol):
    """What is read of a `Band`."""

    @property
    def places(self) -> Sequence[int]: ...
    @property
    def open(self) -> _Open: ...
    @property
    def packed(self) -> tuple[Segment, ...]: ...


class Lines(NamedTuple):
    """Heads that hold equally many entries, as `Band` has them.

    Attributes:
        places: the heads, each as row * kv_heads + head.
        open: entries in the dtype of the model.
        packed: quantised slots.
    """

    places: Sequence[int]
    open: _Open
    packed: tuple[Segment, ...] = ()


class KernelWay:
    """Plan of a layer's kernels, made anew when its memory changes.

    It holds addresses of the layer's tensors, and none of the tensors. A copy begins without a plan.
    """

    def __init__(self) -> None:
        self._plan: DecodePlan | None = None
        self._held: list[weakref.ref[Any]] = []
        self._lengths: list[int] = []
        self._query: tuple[torch.dtype, int] | None = None

    def attend(self, query: Tensor, kv_heads: int, lines: Sequence[_Lines], options: AttentionOptions) -> Tensor | None:
        """Attend by the kernels, if they can attend to these entries.

        Args:
            query: (rows, heads, 1, d).
            kv_heads: key heads of a row.
            lines: all heads of all rows.
            options: further arguments of the attention call, without `valid`.

        Returns:
            (rows, heads, 1, d_v) in the query's dtype, or None.
        """
        if torch.compiler.is_compiling() or (query.requires_grad and torch.is_grad_enabled()):
            return None
        if not self._serves(query, lines):
            self._make(query, kv_heads, lines)
        if self._plan is None:
            return None
        return self._plan.attend(query, lines[0].open.length - self._lengths[0], options)

    def tensors(self) -> list[Tensor]:
        """List the tensors of the plan."""
        return [] if self._plan is None else self._plan.tensors()

    def _serves(self, query: Tensor, lines: Sequence[_Lines]) -> bool:
        """Tell if the plan, or what was found without one, still holds."""
        if self._query is None or self._query[0] is not query.dtype or self._query[1] != query.shape[1]:
            return False
        added = lines[0].open.length - self._lengths[0]
        place = 0
        for own, length in zip(lines, self._lengths, strict=False):
            held = self._held
            if held[place]() is not own.open.allocated or own.open.length - length != added:
                return False
            place += 1
            for segment in own.packed:
                if held[place]() is not segment:
                    return False
                place += 1
        return len(lines) == len(self._lengths) and place == len(self._held)

    def _make(self, query: Tensor, kv_heads: int, lines: Sequence[_Lines]) -> None:
        """Choose the way, and make the plan where the kernels can do it."""
        bands, group = [_held(own) for own in lines], query.shape[1] // kv_heads
        self._plan = DecodePlan.of(bands, kv_heads, group) if supports(bands, query.dtype, group) else None
        self._held = [weakref.ref(one) for own in lines for one in (own.open.allocated, *own.packed)]
        self._lengths, self._query = [own.open.length for own in lines], (query.dtype, query.shape[1])

    def __reduce__(self) -> tuple[type[KernelWay], tuple[()]]:
        return KernelWay, ()


def _held(lines: _Lines) -> HeldBand:
    """Name the tensors of some heads for the kernels."""
    held = lines.open.allocated
    packed = [PackedPart(segment.keys, segment.values, segment.weights, segment.valid) for segment in lines.packed]
    return HeldBand(lines.places, held.keys, held.values, held.weights, held.valid, lines.open.length, packed)
