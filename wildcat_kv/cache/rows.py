"""Rows of a batch that hold unequally much, in groups of equal ones.

A method sees only rectangles; afterwards the groups are put together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.cache.budget import FoldPlan, Row
from wildcat_kv.cache.entries import Entries
from wildcat_kv.compressors.base import Compressed
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.slot_facts import SlotFacts


@dataclass(frozen=True)
class RowGroup:
    """Rows that hold equally much, and fold in the same way.

    Attributes:
        rows: places in the batch, in order.
        held: entries of a row.
        items: entries that become slots.
        rank: slots that they become, in a head on average.
        window: exact tokens behind the items.
        exact: newest entries that are exact tokens.
        seen: tokens read.
        queried: queries at hand.
        weighted: True if slots of an earlier coreset are among the items.
        packs: True if each item becomes a slot as it is.
    """

    rows: tuple[int, ...]
    held: int
    items: int
    rank: int
    window: int
    exact: int
    seen: int
    queried: int
    weighted: bool
    packs: bool = False


def group_rows(rows: Sequence[Row], plans: Sequence[FoldPlan], queried: Sequence[int]) -> list[RowGroup]:
    """Group the rows that fold by all that a method can tell of them."""
    alike: dict[RowGroup, list[int]] = {}
    for number, (row, plan, queries) in enumerate(zip(rows, plans, queried, strict=True)):
        if not plan.items:
            continue
        numbers = (row.stored, plan.items, plan.rank, plan.window, row.exact, row.seen, queries)
        alike.setdefault(RowGroup((), *numbers, weighted=row.slots > plan.kept, packs=plan.packs), []).append(number)
    return [replace(group, rows=tuple(members)) for group, members in alike.items()]


def common_groups(layers: Sequence[Sequence[RowGroup]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Group the rows that are alike in every layer.

    Args:
        layers: groups of each layer, of the same rows in all.

    Returns:
        For each common group its rows, and the place of the group that they are in, layer by layer.
    """
    places = [{row: place for place, group in enumerate(groups) for row in group.rows} for groups in layers]
    together: dict[tuple[int, ...], list[int]] = {}
    for row in sorted(places[0]):
        together.setdefault(tuple(found[row] for found in places), []).append(row)
    return [(tuple(rows), at) for at, rows in together.items()]


