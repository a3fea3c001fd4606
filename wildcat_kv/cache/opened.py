"""Open entries of all bands of a layer in one memory: a token is appended to all heads at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.storage import Storage
from wildcat_kv.coreset.tensors import ordinary_tensors


class Opened:
    """Open entries of bands, each a view of one memory from then on.

    Args:
        opens: open entries (batch, 1, n, ...) of each band.
        places: heads of all bands, one band after the other.

    Attributes:
        alike: entries of all heads, (heads, n, ...), where all bands have equally many columns; None otherwise.
    """

    def __init__(self, opens: Sequence[Storage], places: Sequence[int]) -> None:
        self._order = places
        self._lay(opens, [held.allocated.keys.shape[2] for held in opens])

    def _lay(self, opens: Sequence[Storage], columns: Sequence[int]) -> None:
        """Copy the columns in use to new memory, with `columns` of each band in all."""
        heads = [held.allocated.keys.shape[0] for held in opens]
        ends = [0]
        for batch, wide in zip(heads, columns, strict=True):
            ends.append(ends[-1] + batch * wide)
        first = opens[0].allocated
        with ordinary_tensors():
            self._all = Entries(*(tensor.new_zeros(ends[-1], *tensor.shape[3:]) for tensor in first.tensors()))
            self._views = []
            for number, held in enumerate(opens):
                own = [tensor[ends[number] : ends[number + 1]] for tensor in self._all.tensors()]
                view = Entries(*(one.view(heads[number], 1, columns[number], *one.shape[1:]) for one in own))
                for target, source in zip(view.slice(0, held.length).tensors(), held.entries.tensors(), strict=True):
                    target.copy_(source)
                held.allocated = view
                self._views.append(view)
        self.alike: Entries | None = None
        if len(set(columns)) == 1:
            self.alike = Entries(*(one.view(sum(heads), columns[0], *one.shape[1:]) for one in self._all.tensors()))
        self._count(opens)

    def _count(self, opens: Sequence[Storage]) -> None:
        """Find the next free column of each head."""
        self._lengths = [held.length for held in opens]
        free, start = torch.empty(len(self._order), dtype=torch.int64), 0
        at = 0
        for held in opens:
            batch, _, columns = held.allocated.keys.shape[:3]
            for _ in range(batch):
                free[self._order[at]] = start + held.length
                start, at = start + columns, at + 1
        self._free = free

    def holds(self, opens: Sequence[Storage]) -> bool:
        """Tell if the bands still have their entries here."""
        return all(held.allocated is view for held, view in zip(opens, self._views, strict=True))

    @torch.no_grad()
    def append(self, opens: Sequence[Storage], keys: Tensor, values: Tensor) -> None:
        """Append one valid token to all bands.

        Args:
            opens: open entries of each band, which are here.
            keys: (heads, d).
            values: (heads, d_v).
        """
        lengths = [held.length for held in opens]
        if any(held.allocated.keys.shape[2] == length for held, length in zip(opens, lengths, strict=True)):
            self._lay(opens, self._with_room(opens))
        elif lengths != self._lengths:
            self._count(opens)
        free, every = self._free, self._all
        every.keys.index_copy_(0, free, keys)
        every.values.index_copy_(0, free, values)
        every.weights.index_fill_(0, free, 1.0)
        every.valid.index_fill_(0, free, True)
        free += 1
        for held in opens:
            held.length += 1
        self._lengths = [length + 1 for length in lengths]

    @staticmethod
    def _with_room(opens: Sequence[Storage]) -> list[int]:
        """Give each band room for as many tokens as any, in as much memory as each would take alone."""
        rooms = [(held.allocated.keys.shape[0], held.room_for(held.length + 1) - held.length) for held in opens]
        shared = sum(heads * room for heads, room in rooms) // sum(heads for heads, _ in rooms)
        return [held.length + shared for held in opens]
