"""One layer of the cache: what it keeps, how it grows, when it folds, and how it takes tokens back.

A layer stores, in one line of columns a row: padding, sink, coreset slots, exact tokens. Rows end together,
so that new tokens take the same columns in all of them.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from wildcat_kv.attention import NAME, Forward, MarkedLength, mark, weighted_attention
from wildcat_kv.budget import Fold, Row, block_size, plan_fold, tokens_until_fold
from wildcat_kv.compress import Coreset
from wildcat_kv.compressors import Compressor, KVBlock
from wildcat_kv.config import WildCatConfig
from wildcat_kv.folding import align_right, column_mask, fold_entries
from wildcat_kv.progress import Progress
from wildcat_kv.storage import Entries, Storage, ordinary_tensors
from wildcat_kv.value_range import ValueRange

# Most free columns behind what is stored, where a block is larger or nothing is ever folded.
_ROOM = 64


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
        compressed: whether any layer has folded anything.
        padded: whether any prompt had padding.
        warned: whether the user knows that the text is longer than the model's positions.
    """

    settings: WildCatConfig
    compressor: Compressor
    positions: int | None
    forward: Forward | None = None
    waiting: int | None = None
    compressed: bool = False
    padded: bool = False
    warned: bool = False

    def reset(self) -> None:
        """Back to before the first forward pass."""
        self.forward = self.waiting = None
        self.compressed = self.padded = self.warned = False


