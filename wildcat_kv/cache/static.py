"""Decoding with fixed shapes: one compiled graph serves every token.

It may be a CUDA graph too. Under `max_tokens` a layer never holds more than a fixed number of columns. A static layer
allocates them once and keeps them where they are. A traced forward pass of one token uses tensors only: the number of
columns in use is on the device, and free columns have weight 0. The host reads this number between two passes, and
only if a fold may be due. Then it folds in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from wildcat_kv.cache.folding import fold_due
from wildcat_kv.cache.forward import PassState
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.cache.positions import Step, holds_positions
from wildcat_kv.cache.state import LayerState
from wildcat_kv.coreset.tensors import ordinary_tensors
from wildcat_kv.coreset.wtdattn import AttentionOptions, WeightSigns, coreset_attention
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.hook.marks import Forward, mark


@dataclass
class DecodeBuffers:
    """Tensors of one layer that a traced step of one token reads and writes.

    Attributes:
        keys: (rows, kv_heads, max_tokens + 1, d), all columns of the layer.
        values: (rows, kv_heads, max_tokens + 1, d_v).
        weights: float32 (rows, kv_heads, max_tokens + 1), 0 in free columns.
        valid: bool (rows, kv_heads, max_tokens + 1), False in free columns.
        lowest: smallest value of each channel so far, (rows, kv_heads, 1, d_v); no bound before the first fold.
        highest: largest value of each channel so far, in the same shape.
        length: int64 (1,), columns in use.
        seen: int64 (), tokens read.
        signed: True if any weight is negative or very small.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor
    valid: Tensor
    lowest: Tensor
    highest: Tensor
    length: Tensor
    seen: Tensor
    signed: bool = False

    @staticmethod
    def of(state: LayerState) -> DecodeBuffers:
        """Make the buffers of an allocated layer; call `load` before the first step."""
        assert state.storage is not None
        allocated = state.storage.allocated
        box = (*allocated.values.shape[:2], 1, allocated.values.shape[3])
        with ordinary_tensors():
            buffers = DecodeBuffers(
                allocated.keys,
                allocated.values,
                allocated.weights,
                allocated.valid,
                lowest=allocated.values.new_empty(box),
                highest=allocated.values.new_empty(box),
                length=torch.zeros(1, dtype=torch.int64, device=allocated.keys.device),
                seen=torch.zeros((), dtype=torch.int64, device=allocated.keys.device),
            )
        for tensor in (value for value in vars(buffers).values() if isinstance(value, Tensor)):
            torch._dynamo.mark_static_address(tensor)  # a CUDA graph must not copy them in
        return buffers

    def load(self, state: LayerState) -> None:
        """Update the numbers and the box from the host's state."""
        assert state.storage is not None
        limit, box = torch.finfo(self.lowest.dtype), state.value_range
        with ordinary_tensors():
            self.length.fill_(state.storage.length)
            self.seen.fill_(state.progress.seen)
            if box is None:
                self.lowest.fill_(limit.min)
                self.highest.fill_(limit.max)
            else:
                self.lowest.copy_(box.lowest)
                self.highest.copy_(box.highest)
        self.signed = state.plain.weighting is WeightSigns.SIGNED

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append one token's keys and values (rows, kv_heads, 1, channels).

        Returns:
            Views of all columns, (rows, kv_heads, max_tokens + 1, channels).
        """
        self.keys.index_copy_(2, self.length, keys)
        self.values.index_copy_(2, self.length, values)
        self.weights.index_fill_(2, self.length, 1.0)
        self.valid.index_fill_(2, self.length, True)
        self.lowest.copy_(torch.minimum(self.lowest, values))
        self.highest.copy_(torch.maximum(self.highest, values))
        self.length.add_(1)
        self.seen.add_(1)
        return self.keys.narrow(2, 0, self.keys.shape[2]), self.values.narrow(2, 0, self.values.shape[2])

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
        """Attend to all columns by their weights; free ones have weight 0.

        The arguments are those of `WildCatLayer.attend`, with the keys and values of all columns.
        """
        attention = AttentionOptions(
            scale=scale,
            valid=self.valid,
            value_range=(self.lowest, self.highest),
            softcap=options.get("softcap"),
            sink_logits=options.get("s_aux"),
        )
        signs = WeightSigns.SIGNED if self.signed else WeightSigns.POSITIVE
        return coreset_attention(query, keys, values, self.weights, signs, attention)


@dataclass
class StaticPassState(PassState):
    """State that all layers of a static cache share.

    Attributes:
        buffers: tensors of each layer, by its index.
        stale: True if the host has changed its state and not the buffers.
        announced: True if a forward pass of one token comes next, traced or not.
        unreported: number of traced forward passes that the host's state does not include yet.
    """

    buffers: dict[int, DecodeBuffers] = field(default_factory=dict)
    stale: bool = True
    announced: bool = False
    unreported: int = 0

    def reset(self) -> None:
        """Go back to before the first forward pass."""
        super().reset()
        self.stale, self.announced, self.unreported = True, False, 0
        self.buffers.clear()  # frees the tensors of the former text

    @property
    def may_fold(self) -> bool:
        """True if any layer may have to fold before the next token."""
        numbers = (state.progress for state in self.states.values())
        return any(one.fold_from is not None and one.seen + self.unreported >= one.fold_from for one in numbers)

    def note_step(self) -> None:
        """Count the forward pass that was announced, unless the host took part in it."""
        self.unreported += self.announced
        self.announced = False

    def catch_up(self) -> None:
        """Count the tokens of traced steps, and do the folds that are due.

        Raises:
            ValueError: NaN or infinity among the keys to fold.
        """
        self.note_step()
        if not self.unreported:
            return
        self.unreported, self.stale = 0, True
        for index, state in self.states.items():
            state.take_in(int(self.buffers[index].seen) - state.progress.seen)
        self.fold_layers()

    def fold_layers(self) -> None:
        """Do the folds that are due, in every layer.

        Raises:
            ValueError: NaN or infinity among the keys to fold.
        """
        for state in self.states.values():
            before = state.folded_range
            try:
                fold_due(state, state.progress.seen)
            finally:  # an earlier one of several folds may have been done
                self.stale = self.stale or state.folded_range is not before
                self.compressed = self.compressed or state.folded_range is not None

    def load(self) -> None:
        """Update the buffers from the host's state, if they are stale.

        Raises:
            ValueError: a layer holds more columns than it has room for.
        """
        if not self.stale:
            return
        for index, state in self.states.items():
            assert state.storage is not None
            if state.progress.spare > 0:
                raise ValueError(
                    f"static=True: layer {index} holds {state.stored} columns, more than its share of "
                    f"max_tokens={self.settings.max_tokens}: {type(self.compressor).__name__} deals the budget out "
                    "unequally; leave static out for it"
                )
            if index not in self.buffers or self.buffers[index].keys is not state.storage.allocated.keys:
                self.buffers[index] = DecodeBuffers.of(state)
            self.buffers[index].load(state)
        self.stale = False


class StaticWildCatLayer(WildCatLayer):
    """A `WildCatLayer` whose steps of one token can be traced.

    torch.compile and CUDA graphs can trace them.
    """

    is_compileable = True
    is_croppable = False
    fixed = True

    _pass_state: StaticPassState

    # Traced

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():  # returns views of all columns, free ones included
            keys, values = self._pass_state.buffers[self._index].append(key_states, value_states)
            return mark(keys, values, self)
        self._pass_state.announced = False
        self._pass_state.catch_up()  # the tokens of traced steps come first
        self._pass_state.stale = True
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def uses_fallback(self) -> bool:
        """True if this forward pass attends exactly; a pass of one token never does."""
        return not torch.compiler.is_compiling() and super().uses_fallback

    @override
    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
        if torch.compiler.is_compiling():
            return self._pass_state.buffers[self._index].attend(query, keys, values, scale, options)
        return super().attend(query, keys, values, scale, options)

    @override
    def after_attention(self, query: Tensor, scale: float) -> None:
        if not torch.compiler.is_compiling():  # the host folds between traced steps
            super().after_attention(query, scale)

    def get_seq_length(self) -> Any:
        """Count the tokens seen: int, or int64 () in a traced step."""
        if torch.compiler.is_compiling():
            return self._pass_state.buffers[self._index].seen
        return super().get_seq_length() + self._pass_state.unreported + self._pass_state.announced

    # Between forward passes

    @override
    def announce(self, rows: int, queries: int, mask: Tensor | None, *, causal: bool = True) -> Forward:
        # A pass of one token may be traced, so the host does all of its work here.
        shared = self._pass_state
        shared.note_step()
        if queries > 1 or shared.may_fold:
            shared.catch_up()
            shared.fold_layers()  # again, for folds that failed before
        forward = super().announce(rows, queries, mask, causal=causal)
        if queries == 1 and self.is_initialized:
            forward.uses_fallback = False
            shared.load()
            shared.announced = True
        return forward

    @property
    def state(self) -> LayerState:
        """Contents of the layer, tokens of traced steps included."""
        self._pass_state.catch_up()
        return self._state

    @property
    def stored(self) -> int:
        """Entries held in a row: slots, exact tokens and padding."""
        self._pass_state.catch_up()
        return super().stored

    @override
    def tensors(self) -> list[Tensor]:
        buffers = self._pass_state.buffers.get(self._index)
        of_steps = [] if buffers is None else [value for value in vars(buffers).values() if isinstance(value, Tensor)]
        return [*super().tensors(), *of_steps]

    @override
    def select_rows(self, index: Tensor, on_host: list[int] | None) -> None:
        self._pass_state.catch_up()
        self._pass_state.stale = True
        super().select_rows(index, on_host)

    def activate_past_recording(self) -> None:
        """Refuse to record: a traced step cannot be taken back.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "static=True: tokens of compiled steps cannot be taken back, as prompt lookup and assisted generation do; "
            "leave static out for those"
        )

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back.

        Raises:
            ValueError: tokens_to_remove is not 0.
        """
        if tokens_to_remove:
            self.activate_past_recording()


class _NextPositions:
    """Positions of the next token, for models that count them by a mask.

    Static caches have no such mask.

    Args:
        model: model that goes on.
        cache: its static cache.

    Raises:
        ValueError: the positions of the tokens read are not known.
    """

    def __init__(self, model: nn.Module, cache: Any) -> None:
        self._model, self._cache = model, cache
        self._steps: list[Step] = []  # the steps for which the padding was counted
        self._padding: Tensor | None = None  # int64 (rows, 1), padding columns of each row
        cache.rope.after(cache.get_seq_length(), model)

    def next(self, ids: Tensor) -> Tensor:
        """Compute the positions of the tokens `ids`, int64 (rows, 1) both."""
        shared, seen = self._cache._pass_state, self._cache.get_seq_length()
        deltas = shared.rope.after(seen, self._model)
        positions = torch.full_like(ids, seen)
        if deltas is None:
            return positions
        if self._padding is None or self._steps is not shared.rope.steps or shared.forward.queries > 1:
            shared.catch_up()
            valid = [[row.seen] for row in shared.leader.count_rows(seen)]
            self._steps, self._padding = shared.rope.steps, seen - torch.tensor(valid, device=ids.device)
        return positions - self._padding + deltas.to(ids)


def compile_decoding(model: nn.Module, cache: Any, **options: Any) -> Callable[[Tensor], Tensor]:
    """Compile the forward pass of one token, for a static cache.

    The model itself reads the prompt, as usual. Then each call reads one token, and due folds run between two calls.
    The graph is compiled at the first call, and once more when negative weights appear.

    Args:
        model: causal language model of Transformers.
        cache: its cache, built with `static=True`, which has read a prompt.
        **options: options of `torch.compile`, for example mode="reduce-overhead" for CUDA graphs.

    Returns:
        A function from token ids, int64 (rows, 1), to logits (rows, 1, vocabulary).

    Raises:
        ValueError: the cache is not static, has read nothing, or does not know the positions of the tokens read.

    Example:
        cache = WildCatCache(model.config, max_tokens=1024, static=True)
        token = model(prompt, cache=cache).logits[:, -1:].argmax(-1)
        step = compile_decoding(model, cache)
        for _ in range(100):
            token = step(token).argmax(-1)
    """
    if not getattr(cache, "static", False):
        raise ValueError(f"cache={cache!r} has no fixed shapes; build it with max_tokens=... and static=True")
    if not cache.get_seq_length():
        raise ValueError(f"cache={cache!r} is empty: read a prompt with the model before compiled steps")
    positions = _NextPositions(model, cache) if holds_positions(model) else None
    compiled = torch.compile(model.forward, **{"fullgraph": True, "dynamic": False, **options})

    shared: StaticPassState = cache._pass_state

    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        counted = {} if positions is None else {"position_ids": positions.next(ids)}
        mask = cache.announce_step(ids.shape[0])
        shared.announced = False  # not read yet: if torch does not compile, the model asks for the length
        try:
            logits = compiled(input_ids=ids, attention_mask=mask, **counted, **{CACHE: cache}).logits
        except BaseException:
            shared.announced = not shared.stale
            shared.catch_up()  # the device knows which layers have read the token
            raise
        shared.announced = not shared.stale  # stale if the host took part
        return logits

    return step
