"""The tensors of one cache layer, allocated ahead of the tokens so that appending copies only the new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.tensors import at_least_float32, ordinary_tensors, saturate_, take_columns
from wildcat_kv.coreset.wtdattn import WeightSigns, mass_of

# Free columns where more are allocated than needed: this many, or this part of what is in use if that is more.
_LEAST_ROOM = 32
_ROOM_PART = 64
# Free columns that a fold may leave, in rooms: those that it frees are filled again before the next one.
_MOST_ROOMS = 4


@dataclass(frozen=True)
class Entries:
    """Stored entries: coreset slots and exact tokens alike.

    Attributes:
        keys: (rows, heads, n, d).
        values: (rows, heads, n, d_v), numerators U over the mass of their weights: an exact token's value as it is.
        weights: float32 (rows, heads, n), 1 for exact tokens, 0 for padding.
        valid: bool (rows, heads, n), False for padding.
        carried_state: float32 (rows, heads, n, m), numbers that the method keeps of an entry from fold to fold; m is 0
            for most methods, and a new token has zeros.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor
    valid: Tensor
    carried_state: Tensor

    @staticmethod
    def of(coreset: Coreset, carried_state: Tensor | None, like: Entries) -> Entries:
        """The slots of a coreset as entries beside `like`, in its dtypes."""
        values = coreset.values.to(at_least_float32(coreset.values.dtype)) / mass_of(coreset.weights).unsqueeze(-1)
        if carried_state is None:
            carried_state = like.carried_state.new_zeros(*coreset.valid.shape, like.carried_state.shape[-1])
        return Entries(
            coreset.keys,
            saturate_(values, like.values.dtype),
            coreset.weights.masked_fill(~coreset.valid, 0.0),
            coreset.valid,
            carried_state,
        )

    def numerators(self) -> Tensor:
        """U, float32 (rows, heads, n, d_v); float64 where the values are."""
        return self.values.to(at_least_float32(self.values.dtype)) * mass_of(self.weights).unsqueeze(-1)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors, in the order of the attributes."""
        return self.keys, self.values, self.weights, self.valid, self.carried_state

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
    """Entries with free room behind them, in which weights and carried states are 0 and nothing is valid.

    Args:
        parts: what to store, one after the other; copied.
        limit: columns that are enough for good; None where there is no such number.
        weighting: what is known of the weights; read from them by default.
        extra: columns to come at once.
        fixed: allocate `limit` columns now, and come back to this very memory whenever they are enough.

    Attributes:
        length: columns in use.
        weighting: what is known of the weights of the entries.
    """

    def __init__(
        self,
        parts: Sequence[Entries],
        limit: int | None = None,
        weighting: WeightSigns | None = None,
        extra: int = 0,
        fixed: bool = False,
    ) -> None:
        self._limit, self._fixed = limit, fixed
        first, needed = parts[0], sum(part.keys.shape[2] for part in parts)
        shape, device = (*first.keys.shape[:2], self._capacity(needed + extra)), first.keys.device
        # A traced step attends to free columns as well, with weight 0: they must hold numbers.
        allocate = torch.zeros if fixed else torch.empty
        with ordinary_tensors():
            self._memory = Entries(
                allocate(*shape, first.keys.shape[-1], dtype=first.keys.dtype, device=device),
                allocate(*shape, first.values.shape[-1], dtype=first.values.dtype, device=device),
                torch.zeros(shape, dtype=torch.float32, device=device),
                torch.zeros(shape, dtype=torch.bool, device=device),
                torch.zeros(*shape, first.carried_state.shape[-1], dtype=torch.float32, device=device),
            )
            self.length = self._write(0, parts)
        # Where a fixed storage comes back to; it leaves it only for more tokens at once than the limit.
        self._home = self._memory if fixed and shape[2] == limit else None
        self.weighting = WeightSigns.of(self.entries.weights, self.entries.valid) if weighting is None else weighting

    @staticmethod
    def empty(
        keys: Tensor, values: Tensor, state_size: int = 0, limit: int | None = None, *, fixed: bool = False
    ) -> Storage:
        """Nothing stored, with free columns for these keys and values."""
        none = Entries(
            keys[:, :, :0],
            values[:, :, :0],
            keys.new_ones(*keys.shape[:2], 0, dtype=torch.float32),
            keys.new_ones(*keys.shape[:2], 0, dtype=torch.bool),
            keys.new_zeros(*keys.shape[:2], 0, state_size, dtype=torch.float32),
        )
        return Storage([none], limit, WeightSigns.NONE, extra=keys.shape[2], fixed=fixed)

    @staticmethod
    def adopt(memory: Entries, length: int, limit: int | None = None) -> Storage:
        """Hold `memory`, of which the first `length` columns are in use, without a copy."""
        if memory.keys.is_inference():  # which could not be written to later
            with ordinary_tensors():
                memory = Entries(*(tensor.clone() for tensor in memory.tensors()))
        storage = Storage([memory.slice(0, 0)], 0, WeightSigns.NONE)
        storage._limit, storage._memory, storage.length = limit, memory, length
        storage.weighting = WeightSigns.of(storage.entries.weights, storage.entries.valid)
        return storage

    def snapshot(self) -> Entries:
        """A copy of what is in use, and of a little free room."""
        with ordinary_tensors():
            room = Entries(
                *(
                    tensor[:, :, :1].new_zeros(*tensor.shape[:2], _LEAST_ROOM, *tensor.shape[3:])
                    for tensor in self._memory.tensors()
                )
            )
            return Entries(
                *(torch.cat(pieces, dim=2) for pieces in zip(self.entries.tensors(), room.tensors(), strict=True))
            )

    def rewrite(self, start: int, parts: Sequence[Entries]) -> None:
        """Put `parts`, one after the other, in the place of the columns from `start` on.

        In place, unless that would leave much room unused for good.

        Args:
            start: first column to replace.
            parts: what comes there; may be views of the columns in use.
        """
        needed, held = start + sum(part.keys.shape[2] for part in parts), self._memory.keys.shape[2]
        with ordinary_tensors():
            whole = [self._memory.slice(0, start), *parts]
            # Before anything is written: what fails here leaves everything as it was.
            weighting = WeightSigns.of(
                torch.cat([part.weights for part in whole], dim=2), torch.cat([part.valid for part in whole], dim=2)
            )
            if needed <= held and (self._memory is self._home if self._fixed else held <= self._most(needed)):
                # Joined before any is written: they may lie where others are to come.
                tensors = zip(*(part.tensors() for part in parts), strict=True)
                end = self._write(start, [Entries(*(torch.cat(pieces, dim=2) for pieces in tensors))])
                self._free(end, max(end, self.length))
            elif self._home is not None and needed <= self._home.keys.shape[2]:
                self._memory = self._home
                self._free(self._write(0, whole), self._home.keys.shape[2])
            else:
                self._reallocate(whole)
        self.length, self.weighting = needed, weighting

    def _reallocate(self, parts: Sequence[Entries], extra: int = 0) -> None:
        """Copy `parts` to new memory."""
        new = Storage(parts, self._limit, self.weighting, extra, self._fixed)
        self._memory, self._home = new._memory, self._home or new._home

    def _capacity(self, length: int) -> int:
        """Columns to allocate for `length` of them."""
        capacity = length + max(_LEAST_ROOM, length // _ROOM_PART)
        if self._limit is None:
            return capacity
        if length > self._limit:  # of an uneven method, or of tokens that may be taken back: there may be more
            return length if self._fixed else capacity
        return self._limit if self._fixed else min(capacity, self._limit)

    def _most(self, length: int) -> int:
        """Columns to keep, at most, where `length` are left."""
        if self._limit is not None and length <= self._limit:
            return self._limit
        return length + _MOST_ROOMS * max(_LEAST_ROOM, length // _ROOM_PART)

    def _write(self, start: int, parts: Sequence[Entries]) -> int:
        """Copy `parts` one after the other to the columns from `start` on; returns the column after them."""
        for part in parts:
            end = start + part.keys.shape[2]
            for target, source in zip(self._memory.slice(start, end).tensors(), part.tensors(), strict=True):
                target.copy_(source)
            start = end
        return start

    @property
    def entries(self) -> Entries:
        """A view of what is in use."""
        return self._memory.slice(0, self.length)

    def view(self) -> tuple[Tensor, Tensor]:
        """New views of the keys and values in use, (rows, heads, length, channels)."""
        return self._memory.keys[:, :, : self.length], self._memory.values[:, :, : self.length]

    def weights(self) -> tuple[Tensor, Tensor]:
        """Views of the weights in use and of which of them are valid, (rows, heads, length)."""
        return self._memory.weights[:, :, : self.length], self._memory.valid[:, :, : self.length]

    @property
    def memory(self) -> Entries:
        """All of the memory, free room included."""
        return self._memory

    def select_rows(self, index: Tensor) -> None:
        """Keep the rows at `index`, int64 (k,), in that order."""
        with ordinary_tensors():
            chosen = self._memory.rows(index)
            if self._memory is self._home and len(index) == self._home.keys.shape[0]:
                for target, source in zip(self._home.tensors(), chosen.tensors(), strict=True):
                    target.copy_(source)
            else:
                self._settle_in(chosen)

    def _settle_in(self, memory: Entries) -> None:
        """Hold `memory` from now on, of other rows or elsewhere than before."""
        self._home = memory if self._memory is self._home else None
        self._memory = memory

    def truncate(self, length: int) -> None:
        """Give the columns from `length` on back to the free room."""
        self._free(length, self.length)
        self.length = length

    def _free(self, start: int, stop: int) -> None:
        freed = self._memory.slice(start, stop)
        freed.valid.fill_(False)
        freed.weights.zero_()
        freed.carried_state.zero_()

    def to(self, device: torch.device) -> None:
        """Take everything to `device`; nothing happens where it is there already."""
        if all(tensor.device == device for tensor in self._memory.tensors()):
            return
        with ordinary_tensors():
            moved = Entries(*(tensor.to(device, non_blocking=True) for tensor in self._memory.tensors()))
        self._settle_in(moved)

    def offload(self) -> None:
        """Take keys and values to the CPU. Weights and validity are small and stay: the host may ask for them."""
        held = self._memory
        with ordinary_tensors():
            keys, values = (tensor.to("cpu", non_blocking=True) for tensor in (held.keys, held.values))
        self._memory = Entries(keys, values, held.weights, held.valid, held.carried_state)

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Append exact tokens (rows, heads, k, ...); `valid` is bool (rows, k), all by default."""
        end = self.length + keys.shape[2]
        if end > self._memory.keys.shape[2]:
            self._reallocate([self.entries], extra=keys.shape[2])
        free, new = self._memory, slice(self.length, end)  # not through `slice`: this is done for every token
        free.keys[:, :, new] = keys
        free.values[:, :, new] = values
        shown: Tensor | float = 1.0 if valid is None else valid.unsqueeze(1)
        free.valid[:, :, new] = shown
        free.weights[:, :, new] = shown
        if valid is not None:
            self.hide()
        self.length = end

    def hide(self) -> None:
        """Take note that entries may be hidden: a mask came that the host has not read."""
        if self.weighting is WeightSigns.NONE:
            self.weighting = WeightSigns.POSITIVE