class WildCatLayer(CacheLayerMixin):
    """One full-attention layer: a coreset of the past, and the newest tokens as they are.

    Attributes:
        keys: (rows, kv_heads, stored, d), a view of what is stored, in the model's dtype; None when empty.
        values: (rows, kv_heads, stored, d_v), likewise; numerators U for coreset slots.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = True

    def __init__(self, shared: Shared, index: int, count: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index
        self._count = count
        self._clear()

    def _clear(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self._progress = Progress()
        self._storage: Storage | None = None
        self._offloading = False
        self._forward: Forward | None = None  # the last one that was served
        self._folded_range: ValueRange | None = None  # of the tokens that are exact no longer
        self._value_range: ValueRange | None = None  # of all tokens seen, once anything is folded

    # What Transformers calls

    @property
    def record_past(self) -> bool:
        """Whether folds wait for `crop`, so that tokens can be taken back."""
        return self._progress.record_past

    @record_past.setter
    def record_past(self, record: bool) -> None:
        self._progress.record_past = record

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values of these shapes; called by the first `update`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        room = min(block_size(self._shared.settings), _ROOM) if self._shared.settings.ratio != 1 else _ROOM
        self._storage = Storage.empty(key_states, value_states, room)
        self._progress.rows = [Row()] * key_states.shape[0]
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
        if self._storage is None:
            self.lazy_initialization(key_states, value_states)
        assert self._storage is not None
        self._bring_to(key_states.device)
        if self.record_past and not forward.exact:
            self._settle(self._beyond_rollback())
        valid = forward.new_valid(key_states.device)
        self._storage.append(key_states, value_states, valid)
        self._progress.read(forward.queries, masked=valid is not None)
        self._forward, self._shared.waiting = forward, self._index
        if self._value_range is not None:
            with ordinary_tensors():
                new = ValueRange.of(value_states, None if valid is None else valid.unsqueeze(1))
                self._value_range = self._value_range.join(new)
        self._expose()
        keys, values = self._storage.view()
        return mark(keys, self), mark(values, self)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: positions continue from it. What is stored is `stored`."""
        return self._progress.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for the mask function; the length leads it to the cache."""
        return MarkedLength(self._progress.seen + query_length, self), 0

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
        if self._storage is None:
            return
        self._bring_to(self.device)
        if tokens_to_remove:
            self._storage.truncate(self._storage.length + tokens_to_remove)
            self._progress.take_back(-tokens_to_remove)
            self._span_values()
        self._settle(self._progress.seen)
        self._expose()
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
        exact = self._progress.exact
        if -tokens_to_remove > exact:
            window = self._shared.settings.window
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: the last {exact} tokens can be taken back, those before them "
                f"are folded; call cache.activate_past_recording() before they are read, and enlarge the window, "
                f"window={max(window, -tokens_to_remove)}, where several forward passes come before a crop"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; int64 (k,), rows may be left out or repeated."""
        if self._storage is None:
            return
        self._bring_to(self.device)
        self._storage.select_rows(beam_idx)
        rows = self._progress.rows
        # The host reads the indices only where rows differ in what they hold.
        alike = len(set(rows)) == 1
        self._progress.rows = rows[:1] * len(beam_idx) if alike else [rows[row] for row in beam_idx.tolist()]
        with ordinary_tensors():
            if self._folded_range is not None:
                self._folded_range = self._folded_range.rows(beam_idx)
            if self._value_range is not None:
                self._value_range = self._value_range.rows(beam_idx)
        self._expose()
        self._rest()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self.reorder_cache(torch.arange(self.batch_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, int64 (k,) or a bool mask over rows, in that order."""
        self.reorder_cache(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def offload(self) -> None:
        """Keep keys and values on the CPU between forward passes; from the end of this one's attention on."""
        self._offloading = self.is_initialized

    def prefetch(self) -> None:
        """Bring keys and values back to the layer's device ahead of time."""
        if self._storage is not None:
            self._bring_to(self.device)

    # What the "wildcat" attention and mask functions call

    def announce(self, queries: int, mask: Tensor | None) -> Forward:
        """Take note, for all layers of the cache, that a forward pass has begun.

        Args:
            queries: new tokens.
            mask: bool (rows, seen + queries), False for padding, or None.

        Raises:
            ValueError: a mask that contradicts what was passed before.
        """
        shared, seen = self._shared, self._progress.seen
        if queries > 1:  # reading the mask would stall the path of one token
            self._check_mask(queries, mask)
            shared.padded = shared.padded or (mask is not None and not bool(mask.all()))
        if shared.positions is not None and seen + queries > shared.positions and not shared.warned:
            warnings.warn(
                f"the text is {seen + queries} tokens long and the model has {shared.positions} positions "
                "(max_position_embeddings): answers will degrade; shorten the prompt or use a longer model",
                stacklevel=2,
            )
            shared.warned = True
        if mask is None and shared.padded and not shared.compressed:
            raise ValueError("attention_mask=None, but earlier tokens were padding; pass the mask of all tokens so far")
        if self.record_past and self._will_fold(self._beyond_rollback()):
            shared.compressed = True  # every layer folds in its `update`, too late to change the mask
        shared.forward = Forward(seen, queries, mask, exact=not shared.compressed)
        return shared.forward

    @property
    def exact(self) -> bool:
        """Whether this forward pass attends exactly, through the fallback."""
        assert self._forward is not None
        return self._forward.exact

    def attend(self, query: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
        """Weighted attention of the newest tokens' queries.

        Args:
            query: (rows, heads, q, d).
            scale: b.
            options: of the attention call; `softcap` and `s_aux` are honoured.

        Returns:
            (rows, heads, q, d_v).
        """
        assert self._storage is not None
        entries = self._storage.entries
        return weighted_attention(
            query,
            entries.keys,
            entries.values,
            entries.weights,
            scale=scale,
            valid=entries.valid,
            causal=True,
            value_range=None if self._value_range is None else self._value_range.tensors(),
            softcap=options.get("softcap"),
            sink_logits=options.get("s_aux"),
        )

    def after_attention(self, scale: float) -> None:
        """Fold where a row is over its budget, now that the newest tokens have been attended to.

        Args:
            scale: b, the factor of the attention scores.

        Raises:
            ValueError: NaN or infinity among the keys to fold; they stay as they are.
        """
        self._shared.waiting = None
        self._progress.end_forward(scale)
        if not self.record_past:
            self._settle(self._progress.seen)
        self._rest()

    # What the cache reports

    @property
    def progress(self) -> Progress:
        """The numbers behind the layer."""
        return self._progress

    def held(self) -> tuple[Entries, ValueRange | None]:
        """What is stored, and the box around the values of the tokens that are exact no longer, if any."""
        assert self._storage is not None
        return self._storage.entries, self._folded_range

    def restore(self, progress: Progress, entries: Entries, folded_range: ValueRange | None) -> None:
        """Become the layer that had these; it must be new."""
        self.lazy_initialization(entries.keys[:, :, :0], entries.values[:, :, :0])
        assert self._storage is not None
        self._storage = Storage([entries], room=self._storage.room)
        self._progress, self._folded_range = progress, folded_range
        self._span_values()
        self._expose()

    def tensors(self) -> list[Tensor]:
        """All memory that the layer holds, free room included."""
        if self._storage is None:
            return []
        ranges = (self._folded_range, self._value_range)
        return [*self._storage.memory.tensors(), *(bound for box in ranges if box for bound in box.tensors())]

    @property
    def stored(self) -> int:
        """Entries held a row: slots and exact tokens, and the padding among them."""
        return 0 if self._storage is None else self._storage.length

    @property
    def batch_rows(self) -> int:
        """Rows of the batch; 0 before the first forward pass."""
        return len(self._progress.rows)

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
        if forward.seen != self._progress.seen:
            raise RuntimeError(
                f"layer {self._index} has seen {self._progress.seen} tokens and others {forward.seen}: an earlier "
                "forward pass failed half-way; call cache.reset() and read the text again"
            )
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] != forward.queries:
            raise ValueError(
                f"layer {self._index}: key_states {tuple(keys.shape)} and value_states {tuple(values.shape)} must be "
                f"(rows, kv_heads, {forward.queries} new tokens, channels), alike but for the channels"
            )
        if self._storage is not None:
            held = self._storage.entries
            if keys.shape[0] != held.keys.shape[0]:
                raise ValueError(
                    f"layer {self._index}: the batch has {keys.shape[0]} rows and the cache holds "
                    f"{held.keys.shape[0]}; call cache.batch_repeat_interleave(n) to ask several questions of one "
                    "context"
                )
            for name, new, old in (("key_states", keys, held.keys), ("value_states", values, held.values)):
                if (new.shape[1], new.shape[3], new.dtype) != (old.shape[1], old.shape[3], old.dtype):
                    raise ValueError(
                        f"layer {self._index}: {name} {tuple(new.shape)} in {new.dtype} have other heads, channels or "
                        f"another dtype than the {tuple(old.shape)} in {old.dtype} held; call cache.reset(), or build "
                        "a cache for this model"
                    )
        if forward.queries > 1:  # one new token is checked when it is folded: reading it would stall the device
            self._check_finite(keys)
        return forward

    def _check_finite(self, keys: Tensor) -> None:
        # A sum is one pass; only if it overflows is every key looked at.
        if not bool(torch.isfinite(keys.sum(dtype=torch.float32))) and not bool(torch.isfinite(keys).all()):
            raise ValueError(
                f"layer {self._index}: NaN or infinity in the keys; the model has overflowed, try bfloat16 or "
                "float32, and call cache.reset(): other layers may have read the tokens"
            )

    def _check_mask(self, queries: int, mask: Tensor | None) -> None:
        """Refuse a mask that hides tokens which the cache holds, or shows padding which it dropped."""
        if mask is None or self._storage is None or mask.shape[0] != self.batch_rows:
            return
        before, seen = mask[:, : mask.shape[-1] - queries].sum(-1).tolist(), self._progress.seen
        if before != (held := [row.seen for row in self._count_rows(seen)]):
            raise ValueError(
                f"attention_mask shows {before} of the {seen} earlier tokens of each row, and {held} were shown "
                "when they were read; what was read cannot be masked later, call cache.reset() for another text"
            )

    # Where things are

    def _bring_to(self, device: torch.device) -> None:
        """Have everything on `device`: that of the layer, or, for a cache from a file, of the first keys."""
        assert self._storage is not None
        self._storage.to(device)
        if self.device != device:
            self.device = device
            self._folded_range, self._value_range = (
                box and box.to(device) for box in (self._folded_range, self._value_range)
            )

    def _rest(self) -> None:
        """Nothing more to do with the tensors for now."""
        assert self._storage is not None
        if self._offloading:
            self._storage.offload()
            self._expose()

    def _expose(self) -> None:
        """Let `keys` and `values` show what is stored; not the marked tensors, that would be a cycle."""
        assert self._storage is not None
        self.keys, self.values = self._storage.view()

    # Folding

    def _beyond_rollback(self) -> int:
        """The column up to which nothing need be taken back, whatever `crop` follows."""
        return self._progress.seen - self._shared.settings.window

    def _settle(self, until: int) -> None:
        """Fold, as was due at the ends of the forward passes up to column `until`, one after the other."""
        settings, progress = self._shared.settings, self._progress
        while (end := progress.due(until)) is not None:
            rows = self._count_rows(end)
            if folds := self._plan(rows, progress.settled, end):
                rows = self._fold(rows, folds, end)
            waits = [wait for row in rows if (wait := tokens_until_fold(row, settings)) is not None]
            if settings.max_tokens is not None:  # columns of padding take room as well
                waits.append(max(1, settings.max_tokens + 1 - self._stored_at(end)))
            progress.settle(min(waits) if waits else None)

    def _will_fold(self, until: int) -> bool:
        """Whether `_settle` would change what is stored."""
        progress = self._progress
        if self._storage is None or progress.due(until) is None:
            return False
        starts = [progress.settled, *progress.ends[:-1]]
        spans = [(start, end) for start, end in zip(starts, progress.ends, strict=True) if end <= until]
        return any(self._plan(self._count_rows(end), start, end) for start, end in spans)

    def _stored_at(self, column: int) -> int:
        """Columns stored when `column` columns had been read; they must have come after the last fold."""
        return self.stored - (self._progress.seen - column)

    def _count_rows(self, end: int) -> list[Row]:
        """The rows with the tokens between the last fold and column `end`."""
        progress = self._progress
        if not progress.masked:
            return [row.append(end - progress.folded_at) for row in progress.rows]
        assert self._storage is not None
        new = self._storage.entries.valid[:, 0, self._stored_at(progress.folded_at) : self._stored_at(end)]
        return [row.append(count) for row, count in zip(progress.rows, new.sum(-1).tolist(), strict=True)]

    def _plan(self, rows: Sequence[Row], start: int, end: int) -> list[Fold] | None:
        """What to fold after the forward pass over columns [start, end), None for nothing.

        Args:
            rows: the rows as of its end.
            start: where it began.
            end: where it ended.
        """
        settings = self._shared.settings
        # A row's first tokens, several at once, are its prompt; with padding that may come in a later pass.
        prompts = [before.seen == 0 and row.seen > 1 for before, row in zip(self._count_rows(start), rows, strict=True)]
        plans = [plan_fold(row, settings, prefill=prompt) for row, prompt in zip(rows, prompts, strict=True)]
        too_wide = settings.max_tokens is not None and self._stored_at(end) > settings.max_tokens
        if not any(plans) and not too_wide:
            return None
        return [plan or Fold.nothing(row) for plan, row in zip(plans, rows, strict=True)]

    def _fold(self, rows: list[Row], folds: list[Fold], end: int) -> list[Row]:
        """Fold as of column `end`; what came after stays as it is. Returns what the rows hold then."""
        assert self._storage is not None
        held, cut, appended = self._progress.rows, self._stored_at(end), end - self._progress.folded_at
        entries, later = self._storage.entries.slice(0, cut), self._storage.entries.slice(cut, self.stored)
        self._check_finite(entries.keys[:, :, cut - appended :])
        if any(row.stored - old.stored != appended for row, old in zip(rows, held, strict=True)):
            entries = align_right(entries, held, appended)
        # Exact tokens that become slots, and the box around all values.
        leaving = [
            (cut - row.stored + max(row.sink + row.slots, fold.sink + fold.kept), cut - fold.window)
            if fold.items
            else (cut, cut)
            for row, fold in zip(rows, folds, strict=True)
        ]
        with ordinary_tensors():
            folded = self._range(entries, leaving)
            if self._folded_range is not None:
                folded = folded.join(self._folded_range)
            seen = folded.join(self._exact_range(entries, rows))
            weighted = any(row.slots > fold.kept for row, fold in zip(rows, folds, strict=True))

            def compress(items: Entries, lengths: Sequence[int], ranks: Sequence[int]) -> Coreset:
                block = KVBlock(
                    keys=items.keys,
                    values=items.values,
                    valid=items.valid,
                    lengths=lengths,
                    seen=[row.seen for row in rows],
                    scale=self._progress.scale,
                    layer_index=self._index,
                    layer_count=self._count,
                    weights=items.weights if weighted else None,
                    value_bound=seen.squared_norm(),
                )
                return self._shared.compressor.compress(block, ranks)

            parts = fold_entries(entries, rows, folds, compress)
            self._storage = Storage([*parts, later], room=self._storage.room)
            self._folded_range = folded
        self._progress.fold([fold.apply(row) for fold, row in zip(folds, rows, strict=True)], end)
        self._span_values()
        self._shared.compressed = True
        self._expose()
        return self._progress.rows

    def _span_values(self) -> None:
        """Set the box around the values of all tokens seen, from those folded and those held."""
        if self._folded_range is None:
            return
        assert self._storage is not None
        entries, cut = self._storage.entries, self._stored_at(self._progress.folded_at)
        with ordinary_tensors():
            span = self._folded_range.join(self._exact_range(entries.slice(0, cut), self._progress.rows))
            if cut < self.stored:
                later = entries.slice(cut, self.stored)
                span = span.join(ValueRange.of(later.values, later.valid if self._progress.masked else None))
            # A row that has folded nothing is attended to exactly: nothing to clip.
            self._value_range = span.unbounded_where_empty(self._folded_range)

    def _exact_range(self, entries: Entries, rows: Sequence[Row]) -> ValueRange:
        """The box around the values of the exact tokens in right-aligned rows."""
        end = entries.keys.shape[2]
        sinks = [(end - row.stored, end - row.stored + row.sink) for row in rows]
        return self._range(entries, sinks).join(self._range(entries, [(end - row.exact, end) for row in rows]))

    @staticmethod
    def _range(entries: Entries, spans: Sequence[tuple[int, int]]) -> ValueRange:
        """The box around the values in columns [start, stop) of each row, exact tokens all."""
        if len(set(spans)) == 1:
            return ValueRange.of(entries.slice(*spans[0]).values)
        return ValueRange.of(entries.values, column_mask(spans, entries.values).unsqueeze(1))
