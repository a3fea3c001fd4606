"""One forward pass over all layers: announcement, mask and folds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.cache.byte_budget import ByteBudget, Shape
from wildcat_kv.cache.folding import fold_due, fold_together, survey_due, will_fold
from wildcat_kv.cache.positions import RopeDeltas
from wildcat_kv.cache.rereading import rereading_fault
from wildcat_kv.cache.state import LayerState
from wildcat_kv.compressors import Compressor
from wildcat_kv.config import WildCatConfig
from wildcat_kv.coreset.launching import is_launched
from wildcat_kv.hook.marks import NAME, Forward


@dataclass
class PassState:
    """State that all layers of one cache share.

    Layers hold this and not the cache. Without a reference cycle, a deleted cache frees its memory at once.

    Attributes:
        settings: budget and exact ends.
        compressor: method.
        positions: number of positions of the model; None if unknown.
        forward: forward pass under way, or the last one; None before the first.
        waiting: index of the layer whose keys have not reached the attention function yet.
        compressed: True once any layer has folded, or will fold in this forward pass.
        padded: True if any token held is padding; None if unknown.
        begun: True while uncompressed layers have read tokens that compressed ones have not.
        states: contents of each layer, by its index.
        exact_layers: indices of layers that never fold.
        rotation_limit: tokens that the method's rotations hold for; None for any number.
        warned: True once the user was told that the text is longer than the model's positions.
        rope: positions that the model would keep on itself.
        byte_budget: budget in bytes, to settle the settings by at the first tokens; None for another budget.
    """

    settings: WildCatConfig
    compressor: Compressor
    positions: int | None
    forward: Forward | None = None
    waiting: int | None = None
    compressed: bool = False
    padded: bool | None = False
    warned: bool = False
    begun: bool = False
    states: dict[int, LayerState] = field(default_factory=dict)
    exact_layers: frozenset[int] = frozenset()
    rotation_limit: int | None = None
    rope: RopeDeltas = field(default_factory=RopeDeltas)
    byte_budget: ByteBudget | None = None

    @property
    def folding(self) -> dict[int, LayerState]:
        """Contents of the layers that fold, by index.

        All of them fold at the same time.
        """
        return {index: state for index, state in self.states.items() if index not in self.exact_layers}

    @property
    def leading(self) -> int:
        """Index of the first layer that folds."""
        return next(index for index in self.states if index not in self.exact_layers)

    @property
    def trailing(self) -> int:
        """Index of the last layer that folds.

        Once it has read as many tokens as another one, all layers have.
        """
        return next(index for index in reversed(self.states) if index not in self.exact_layers)

    @property
    def leader(self) -> LayerState:
        """Contents of the first layer that folds."""
        return self.states[self.leading]

    def reset(self) -> None:
        """Go back to before the first forward pass."""
        self.forward = self.waiting = None
        self.compressed = self.padded = self.warned = self.begun = False
        self.rope = RopeDeltas()
        if self.byte_budget is not None:
            self.settings = self.byte_budget.settings

    def settle_bytes(self, keys: Tensor, values: Tensor) -> None:
        """Turn a budget in bytes into entries, once the first keys and values (rows, kv_heads, n, channels) are here.

        Raises:
            ValueError: too few bytes for this batch.
        """
        if self.byte_budget is not None and self.settings.max_bytes is not None:
            self.settings = self.byte_budget.settle(Shape.of(keys, values))
            for state in self.states.values():
                state.settings = self.settings

    def take(self, settings: WildCatConfig) -> None:
        """Take other settings before the first forward pass.

        Raises:
            ValueError: a budget in bytes, where the cache was made with another kind.
        """
        if settings.max_bytes is None:
            self.byte_budget = None
        elif self.byte_budget is None:
            raise ValueError(f"max_bytes={settings.max_bytes}: this cache was made without; make a new one")
        else:
            self.byte_budget = replace(self.byte_budget, settings=settings)
        self.settings = settings

    def note_linear(self, index: int) -> None:
        """Note that a linear layer has read; its own state does not show it."""
        self.begun = self.begun or index < min(self.states)

    def folds_first(self, seen: int) -> bool:
        """Tell if the next `update` of a recording cache folds before it reads.

        Such a fold keeps the cache bounded while it records.
        """
        return will_fold(self.leader, beyond_rollback(self, seen))


def beyond_rollback(shared: PassState, seen: int) -> int:
    """Return the column that no later `crop` can reach back beyond."""
    return seen - shared.settings.window


def announce(
    shared: PassState,
    state: LayerState,
    seen: int,
    rows: int,
    queries: int,
    mask: Tensor | None,
    *,
    causal: bool,
    served: Forward | None,
    weighted: bool = False,
) -> Forward:
    """Begin a forward pass, for all layers of the cache.

    Args:
        shared: state of the cache's passes.
        state: contents of the layer that leads to the cache.
        seen: tokens read before.
        rows: rows of the batch.
        queries: new tokens.
        mask: bool (rows, seen + queries), False for padding, or None.
        causal: True if no new token sees later ones.
        served: last forward pass that this layer took part in.
        weighted: True if the pass attends by weights anyway, so that padding needs no mask.

    Raises:
        ValueError: another batch size than before, a mask that contradicts the folded tokens, a text longer than the
            method's rotations hold for, or a compressed cache with tokens that see later ones. Nothing has changed
            then.
    """
    _check_call(shared, state, seen, rows, queries, mask, causal=causal)
    shared.rope.begin(seen, rows)
    relabelled = False
    if mask is None:
        if not weighted and not shared.compressed:  # weighted attention knows what is padding
            _check_unpadded(shared, state)
    elif queries > 1:  # reading the mask would stall the path of one token
        relabelled = _read_mask(shared, seen, queries, mask)
    else:
        shared.padded = shared.padded or None
    if shared.positions is not None and seen + queries > shared.positions and not shared.warned:
        _warn_of_length(shared, seen + queries)
    if state.progress.record_past and shared.folds_first(seen):
        shared.compressed = True  # every layer folds in its `update`, too late to change the mask
    before = shared.forward
    if before is not None and before is not served and before.seen == seen:  # generate() may ask for a mask twice
        relabelled = relabelled or before.relabelled
    forward = shared.forward = Forward(seen, queries, mask, not shared.compressed, relabelled)
    return forward


def _check_call(
    shared: PassState, state: LayerState, seen: int, rows: int, queries: int, mask: Tensor | None, *, causal: bool
) -> None:
    """Refuse a forward pass that cannot be served, before anything changes."""
    if (held := len(state.progress.rows)) not in (0, rows):
        raise ValueError(
            f"the batch has {rows} rows and the cache holds {held}; call "
            "cache.batch_repeat_interleave(n) to ask several questions of one context"
        )
    if not queries:
        raise ValueError(
            f"there are no new tokens: the cache has read {seen}, and the prompt has no more; pass generate() the "
            "whole text with at least one token more, or call cache.reset() to read a text anew"
        )
    if mask is not None and mask.shape[0] != rows:
        raise ValueError(f"attention_mask has {mask.shape[0]} rows and the batch {rows}; pass a row for each")
    if shared.rotation_limit is not None and seen + queries > shared.rotation_limit:
        raise ValueError(
            f"the text is {seen + queries} tokens long: beyond {shared.rotation_limit} this model rotates by other "
            f"frequencies, which {type(shared.compressor).__name__} does not follow; use a shorter text, or a "
            "method that needs no positions, such as snapkv"
        )
    if not causal and (shared.compressed or (state.progress.record_past and shared.folds_first(seen))):
        raise ValueError(
            "mask_function shows later tokens to earlier ones (those of an image, for example), and the cache is "
            "compressed already: call cache.reset() and read the whole prompt, images included, in its first "
            "forward pass"
        )


def _check_unpadded(shared: PassState, state: LayerState) -> None:
    """Refuse a missing mask if the cache holds padding.

    An exact forward pass would attend to the padding.
    """
    storage = state.storage
    if storage is None:
        shared.padded = False
        return
    if shared.padded is None:
        shared.padded = not bool(storage.entries.valid.all())
    if shared.padded:
        raise ValueError("attention_mask=None, but earlier tokens were padding; pass the mask of all tokens so far")


def _read_mask(shared: PassState, seen: int, queries: int, mask: Tensor) -> bool:
    """Learn the padding from the mask.

    Returns:
        True if the mask changes the padding among the tokens since the last fold; these can still change.

    Raises:
        ValueError: the mask hides folded tokens, or shows padding that a fold has dropped.
    """
    progress, storage = shared.leader.progress, shared.leader.storage
    relabelled = False
    if storage is not None:
        earlier = mask[:, : mask.shape[-1] - queries]
        shown, folded = earlier[:, : progress.folded_at].sum(-1).tolist(), [row.seen for row in progress.rows]
        if progress.folded_at and shown != folded:
            raise ValueError(
                f"attention_mask shows {shown} of the first {progress.folded_at} tokens of each row, and {folded} were "
                "shown when these were folded; what is folded cannot be masked later, call cache.reset() for another "
                "text"
            )
        held = storage.newest(progress.since_fold).valid[:, 0]
        relabelled = not torch.equal(earlier[:, progress.folded_at :].to(held.device), held)
    shared.padded = not bool(mask.all())
    if relabelled:  # tell all layers now, before any of them plans a fold
        for state in shared.states.values():
            state.show(mask[:, state.progress.folded_at : seen])
    return relabelled


def _warn_of_length(shared: PassState, length: int) -> None:
    """Warn, once, of a text longer than the model's positions."""
    shared.warned = True
    warnings.warn(
        f"the text is {length} tokens long and the model has {shared.positions} positions "
        "(max_position_embeddings): answers will degrade; shorten the prompt or use a longer model",
        stacklevel=3,
    )


