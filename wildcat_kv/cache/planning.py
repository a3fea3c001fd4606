"""When a layer folds, and what: the plan of its next fold."""

from __future__ import annotations

from collections.abc import Sequence

from wildcat_kv.cache.budget import FoldPlan, Row, plan_fold, tokens_until_fold
from wildcat_kv.cache.byte_budget import Shape
from wildcat_kv.cache.state import LayerState


def next_fold(state: LayerState, until: int) -> tuple[list[Row], list[FoldPlan], int] | None:
    """Find the rows, the plans and the column of the next fold.

    It is up to column `until`; None if there is none.

    Ends of forward passes that fold nothing are decided on the way.
    """
    while (end := state.progress.due(until)) is not None:
        rows = state.count_rows(end)
        if plans := _plan(state, rows, end):
            return rows, plans, end
        mark_decided(state, rows, end)
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
        plan_fold(row, settings, prefill=prompt, slot_cost=_slot_cost(state)) if prompt or decodes else None
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    too_wide = settings.max_tokens is not None and _counted_at(state, end) > settings.max_tokens
    if not any(plans) and not too_wide:
        return None
    return [plan or FoldPlan.nothing(row) for plan, row in zip(plans, rows, strict=True)]


def _counted_at(state: LayerState, column: int) -> int:
    """Count columns held at `column` as the budget does: alike in all layers."""
    return state.stored_at(column) - state.progress.spare


def mark_decided(state: LayerState, rows: Sequence[Row], end: int) -> None:
    """Note that the first end, `end`, is decided, and when to look again."""
    settings, cost = state.settings, _slot_cost(state)
    again = [row for row in rows if state.compressor.decodes or not row.seen]
    waits = [wait for row in again if (wait := tokens_until_fold(row, settings, cost)) is not None]
    if settings.max_tokens is not None:  # columns of padding take room as well
        waits.append(max(1, settings.max_tokens + 1 - _counted_at(state, end)))
    state.progress.mark_decided(min(waits) if waits else None)


def _slot_cost(state: LayerState) -> float:
    """Give the bytes of a quantised slot over those of an entry in the dtype of the model."""
    held = state.held.allocated
    return Shape.of(held.keys, held.values).slot_cost(state.settings, state.compressor)
