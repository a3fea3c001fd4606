"""Sort the heads of a layer into bands after a fold, and quantise their slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.cache.banding_at_once import ROOM, Line, bands_at_once
from wildcat_kv.cache.bands import Band, BandedStorage
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.packed import Segment, add_segments, pack
from wildcat_kv.cache.storage import Storage
from wildcat_kv.coreset.launching import is_launched
from wildcat_kv.coreset.quantised import OCTET
from wildcat_kv.coreset.slot_facts import SlotFacts
from wildcat_kv.coreset.wtdattn import WeightSigns

# Heads share a band while the one with fewest lacks at most this many slots, or the most over this divisor.
_FEW = 4
_FEW_PART = 64


@dataclass(frozen=True)
class _Part:
    """Heads that were in one band before, and whose lines are alike.

    Attributes:
        places: heads, each as row * heads + head.
        line: columns of their rows.
        packed: their quantised slots.
        waiting: slots kept in the dtype of the model.
    """

    places: list[int]
    line: Line
    packed: tuple[Segment, ...]
    waiting: int


def is_unequal(counts: Sequence[Sequence[int]]) -> bool:
    """Tell if heads hold so unequally many slots, rows of heads, that bands take less memory."""
    return any(max(heads) - min(heads) > max(_FEW, max(heads) // _FEW_PART) for heads in counts)


def sort_into_bands(
    whole: Entries,
    lines: Sequence[Line],
    before: Storage | BandedStorage,
    bits: int | None,
    group: int,
    facts: SlotFacts | None = None,
) -> BandedStorage:
    """Sort the heads of a rectangle into bands that hold equally many entries.

    With `bits`, slots are quantised: all of them where none were before, else whole groups as soon as there are any.

    Args:
        whole: entries (rows, heads, n, ...), right-aligned.
        lines: columns of the rows.
        before: storage that the kept slots come from; what is quantised there stays as it is.
        bits: bits of a number, None for the dtype of the model.
        group: slots of a group.
        facts: facts of all slots, where no exact token is padding; read by default.
    """
    rows, heads = whole.keys.shape[:2]
    if facts is not None and bits is None and len(set(lines)) == 1 and is_launched(whole.keys.device):
        counts = [count for row in facts.counts for count in row]
        groups = alike(range(rows * heads), counts)
        signs = [_signs(facts, places, counts, lines[0]) for places in groups]
        widths = [max(counts[place] for place in places) for places in groups]
        return BandedStorage((rows, heads), bands_at_once(whole, lines[0], groups, widths, signs))
    parts = _parts(lines, before, heads)
    fresh = [0] * (rows * heads)
    for part in parts:
        for place in part.places:
            fresh[place] = part.line.slots - part.line.kept + part.waiting
    mask = _fresh(whole, torch.tensor(fresh).view(rows, heads), lines)
    counts, index = mask.sum(-1).flatten().tolist(), mask.to(torch.int8).argsort(dim=-1, stable=True).flatten(0, 1)
    bands = []
    for part in parts:
        for places in [part.places] if part.packed else alike(part.places, counts):
            at = None if places == part.places else torch.tensor([part.places.index(place) for place in places])
            packed = part.packed if at is None else tuple(segment.rows(at) for segment in part.packed)
            most = max(counts[place] for place in places)
            bands.append(_band(whole, places, part.line, packed, most, counts, index, bits, group))
    return BandedStorage((rows, heads), bands)


def _signs(facts: SlotFacts, places: Sequence[int], counts: Sequence[int], line: Line) -> WeightSigns:
    """Tell the signs of a band's weights without a look at them."""
    padded = min(counts[place] for place in places) < max(counts[place] for place in places)
    return facts.signs(places, padded=padded, exact=line.sink + line.exact > 0)