def check_update(shared: PassState, index: int, served: Forward | None, keys: Tensor, values: Tensor) -> Forward:
    """Find the forward pass that new keys and values belong to.

    Args:
        shared: state of the cache's passes.
        index: index of the layer.
        served: last forward pass that this layer took part in.
        keys: (rows, kv_heads, q, d).
        values: (rows, kv_heads, q, d_v).

    Raises:
        RuntimeError: the keys did not come through the "wildcat" attention, or an earlier pass failed half-way.
        ValueError: shapes or dtypes do not fit, or on a CPU the keys of a prompt have NaN or infinity.
    """
    forward, state = shared.forward, shared.states[index]
    if forward is None or forward is served or shared.waiting is not None or forward.seen != state.progress.seen:
        raise RuntimeError(_out_of_step(shared, index, served))
    if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] != forward.queries:
        raise ValueError(
            f"layer {index}: key_states {tuple(keys.shape)} and value_states {tuple(values.shape)} must be "
            f"(rows, kv_heads, {forward.queries} new tokens, channels), alike but for the channels"
        )
    if state.storage is not None:
        held = state.storage.allocated
        for name, new, old in (("key_states", keys, held.keys), ("value_states", values, held.values)):
            shape, known = new.shape, old.shape
            if shape[:2] != known[:2] or shape[3] != known[3] or new.dtype != old.dtype:
                raise ValueError(
                    f"layer {index}: {name} {tuple(shape)} in {new.dtype} have other rows, heads, "
                    f"channels or another dtype than the {tuple(known)} in {old.dtype} held; call "
                    "cache.reset(), or build a cache for this model"
                )
    # On a device keys are checked when they fold, as a single token always is: reading them now would stall it.
    if forward.queries > 1 and not is_launched(keys.device):
        state.check_finite(keys)
    return forward


