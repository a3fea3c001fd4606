"""Bins of consecutive tokens: where each token and each slot goes.

Index arithmetic, no kernel.

All bins of all rows and heads are compressed as one batch, as in COMPRESSKV of arXiv 2602.10056. Bins of unequal
length are laid out in a rectangle with unused places.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.launching import is_launched
from wildcat_kv.coreset.tensors import ordinary_tensors


class Split(NamedTuple):
    """A line of items, cut into consecutive parts as equal as can be.

    The first `longer` parts have one more.

    Attributes:
        total: number of items.
        parts: number of parts.
    """

    total: int
    parts: int

    @property
    def longest(self) -> int:
        """Items of the largest part."""
        return -(-self.total // self.parts)

    @property
    def even(self) -> bool:
        """True if all parts are equal."""
        return self.total % self.parts == 0

    @property
    def sizes(self) -> Tensor:
        """Items of each part, int64 (parts,) on the host."""
        return torch.tensor(split_evenly(self.total, self.parts))

    def rectangle(self, line: Tensor, parts: range, dtype: torch.dtype) -> Tensor:
        """Cut some parts of a line into a rectangle, 0 where unused.

        The line is (rows, heads, n, ...), the result (rows, heads, parts, longest, ...).
        """
        start, stop = parts.start, parts.stop
        size, longer = divmod(self.total, self.parts)
        shape = (*line.shape[:2], stop - start, self.longest, *line.shape[3:])
        rectangle = torch.empty(shape, dtype=dtype, device=line.device)
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
        """Put the used places of a rectangle side by side.

        The rectangle is (rows, heads, parts, longest, ...).
        """
        size, longer = divmod(self.total, self.parts)
        if not longer:
            return rectangle.flatten(2, 3)
        first, second = rectangle[:, :, :longer], rectangle[:, :, longer:, :size]
        return torch.cat((first.flatten(2, 3), second.flatten(2, 3)), dim=2)


@dataclass(frozen=True)
class BinLayout:
    """Bins of tokens, and the slots they fill; the same in all rows.

    Attributes:
        tokens: cut of the tokens into bins.
        slots: cut of the slots into bins.
        device: device of the tensors.
        lossless: True if no bin has more tokens than slots.
        mixed: True if some bins have more tokens than slots, and some not.
    """

    tokens: Split
    slots: Split
    device: torch.device | str
    lossless: bool
    mixed: bool

    @staticmethod
    def build(length: int, rank: int, bins: int, device: torch.device | str = "cpu") -> BinLayout:
        """Lay out `length` tokens and `rank` slots in `bins` bins.

        It runs on the host. On a device the layers of a model share a layout, and its tensors.
        """
        return (_shared_layout if is_launched(device) else _layout)(length, rank, bins, device)

    # Few folds need the following tensors: make them when they are asked for, on the host, for layers in any mode.

    @cached_property
    @ordinary_tensors()
    def used(self) -> Tensor:
        """Mark the places of tokens: bool (bins, t)."""
        return (torch.arange(self.tokens.longest) < self.tokens.sizes.unsqueeze(-1)).to(self.device, non_blocking=True)

    @cached_property
    @ordinary_tensors()
    def present(self) -> Tensor:
        """Mark the places of tokens by 1, others by 0: float32 (bins, t)."""
        return self.used.to(torch.float32)

    @cached_property
    @ordinary_tensors()
    def counts(self) -> Tensor:
        """Count the tokens of each bin: float32 (bins, 1)."""
        return self.tokens.sizes.unsqueeze(-1).to(self.device, torch.float32, non_blocking=True)

    @cached_property
    @ordinary_tensors()
    def filled(self) -> Tensor:
        """Find the places that slots fill, side by side: int64 (rank,)."""
        sizes = split_evenly(self.slots.total, self.slots.parts)
        places = [number * self.bin_rank + place for number, size in enumerate(sizes) for place in range(size)]
        return torch.tensor(places).to(self.device, non_blocking=True)

    @cached_property
    @ordinary_tensors()
    def start(self) -> Tensor:
        """Count the tokens before each bin: int64 (bins,)."""
        return (self.tokens.sizes.cumsum(-1) - self.tokens.sizes).to(self.device, non_blocking=True)

    @cached_property
    @ordinary_tensors()
    def rank(self) -> Tensor:
        """Count the slots of each bin: int64 (bins,)."""
        return self.slots.sizes.to(self.device, non_blocking=True)

    @property
    def bins(self) -> int:
        """Number of bins."""
        return self.tokens.parts

    @property
    def longest(self) -> int:
        """Tokens of the largest bin, t."""
        return self.tokens.longest

    @property
    def bin_rank(self) -> int:
        """Slots of the largest bin, r."""
        return self.slots.longest

    def gather(self, tokens: Tensor, bins: range | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Cut tokens into bins, copied, with 0 in unused places.

        Tokens are (rows, heads, n, ...), bins (rows, heads, bins, t, ...).

        Args:
            tokens: finite, for numbers that stay finite.
            bins: bins to take, all by default.
            dtype: dtype of the result, that of the tokens by default.
        """
        bins = range(self.bins) if bins is None else bins
        return self.tokens.rectangle(tokens, bins, tokens.dtype if dtype is None else dtype)

    def columns(self, places: Tensor) -> Tensor:
        """Find the tokens at places within the bins, int64 (rows, heads, bins, r)."""
        return (places + self.start.unsqueeze(-1)).clamp_max_(self.tokens.total - 1)

    def collect(self, slots: Tensor) -> Tensor:
        """Put the slots of the bins into one line.

        They are (rows, heads, bins, r, ...), the line (rows, heads, rank, ...).
        """
        if is_launched(slots.device):
            return slots.flatten(2, 3).index_select(2, self.filled)
        return self.slots.line(slots)


def _layout(length: int, rank: int, bins: int, device: torch.device | str) -> BinLayout:
    pairs = zip(split_evenly(length, bins), split_evenly(rank, bins), strict=True)
    unchanged = [size <= slots for size, slots in pairs]
    mixed = any(unchanged) and not all(unchanged)
    return BinLayout(Split(length, bins), Split(rank, bins), device, lossless=all(unchanged), mixed=mixed)


_shared_layout = lru_cache(maxsize=8)(_layout)


def split_evenly(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` whole numbers, the larger first.

    They differ by at most one.

    Example:
        >>> split_evenly(10, 3)
        [4, 3, 3]
    """
    size, rest = divmod(total, parts)
    return [size + (part < rest) for part in range(parts)]
