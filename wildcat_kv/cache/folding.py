"""Folding: the tensors behind a `Fold`. Puts a coreset in the place of the entries that it stands for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wildcat_kv.cache.budget import Fold, Row
from wildcat_kv.cache.storage import Entries
from wildcat_kv.coreset.compresskv import Coreset


def fold_entries(
    entries: Entries, rows: Sequence[Row], folds: Sequence[Fold], coreset: Coreset | None, columns: Sequence[int]
) -> tuple[int, list[Entries]]:
    """Carry out `folds`, one a row.

    Args:
        entries: right-aligned rows of `rows[b].stored` columns.
        rows: what the rows hold.
        folds: what becomes of them.
        coreset: of the rows' items, right-aligned; None where no row has any.
        columns: columns of the coreset that each row takes.

    Returns:
        How many of the first columns stay as they are, and the parts that come behind them, side by side, to give
        the new right-aligned rows. Views of `entries` where possible.
    """
    stored = entries.keys.shape[2]
    if coreset is None:  # nothing but padding goes
        return 0, [entries.slice(stored - max(row.stored for row in rows), stored)]
    width = coreset.valid.shape[-1]
    slots = Entries.of(coreset, entries)
    if len(set(zip(rows, folds, columns, strict=True))) == 1 and rows[0].stored == stored:
        stop = stored - folds[0].window
        return folds[0].head, [slots.slice(width - columns[0], width), entries.slice(stop, stored)]

    index, used = _assembly(rows, folds, columns, stored, width)
    device = entries.keys.device
    both = [torch.cat(pair, dim=2) for pair in zip(entries.tensors(), slots.tensors(), strict=True)]
    joined = Entries(*both).columns(index.to(device))
    used = used.to(device)[:, None, :]
    return 0, [
        Entries(
            joined.keys.masked_fill_(~used.unsqueeze(-1), 0.0),
            joined.values.masked_fill_(~used.unsqueeze(-1), 0.0),
            joined.weights.masked_fill_(~used, 0.0),
            joined.valid & used,
            joined.memory,
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


def _assembly(
    rows: Sequence[Row], folds: Sequence[Fold], columns: Sequence[int], stored: int, slots: int
) -> tuple[Tensor, Tensor]:
    """Where each column of the new rows comes from: [0, stored) is old, [stored, stored + slots) coreset."""
    head = torch.tensor([fold.head for fold in folds]).unsqueeze(-1)
    taken = torch.tensor(columns).unsqueeze(-1)
    window = torch.tensor([fold.window for fold in folds]).unsqueeze(-1)
    before = torch.tensor([row.stored for row in rows]).unsqueeze(-1)
    length = head + taken + window
    total = int(length.max())
    place = torch.arange(total) - (total - length)
    index = torch.where(
        place < head,
        stored - before + place,
        torch.where(place < head + taken, stored + slots - taken + place - head, stored + place - length),
    )
    return index.clamp_min_(0), place >= 0