def _out_of_step(shared: PassState, index: int, served: Forward | None) -> str:
    """Say why keys came that no forward pass announced."""
    forward = shared.forward
    if forward is None or forward is served:
        return (
            f"layer {index}: these keys did not come through the '{NAME}' attention. Build the cache from "
            "the model's own config, WildCatCache(model.config, ...), keep its attention implementation as it is "
            "then, and pass a 2D attention mask"
        )
    if shared.waiting is not None:
        return (
            f"layer {shared.waiting}: its keys never reached the '{NAME}' attention. Either the forward pass "
            "failed, then call cache.reset(); or this model attends in a way of its own, then use DynamicCache"
        )
    return (
        f"layer {index} has seen {shared.states[index].progress.seen} tokens and others {forward.seen}: an earlier "
        "forward pass failed half-way; call cache.reset() and read the text again"
    )


def check_reading(shared: PassState, index: int, query: Tensor, config: Any, options: dict[str, Any]) -> None:
    """Refuse new tokens that the cache has read before.

    Only the first layer checks, for all of them.

    Args:
        shared: state of the cache's passes.
        index: index of the layer.
        query: queries of the newest tokens, (rows, heads, q, d).
        config: config of the decoder.
        options: keyword arguments of the attention call.

    Raises:
        ValueError: the tokens were read before, see `rereading_fault`. The layer is left as it was before the pass.
    """
    queries, forward = query.shape[2], shared.forward
    assert forward is not None
    if index != next(iter(shared.states)) or not forward.seen:
        return
    state = shared.states[index]
    before = [row.seen for row in state.count_rows(forward.seen)]
    if fault := rereading_fault(options, config, queries, before, forward.new_valid(query.device)):
        state.observe(query)
        state.keep_queries()
        state.take_back(queries)
        shared.forward = shared.waiting = None
        raise ValueError(fault)


def fold_layer(shared: PassState, index: int, until: int) -> None:
    """Fold the columns before `until`, if that is due.

    If layers fold together, the last one folds them all, and the others prepare.
    """
    state = shared.states[index]
    try:
        if not state.compressor.waits:  # the layer's own method: one that keeps everything waits for none
            fold_due(state, until)
        elif shared.states[shared.trailing].progress.seen != state.progress.seen:
            survey_due(state, until)
        else:
            fold_together(list(shared.folding.values()), until)
    finally:  # an earlier one of several folds may have been done
        shared.compressed = shared.compressed or state.folded_range is not None
