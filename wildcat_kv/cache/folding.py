"""A fold: plan -> blocks -> coresets -> storage.

These are functions of a layer's state.

`fold_due` folds one layer by itself; `survey_due` and `fold_together` fold the layers of a `SharingCompressor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.cache.banding import Line, is_unequal, sort_into_bands
from wildcat_kv.cache.bands import BandedStorage
from wildcat_kv.cache.budget import FoldPlan, Row, plan_fold, tokens_until_fold
from wildcat_kv.cache.pending import PendingFold
from wildcat_kv.cache.rows import (
    RowGroup,
    align_right,
    common_groups,
    group_rows,
    join_groups,
    replace_items,
    take_rows,
)
from wildcat_kv.cache.state import LayerState
from wildcat_kv.cache.storage import Entries
from wildcat_kv.cache.value_range import exact_range, range_of
from wildcat_kv.compressors.base import Compressed, KVBlock, SharingCompressor
from wildcat_kv.coreset.tensors import ordinary_tensors


def fold_due(state: LayerState, until: int) -> None:
    """Fold what is due at the ends of forward passes.

    The ends up to column `until` come one after the other, each folded as of then.

    Raises:
        ValueError: NaN or infinity among the keys to fold; what was not yet folded stays as it is.
    """
    while (due := _next_fold(state, until)) is not None:
        pending, found, method = _prepare(state, *due), [], state.compressor
        for group in pending.groups:
            with torch.no_grad(), ordinary_tensors():
                block = _block(state, pending, group)
                made = block.keep_items() if group.keeps_all else method.compress(block, group.rank)
            found.append(_checked(made, block, group.rank, type(method).__name__))
        _carry_out(state, pending, found)
    trim_queries(state)


@torch.no_grad()
def survey_due(state: LayerState, until: int) -> bool:
    """Survey the next fold up to column `until`, for `fold_together`.

    Returns False if there is none.

    Raises:
        ValueError: NaN or infinity among the keys to fold.
    """
    if state.pending is None and (due := _next_fold(state, until)) is not None:
        assert isinstance(state.compressor, SharingCompressor)
        pending = _prepare(state, *due)
        for group in pending.groups:
            with ordinary_tensors():
                surveyed = None if group.keeps_all else state.compressor.survey(_block(state, pending, group))
                pending.surveys.append(surveyed)
        _fold_log(state, pending)
        pending.release(banded=isinstance(state.held, BandedStorage))
        state.pending = pending
    return state.pending is not None


@torch.no_grad()
def fold_together(states: Sequence[LayerState], until: int) -> None:
    """Fold layers that share one budget, each as `fold_due` does.

    Raises:
        ValueError: NaN or infinity among the keys to fold.
    """
    compressor = states[0].compressor
    assert isinstance(compressor, SharingCompressor)
    while True:
        ready = [survey_due(state, until) for state in states]  # each of them, whatever the others say
        if not all(ready):
            break
        pending = [state.pending for state in states if state.pending is not None]
        dealt = _deal(compressor, pending)
        for place, (state, each) in enumerate(zip(states, pending, strict=True)):
            found = []
            for group, shares in zip(each.groups, dealt, strict=True):
                with ordinary_tensors():
                    block, rank = _block(state, each, group), group.rank
                    if group.keeps_all:
                        made = block.keep_items()
                    else:
                        made = compressor.compress_share(block, rank, shares[place])
                found.append(_checked(made, block, group.rank, type(compressor).__name__))
            state.pending = None
            _carry_out(state, each, found)
    for state in states:
        trim_queries(state)


def will_fold(state: LayerState, until: int) -> bool:
    """Tell whether `fold_due` would fold anything.

    Ends that fold nothing are decided on the way.
    """
    return _next_fold(state, until) is not None


# Plan


def _next_fold(state: LayerState, until: int) -> tuple[list[Row], list[FoldPlan], int] | None:
    """Find the rows, the plans and the column of the next fold.

    It is up to column `until`; None if there is none.

    Ends of forward passes that fold nothing are decided on the way.
    """
    while (end := state.progress.due(until)) is not None:
        rows = state.count_rows(end)
        if plans := _plan(state, rows, end):
            return rows, plans, end
        _mark_decided(state, rows, end)
    return None


def _plan(state: LayerState, rows: Sequence[Row], end: int) -> list[FoldPlan] | None:
    """Plan the fold after the forward pass that ended at `end`.

    The `rows` are as of that column. None means no fold.
    """
    settings, decodes = state.settings, state.compressor.decodes
    # A row's first tokens, several at once, are its prompt; with padding that may come in a later pass.
    before = state.count_rows(state.progress.settled)
    prompts = [earlier.seen == 0 and row.seen > 1 for earlier, row in zip(before, rows, strict=True)]
    plans = [
        plan_fold(row, settings, prefill=prompt) if prompt or decodes else None
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    too_wide = settings.max_tokens is not None and _counted_at(state, end) > settings.max_tokens
    if not any(plans) and not too_wide:
        return None
    return [plan or FoldPlan.nothing(row) for plan, row in zip(plans, rows, strict=True)]


def _counted_at(state: LayerState, column: int) -> int:
    """Count columns held at `column` as the budget does: alike in all layers."""
    return state.stored_at(column) - state.progress.spare


def _mark_decided(state: LayerState, rows: Sequence[Row], end: int) -> None:
    """Note that the first end, `end`, is decided, and when to look again."""
    settings = state.settings
    again = [row for row in rows if state.compressor.decodes or not row.seen]
    waits = [wait for row in again if (wait := tokens_until_fold(row, settings)) is not None]
    if settings.max_tokens is not None:  # columns of padding take room as well
        waits.append(max(1, settings.max_tokens + 1 - _counted_at(state, end)))
    state.progress.mark_decided(min(waits) if waits else None)


# Blocks


@torch.no_grad()
def _prepare(state: LayerState, rows: list[Row], plans: list[FoldPlan], end: int) -> PendingFold:
    """Gather what a fold as of column `end` needs to know.

    Columns that came after stay as they are.
    """
    cut, appended = state.stored_at(end), end - state.progress.folded_at
    newest = state.held.newest(state.progress.since_fold).slice(0, appended)
    if unchecked := end - max(state.checked, state.progress.folded_at):
        state.check_finite(newest.keys[:, :, appended - unchecked :])
        state.checked = end
    queries, queried = _queries_until(state, end, newest.valid[:, 0])
    entries, moved = _entries_at(state, rows, end)
    with ordinary_tensors():
        leaving = [_leaving(cut, row, plan) for row, plan in zip(rows, plans, strict=True)]
        folded = range_of(entries.values, leaving)
        if state.folded_range is not None:
            folded = folded.join(state.folded_range)
        bound = folded.join(exact_range(entries.values, rows)).squared_norm()
        groups = group_rows(rows, plans, queried)
        pending = PendingFold(rows, plans, end, entries, moved, folded, bound, queries, queried, groups)
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


def _entries(state: LayerState, pending: PendingFold) -> Entries:
    """Give the entries of a fold, unpacked anew where they were not kept."""
    if pending.entries is None:
        pending.entries, _ = _entries_at(state, pending.rows, pending.end)
        if pending.carried_state is not None:
            pending.entries = replace(pending.entries, carried_state=pending.carried_state)
    return pending.entries


def _block(state: LayerState, pending: PendingFold, group: RowGroup) -> KVBlock:
    """Build a group's block for the method, of views where all rows are alike."""
    held = _entries(state, pending)
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
        rotation=state.rotation,
    )


