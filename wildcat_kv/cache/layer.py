"""One layer of the cache, as Transformers and the "wildcat" attention see it; what it holds is in `state.py`."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from wildcat_kv.cache.folding import fold_due, fold_together, survey_due, will_fold
from wildcat_kv.cache.positions import RopeDeltas
from wildcat_kv.cache.progress import Progress
from wildcat_kv.cache.rereading import rereading
from wildcat_kv.cache.state import LayerState
from wildcat_kv.cache.storage import Entries
from wildcat_kv.cache.value_range import ValueRange
from wildcat_kv.compressors import Compressor, Everything
from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.config import WildCatConfig
from wildcat_kv.coreset.wtdattn import coreset_attention
from wildcat_kv.hook.marks import NAME, Forward, MarkedLength, mark


@dataclass
class Shared:
    """What the layers of one cache have in common. They hold this and not the cache: without a reference
    cycle, a deleted cache gives its memory back at once.

    Attributes:
        settings: the budget.
        compressor: the method.
        positions: tokens that the model has positions for, None if unknown.
        forward: the forward pass under way or the last one, None before the first.
        waiting: the layer whose keys have not reached the attention function yet.
        compressed: whether any layer has folded, or is about to in this forward pass.
        padded: whether any token held is padding; None for unknown.
        begun: whether layers of Transformers' have read tokens that ours have not come to yet.
        states: what each layer holds, by its index.
        exact_layers: indices of layers that never fold.
        rotation_limit: tokens that the method's rotations hold for, None for any number.
        warned: whether the user knows that the text is longer than the model's positions.
        rope: positions that the model would keep on itself.
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

    @property
    def leading(self) -> int:
        """The first layer that folds: all that do, do so at the same time."""
        return next(index for index in self.states if index not in self.exact_layers)

    @property
    def trailing(self) -> int:
        """The last layer that folds: when it has read what another has, all have."""
        return next(index for index in reversed(self.states) if index not in self.exact_layers)

    @property
    def leader(self) -> LayerState:
        """What it holds."""
        return self.states[self.leading]

    def reset(self) -> None:
        """Back to before the first forward pass."""
        self.forward = self.waiting = None
        self.compressed = self.padded = self.warned = self.begun = False
        self.rope = RopeDeltas()


