"""Bins of consecutive tokens: where each token and each slot goes. Index arithmetic, no kernel.

All bins of all rows and heads are compressed as one batch (design of arXiv 2602.10056's COMPRESSKV), so
ragged bins are laid out in a rectangle with unused places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.tensors import take_columns


class Split(NamedTuple):
    """A line of items cut into consecutive parts as equal as can be: the first `longer` parts have one more.

    Attributes:
        total: items, the last ones of a line.
        parts: into which they are cut.
    """

    total: int
    parts: int

    def rectangle(self, line: Tensor, parts: range, dtype: torch.dtype) -> Tensor:
        """Some parts of a line (rows, heads, n, ...): (rows, heads, parts, longest, ...), 0 where unused."""
        start, stop = parts.start, parts.stop
        size, longer = divmod(self.total, self.parts)
        shape = (*line.shape[:2], stop - start, size + (longer > 0), *line.shape[3:])
        rectangle = torch.empty(shape, dtype=dtype, device=line.device)
        line = line[:, :, line.shape[2] - self.total :]
        cut = min(max(longer, start), stop)
        if cut > start:  # strided copies, the conversion to `dtype` among them
            rectangle[:, :, : cut - start] = line[:, :, start * (size + 1) : cut * (size + 1)].unflatten(
                2, (cut - start, size + 1)
            )
        if stop > cut:
            rectangle[:, :, cut - start :, :size] = line[:, :, longer + cut * size : longer + stop * size].unflatten(
                2, (stop - cut, size)
            )
            rectangle[:, :, cut - start :, size:] = 0
        return rectangle

    def line(self, rectangle: Tensor) -> Tensor:
        """The used places of a rectangle (rows, heads, parts, longest, ...), side by side."""
        size, longer = divmod(self.total, self.parts)
        if not longer:
            return rectangle.flatten(2, 3)
        first, second = rectangle[:, :, :longer], rectangle[:, :, longer:, :size]
        return torch.cat((first.flatten(2, 3), second.flatten(2, 3)), dim=2)


@dataclass(frozen=True)
class BinLayout:
    """Which columns form which bin, and which slots the bins fill. Built on the host, once a fold.

    Tokens and slots are right-aligned: a row with fewer than the others starts with unused columns. The
    first dimension is 1 where all rows are alike.

    Attributes:
        column: int64 (rows, bins, t), the column of each bin's tokens; the last one where unused.
        used: bool (rows, bins, t).
        size: int64 (rows, bins), tokens of each bin.
        rank: int64 (rows, bins), slots of each bin.
        slot: int64 (rows, c), index into the flattened (bins, bin_rank) of each slot; 0 where unused.
        slot_used: bool (rows, c).
        bin_rank: the largest rank of a bin, r.
        lossless: whether no bin has more tokens than slots.
        mixed: whether some bins have more tokens than slots, and some not.
        uneven: whether ranks differ.
        ragged: whether some places are unused.
        tokens: how tokens are cut into bins, None where rows differ.
        slots: likewise for slots.
    """

    column: Tensor
    used: Tensor
    size: Tensor
    rank: Tensor
    slot: Tensor
    slot_used: Tensor
    bin_rank: int
    lossless: bool
    mixed: bool
    uneven: bool
    ragged: bool
    tokens: Split | None
    slots: Split | None

    @staticmethod
    def build(
        columns: int,
        lengths: Sequence[int],
        ranks: Sequence[int],
        bins: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> BinLayout:
        """Lay out rows of `lengths` tokens, `ranks` slots and `bins` bins, in `columns` columns."""
        rows = list(zip(lengths, ranks, bins, strict=True))
        if len(set(rows)) == 1:
            rows = rows[:1]
        size = _rectangle([split_evenly(length, count) for length, _, count in rows])
        rank = _rectangle([split_evenly(slots, count) for _, slots, count in rows])
        length = torch.tensor([row[0] for row in rows])
        total = torch.tensor([row[1] for row in rows])
        bin_rank = int(rank.max())

        start = (columns - length).unsqueeze(-1) + size.cumsum(-1) - size
        offset = torch.arange(int(size.max()))
        used = offset < size.unsqueeze(-1)
        column = torch.where(used, start.unsqueeze(-1) + offset, columns - 1)

        ragged = not bool(used.all())

        # Close up the slots of ragged bins, and push them to the right.
        filled = (torch.arange(bin_rank) < rank.unsqueeze(-1)).flatten(1)
        if len(rows) == 1:
            slot = filled[0].nonzero().T
        else:
            slot = filled.to(torch.int8).argsort(dim=-1, stable=True)[:, -int(total.max()) :]
        slot_used = filled.gather(-1, slot)

        column, used, size_d, rank_d, slot, slot_used = (
            tensor.to(device, non_blocking=True)
            for tensor in (column, used, size, rank, torch.where(slot_used, slot, 0), slot_used)
        )
        unchanged = size <= rank
        lossless = bool(unchanged.all())
        alike = len(rows) == 1
        return BinLayout(
            column,
            used,
            size_d,
            rank_d,
            slot,
            slot_used,
            bin_rank,
            lossless=lossless,
            mixed=not lossless and bool((unchanged & (size > 0)).any()),
            uneven=not bool((rank == bin_rank).all()),
            ragged=ragged,
            tokens=Split(rows[0][0], rows[0][2]) if alike else None,
            slots=Split(rows[0][1], rows[0][2]) if alike else None,
        )

    @property
    def bins(self) -> int:
        """The most bins of a row."""
        return self.column.shape[1]

    @property
    def longest(self) -> int:
        """The most tokens of a bin, t."""
        return self.column.shape[2]

    def gather(self, tokens: Tensor, bins: range | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Tokens (rows, heads, n, ...) into bins (rows, heads, bins, t, ...), copied; unused places are arbitrary.

        Args:
            tokens: finite, for numbers that stay finite.
            bins: which, all by default.
            dtype: of the result, that of the tokens by default.
        """
        bins = range(self.bins) if bins is None else bins
        dtype = tokens.dtype if dtype is None else dtype
        if self.tokens is not None:
            return self.tokens.rectangle(tokens, bins, dtype)
        column = self.column[:, bins.start : bins.stop]
        return take_columns(tokens, column.flatten(1).unsqueeze(1)).unflatten(2, column.shape[1:]).to(dtype)

    def columns(self, places: Tensor) -> Tensor:
        """The columns of places within the bins, int64 (rows, heads, bins, r)."""
        return self.column.unsqueeze(1).expand(*places.shape[:-1], -1).gather(-1, places)

    def collect(self, slots: Tensor) -> Tensor:
        """Slots of the bins (rows, heads, bins, r, ...) into one line (rows, heads, c, ...)."""
        if self.slots is not None:
            return self.slots.line(slots)
        return take_columns(slots.flatten(2, 3), self.slot.unsqueeze(1))


def _rectangle(rows: list[list[int]]) -> Tensor:
    """Rows of different lengths, filled up with zeros."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole numbers that differ by at most one, the larger first.

    Example:
        >>> split_evenly(10, 3)
        [4, 3, 3]
    """
    size, rest = divmod(total, parts)
    return [size + (part < rest) for part in range(parts)]
