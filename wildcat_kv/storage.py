"""The tensors of one cache layer, allocated ahead of the tokens so that appending copies only the new ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.bins import take_columns


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that outlive the forward pass: without a graph, and, under inference_mode too, writable later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class Entries:
    """Stored entries: coreset slots and exact tokens alike.

    Attributes:
        keys: (rows, heads, n, d).
        values: (rows, heads, n, d_v).
        weights: float32 (rows, heads, n), 1 for exact tokens.
        valid: bool (rows, heads, n), False for padding.
        memory: float32 (rows, heads, n, m), what the method remembers of an entry from fold to fold; m is 0 for
            most methods, and 0 is what it remembers of a new token.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor
    valid: Tensor
    memory: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors, in the order of the attributes."""
        return self.keys, self.values, self.weights, self.valid, self.memory

    def slice(self, start: int, stop: int) -> Entries:
        """A view of the columns [start, stop)."""
        return Entries(*(tensor[:, :, start:stop] for tensor in self.tensors()))

    def columns(self, index: Tensor) -> Entries:
        """Columns (rows, k) of each row, copied."""
        return Entries(*(take_columns(tensor, index.unsqueeze(1)) for tensor in self.tensors()))

    def rows(self, index: Tensor) -> Entries:
        """Rows (k,) of the batch, copied."""
        return Entries(*(tensor.index_select(0, index.to(tensor.device)) for tensor in self.tensors()))


class Storage:
    """Entries with free room behind them.

    Attributes:
        length: columns in use.
        room: columns to allocate beyond what is needed, whenever more are needed.
    """

    def __init__(self, parts: list[Entries], room: int, extra: int = 0) -> None:
        """Copy `parts` one after the other into new memory, with `room + extra` free columns behind them."""
        self.room = room
        self.length = 0
        first = parts[0]
        capacity = sum(part.keys.shape[2] for part in parts) + room + extra
        shape, device = (*first.keys.shape[:2], capacity), first.keys.device
        with ordinary_tensors():
            self._memory = Entries(
                torch.empty(*shape, first.keys.shape[-1], dtype=first.keys.dtype, device=device),
                torch.empty(*shape, first.values.shape[-1], dtype=first.values.dtype, device=device),
                torch.ones(shape, device=device),
                torch.ones(shape, dtype=torch.bool, device=device),
                torch.zeros(*shape, first.memory.shape[-1], device=device),
            )
            for part in parts:
                end = self.length + part.keys.shape[2]
                for target, source in zip(self._memory.slice(self.length, end).tensors(), part.tensors(), strict=True):
                    target.copy_(source)
                self.length = end

    @staticmethod
    def empty(keys: Tensor, values: Tensor, room: int, memory: int = 0) -> Storage:
        """Nothing stored, with free columns for these keys and values and `room` more."""
        none = Entries(
            keys[:, :, :0],
            values[:, :, :0],
            keys.new_ones(*keys.shape[:2], 0, dtype=torch.float32),
            keys.new_ones(*keys.shape[:2], 0, dtype=torch.bool),
            keys.new_zeros(*keys.shape[:2], 0, memory, dtype=torch.float32),
        )
        return Storage([none], room, extra=keys.shape[2])

    @property
    def entries(self) -> Entries:
        """A view of what is in use."""
        return self._memory.slice(0, self.length)

    def view(self) -> tuple[Tensor, Tensor]:
        """New views of the keys and values in use, (rows, heads, length, channels)."""
        return self._memory.keys[:, :, : self.length], self._memory.values[:, :, : self.length]

    @property
    def memory(self) -> Entries:
        """All of the memory, free room included."""
        return self._memory

    def select_rows(self, index: Tensor) -> None:
        """Keep the rows at `index`, int64 (k,), in that order."""
        with ordinary_tensors():
            self._memory = self._memory.rows(index)

    def truncate(self, length: int) -> None:
        """Give the columns from `length` on back to the free room."""
        freed = self._memory.slice(length, self.length)
        freed.valid.fill_(True)
        freed.weights.fill_(1.0)
        freed.memory.zero_()
        self.length = length

    def to(self, device: torch.device) -> None:
        """Take everything to `device`; nothing happens where it is there already."""
        if all(tensor.device == device for tensor in self._memory.tensors()):
            return
        with ordinary_tensors():
            self._memory = Entries(*(tensor.to(device, non_blocking=True) for tensor in self._memory.tensors()))

    def offload(self) -> None:
        """Take keys and values to the CPU. Weights and validity are small and stay: the host may ask for them."""
        held = self._memory
        with ordinary_tensors():
            keys, values = (tensor.to("cpu", non_blocking=True) for tensor in (held.keys, held.values))
        self._memory = Entries(keys, values, held.weights, held.valid, held.memory)

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Append exact tokens (rows, heads, k, ...); `valid` is bool (rows, k), all by default."""
        end = self.length + keys.shape[2]
        if end > self._memory.keys.shape[2]:
            self._memory = Storage([self.entries], self.room, extra=keys.shape[2])._memory
        new = self._memory.slice(self.length, end)
        new.keys.copy_(keys)
        new.values.copy_(values)
        if valid is not None:
            new.valid.copy_(valid.unsqueeze(1))
            new.weights.copy_(valid.unsqueeze(1))
        self.length = end
