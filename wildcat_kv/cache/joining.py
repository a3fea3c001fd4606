"""Join caches that have read parts of a text apart: parallel context windows.

Source: Ratner et al., "Parallel Context Windows for Large Language Models", arXiv 2212.10947. Every part was read from
position 0 on; what is read next sees all of them and continues the positions of the last.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from wildcat_kv.cache.bands import BandedStorage
from wildcat_kv.cache.budget import Row
from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.cache.progress import Progress
from wildcat_kv.cache.refilling import hold_in_bands
from wildcat_kv.cache.state import LayerState
from wildcat_kv.cache.value_range import ValueRange
from wildcat_kv.compressors.describe import describe
from wildcat_kv.config import WildCatConfig


def join_caches(caches: Sequence[CompressedCache], settings: WildCatConfig | None = None) -> CompressedCache:
    """Join several caches in one that holds what they hold.

    Quantised slots are quantised anew, in groups of the joined cache. Sliding-window layers go on from the last part
    alone, as they would after the whole text.

    Args:
        caches: caches of one model, method and batch size, without padding, none of them static. Each has read
            something; they stay as they are.
        settings: settings of the joined cache, without `min_tokens`; the last one's by default.

    Returns:
        A cache that has seen as many tokens as the last part. Nothing that was read can be taken back.

    Raises:
        ValueError: no caches, or caches that do not fit together.

    Example:
        parts = [WildCatCache(model.config, ratio=0.25) for _ in passages]
        for part, ids in zip(parts, passages):
            model(ids, cache=part)
        cache = join_caches(parts)
    """
    caches = list(caches)
    _check(caches, settings)
    last = caches[-1]
    joined = last.fresh(settings)
    for index, layer in enumerate(joined.layers):
        if not isinstance(layer, WildCatLayer):
            joined.layers[index] = copy.deepcopy(last.layers[index])
            continue
        states = [cache.layers[index].state for cache in caches]
        row, log = _row(states, bounded=joined.settings.ratio is None), states[-1].log
        progress = Progress(
            rows=[row] * len(states[-1].progress.rows),
            seen=row.seen,
            folded_at=row.seen,
            settled=row.seen,
            scale=states[-1].progress.scale,
            spare=row.spare,
        )
        entries = _entries(states, row.sink)
        carried = log.carried if log is not None and row.carried else None
        layer.restore(progress, entries, entries.keys.shape[2], _span(states), carried)
        quantised = layer.state.settings.bits is not None
        if quantised or any(isinstance(state.storage, BandedStorage) for state in states):
            hold_in_bands(layer.state)
    joined.go_on_from(last)
    return joined


def _row(states: Sequence[LayerState], *, bounded: bool) -> Row:
    """Count what a row of one layer holds once joined.

    The last part counts as it is; the others count as slots beside it.
    """
    parts = [state.count_rows(state.progress.seen)[0] for state in states]
    last, others = parts[-1], parts[:-1]
    if not last.seen_at_fold:  # all of it is exact: its first tokens are the sink of what follows
        sink = min(states[-1].settings.sink, last.exact)
        last = replace(last, sink=sink, exact=last.exact - sink)
    if states[-1].progress.since_fold:  # its queries are not those of a fold
        last = replace(last, carried=0)
    if bounded:
        slots, spare = sum(row.counted for row in others), sum(row.spare for row in others)
    else:  # a ratio counts the last part's tokens alone
        slots, spare = 0, sum(row.stored for row in others)
    return replace(last, slots=last.slots + slots, spare=last.spare + spare, seen_at_fold=last.seen)


def _entries(states: Sequence[LayerState], sink: int) -> Entries:
    """Put all entries in the order of a joined row.

    They are the last part's sink, the other parts, and the rest of the last part.
    """
    *others, last = (state.entries for state in states)
    parts = [last.slice(0, sink), *others, last.slice(sink, last.keys.shape[2])]
    return Entries(*(torch.cat(tensors, dim=2) for tensors in zip(*(part.tensors() for part in parts), strict=True)))


def _span(states: Sequence[LayerState]) -> ValueRange:
    """Join the boxes around all values read."""
    boxes = [state.value_range or ValueRange.of(state.entries.values) for state in states]
    return functools.reduce(ValueRange.join, boxes)


def _check(caches: Sequence[CompressedCache], settings: WildCatConfig | None) -> None:
    """Refuse what cannot be joined."""
    if strangers := [type(cache).__name__ for cache in caches if not isinstance(cache, CompressedCache)]:
        raise TypeError(f"caches: {strangers[0]} is no compressed cache; give those that have read the parts")
    if settings is not None and not isinstance(settings, WildCatConfig):
        raise TypeError(f"settings={settings!r} is no WildCatConfig; give one, or leave it out")
    if not caches:
        raise ValueError("caches=[]: there is nothing to join; give at least one")
    last = caches[-1]
    if len(caches) > 1 and (floor := (settings or last.settings).min_tokens):
        raise ValueError(
            f"settings.min_tokens={floor}: joined caches count as one text, and what follows them keeps a share; pass "
            "settings=caches[-1].settings.changed(min_tokens=0)"
        )
    for number, cache in enumerate(caches):
        cache.check_in_step()
        if fault := _fault(cache, last) or (unjoinable(cache) if len(caches) > 1 else None):
            raise ValueError(
                f"caches[{number}] {fault}; join caches of one model and method that read their parts alike"
            )


def _fault(cache: CompressedCache, last: CompressedCache) -> str | None:
    """Say what keeps a cache from joining the last one; None for nothing."""
    if cache.static:
        return "is static"
    if not cache.get_seq_length():
        return "has read nothing"
    if difference := cache.model.difference(last.model):
        return f"is of another model: {difference}"
    if describe(cache.compressor) != describe(last.compressor):
        return f"compresses by {cache.compressor}, and the last one by {last.compressor}"
    if cache.exact_layers != last.exact_layers:
        return f"leaves layers {sorted(cache.exact_layers)} exact, and the last one {sorted(last.exact_layers)}"
    ours, theirs = ([layer.state for layer in each.layers if isinstance(layer, WildCatLayer)] for each in (cache, last))
    if len(ours[0].progress.rows) != len(theirs[0].progress.rows):
        return f"has {len(ours[0].progress.rows)} rows, and the last one {len(theirs[0].progress.rows)}"
    seen = ours[0].progress.seen
    return "holds padding" if any(row.seen < seen for row in ours[0].count_rows(seen)) else None


def unjoinable(cache: CompressedCache) -> str | None:
    """Say what keeps a model's caches from being joined; None for nothing.

    The words follow "the cache".
    """
    kinds = [type(layer).__name__ for layer in cache.layers if hasattr(layer, "conv_states")]
    return f"has layers whose states cannot be joined ({kinds[0]})" if kinds else None