def take_rows(tree: Any, rows: Sequence[int], total: int) -> Any:
    """Take `rows` of `total` from every tensor in a nested structure.

    The structure is of tuples, lists and dicts. Nothing is copied if all rows are taken.
    """
    if len(rows) == total:
        return tree
    if isinstance(tree, Tensor):
        return tree.index_select(0, torch.tensor(rows, device=tree.device))
    if isinstance(tree, dict):
        return {name: take_rows(part, rows, total) for name, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [take_rows(part, rows, total) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(
        f"a survey holds a {type(tree).__name__}; make it of tensors in named tuples, tuples, lists and dicts"
    )


@dataclass(frozen=True)
class JoinedSlots:
    """Slots of all rows of a batch, right-aligned.

    Attributes:
        coreset: slots (rows, heads, width, ...).
        columns: columns that each row takes, of the last ones; 0 for a row that does not fold.
        carried_state: float32 (rows, heads, width, m), None for zeros.
        error: float32 (rows, query_heads), 0 for a row that does not fold; None where the method makes no estimate.
        facts: facts of all slots, where the method has read them.
    """

    coreset: Coreset
    columns: list[int]
    carried_state: Tensor | None
    error: Tensor | None
    facts: SlotFacts | None = None


def join_groups(groups: Sequence[RowGroup], parts: Sequence[Compressed], total: int) -> JoinedSlots | None:
    """Put the parts of all groups together, to `total` rows.

    None if there is no group.
    """
    if not groups:
        return None
    taken = [_columns_taken(group, part) for group, part in zip(groups, parts, strict=True)]
    if len(groups) == 1 and len(groups[0].rows) == total:
        [part] = parts
        return JoinedSlots(part.coreset, taken[0], part.carried_state, part.error, part.facts)
    columns = [0] * total
    for group, counts in zip(groups, taken, strict=True):
        for row, count in zip(group.rows, counts, strict=True):
            columns[row] = count
    width = max(columns)

    keys, values, weights, valid = (
        _join(groups, [getattr(part.coreset, name) for part in parts], total, width)
        for name in ("keys", "values", "weights", "valid")
    )
    assert keys is not None and values is not None and weights is not None and valid is not None
    state = _join(groups, [part.carried_state for part in parts], total, width)
    error = _join(groups, [part.error for part in parts], total, None)
    return JoinedSlots(Coreset(keys, values, weights, valid), columns, state, error)


def _columns_taken(group: RowGroup, part: Compressed) -> list[int]:
    """Count the columns that each row of a group takes."""
    return [group.rank] * len(group.rows) if part.columns is None else [int(count) for count in part.columns]


def _join(groups: Sequence[RowGroup], parts: Sequence[Tensor | None], total: int, width: int | None) -> Tensor | None:
    """Join the groups' tensors (rows, heads, c, ...), right-aligned in `width` columns.

    Returns None if one is missing.

    Without a width they are (rows, ...), and are joined as they are.
    """
    there = [part for part in parts if part is not None]
    if len(there) < len(parts):
        return None
    shape, dtypes = list(there[0].shape), {part.dtype for part in there}
    shape[0], shape[2:3] = total, [] if width is None else [width]
    whole = there[0].new_zeros(shape, dtype=torch.float32 if len(dtypes) > 1 else None)
    for group, part in zip(groups, there, strict=True):
        index = torch.tensor(group.rows, device=whole.device)
        if width is None:
            whole[index] = part
        else:
            count = min(width, part.shape[2])
            whole[index, :, width - count :] = part[:, :, part.shape[2] - count :].to(whole.dtype)
    return whole


def replace_items(
    entries: Entries, rows: Sequence[Row], plans: Sequence[FoldPlan], slots: Entries | None, columns: Sequence[int]
) -> tuple[int, list[Entries]]:
    """Put slots in the place of the items that they stand for.

    Args:
        entries: right-aligned rows of `rows[b].stored` columns.
        rows: contents of the rows.
        plans: their folds.
        slots: those of the rows' items, right-aligned; None where no row has any.
        columns: columns of the slots that each row takes.

    Returns:
        How many of the first columns stay as they are, and the parts that come behind them, side by side, to give
        the new right-aligned rows. Views of `entries` where possible.
    """
    stored = entries.keys.shape[2]
    if slots is None:  # nothing but padding goes
        return 0, [entries.slice(stored - max(row.stored for row in rows), stored)]
    width = slots.keys.shape[2]
    if len(set(zip(rows, plans, columns, strict=True))) == 1 and rows[0].stored == stored:
        stop = stored - plans[0].window
        return plans[0].head, [slots.slice(width - columns[0], width), entries.slice(stop, stored)]

    index, used = _assembly(rows, plans, columns, stored, width)
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
            joined.carried_state,
        )
    ]


def align_right(entries: Entries, rows: Sequence[Row], appended: int) -> Entries:
    """Close the gaps that padding left among the newest columns.

    Args:
        entries: right-aligned rows of `rows[b].stored` columns, then `appended` columns of new tokens, some
            of them padding.
        rows: contents of the rows before the new tokens.
        appended: new columns.

    Returns:
        Right-aligned rows, copied: the padding has gone to the left.
    """
    before = entries.keys.shape[2] - appended
    held = torch.tensor([row.stored for row in rows]).to(entries.keys.device, non_blocking=True)
    taken = torch.arange(before, device=entries.keys.device) >= before - held.unsqueeze(-1)
    taken = torch.cat((taken, entries.valid[:, 0, before:]), dim=-1)
    return entries.columns(taken.to(torch.int8).argsort(dim=-1, stable=True))


def _assembly(
    rows: Sequence[Row], plans: Sequence[FoldPlan], columns: Sequence[int], stored: int, slots: int
) -> tuple[Tensor, Tensor]:
    """Find where each column of the new rows comes from.

    [0, stored) is old, [stored, stored + slots) is coreset.
    """
    head = torch.tensor([plan.head for plan in plans]).unsqueeze(-1)
    taken = torch.tensor(columns).unsqueeze(-1)
    window = torch.tensor([plan.window for plan in plans]).unsqueeze(-1)
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