def _remembered(state: LayerState, pending: PendingFold) -> Tensor:
    """Give the carried state of all entries, brought up to date where rows fold.

    The other rows keep their state and their queries.
    """
    before = _entries(state, pending).carried_state
    found = [state.compressor.remember(_block(state, pending, group)) for group in pending.groups]
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


# Coresets


def _deal(compressor: SharingCompressor, pending: Sequence[PendingFold]) -> list[list[Any]]:
    """Deal the budget out among layers, for rows that are alike in all.

    These rows are the groups of `pending` from now on.

    Returns:
        For each of these groups the layers' shares.
    """
    common, dealt = common_groups([each.groups for each in pending]), []
    for rows, at in common:
        surveys = []
        for each, place in zip(pending, at, strict=True):
            own = each.groups[place].rows
            surveys.append(take_rows(each.surveys[place], [own.index(row) for row in rows], len(own)))
        with ordinary_tensors():
            group = pending[0].groups[at[0]]
            dealt.append([None] * len(surveys) if group.keeps_all else compressor.deal(surveys, group.rank))
    for number, each in enumerate(pending):
        each.groups = [replace(each.groups[at[number]], rows=rows) for rows, at in common]
    return dealt


def _checked(found: Any, block: KVBlock, rank: int, method: str) -> Compressed:
    """Refuse what a method should not have returned, before anything is replaced.

    Raises:
        ValueError: names the method, and what its coreset must be.
    """
    if not isinstance(found, Compressed):
        raise ValueError(
            f"compressor={method}: compress returned a {type(found).__name__}; return a "
            "wildcat_kv.compressors.Compressed, with the coreset in it"
        )
    coreset, columns = found.coreset, found.columns
    (rows, heads, _, d), d_v, width = block.keys.shape, block.values.shape[-1], coreset.valid.shape[-1]
    shapes = [tuple(tensor.shape) for tensor in (coreset.keys, coreset.values, coreset.weights, coreset.valid)]
    wanted = [(rows, heads, width, d), (rows, heads, width, d_v), (rows, heads, width), (rows, heads, width)]
    dtypes = [tensor.dtype for tensor in (coreset.keys, coreset.values, coreset.weights, coreset.valid)]
    # Slots that are folded again come in float32; in the dtype of the cache they are as welcome.
    fit = dtypes[1] in (block.keys.dtype, block.values.dtype)
    if shapes != wanted or not fit or dtypes[::2] + dtypes[3:] != [block.keys.dtype, torch.float32, torch.bool]:
        raise ValueError(
            f"compressor={method}: its coreset has shapes {shapes} and dtypes {dtypes}; keys, values, weights, valid "
            f"must be {wanted} in {block.keys.dtype}, {block.values.dtype}, float32 and bool"
        )
    columns = [rank] * rows if columns is None else [int(count) for count in columns]
    if len(columns) != rows or not 0 <= min(columns) <= max(columns) <= width:
        raise ValueError(
            f"compressor={method}: its coreset has {width} columns, and the {rows} rows take {columns} of them; return "
            "`rank` columns, or say in `columns` how many each row takes"
        )
    return replace(found, columns=columns)


