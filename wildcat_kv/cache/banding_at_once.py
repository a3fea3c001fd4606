"""All bands of a layer from a few copies: for devices, where each operation is a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.cache.bands import Band
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.storage import Room, Storage
from wildcat_kv.coreset.tensors import keep_where_
from wildcat_kv.coreset.wtdattn import WeightSigns

# Bands are small, and allocated anew at every fold.
ROOM = Room(least=8)


@dataclass(frozen=True)
class Line:
    """Columns of one row of a rectangle: padding, sink, slots, exact tokens.

    Attributes:
        sink: exact tokens at the beginning.
        kept: slots that were there before, behind the sink.
        slots: all slots, padding included.
        exact: exact tokens behind the slots.
    """

    sink: int
    kept: int
    slots: int
    exact: int


def bands_at_once(
    whole: Entries,
    line: Line,
    groups: Sequence[list[int]],
    widths: Sequence[int],
    signs: Sequence[WeightSigns],
) -> list[Band]:
    """Make the bands of a rectangle whose rows are alike, without quantised slots.

    The heads are sorted by band into one more rectangle, of which each band takes a part.

    Args:
        whole: entries (rows, heads, n, ...), right-aligned.
        line: columns of each row; exact tokens are valid.
        groups: heads of each band, each as row * heads + head.
        widths: most valid slots of a head of each band.
        signs: signs of the weights of each band.
    """
    order = torch.tensor([place for places in groups for place in places]).to(whole.keys.device, non_blocking=True)
    most = max(widths)
    columns, shown = _columns(whole.valid.flatten(0, 1).index_select(0, order), line, most)

    def taken(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1)[order.unsqueeze(-1), columns].unsqueeze(1)

    keys, values, weights, valid, state = map(taken, whole.tensors())
    shown = shown.unsqueeze(1)
    keep_where_(weights, shown)
    keep_where_(state, shown.unsqueeze(-1))
    sorted_heads = Entries(keys, values, weights, valid.logical_and_(shown), state)

    bands, first = [], 0
    for places, width, sign in zip(groups, widths, signs, strict=True):
        own = Entries(*(tensor[first : first + len(places)] for tensor in sorted_heads.tensors()))
        parts = [own.slice(line.sink + most - width, line.sink + most + line.exact)]
        if line.sink:
            parts.insert(0, own.slice(0, line.sink))
        bands.append(Band(places, Storage(parts, ROOM, sign), (), line.sink, width))
        first += len(places)
    return bands


def _columns(valid: Tensor, line: Line, most: int) -> tuple[Tensor, Tensor]:
    """Choose the columns of each head's line: sink, valid slots right-aligned in `most` columns, exact tokens.

    Args:
        valid: bool (k, n), of k heads.
        line: columns of each head.
        most: most valid slots of a head.

    Returns:
        int64 (k, sink + most + exact), and bool of this shape, False for padding, which repeats a slot of its head.
    """
    heads, n = valid.shape
    start, place = n - line.exact, torch.arange(n, device=valid.device)
    slots = valid[:, start - line.slots : start]
    # Padding first: a stable sort keeps the order of the slots.
    last = slots.to(torch.int8).argsort(dim=-1, stable=True)[:, line.slots - most :]
    padding = most - slots.sum(-1, keepdim=True)
    real = place[:most] >= padding
    if most:
        last = torch.where(real, last, last.gather(1, padding.clamp_max(most - 1)))
    sink = place[start - line.slots - line.sink : start - line.slots].expand(heads, -1)
    exact = place[start:].expand(heads, -1)
    columns = torch.cat((sink, last + (start - line.slots), exact), dim=1)
    return columns, torch.cat((sink >= 0, real, exact >= 0), dim=1)
