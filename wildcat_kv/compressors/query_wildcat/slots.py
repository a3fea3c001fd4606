"""Slots of one block: kept, merged, and chosen by their error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.compressors.base import Compressed, KVBlock
from wildcat_kv.compressors.scorer import take_items
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.tensors import take_columns


class Counts(NamedTuple):
    """Items of each row and head, known to the host.

    Attributes:
        kept: those that stay as they are, rows of heads.
        left: others, rows of heads.
    """

    kept: list[list[int]]
    left: list[list[int]]

    @staticmethod
    def read(kept: Sequence[Tensor], there: Sequence[Tensor]) -> list[Counts]:
        """Count the items of layers: the host waits once for all of them.

        Args:
            kept: bool (rows, heads, items) of each layer, True for items that stay as they are.
            there: bool (rows, heads, items) of each layer, False for padding.
        """
        home = kept[0].device
        sums = [tensor.sum(-1).to(home) for pair in zip(kept, there, strict=True) for tensor in pair]
        numbers = torch.cat(sums, dim=-1).tolist()
        counts = []
        for layer in kept:
            heads = layer.shape[1]
            found = [(row[:heads], row[heads : 2 * heads]) for row in numbers]
            numbers = [row[2 * heads :] for row in numbers]
            left = [[whole - part for part, whole in zip(*pair, strict=True)] for pair in found]
            counts.append(Counts([own for own, _ in found], left))
        return counts

    @staticmethod
    def of(kept: Tensor, there: Tensor) -> Counts:
        """Count the items of one layer."""
        [counts] = Counts.read([kept], [there])
        return counts


def take_kept(block: KVBlock, kept: Tensor, width: int) -> tuple[Coreset, Tensor]:
    """Take the items of a mask (rows, heads, items) unchanged, right-aligned.

    There are at most `width` in a head. The second result is int64, the item of each slot.
    """
    counts, place = kept.sum(-1, keepdim=True), torch.arange(kept.shape[-1], device=kept.device)
    # A place for each, and one behind them for what is not kept: much faster than sorting.
    target = torch.where(kept, kept.cumsum(-1) + (width - 1 - counts), width)
    index = counts.new_zeros(*kept.shape[:2], width + 1).scatter_(-1, target, place.expand_as(target))[..., :width]
    return take_items(block, index, place[:width] >= width - counts).coreset, index


def merge_parts(parts: Sequence[tuple[Coreset, Tensor]], width: int) -> Coreset:
    """Join coresets of different items of one block.

    Slots are in the order of their positions, padding slots first.

    Args:
        parts: coresets, and int64 (rows, heads, c), the item of each slot.
        width: columns of the result; no head has more valid slots.
    """
    valid = torch.cat([part.valid for part, _ in parts], dim=2)
    source = torch.cat([source for _, source in parts], dim=2).masked_fill(~valid, -1)
    order = source.argsort(dim=-1, stable=True)[..., source.shape[-1] - width :]

    def merged(name: str) -> Tensor:
        wide = {getattr(part, name).dtype for part, _ in parts}
        dtype = torch.float32 if len(wide) > 1 else wide.pop()
        return take_columns(torch.cat([getattr(part, name).to(dtype) for part, _ in parts], dim=2), order)

    return Coreset(merged("keys"), merged("values"), merged("weights"), merged("valid"))


def narrowed(coreset: Coreset, width: int) -> Coreset:
    """Leave padding slots out, to `width` columns: a coreset whose bins were exhausted has more of them."""
    start = coreset.valid.shape[-1] - width
    if not start:
        return coreset
    return Coreset(
        coreset.keys[:, :, start:],
        coreset.values[:, :, start:],
        coreset.weights[..., start:],
        coreset.valid[..., start:],
    )


def first_within(tolerance: float, first: Compressed, second: Compressed) -> Compressed:
    """Take the first in the rows where its error is within the tolerance.

    The error is the estimate; the other rows take the second.
    """
    assert first.error is not None and second.error is not None
    assert first.columns is not None and second.columns is not None
    met = first.error.mean(-1) <= tolerance
    width = max(first.coreset.valid.shape[-1], second.coreset.valid.shape[-1])

    def chosen(name: str) -> Tensor:
        one, other = (_widened(getattr(each.coreset, name), width) for each in (first, second))
        return torch.where(met.view(-1, *[1] * (one.dim() - 1)), one, other)

    coreset = Coreset(chosen("keys"), chosen("values"), chosen("weights"), chosen("valid"))
    columns = [a if kept else b for a, b, kept in zip(first.columns, second.columns, met.tolist(), strict=True)]
    return Compressed(coreset, columns, error=torch.where(met.unsqueeze(-1), first.error, second.error))


def _widened(slots: Tensor, width: int) -> Tensor:
    """Pad slots (rows, heads, c, ...) with zeros in front, to `width`."""
    return torch.cat((slots.new_zeros(*slots.shape[:2], width - slots.shape[2], *slots.shape[3:]), slots), dim=2)
