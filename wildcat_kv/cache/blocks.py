"""Give the method of a fold its entries and queries, in rectangles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wildcat_kv.cache.budget import FoldPlan, Row
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.pending import PendingFold
from wildcat_kv.cache.rows import RowGroup, align_right, group_rows, take_rows
from wildcat_kv.cache.state import LayerState
from wildcat_kv.cache.value_range import exact_range, range_of
from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.coreset.launching import is_launched
from wildcat_kv.coreset.tensors import ordinary_tensors


@torch.no_grad()
def prepare(state: LayerState, rows: list[Row], plans: list[FoldPlan], end: int) -> PendingFold:
    """Gather what a fold as of column `end` needs to know.

    Columns that came after stay as they are.
    """
    cut, appended = state.stored_at(end), end - state.progress.folded_at
    newest = state.held.newest(state.progress.since_fold).slice(0, appended)
    key_sum = None
    if unchecked := end - max(state.checked, state.progress.folded_at):
        keys = newest.keys[:, :, appended - unchecked :]
        if is_launched(keys.device):  # read with what the fold must read anyway
            key_sum = keys.sum(dtype=torch.float32)
        else:
            state.check_finite(keys)
            state.checked = end
    queries, queried = _queries_until(state, end, newest.valid[:, 0])
    entries, moved = _entries_at(state, rows, end)
    with ordinary_tensors():
        leaving = [_leaving(cut, row, plan) for row, plan in zip(rows, plans, strict=True)]
        folded = range_of(entries.values, leaving)
        if state.folded_range is not None:
            folded = folded.join(state.folded_range)
        groups, bound = group_rows(rows, plans, queried), None
        if any(group.weighted for group in groups):
            bound = folded.join(exact_range(entries.values, rows)).squared_norm()
        pending = PendingFold(
            rows, plans, end, entries, moved, folded, bound, queries, queried, groups, key_sum=key_sum
        )
        if state.compressor.state_size:
            pending.entries, pending.moved = replace(entries, carried_state=_remembered(state, pending)), True
    return pending


def _entries_at(state: LayerState, rows: Sequence[Row], end: int) -> tuple[Entries, bool]:
    """Give the entries as of column `end`, rows right-aligned, and True if they are not the stored ones."""
    held, appended = state.progress.rows, end - state.progress.folded_at
    entries = state.held.entries.slice(0, state.stored_at(end))
    if any(row.counted - old.counted != appended for row, old in zip(rows, held, strict=True)):
        return align_right(entries, held, appended), True
    return entries, False


def entries_of(state: LayerState, pending: PendingFold) -> Entries:
    """Give the entries of a fold, unpacked anew where they were not kept."""
    if pending.entries is None:
        pending.entries, _ = _entries_at(state, pending.rows, pending.end)
        if pending.carried_state is not None:
            pending.entries = replace(pending.entries, carried_state=pending.carried_state)
    return pending.entries


def block_of(state: LayerState, pending: PendingFold, group: RowGroup) -> KVBlock:
    """Build a group's block for the method, of views where all rows are alike."""
    held = entries_of(state, pending)
    total, n = len(pending.rows), held.keys.shape[2]
    entries = Entries(*take_rows(held.slice(n - group.held, n).tensors(), group.rows, total))
    queries = pending.queries
    if queries is not None:
        queries = take_rows(queries[:, :, queries.shape[2] - group.queried :], group.rows, total)
    return KVBlock(
        keys=entries.keys,
        values=entries.numerators() if group.weighted else entries.values,
        valid=entries.valid,
        items=group.items,
        window=group.window,
        exact=group.exact,
        seen=group.seen,
        scale=state.progress.scale,
        layer_index=state.place,
        sharing=state.sharing,
        weights=entries.weights if group.weighted else None,
        value_bound=take_rows(pending.value_bound, group.rows, total),
        queries=queries,
        carried_state=entries.carried_state,
        rotation=state.model.rotation,
        output_projection=state.model.output_projection(state.compressor),
    )


def _remembered(state: LayerState, pending: PendingFold) -> Tensor:
    """Give the carried state of all entries, brought up to date where rows fold.

    The other rows keep their state and their queries.
    """
    before = entries_of(state, pending).carried_state
    found = [state.compressor.remember(block_of(state, pending, group)) for group in pending.groups]
    if len(found) == 1 and found[0].shape == before.shape:
        return found[0]
    after = before.clone()
    for group, new in zip(pending.groups, found, strict=True):
        after[torch.tensor(group.rows, device=after.device), :, after.shape[2] - group.held :] = new
    return after


def _queries_until(state: LayerState, end: int, valid: Tensor) -> tuple[Tensor | None, list[int]]:
    """Give the queries to learn from, and how many each row has.

    They are those as of column `end`, right-aligned.

    Args:
        state: contents of the layer.
        end: column.
        valid: bool (rows, k), False for padding among the columns since the last fold.
    """
    if state.log is None:
        return None, [0] * len(state.progress.rows)
    carried = [row.carried for row in state.progress.rows]
    later, latest = state.progress.seen - end, state.log.observation.latest
    queries, queried = state.log.until(later, valid if state.progress.masked else None, carried)
    if latest is None or queries is None:
        return queries, queried
    return queries[:, :, max(0, queries.shape[2] - latest) :], [min(count, latest) for count in queried]


def _leaving(columns: int, row: Row, plan: FoldPlan) -> tuple[int, int]:
    """Find the exact tokens that `plan` makes into slots: [start, stop).

    The row is right-aligned.
    """
    if not plan.items:
        return columns, columns
    exact = max(row.stored - row.exact, plan.head)
    return columns - row.stored + exact, columns - plan.window
