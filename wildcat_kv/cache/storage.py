"""Tensors of one cache layer.

They are allocated ahead of the tokens, so that appending copies only the new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from wildcat_kv.cache.budget import Row
from wildcat_kv.cache.entries import Entries, weights_of
from wildcat_kv.cache.kernel_way import KernelWay, Lines
from wildcat_kv.cache.value_range import ValueRange, exact_range
from wildcat_kv.coreset import decoding
from wildcat_kv.coreset.tensors import ordinary_tensors
from wildcat_kv.coreset.wtdattn import AttentionOptions, WeightSigns, coreset_attention

# Free columns to allocate beside the needed ones: at least this many, or the needed ones over this divisor.
LEAST_ROOM = 32
_ROOM_PART = 64
# A fold may leave this many times as many free columns: new tokens fill them before the next fold.
_MOST_ROOMS = 4


@dataclass(frozen=True)
class Room:
    """Columns to allocate ahead of those in use.

    Attributes:
        limit: number of columns that is always enough; None if unknown.
        fixed: True to allocate `limit` columns at once.
        least: least free columns to allocate.
    """

    limit: int | None = None
    fixed: bool = False
    least: int = LEAST_ROOM

    @classmethod
    def under(cls, max_tokens: int | None, *, fixed: bool = False) -> Self:
        """Plan for a layer: with `max_tokens` never more than these and the newest token's."""
        return cls(None if max_tokens is None else max_tokens + 1, fixed)

    def capacity(self, length: int) -> int:
        """Compute the columns to allocate for `length` of them."""
        capacity = length + max(self.least, length // _ROOM_PART)
        if self.limit is None:
            return capacity
        if length > self.limit:  # an uneven method, or tokens that can be taken back: more may come
            return length if self.fixed else capacity
        return self.limit if self.fixed else min(capacity, self.limit)

    def suits(self, held: int, length: int) -> bool:
        """Tell if `held` allocated columns are enough for `length` of them, and not too many to keep."""
        if self.limit is not None and length <= self.limit:
            return length <= held <= self.limit
        return length <= held <= length + _MOST_ROOMS * max(self.least, length // _ROOM_PART)


_ANY_NUMBER = Room()


class Storage:
    """Entries with free columns behind them.

    Free columns are not valid. Their weights and carried states are 0.

    Args:
        parts: entries to copy, one part after the other.
        room: columns to allocate ahead. A fixed storage returns to its first memory whenever that is enough.
        weighting: signs of the weights; by default read from the weights.
        extra: columns that will be needed at once.

    Attributes:
        allocated: all columns, the free ones behind those in use.
        length: number of columns in use.
        weighting: signs of the entries' weights.
    """

    def __init__(
        self,
        parts: Sequence[Entries],
        room: Room = _ANY_NUMBER,
        weighting: WeightSigns | None = None,
        extra: int = 0,
    ) -> None:
        self._room, self._way = room, KernelWay()
        first, needed = parts[0], sum(part.keys.shape[2] for part in parts)
        capacity, self.length = self._room.capacity(needed + extra), needed
        with ordinary_tensors():
            free = [
                tensor.new_empty(*tensor.shape[:2], capacity - needed, *tensor.shape[3:]) for tensor in first.tensors()
            ]
            # A traced step attends to free columns too, with weight 0, so they must hold finite numbers.
            for tensor in free if room.fixed else free[2:]:
                tensor.zero_()
            pieces = zip(*(part.tensors() for part in parts), free, strict=True)
            self.allocated = Entries(*(torch.cat(tensors, dim=2) for tensors in pieces) if needed else free)
        # A fixed storage leaves this memory only for more tokens at once than the limit, and returns to it.
        self._home = self.allocated if room.fixed and capacity == room.limit else None
        self.weighting = WeightSigns.of(self.entries.weights, self.entries.valid) if weighting is None else weighting

    @staticmethod
    def empty(keys: Tensor, values: Tensor, state_size: int = 0, room: Room = _ANY_NUMBER) -> Storage:
        """Make an empty storage with free columns for these keys and values."""
        none = Entries(
            keys[:, :, :0],
            values[:, :, :0],
            keys.new_ones(*keys.shape[:2], 0, dtype=torch.float32),
            keys.new_ones(*keys.shape[:2], 0, dtype=torch.bool),
            keys.new_zeros(*keys.shape[:2], 0, state_size, dtype=torch.float32),
        )
        return Storage([none], room, WeightSigns.NONE, extra=keys.shape[2])

    @staticmethod
    def adopt(allocated: Entries, length: int, room: Room = _ANY_NUMBER) -> Storage:
        """Make a storage of existing tensors, without a copy.

        Args:
            allocated: all columns.
            length: number of columns in use, the first ones.
            room: columns to allocate ahead, once these are used up.
        """
        if allocated.keys.is_inference():  # such tensors could not be written to later
            with ordinary_tensors():
                allocated = Entries(*(tensor.clone() for tensor in allocated.tensors()))
        storage = Storage([allocated.slice(0, 0)], Room(0), WeightSigns.NONE)
        storage._room, storage.allocated, storage.length = room, allocated, length
        storage.weighting = WeightSigns.of(storage.entries.weights, storage.entries.valid)
        return storage

    def snapshot(self) -> Entries:
        """Copy the columns in use, with a few free ones behind them."""
        return self.entries.with_room(self._room.least)

    def rewrite(self, start: int, parts: Sequence[Entries], weighting: WeightSigns | None = None) -> None:
        """Replace the columns from `start` on by `parts`.

        It writes in place if the columns are enough and not too many of them stay free.

        Args:
            start: first column to replace.
            parts: new entries, one part after the other; may be views of the columns in use.
            weighting: signs of all weights then; by default read from the weights.
        """
        needed, held = start + sum(part.keys.shape[2] for part in parts), self.allocated.keys.shape[2]
        with ordinary_tensors():
            whole = [self.allocated.slice(0, start), *parts]
            # Done before anything is written: an error here leaves everything as it was.
            if weighting is None:
                weighting = WeightSigns.of(*weights_of(whole))
            at_home = needed <= held and self.allocated is self._home
            if at_home if self._room.fixed else self._room.suits(held, needed):
                # Joined first: the parts may be views of columns that are written here.
                tensors = zip(*(part.tensors() for part in parts), strict=True)
                end = self._write(start, [Entries(*(torch.cat(pieces, dim=2) for pieces in tensors))])
                self._free(end, max(end, self.length))
            elif self._home is not None and needed <= self._home.keys.shape[2]:
                self.allocated = self._home
                self._free(self._write(0, whole), self._home.keys.shape[2])
            else:
                self._reallocate(whole)
        self.length, self.weighting = needed, weighting

    def _reallocate(self, parts: Sequence[Entries], extra: int = 0) -> None:
        """Copy `parts` to new memory."""
        new = Storage(parts, self._room, self.weighting, extra)
        self.allocated, self._home = new.allocated, self._home or new._home

    def _write(self, start: int, parts: Sequence[Entries]) -> int:
        """Copy `parts` to the columns from `start` on; return the column after them."""
        for part in parts:
            end = start + part.keys.shape[2]
            for target, source in zip(self.allocated.slice(start, end).tensors(), part.tensors(), strict=True):
                target.copy_(source)
            start = end
        return start

    def room_for(self, length: int) -> int:
        """Give the columns to allocate for `length` of them."""
        return self._room.capacity(length)

    @property
    def entries(self) -> Entries:
        """View of the columns in use."""
        return self.allocated.slice(0, self.length)

    @property
    def columns(self) -> int:
        """Columns in use, on average over the heads."""
        return self.length

    def newest(self, columns: int) -> Entries:
        """View the newest columns."""
        return self.allocated.slice(self.length - columns, self.length)

    def view(self) -> tuple[Tensor, Tensor]:
        """Return new views of the keys and values, (rows, heads, length, channels)."""
        return self.allocated.keys[:, :, : self.length], self.allocated.values[:, :, : self.length]

    def shown(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that a model gets for new ones: views of all."""
        held, length = self.allocated, self.length  # new views: marks go with the tensor object
        return held.keys[:, :, :length], held.values[:, :, :length]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions) -> Tensor:
        """Attend by weights with queries (rows, query_heads, q, d) to what `shown` gave; no `valid` in `options`."""
        held, length = self.allocated, self.length
        if query.shape[2] == 1 and query.device.type in decoding.DEVICES:
            rows, heads = held.weights.shape[:2]
            if (found := self._way.attend(query, heads, (Lines(range(rows * heads), self),), options)) is not None:
                return found
        weights, valid = held.weights[:, :, :length], held.valid[:, :, :length]
        return coreset_attention(query, keys, values, weights, self.weighting, options._replace(valid=valid))

    def exact_box(self, rows: Sequence[Row], later: int, masked: bool) -> ValueRange:
        """Find the box around the values of exact tokens.

        `rows` are without the `later` newest columns, some of which may be padding if `masked`.
        """
        box, new = exact_range(self.entries.slice(0, self.length - later).values, rows), self.newest(later)
        return box.join(ValueRange.of(new.values, new.valid if masked else None)) if later else box

    def relabel(self, valid: Tensor) -> None:
        """Mark anew which of the newest tokens are valid, bool (rows, k)."""
        newest = self.newest(valid.shape[1])
        newest.valid.copy_(valid.unsqueeze(1))
        newest.weights.copy_(valid.unsqueeze(1))
        self.hide()

    def carry(self, state: Tensor) -> None:
        """Keep the newest tokens' carried state, float32 (rows, heads, k, m)."""
        self.newest(state.shape[2]).carried_state.copy_(state)

    def select_rows(self, index: Tensor, on_host: Sequence[int] | None = None) -> None:
        """Keep the rows at `index`, int64 (k,), in that order; `on_host` is of no use here."""
        with ordinary_tensors():
            chosen = self.allocated.rows(index)
            if self.allocated is self._home and len(index) == self._home.keys.shape[0]:
                for target, source in zip(self._home.tensors(), chosen.tensors(), strict=True):
                    target.copy_(source)
            else:
                self._hold(chosen)

    def _hold(self, allocated: Entries) -> None:
        """Hold other tensors from now on: other rows, or another device."""
        self._home = allocated if self.allocated is self._home else None
        self.allocated = allocated

    def truncate(self, length: int) -> None:
        """Free the columns from `length` on."""
        self._free(length, self.length)
        self.length = length

    def _free(self, start: int, stop: int) -> None:
        freed = self.allocated.slice(start, stop)
        freed.valid.fill_(False)
        freed.weights.zero_()
        freed.carried_state.zero_()

    @property
    def device(self) -> torch.device:
        """Device of what the host may read."""
        return self.allocated.weights.device

    def tensors(self) -> list[Tensor]:
        """List all tensors, free columns included."""
        return [*self.allocated.tensors(), *self._way.tensors()]

    def to(self, device: torch.device) -> None:
        """Move everything to `device`, unless it is there already."""
        if any(tensor.device != device for tensor in self.allocated.tensors()):
            self._hold(self.allocated.to(device))

    def offload(self) -> None:
        """Move keys and values to the CPU; the rest stays where the host may read it."""
        self.allocated = self.allocated.to(torch.device("cpu"), numbers_only=True)

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Append exact tokens.

        Args:
            keys: (rows, heads, k, d).
            values: (rows, heads, k, d_v).
            valid: bool (rows, k), False for padding; None if there is none.
        """
        end = self.length + keys.shape[2]
        if end > self.allocated.keys.shape[2]:
            self._reallocate([self.entries], extra=keys.shape[2])
        free, new = self.allocated, slice(self.length, end)  # no views by `Entries.slice`: this runs for every token
        free.keys[:, :, new] = keys
        free.values[:, :, new] = values
        shown: Tensor | float = 1.0 if valid is None else valid.unsqueeze(1)
        free.valid[:, :, new] = shown
        free.weights[:, :, new] = shown
        if valid is not None:
            self.hide()
        self.length = end

    def hide(self) -> None:
        """Note that entries may be padding.

        A mask has come, and the host has not read it.
        """
        if self.weighting is WeightSigns.NONE:
            self.weighting = WeightSigns.POSITIVE
