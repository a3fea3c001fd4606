"""Compressed layers of a file, put together and checked."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from wildcat_kv.cache.bands import BandedStorage
from wildcat_kv.cache.disk.banded_layers import read_bands, read_entries
from wildcat_kv.cache.disk.format import BOUNDS, QUERIES, DamageError, LayerHeader
from wildcat_kv.cache.disk.saved import SavedLayer
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.progress import Progress
from wildcat_kv.cache.value_range import ValueRange


def wildcat_layer(described: LayerHeader, own: dict[str, Tensor], bits: int | None) -> SavedLayer:
    """Put one layer together.

    Args:
        described: header of the layer.
        own: tensors of the layer by name.
        bits: bits of a quantised number, of the settings.

    Raises:
        DamageError: something is missing, or contradicts the rest.
    """
    progress, length = described.progress, described.length or 0
    assert progress is not None
    own = dict(own)
    if described.bands:
        storage = BandedStorage.whole(read_bands(described.bands, own, progress, bits), len(progress.rows))
        entries, bands = storage.allocated, storage.bands
        if length != storage.length:
            raise DamageError("its numbers do not fit its bands")
    else:
        entries, bands = read_entries(own), []
    folded_range = _folded_range(own, entries)
    carried, recent = _queries(own, entries.keys, progress)
    if set(own) - {*BOUNDS, *QUERIES}:
        raise DamageError("it has tensors of another layer")
    room = length if bands else entries.keys.shape[2]
    fits = _fits_entries(progress, length, entries.keys, room) and (folded_range is not None) == (
        progress.folded_at > 0
    )
    if not fits or not _is_consistent(progress):
        raise DamageError("its numbers do not fit its tensors")
    # Look for the next fold anew: a wrong number would put it off for ever.
    progress = dataclasses.replace(progress, fold_from=0)
    return SavedLayer(progress, entries, length, folded_range, carried, recent, bands)


def _folded_range(own: dict[str, Tensor], entries: Entries) -> ValueRange | None:
    bounds = [own[name] for name in BOUNDS if name in own]
    if not bounds:
        return None
    rows, heads, _, channels = entries.values.shape
    if [bound.shape for bound in bounds] != [(rows, heads, 1, channels)] * 2:
        raise DamageError("its value range does not fit")
    if {bound.dtype for bound in bounds} != {entries.values.dtype}:
        raise DamageError("its value range does not fit")
    return ValueRange(*bounds)


def _queries(own: dict[str, Tensor], keys: Tensor, progress: Progress) -> tuple[Tensor | None, Tensor | None]:
    """Return the carried and the recent queries."""
    carried, recent = (own.get(name) for name in QUERIES)
    given = [tensor for tensor in (carried, recent) if tensor is not None]
    heads = {tensor.shape[1] for tensor in given if tensor.dim() == 4}
    if len(heads) > 1 or not all(_are_queries(tensor, keys) for tensor in given):
        raise DamageError("its queries do not fit")
    counts = [0 if tensor is None else tensor.shape[2] for tensor in (carried, recent)]
    if max((row.carried for row in progress.rows), default=0) > counts[0] or counts[1] > progress.since_fold:
        raise DamageError("its queries do not fit its numbers")
    return carried, recent


def _are_queries(tensor: Tensor, keys: Tensor) -> bool:
    """Tell whether a tensor can be queries to `keys`."""
    rows, heads, _, channels = keys.shape
    return (
        tensor.dim() == 4
        and tensor.shape[::3] == (rows, channels)
        and tensor.shape[1] % heads == 0
        and tensor.dtype == keys.dtype
        and bool(torch.isfinite(tensor).all())
    )


def _fits_entries(progress: Progress, length: int, keys: Tensor, room: int) -> bool:
    """Tell whether the numbers of a layer fit its entries."""
    rows = progress.rows
    return (
        0 <= length <= room
        and len(rows) == keys.shape[0] > 0
        and max(row.stored for row in rows) + progress.since_fold <= length
        and -progress.seen <= progress.spare + length + max(row.counted for row in rows)
        and progress.spare <= length + max(row.counted for row in rows)
    )


def _is_consistent(progress: Progress) -> bool:
    """Tell whether the numbers of a layer fit each other."""
    ends = progress.ends
    return (
        all(
            min(row.seen, row.sink, row.slots, row.slots + row.spare, row.exact, row.seen_at_fold, row.carried) >= 0
            for row in progress.rows
        )
        and 0 <= progress.folded_at <= progress.settled <= progress.seen
        and ends == sorted(set(ends))
        and all(progress.settled < end <= progress.seen for end in ends)
        and 0 <= progress.scale < float("inf")
    )
