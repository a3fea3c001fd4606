"""Slots that a fold puts in the place of their items, quantised or in bands where that is due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wildcat_kv.cache.banding import Line, is_unequal, sort_into_bands
from wildcat_kv.cache.bands import BandedStorage
from wildcat_kv.cache.blocks import entries_of
from wildcat_kv.cache.budget import Row
from wildcat_kv.cache.entries import Entries, weights_of
from wildcat_kv.cache.pending import PendingFold
from wildcat_kv.cache.planning import mark_decided
from wildcat_kv.cache.rows import join_groups, replace_items
from wildcat_kv.cache.state import LayerState
from wildcat_kv.compressors.base import Compressed
from wildcat_kv.coreset.quantised import fits_half
from wildcat_kv.coreset.slot_facts import SlotFacts
from wildcat_kv.coreset.tensors import ordinary_tensors
from wildcat_kv.coreset.wtdattn import WeightSigns


@torch.no_grad()
def carry_out(state: LayerState, pending: PendingFold, found: Sequence[Compressed]) -> None:
    """Put what the method made of each group in the place of its items."""
    rows, plans, end, entries = pending.rows, pending.plans, pending.end, entries_of(state, pending)
    with ordinary_tensors():
        joined = join_groups(pending.groups, found, len(rows))
        slots = None if joined is None else Entries.of(joined.coreset, joined.carried_state, entries)
        columns = [0] * len(rows) if joined is None else joined.columns
        start, parts = replace_items(entries, rows, plans, slots, columns)
        parts.append(state.held.newest(state.progress.seen - end))
        after = [plan.apply(row, taken) for plan, row, taken in zip(plans, rows, columns, strict=True)]
        if _needs_bands(state, found):
            if pending.key_sum is not None:
                check_sums([state], [pending], [float(pending.key_sum)])
            facts = None if joined is None else joined.facts
            after = _rebuild(state, pending, [entries.slice(0, start), *parts], columns, after, facts)
        else:
            signs = _read_signs(state, pending, [entries.slice(0, start), *parts])
            if pending.moved:  # what is held before `start` is no longer what it should be
                state.plain.rewrite(0, [entries.slice(0, start), *parts], signs)
            else:
                state.plain.rewrite(start, parts, signs)
    state.folded_range = pending.folded_range
    if joined is not None and joined.error is not None:
        _note_error(state, joined.error, [plan.items > 0 for plan in plans])
    carried = fold_log(state, pending)
    after = [replace(row, carried=count) for row, count in zip(after, carried, strict=True)]
    state.progress.fold(after, end)
    state.span()
    mark_decided(state, state.progress.rows, end)


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
    dealt = [part for part in found if part.columns is not None]
    return not state.fixed and any(is_unequal(_counts(part)) for part in dealt)


def _counts(part: Compressed) -> Sequence[Sequence[int]]:
    """Count the valid slots of each row and head."""
    if part.facts is not None:
        return part.facts.counts
    counts: list[list[int]] = part.coreset.valid.sum(-1).tolist()
    return counts


def _rebuild(
    state: LayerState,
    pending: PendingFold,
    parts: Sequence[Entries],
    columns: Sequence[int],
    after: Sequence[Row],
    facts: SlotFacts | None,
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
        _check_range(state, whole)
    if state.compressor.reads_twice:  # the text that the second reading was about is compressed now
        whole = replace(whole, carried_state=whole.carried_state[..., :0])
    if state.progress.masked or any(plan.kept or plan.spare for plan in pending.plans):
        facts = None  # they do not tell of all slots, or some exact tokens are padding
    state.storage = storage = sort_into_bands(whole, lines, state.held, settings.bits, settings.group, facts)
    return [replace(row, spare=taken - row.slots) for row, taken in zip(after, storage.slots_of_rows, strict=True)]


def _read_signs(state: LayerState, pending: PendingFold, parts: Sequence[Entries]) -> WeightSigns:
    """Read the signs of the weights to hold, and whether the folded keys are finite, at once.

    Raises:
        ValueError: NaN or infinity among the keys.
    """
    weights, valid = weights_of(parts)
    if pending.key_sum is None:
        return WeightSigns.of(weights, valid)
    least, most, key_sum = torch.stack((*WeightSigns.bounds(weights, valid), pending.key_sum)).tolist()
    check_sums([state], [pending], [key_sum])
    return WeightSigns.within(least, most)


def check_sums(states: Sequence[LayerState], pending: Sequence[PendingFold], sums: Sequence[float]) -> None:
    """Refuse the keys of folds whose `key_sum`, as read, is not finite.

    Raises:
        ValueError: NaN or infinity among the keys; names the layer.
    """
    for state, each, key_sum in zip(states, pending, sums, strict=True):
        if not math.isfinite(key_sum):  # or finite keys with a large sum
            state.check_finite(entries_of(state, each).keys)
        state.checked, each.key_sum = each.end, None


def _check_range(state: LayerState, entries: Entries) -> None:
    """Refuse keys that cannot be quantised.

    Raises:
        ValueError: names the layer.
    """
    if not fits_half(entries.keys):
        raise ValueError(
            f"layer {state.index}: keys beyond 65504, too large for bits={state.settings.bits}; "
            "leave bits out for this model"
        )


def _note_error(state: LayerState, error: Tensor, folding: list[bool]) -> None:
    """Keep the error estimate of the rows that fold now.

    The estimate of the others is still the one of their last fold.
    """
    if state.error is not None and not all(folding):
        there = torch.tensor(folding).to(error.device).unsqueeze(-1)
        error = torch.where(there, error, state.error.to(error.device))
    state.error = error


def fold_log(state: LayerState, pending: PendingFold) -> list[int]:
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
