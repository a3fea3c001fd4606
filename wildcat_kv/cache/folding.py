"""A fold: plan (`planning`) -> blocks (`blocks`) -> coresets (here) -> storage (`refilling`).

These are functions of a layer's state.

`fold_due` folds one layer by itself; `survey_due` and `fold_together` fold the layers of a `SharingCompressor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from wildcat_kv.cache.bands import BandedStorage
from wildcat_kv.cache.blocks import block_of, prepare
from wildcat_kv.cache.pending import PendingFold
from wildcat_kv.cache.planning import next_fold
from wildcat_kv.cache.refilling import carry_out, check_sums, fold_log, trim_queries
from wildcat_kv.cache.rows import common_groups, take_rows
from wildcat_kv.cache.state import LayerState
from wildcat_kv.compressors.base import Compressed, KVBlock, SharingCompressor
from wildcat_kv.coreset.tensors import ordinary_tensors


def fold_due(state: LayerState, until: int) -> None:
    """Fold what is due at the ends of forward passes.

    The ends up to column `until` come one after the other, each folded as of then.

    Raises:
        ValueError: NaN or infinity among the keys to fold; what was not yet folded stays as it is.
    """
    while (due := next_fold(state, until)) is not None:
        pending, found, method = prepare(state, *due), [], state.compressor
        for group in pending.groups:
            with torch.no_grad(), ordinary_tensors():
                block = block_of(state, pending, group)
                made = block.keep_items() if group.packs else method.compress(block, group.rank)
            found.append(_checked(made, block, group.rank, type(method).__name__))
        carry_out(state, pending, found)
    trim_queries(state)


@torch.no_grad()
def survey_due(state: LayerState, until: int) -> bool:
    """Survey the next fold up to column `until`, for `fold_together`.

    Returns False if there is none.

    Raises:
        ValueError: NaN or infinity among the keys to fold.
    """
    if state.pending is None and (due := next_fold(state, until)) is not None:
        assert isinstance(state.compressor, SharingCompressor)
        pending = prepare(state, *due)
        for group in pending.groups:
            with ordinary_tensors():
                surveyed = None if group.packs else state.compressor.survey(block_of(state, pending, group))
                pending.surveys.append(surveyed)
        fold_log(state, pending)
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
        _check_keys(states, pending)
        dealt = _deal(compressor, pending)
        for place, (state, each) in enumerate(zip(states, pending, strict=True)):
            found = []
            for group, shares in zip(each.groups, dealt, strict=True):
                with ordinary_tensors():
                    block, rank = block_of(state, each, group), group.rank
                    made = block.keep_items() if group.packs else compressor.compress_share(block, rank, shares[place])
                found.append(_checked(made, block, group.rank, type(compressor).__name__))
            state.pending = None
            carry_out(state, each, found)
    for state in states:
        trim_queries(state)


def will_fold(state: LayerState, until: int) -> bool:
    """Tell whether `fold_due` would fold anything.

    Ends that fold nothing are decided on the way.
    """
    return next_fold(state, until) is not None


def _check_keys(states: Sequence[LayerState], pending: Sequence[PendingFold]) -> None:
    """Read at once whether the keys of all layers are finite, where that is still open.

    Raises:
        ValueError: NaN or infinity among the keys; names the layer.
    """
    open_ = [(state, each, each.key_sum) for state, each in zip(states, pending, strict=True)]
    open_ = [one for one in open_ if one[2] is not None]
    if open_:
        owners, folds, sums = zip(*open_, strict=True)
        check_sums(owners, folds, torch.stack([each.to(sums[0].device) for each in sums]).tolist())


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
            dealt.append([None] * len(surveys) if group.packs else compressor.deal(surveys, group.rank))
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
    return found if found.columns is None else replace(found, columns=columns)