class WildCatLayer(CacheLayerMixin):
    """One full-attention layer: a coreset of the past, and the newest tokens as they are."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = True
    fixed = False

    def __init__(
        self, shared: Shared, index: int, place: int, sharing: Sequence[int], rotation: Rotation | None = None
    ) -> None:
        super().__init__()
        self._shared = shared
        self._index = index
        self._place = place
        self._sharing = sharing
        self._rotation = rotation
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        shared, settings, compressor = self._shared, self._shared.settings, self._shared.compressor
        if self._index in shared.exact_layers:
            settings, compressor = settings.model_copy(update={"ratio": 1.0}), Everything()
        self._state = LayerState(
            settings,
            compressor,
            self._index,
            self._place,
            self._sharing,
            self._rotation,
            fixed=self.fixed,
        )
        self._shared.states[self._index] = self._state
        self._offloading = False
        self._arrival: Any = None  # of a copy to the device, on another stream
        self._forward: Forward | None = None  # the last one that was served

    @property
    def state(self) -> LayerState:
        """What the layer holds."""
        return self._state

    # What Transformers calls

    @property
    def keys(self) -> Tensor | None:
        """What is stored, (rows, kv_heads, stored, d): pivots, then exact tokens; None when empty."""
        storage = self.state.storage
        return None if storage is None else storage.entries.keys

    @keys.setter
    def keys(self, keys: None) -> None:
        """The base class begins with None."""

    @property
    def values(self) -> Tensor | None:
        """What is stored, (rows, kv_heads, stored, d_v): numerators over masses, then exact values; None when empty."""
        storage = self.state.storage
        return None if storage is None else storage.entries.values

    @values.setter
    def values(self, values: None) -> None:
        """The base class begins with None."""

    @property
    def record_past(self) -> bool:
        """Whether folds wait for `crop`, so that tokens can be taken back."""
        return self._state.progress.record_past

    @record_past.setter
    def record_past(self, record: bool) -> None:
        self._state.progress.record_past = record

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values of these shapes; called by the first `update`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._state.allocate(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append exact tokens and return what this forward pass attends to.

        Args:
            key_states: (rows, kv_heads, q, d), rotated.
            value_states: (rows, kv_heads, q, d_v).
            *args: ignored.
            **kwargs: ignored.

        Returns:
            Views of all stored keys and values; they lead the "wildcat" attention to this layer.

        Raises:
            RuntimeError: the forward pass did not come through the "wildcat" attention.
            ValueError: shapes or a dtype that do not fit, another batch size than before, or NaN or infinity
                in the keys of a prompt. The layer is left as it was.
        """
        forward = self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._bring_to(key_states.device)
        if forward.relabelled:
            self._state.span()
        if self.record_past and will_fold(self._state, self._beyond_rollback()) and not forward.exact:
            self._settle(self._beyond_rollback())
        self._state.append(key_states, value_states, forward.new_valid(key_states.device))
        self._forward, self._shared.waiting, self._shared.begun = forward, self._index, False
        assert self._state.storage is not None
        keys, values = self._state.storage.view()
        return mark(keys, self), mark(values, self)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: positions continue from it. What is stored is `stored`."""
        return self._state.progress.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for the mask function; the length leads it to the cache."""
        return MarkedLength(self.get_seq_length() + query_length, self), 0

    def get_max_length(self) -> int:
        """-1: any number of tokens can be read."""
        return -1

    def reset(self) -> None:
        """Forget everything, as if new."""
        self._clear()
        self._shared.reset()

    def activate_past_recording(self) -> None:
        """Fold nothing until `crop`, so that tokens read from now on can be taken back.

        Several forward passes may come before it: what the window's length rules out from being taken back
        is folded all the same, so that the layer stays bounded.
        """
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back, as if they had never been read; then fold what waited for this.

        Args:
            tokens_to_remove: minus the number of columns to take back; 0 to take none.

        Raises:
            ValueError: a positive number, or tokens that are folded already. The layer is left as it was.
        """
        tokens_to_remove = operator.index(tokens_to_remove)
        self.check_crop(tokens_to_remove)
        if not self.is_initialized:
            return
        self._bring_to(self.device)
        if tokens_to_remove:
            self._shared.padded = self._shared.padded and None
            if -tokens_to_remove == self.get_seq_length():  # of this text, nothing is left
                record_past = self.record_past
                self._clear()
                self.record_past = record_past
                return
            self._state.take_back(-tokens_to_remove)
        self._settle(self.get_seq_length())
        self._rest()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what `crop` cannot do.

        Raises:
            ValueError: see `crop`.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove} must be negative: minus the number of tokens to take back"
            )
        exact, seen = self._state.croppable, self.get_seq_length()
        if -tokens_to_remove == seen == self._state.progress.since_fold:  # of nothing, nothing need be at hand
            return
        if -tokens_to_remove > seen:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: the cache has read {seen} tokens; reset() forgets them all"
            )
        if -tokens_to_remove > exact:
            window = self._shared.settings.window
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: the last {exact} tokens can be taken back, those before them "
                "are folded, or queries that the method needs then are gone; call cache.activate_past_recording() "
                f"before they are read, and enlarge the window, window={max(window, -tokens_to_remove)}, where several "
                "forward passes come before a crop"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; int64 (k,), rows may be left out or repeated."""
        self.select_rows(beam_idx, None if self._state.alike else beam_idx.tolist())

    def select_rows(self, index: Tensor, on_host: list[int] | None) -> None:
        """The same, where the indices have been read already; see `LayerState.select_rows`."""
        if not self.is_initialized:
            return
        self._bring_to(self.device)
        self._state.select_rows(index, on_host)
        self._rest()

    def offload(self) -> None:
        """Keep keys and values on the CPU between forward passes; from the end of this one's attention on."""
        self._offloading = self.is_initialized

    def prefetch(self) -> None:
        """Bring keys and values back to the layer's device ahead of time, on the stream that is current."""
        if self.is_initialized:
            self._bring_to(self.device)
            if self.device.type == "cuda":
                self._arrival = torch.cuda.current_stream(self.device).record_event()

    # What the "wildcat" attention and mask functions call

    def announce(self, rows: int, queries: int, mask: Tensor | None, *, causal: bool = True) -> Forward:
        """Take note, for all layers of the cache, that a forward pass has begun.

        Args:
            rows: of the batch.
            queries: new tokens.
            mask: bool (rows, seen + queries), False for padding, or None.
            causal: whether no new token sees later ones.

        Raises:
            ValueError: another batch size than before, a mask that contradicts what is folded, a text longer than the
                method's rotations hold for, or tokens that see later ones where the cache is compressed. Nothing has
                changed then.
        """
        shared, seen = self._shared, self.get_seq_length()
        if self.batch_rows not in (0, rows):
            raise ValueError(
                f"the batch has {rows} rows and the cache holds {self.batch_rows}; call "
                "cache.batch_repeat_interleave(n) to ask several questions of one context"
            )
        if not queries:
            raise ValueError(
                f"there are no new tokens: the cache has read {seen}, and the prompt has no more; pass generate() the "
                "whole text with at least one token more, or call cache.reset() to read a text anew"
            )
        if mask is not None and mask.shape[0] != rows:
            raise ValueError(f"attention_mask has {mask.shape[0]} rows and the batch {rows}; pass a row for each")
        self._check_rotations(seen + queries)
        if not causal and (shared.compressed or self._folds_first):
            raise ValueError(
                "mask_function shows later tokens to earlier ones (those of an image, for example), and the cache is "
                "compressed already: call cache.reset() and read the whole prompt, images included, in its first "
                "forward pass"
            )
        shared.rope.begin(seen, rows)
        relabelled = False
        if mask is None:
            self._check_unpadded(queries)
        elif queries > 1:  # reading the mask would stall the path of one token
            relabelled = self._check_mask(queries, mask)
            shared.padded = not bool(mask.all())
            if relabelled:  # all layers at once, before any of them decides what to fold
                for state in shared.states.values():
                    state.show(mask[:, state.progress.folded_at : seen])
        else:
            shared.padded = shared.padded or None
        if shared.positions is not None and seen + queries > shared.positions and not shared.warned:
            warnings.warn(
                f"the text is {seen + queries} tokens long and the model has {shared.positions} positions "
                "(max_position_embeddings): answers will degrade; shorten the prompt or use a longer model",
                stacklevel=2,
            )
            shared.warned = True
        if self._folds_first:
            shared.compressed = True  # every layer folds in its `update`, too late to change the mask
        before = shared.forward  # generate() may ask for the mask of a forward pass twice
        if before is not None and before is not self._forward and before.seen == seen:
            relabelled = relabelled or before.relabelled
        shared.forward = Forward(seen, queries, mask, exact=not shared.compressed, relabelled=relabelled)
        return shared.forward

    def check_reading(self, query: Tensor, config: Any, options: dict[str, Any]) -> None:
        """Refuse new tokens that the cache has read before; the first layer answers for all.

        Args:
            query: (rows, heads, q, d), of the newest tokens.
            config: the decoder's config.
            options: keyword arguments of the attention call.

        Raises:
            ValueError: see `rereading`. The layer is left as it was before the pass.
        """
        queries, forward = query.shape[2], self._shared.forward
        assert forward is not None
        if self._index != next(iter(self._shared.states)) or not forward.seen:
            return
        before = [row.seen for row in self._state.count_rows(forward.seen)]
        if fault := rereading(options, config, queries, before, forward.new_valid(query.device)):
            self._state.observe(query)
            self._state.keep_queries()
            self._state.take_back(queries)
            self._shared.forward = self._shared.waiting = None
            raise ValueError(fault)

    @property
    def exact(self) -> bool:
        """Whether this forward pass attends exactly, through the fallback."""
        assert self._forward is not None
        return self._forward.exact

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
        """Weighted attention of the newest tokens' queries.

        Args:
            query: (rows, heads, q, d).
            keys: (rows, kv_heads, stored, d), as `update` returned them; so are the values.
            values: (rows, kv_heads, stored, d_v).
            scale: b.
            options: of the attention call; `softcap` and `s_aux` are honoured.

        Returns:
            (rows, heads, q, d_v).
        """
        storage, value_range = self._state.storage, self._state.value_range
        assert storage is not None
        weights, valid = storage.weights()
        return coreset_attention(
            query,
            keys,
            values,
            weights,
            weighting=storage.weighting,
            scale=scale,
            valid=valid,
            causal=True,
            value_range=None if value_range is None else value_range.tensors(),
            softcap=options.get("softcap"),
            sink_logits=options.get("s_aux"),
        )

    def after_attention(self, query: Tensor, scale: float) -> None:
        """Fold where a row is over its budget, now that the newest tokens have been attended to.

        Args:
            query: (rows, heads, q, d), of the newest tokens.
            scale: b, the factor of the attention scores.

        Raises:
            ValueError: NaN or infinity among the keys to fold; they stay as they are.
        """
        self._shared.waiting = None
        self._state.observe(query)
        self._state.progress.end_forward(scale)
        try:
            if not self.record_past:
                self._settle(self.get_seq_length())
        finally:
            self._state.keep_queries()
        self._rest()

    # What the cache reports

    def restore(
        self,
        progress: Progress,
        memory: Entries,
        length: int,
        folded_range: ValueRange | None,
        carried: Tensor | None = None,
        recent: Tensor | None = None,
    ) -> None:
        """Become the layer that had these; it must be new. See `LayerState.restore`."""
        self._state.restore(progress, memory, length, folded_range, carried, recent)
        self.dtype, self.device, self.is_initialized = memory.keys.dtype, memory.keys.device, True
        self._shared.compressed = self._shared.compressed or folded_range is not None
        self._shared.padded = None

    def tensors(self) -> list[Tensor]:
        """All memory that the layer holds, free room included."""
        return self._state.tensors()

    @property
    def stored(self) -> int:
        """Entries held a row: slots and exact tokens, and the padding among them."""
        return self._state.stored

    @property
    def batch_rows(self) -> int:
        """Rows of the batch; 0 before the first forward pass."""
        return len(self._state.progress.rows)

    # Checks

    def _check(self, keys: Tensor, values: Tensor) -> Forward:
        """Refuse what cannot be served, before anything changes."""
        forward = self._shared.forward
        if forward is None or forward is self._forward:
            raise RuntimeError(
                f"layer {self._index}: these keys did not come through the '{NAME}' attention. Build the cache from "
                "the model's own config, WildCatCache(model.config, ...), keep its attention implementation as it is "
                "then, and pass a 2D attention mask"
            )
        if self._shared.waiting is not None:
            raise RuntimeError(
                f"layer {self._shared.waiting}: its keys never reached the '{NAME}' attention. Either the forward pass "
                "failed, then call cache.reset(); or this model attends in a way of its own, then use DynamicCache"
            )
        if forward.seen != self.get_seq_length():
            raise RuntimeError(
                f"layer {self._index} has seen {self.get_seq_length()} tokens and others {forward.seen}: an earlier "
                "forward pass failed half-way; call cache.reset() and read the text again"
            )
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] != forward.queries:
            raise ValueError(
                f"layer {self._index}: key_states {tuple(keys.shape)} and value_states {tuple(values.shape)} must be "
                f"(rows, kv_heads, {forward.queries} new tokens, channels), alike but for the channels"
            )
        if self._state.storage is not None:
            held = self._state.storage.memory
            for name, new, old in (("key_states", keys, held.keys), ("value_states", values, held.values)):
                if (*new.shape[:2], new.shape[3], new.dtype) != (*old.shape[:2], old.shape[3], old.dtype):
                    raise ValueError(
                        f"layer {self._index}: {name} {tuple(new.shape)} in {new.dtype} have other rows, heads, "
                        f"channels or another dtype than the {tuple(old.shape)} in {old.dtype} held; call "
                        "cache.reset(), or build a cache for this model"
                    )
        if forward.queries > 1:  # one new token is checked when it is folded: reading it would stall the device
            self._state.check_finite(keys)
        return forward

    def _check_unpadded(self, queries: int) -> None:
        """Refuse to do without a mask where padding is held: an exact forward pass would attend to it."""
        shared, storage = self._shared, self._state.storage
        if storage is None:
            shared.padded = False
        if shared.compressed or storage is None:  # weighted attention knows what is padding
            return
        if shared.padded is None:
            shared.padded = not bool(storage.entries.valid.all())
        if shared.padded:
            raise ValueError("attention_mask=None, but earlier tokens were padding; pass the mask of all tokens so far")

    def _check_rotations(self, length: int) -> None:
        """Refuse a text too long for the rotations that the method undoes."""
        shared = self._shared
        if shared.rotation_limit is not None and length > shared.rotation_limit:
            raise ValueError(
                f"the text is {length} tokens long: beyond {shared.rotation_limit} this model rotates by other "
                f"frequencies, which {type(shared.compressor).__name__} does not follow; use a shorter text, or a "
                "method that needs no positions, such as snapkv"
            )

    def _check_mask(self, queries: int, mask: Tensor) -> bool:
        """Refuse a mask that hides tokens which are folded, or shows padding which was dropped by a fold.

        Returns:
            Whether it differs from what was shown of the tokens since, which are still as they came.
        """
        progress, storage = self._shared.leader.progress, self._shared.leader.storage
        if storage is None:
            return False
        earlier = mask[:, : mask.shape[-1] - queries]
        shown, folded = earlier[:, : progress.folded_at].sum(-1).tolist(), [row.seen for row in progress.rows]
        if progress.folded_at and shown != folded:
            raise ValueError(
                f"attention_mask shows {shown} of the first {progress.folded_at} tokens of each row, and {folded} were "
                "shown when these were folded; what is folded cannot be masked later, call cache.reset() for another "
                "text"
            )
        exact = storage.entries.valid[:, 0, storage.length - progress.since_fold :]
        return not torch.equal(earlier[:, progress.folded_at :].to(exact.device), exact)

    # Inside

    @property
    def _folds_first(self) -> bool:
        """Tell whether the next `update` folds before it reads, for the cache to stay bounded."""
        return self.record_past and will_fold(self._shared.leader, self._beyond_rollback())

    def _beyond_rollback(self) -> int:
        """The column up to which nothing need be taken back, whatever `crop` follows."""
        return self.get_seq_length() - self._shared.settings.window

    def _settle(self, until: int) -> None:
        """Fold what is due up to column `until`."""
        if self._state.compressor.waits:
            self._settle_together(until)
            return
        try:
            fold_due(self._state, until)
        finally:  # an earlier one of several folds may have been done
            self._shared.compressed = self._shared.compressed or self._state.folded_range is not None

    def _settle_together(self, until: int) -> None:
        """Get ready for the next fold; the last of the layers that fold carries out everyone's."""
        shared = self._shared
        if shared.states[shared.trailing].progress.seen != self._state.progress.seen:
            survey_due(self._state, until)
            return
        try:
            states = [state for index, state in shared.states.items() if index not in shared.exact_layers]
            fold_together(states, until)
        finally:  # as in `_settle`
            shared.compressed = shared.compressed or self._state.folded_range is not None

    def _bring_to(self, device: torch.device) -> None:
        """Have everything on `device`: that of the layer, or, for a cache from a file, of the first keys."""
        self.wait()
        self._state.move(device)
        self.device = device

    def wait(self) -> None:
        """Let the current stream wait for what another one brings."""
        if self._arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrival)
            self._arrival = None

    def _rest(self) -> None:
        """Nothing more to do with the tensors for now."""
        if self._offloading:
            assert self._state.storage is not None
            self._state.storage.offload()
