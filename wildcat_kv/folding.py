"""Folding: the tensors behind a `Fold`. Picks the entries to compress, and puts the coreset in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wildcat_kv.budget import Fold, Row
from wildcat_kv.compress import Coreset
from wildcat_kv.storage import Entries

# Entries to compress, entries a row, slots a row -> a Coreset with right-aligned rows.
CompressEntries = Callable[[Entries, Sequence[int], Sequence[int]], Coreset]


def fold_entries(
    entries: Entries, rows: Sequence[Row], folds: Sequence[Fold], compress: CompressEntries
) -> list[Entries]:
    """Carry out `folds`, one a row.

    Args:
        entries: right-aligned rows of `rows[b].stored` columns.
        rows: what the rows hold.
        folds: what becomes of them.
        compress: the method.

    Returns:
        Parts that, side by side, are the new right-aligned rows. Views of `entries` where possible.
    """
    lengths, ranks = [fold.items for fold in folds], [fold.rank for fold in folds]
    stored = entries.keys.shape[2]
    if not any(ranks):  # nothing but padding goes
        return [entries.slice(stored - max(row.stored for row in rows), stored)]
    if len(set(zip(rows, folds, strict=True))) == 1 and rows[0].stored == stored:
        start, stop = folds[0].sink + folds[0].kept, stored - folds[0].window
        coreset = compress(entries.slice(start, stop), lengths, ranks)
        return [entries.slice(0, start), _entries(coreset), entries.slice(stop, stored)]

    device = entries.keys.device
    windows = torch.tensor([fold.window for fold in folds])
    places = torch.arange(max(lengths)) - max(lengths)
    index = (stored - windows.unsqueeze(-1) + places).clamp_min_(0)
    coreset = compress(entries.columns(index.to(device)), lengths, ranks)
    index, used = _assembly(rows, folds, stored, coreset.valid.shape[-1])
    both = [torch.cat(pair, dim=2) for pair in zip(entries.tensors(), _entries(coreset).tensors(), strict=True)]
    joined = Entries(*both).columns(index.to(device))
    used = used.to(device)[:, None, :]
    return [
        Entries(
            joined.keys.masked_fill_(~used.unsqueeze(-1), 0.0),
            joined.values.masked_fill_(~used.unsqueeze(-1), 0.0),
            joined.weights.masked_fill_(~used, 0.0),
            joined.valid & used,
        )
    ]


def align_right(entries: Entries, rows: Sequence[Row], appended: int) -> Entries:
    """Close the gaps that padding left among the newest columns.

    Args:
        entries: right-aligned rows of `rows[b].stored` columns, then `appended` columns of new tokens, some
            of them padding.
        rows: what the rows held before the new tokens.
        appended: new columns.

    Returns:
        Right-aligned rows, copied: the padding has gone to the left.
    """
    before = entries.keys.shape[2] - appended
    held = torch.tensor([row.stored for row in rows]).to(entries.keys.device, non_blocking=True)
    taken = torch.arange(before, device=entries.keys.device) >= before - held.unsqueeze(-1)
    taken = torch.cat((taken, entries.valid[:, 0, before:]), dim=-1)
    return entries.columns(taken.to(torch.int8).argsort(dim=-1, stable=True))


def column_mask(spans: Sequence[tuple[int, int]], columns: Tensor) -> Tensor:
    """bool (rows, n), True in columns [start, stop) of each row of `columns` (rows, heads, n, channels)."""
    start, stop = torch.tensor(spans).to(columns.device, non_blocking=True).unsqueeze(-1).unbind(1)
    place = torch.arange(columns.shape[2], device=columns.device)
    return (place >= start) & (place < stop)


def _assembly(rows: Sequence[Row], folds: Sequence[Fold], stored: int, slots: int) -> tuple[Tensor, Tensor]:
    """Where each column of the new rows comes from: [0, stored) is old, [stored, stored + slots) coreset."""
    head = torch.tensor([fold.sink + fold.kept for fold in folds]).unsqueeze(-1)
    rank = torch.tensor([fold.rank for fold in folds]).unsqueeze(-1)
    window = torch.tensor([fold.window for fold in folds]).unsqueeze(-1)
    before = torch.tensor([row.stored for row in rows]).unsqueeze(-1)
    length = head + rank + window
    total = int(length.max())
    place = torch.arange(total) - (total - length)
    index = torch.where(
        place < head,
        stored - before + place,
        torch.where(place < head + rank, stored + slots - rank + place - head, stored + place - length),
    )
    return index.clamp_min_(0), place >= 0


def _entries(coreset: Coreset) -> Entries:
    return Entries(coreset.keys, coreset.values, coreset.weights, coreset.valid)