# Storage


@torch.no_grad()
def _carry_out(state: LayerState, pending: PendingFold, found: Sequence[Compressed]) -> None:
    """Put what the method made of each group in the place of its items."""
    rows, plans, end, entries = pending.rows, pending.plans, pending.end, _entries(state, pending)
    with ordinary_tensors():
        joined = join_groups(pending.groups, found, len(rows))
        slots = None if joined is None else Entries.of(joined.coreset, joined.carried_state, entries)
        columns = [0] * len(rows) if joined is None else joined.columns
        start, parts = replace_items(entries, rows, plans, slots, columns)
        parts.append(state.held.newest(state.progress.seen - end))
        after = [plan.apply(row, taken) for plan, row, taken in zip(plans, rows, columns, strict=True)]
        if _needs_bands(state, found):
            after = _rebuild(state, pending, [entries.slice(0, start), *parts], columns, after)
        elif pending.moved:  # what is held before `start` is no longer what it should be
            state.plain.rewrite(0, [entries.slice(0, start), *parts])
        else:
            state.plain.rewrite(start, parts)
    state.folded_range = pending.folded_range
    if joined is not None and joined.error is not None:
        _note_error(state, joined.error, [plan.items > 0 for plan in plans])
    carried = _fold_log(state, pending)
    after = [replace(row, carried=count) for row, count in zip(after, carried, strict=True)]
    state.progress.fold(after, end)
    state.span()
    _mark_decided(state, state.progress.rows, end)


