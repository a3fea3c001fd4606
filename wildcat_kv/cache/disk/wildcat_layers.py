"""Compressed layers of a file, put together and checked."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from wildcat_kv.cache.disk.format import BOUNDS, ENTRIES, MEMORY, QUERIES, DamageError
from wildcat_kv.cache.disk.saved import SavedLayer
from wildcat_kv.cache.progress import Progress
from wildcat_kv.cache.storage import Entries
from wildcat_kv.cache.value_range import ValueRange


def wildcat_layer(progress: Progress, length: int, own: dict[str, Tensor]) -> SavedLayer:
    """Put one layer together.

    Args:
        progress: numbers of the layer.
        length: number of entries in use.
        own: tensors of the layer by name.

    Raises:
        DamageError: something is missing, or contradicts the rest.
    """
    entries = _entries(own)
    folded_range = _folded_range(own, entries)
    carried, recent = _queries(own, entries.keys, progress)
    if set(own) - {*ENTRIES, *BOUNDS, MEMORY, *QUERIES}:
        raise DamageError("it has tensors of another layer")
    fits = _fits_entries(progress, length, entries.keys) and (folded_range is not None) == (progress.folded_at > 0)
    if not fits or not _is_consistent(progress):
        raise DamageError("its numbers do not fit its tensors")
    # Look for the next fold anew: a wrong number would put it off for ever.
    return SavedLayer(dataclasses.replace(progress, fold_from=0), entries, length, folded_range, carried, recent)


def _entries(own: dict[str, Tensor]) -> Entries:
    if missing := [name for name in ENTRIES if name not in own]:
        raise DamageError(f"{missing[0]} is missing")
    keys, values, weights, valid = (own[name] for name in ENTRIES)
    if keys.dim() != 4 or values.dim() != 4 or not keys.shape[:3] == values.shape[:3] == weights.shape == valid.shape:
        raise DamageError("the shapes of its tensors do not fit each other")
    dtypes = (keys.dtype, torch.float32, torch.bool)
    if not keys.is_floating_point() or (values.dtype, weights.dtype, valid.dtype) != dtypes:
        raise DamageError("the dtypes of its tensors do not fit each other")
    memory = own.get(MEMORY, weights.new_zeros(*weights.shape, 0))
    if memory.shape[:3] != weights.shape or memory.dim() != 4 or memory.dtype != torch.float32:
        raise DamageError("what its method remembers does not fit")
    return Entries(keys, values, weights, valid, memory)


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


def _fits_entries(progress: Progress, length: int, keys: Tensor) -> bool:
    """Tell whether the numbers of a layer fit its entries."""
    rows = progress.rows
    return (
        0 <= length <= keys.shape[2]
        and len(rows) == keys.shape[0] > 0
        and max(row.stored for row in rows) + progress.since_fold <= length
        and abs(progress.spare) <= length + max(row.counted for row in rows)
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