def _parts(lines: Sequence[Line], before: Storage | BandedStorage, heads: int) -> list[_Part]:
    """Divide the heads by the band that they come from and the line of their row."""
    if isinstance(before, Storage):
        origins: list[tuple[list[int], tuple[Segment, ...], int | None]] = [(list(range(len(lines) * heads)), (), None)]
    else:
        origins = [(band.places, band.packed, band.waiting) for band in before.bands]
    parts = []
    for places, packed, waiting in origins:
        by_line: dict[Line, list[int]] = {}
        for place in places:
            by_line.setdefault(lines[place // heads], []).append(place)
        for line, own in by_line.items():
            kept: tuple[Segment, ...] = packed if line.kept else ()
            if kept and len(own) < len(places):
                index = torch.tensor([places.index(place) for place in own])
                kept = tuple(segment.rows(index) for segment in kept)
            parts.append(_Part(own, line, kept, line.kept if waiting is None else min(waiting, line.kept)))
    return parts


def _fresh(whole: Entries, fresh: Tensor, lines: Sequence[Line]) -> Tensor:
    """Mark the valid slots among the last `fresh` ones, int64 (rows, heads): bool (rows, heads, n)."""
    n, device = whole.valid.shape[2], whole.valid.device
    stop = torch.tensor([n - line.exact for line in lines]).view(-1, 1, 1)
    start, place = stop - fresh.unsqueeze(-1), torch.arange(n, device=device)
    return whole.valid & (place >= start.to(device)) & (place < stop.to(device))


def first_packed(most: int) -> int:
    """Count the slots of a line that are quantised where none were before: all, in whole bytes of every plane."""
    return -(-most // OCTET) * OCTET


def alike(places: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Group heads that hold about equally many slots; each group in the order of `places`."""
    groups: list[list[int]] = []
    for place in sorted(places, key=lambda place: (-counts[place], place)):
        if groups:
            most = counts[groups[-1][0]]
            if most - counts[place] <= max(_FEW, most // _FEW_PART):
                groups[-1].append(place)
                continue
        groups.append([place])
    return [sorted(group) for group in groups]


def _band(
    whole: Entries,
    places: list[int],
    line: Line,
    packed: tuple[Segment, ...],
    most: int,
    counts: Sequence[int],
    index: Tensor,
    bits: int | None,
    group: int,
) -> Band:
    """Make one band: quantise what is due, and gather the rest.

    Args:
        whole: entries of all heads.
        places: heads of the band.
        line: columns of their rows.
        packed: slots that are quantised already.
        most: fresh slots of the head with most.
        counts: fresh slots of each head.
        index: int64 (rows * heads, n), columns with the fresh slots last.
        bits: bits of a number, None for the dtype of the model.
        group: slots of a group.
    """
    n, due = index.shape[1], 0
    if bits is not None:
        due = most // group * group if packed else first_packed(most)
    width = max(due, most)
    own = torch.tensor([counts[place] for place in places], device=index.device).unsqueeze(-1)
    wide = index[torch.tensor(places, device=index.device)][:, n - min(width, n) :]
    wide = torch.cat((wide[:, :1].expand(-1, width - wide.shape[1]), wide), dim=1)
    real = torch.arange(width, device=index.device) >= width - own
    # Padding gets a key of its own head: it must not widen a channel's range.
    first = wide.gather(1, (width - own).clamp_max(width - 1)) if width else wide
    wide = torch.where(real, wide, first)
    if due:
        slots = _gather(whole, places, wide[:, :due], real[:, :due])
        packed = add_segments(packed, pack(slots, bits or 0, group))
    place, start = torch.arange(n, device=index.device), n - line.exact
    sink = place[start - line.slots - line.sink : start - line.slots].expand(len(places), -1)
    exact = place[start:].expand(len(places), -1)
    columns = torch.cat((sink, wide[:, due:], exact), dim=1)
    shown = torch.cat((sink >= 0, real[:, due:], exact >= 0), dim=1)
    held = _gather(whole, places, columns, shown)
    return Band(places, Storage([held], ROOM), packed, line.sink, width - due)


def _gather(whole: Entries, places: Sequence[int], index: Tensor, real: Tensor) -> Entries:
    """Copy columns of some heads: (batch, 1, k, ...), padding where not `real`, bool (batch, k)."""
    heads = whole.keys.shape[1]
    real = real.unsqueeze(1)

    def taken(tensor: Tensor) -> Tensor:
        if not is_launched(tensor.device):  # whole runs of memory at a time
            pairs = zip(places, index, strict=True)
            lines = [tensor[place // heads, place % heads].index_select(0, at) for place, at in pairs]
            return torch.stack(lines).unsqueeze(1)
        return tensor.flatten(0, 1)[torch.tensor(places, device=tensor.device).unsqueeze(-1), index].unsqueeze(1)

    keys, values, weights, valid, state = map(taken, whole.tensors())
    return Entries(
        keys,
        values,
        weights.masked_fill(~real, 0.0),
        valid & real,
        state.masked_fill(~real.unsqueeze(-1), 0.0),
    )