@torch.no_grad()
def hold_in_bands(state: LayerState) -> None:
    """Sort the heads of a layer that holds a rectangle of slots into bands; with `bits`, quantise the slots."""
    progress, settings = state.progress, state.settings
    lines = [
        Line(row.sink, row.slots + row.spare, row.slots + row.spare, row.exact + progress.since_fold)
        for row in progress.rows
    ]
    with ordinary_tensors():
        whole = state.plain.entries
        state.storage = storage = sort_into_bands(whole, lines, state.plain, settings.bits, settings.group)
    taken = zip(progress.rows, storage.slots_of_rows, strict=True)
    progress.rows = [replace(row, spare=slots - row.slots) for row, slots in taken]
    progress.spare = max(row.stored for row in progress.rows) - max(row.counted for row in progress.rows)


def _needs_bands(state: LayerState, found: Sequence[Compressed]) -> bool:
    """Tell if a layer is to be held in bands: it is already, or heads are unequal, or slots quantised."""
    if state.settings.bits is not None or isinstance(state.held, BandedStorage):
        return True
    dealt = [part.coreset.valid for part in found if part.columns is not None]
    return not state.fixed and any(is_unequal(valid) for valid in dealt)


def _rebuild(
    state: LayerState, pending: PendingFold, parts: Sequence[Entries], columns: Sequence[int], after: Sequence[Row]
) -> list[Row]:
    """Sort the heads into bands; return the rows with the columns that they take now."""
    later = state.progress.seen - pending.end
    lines = [
        Line(plan.sink, plan.kept + plan.spare, plan.kept + plan.spare + taken, plan.window + later)
        for plan, taken in zip(pending.plans, columns, strict=True)
    ]
    whole = Entries(*(torch.cat(tensors, dim=2) for tensors in zip(*(part.tensors() for part in parts), strict=True)))
    settings = state.settings
    if settings.bits is not None:
        state.check_range(whole)
    state.storage = storage = sort_into_bands(whole, lines, state.held, settings.bits, settings.group)
    return [replace(row, spare=taken - row.slots) for row, taken in zip(after, storage.slots_of_rows, strict=True)]


def _note_error(state: LayerState, error: Tensor, folding: list[bool]) -> None:
    """Keep the error estimate of the rows that fold now.

    The estimate of the others is still the one of their last fold.
    """
    if state.error is not None and not all(folding):
        there = torch.tensor(folding).to(error.device).unsqueeze(-1)
        error = torch.where(there, error, state.error.to(error.device))
    state.error = error


def _fold_log(state: LayerState, pending: PendingFold) -> list[int]:
    """Forget the queries that a fold has learned from.

    Those that the next fold learns from too are kept; the result counts them, row by row.
    """
    if state.log is None or pending.forgotten:
        return [row.carried for row in pending.rows]
    kept = [
        count if not plan.items else min(count, state.log.observation.carried)
        for count, plan in zip(pending.queried, pending.plans, strict=True)
    ]
    state.log.fold(pending.queries, kept, state.progress.seen - pending.end)
    pending.rows = [replace(row, carried=count) for row, count in zip(pending.rows, kept, strict=True)]
    pending.forgotten = True
    return kept


def trim_queries(state: LayerState) -> None:
    """Forget queries that no fold will ask for."""
    # Columns of padding are no queries: what is among them is known only at the fold.
    log, progress = state.log, state.progress
    if log is not None and log.observation.latest is not None and not progress.masked:
        log.trim(progress.seen - progress.settled + log.observation.latest + state.settings.window)
