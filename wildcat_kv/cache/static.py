"""Decoding with fixed shapes, so that one compiled graph, or one CUDA graph, serves every token.

Under `max_tokens` a layer never holds more than a fixed number of columns. A static layer allocates them once and
keeps them where they are. While a forward pass of one token is traced, it touches tensors only: what is in use is
a number on the device, and free columns have weight 0. The host looks at it between two passes, and only where a
fold may be due: then it reads how many tokens came, and folds in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
    """The tensors of one layer that a traced step of one token reads and writes.

    Attributes:
        keys: (rows, kv_heads, max_tokens + 1, d), all of the layer's memory.
        values: (rows, kv_heads, max_tokens + 1, d_v).
        weights: float32 (rows, kv_heads, max_tokens + 1), 0 in free columns.
        valid: bool, likewise.
        lowest: (rows, kv_heads, 1, d_v), of the box around the values seen; no bound before the first fold.
        highest: likewise.
        length: int64 (1,), columns in use.
        seen: int64 (), tokens read.
        signed: whether any weight is negative or very small.
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
        """Of a layer that has been allocated; `load` comes before the first step."""
        assert state.storage is not None
        memory = state.storage.memory
        box = (*memory.values.shape[:2], 1, memory.values.shape[3])
        with ordinary_tensors():
            buffers = DecodeBuffers(
                memory.keys,
                memory.values,
                memory.weights,
                memory.valid,
                lowest=memory.values.new_empty(box),
                highest=memory.values.new_empty(box),
                length=torch.zeros(1, dtype=torch.int64, device=memory.keys.device),
                seen=torch.zeros((), dtype=torch.int64, device=memory.keys.device),
            )
        for tensor in (value for value in vars(buffers).values() if isinstance(value, Tensor)):
            torch._dynamo.mark_static_address(tensor)  # a CUDA graph must not copy them in
        return buffers

    def load(self, state: LayerState) -> None:
        """Take over what the host knows."""
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
        self.signed = state.storage.weighting is WeightSigns.SIGNED

    @torch.no_grad()
    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values (rows, kv_heads, 1, channels); returns views of all columns."""
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
        """Weighted attention of the token's queries (rows, heads, 1, d) to all columns; free ones have weight 0."""
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
    """What the layers of a static cache have in common.

    Attributes:
        buffers: of each layer, by its index.
        stale: whether the host knows something that the buffers do not.
        announced: whether a forward pass of one token is to come, traced or not.
        untold: forward passes that the host has not been told of, since they were traced.
    """

    buffers: dict[int, DecodeBuffers] = field(default_factory=dict)
    stale: bool = True
    announced: bool = False
    untold: int = 0

    def reset(self) -> None:
        """Back to before the first forward pass."""
        super().reset()
        self.stale, self.announced, self.untold = True, False, 0
        self.buffers.clear()  # they hold the memory of the text before

    @property
    def due(self) -> bool:
        """Whether any layer may have to fold before the next token."""
        numbers = (state.progress for state in self.states.values())
        return any(one.fold_from is not None and one.seen + self.untold >= one.fold_from for one in numbers)

    def note_step(self) -> None:
        """Count the forward pass that was announced, unless the host took part in it."""
        self.untold += self.announced
        self.announced = False

    def catch_up(self) -> None:
        """Learn what traced steps have read, and fold what is due.

        Raises:
            ValueError: NaN or infinity among the keys to fold.
        """
        self.note_step()
        if not self.untold:
            return
        self.untold, self.stale = 0, True
        for index, state in self.states.items():
            state.take_in(int(self.buffers[index].seen) - state.progress.seen)
        self.settle()

    def settle(self) -> None:
        """Fold what is due.

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
        """Tell the buffers what the host knows.

        Raises:
            ValueError: a layer holds more than it has room for.
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
            if index not in self.buffers or self.buffers[index].keys is not state.storage.memory.keys:
                self.buffers[index] = DecodeBuffers.of(state)
            self.buffers[index].load(state)
        self.stale = False


class StaticWildCatLayer(WildCatLayer):
    """A `WildCatLayer` whose forward passes of one token can be traced, by torch.compile and CUDA graphs."""

    is_compileable = True
    is_croppable = False
    fixed = True

    _pass_state: StaticPassState

    # Traced

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As of `WildCatLayer`; where it is traced, the views are of all columns, free ones included."""
        if torch.compiler.is_compiling():
            keys, values = self._pass_state.buffers[self._index].append(key_states, value_states)
            return mark(keys, values, self)
        self._pass_state.announced = False
        self._pass_state.catch_up()  # what traced steps have read comes before it
        self._pass_state.stale = True
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def uses_fallback(self) -> bool:
        """Whether this forward pass attends exactly, through the fallback; one of a single token never does."""
        return not torch.compiler.is_compiling() and super().uses_fallback

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
        """See `WildCatLayer`."""
        if torch.compiler.is_compiling():
            return self._pass_state.buffers[self._index].attend(query, keys, values, scale, options)
        return super().attend(query, keys, values, scale, options)

    def after_attention(self, query: Tensor, scale: float) -> None:
        """See `WildCatLayer`; a traced step leaves it to the host."""
        if not torch.compiler.is_compiling():
            super().after_attention(query, scale)

    def get_seq_length(self) -> Any:
        """Tokens seen: int, or int64 () on the device where it is traced."""
        if torch.compiler.is_compiling():
            return self._pass_state.buffers[self._index].seen
        return super().get_seq_length() + self._pass_state.untold + self._pass_state.announced

    # Between forward passes

    def announce(self, rows: int, queries: int, mask: Tensor | None, *, causal: bool = True) -> Forward:
        """See `WildCatLayer`. The pass of a single token may be traced: all that the host has to do is done here."""
        shared = self._pass_state
        shared.note_step()
        if queries > 1 or shared.due:
            shared.catch_up()
            shared.settle()  # again, where it has failed before
        forward = super().announce(rows, queries, mask, causal=causal)
        if queries == 1 and self.is_initialized:
            forward.uses_fallback = False
            shared.load()
            shared.announced = True
        return forward

    @property
    def state(self) -> LayerState:
        """What the layer holds."""
        self._pass_state.catch_up()
        return self._state

    @property
    def stored(self) -> int:
        """Entries held a row."""
        return self.state.stored

    def tensors(self) -> list[Tensor]:
        """See `WildCatLayer`."""
        buffers = self._pass_state.buffers.get(self._index)
        of_steps = [] if buffers is None else [value for value in vars(buffers).values() if isinstance(value, Tensor)]
        return [*super().tensors(), *of_steps]

    def select_rows(self, index: Tensor, on_host: list[int] | None) -> None:
        """See `WildCatLayer`."""
        self._pass_state.catch_up()
        self._pass_state.stale = True
        super().select_rows(index, on_host)

    def activate_past_recording(self) -> None:
        """Refused: a traced step cannot be taken back.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "static=True: tokens of compiled steps cannot be taken back, as prompt lookup and assisted generation do; "
            "leave static out for those"
        )

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refused but for 0, likewise."""
        if tokens_to_remove:
            self.activate_past_recording()


class _NextPositions:
    """Positions of the next token, where the model would count them by a mask that static caches have not.

    Raises:
        ValueError: those of what was read are not known.
    """

    def __init__(self, model: nn.Module, cache: Any) -> None:
        self._model, self._cache = model, cache
        self._steps: list[Step] = []  # as they were when the padding was counted
        self._padding: Tensor | None = None  # int64 (rows, 1), columns of each row that are padding
        cache.rope.after(cache.get_seq_length(), model)

    def next(self, ids: Tensor) -> Tensor:
        """Positions int64 (rows, 1) of the tokens `ids` (rows, 1)."""
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
    """A compiled forward pass of one token, for a cache built with `static=True`.

    The prompt is read by the model itself, as ever; then each call reads one token and folds between two calls
    where that is due. The graph is compiled at the first call, and once more where negative weights come up.

    Args:
        model: a causal language model of Transformers.
        cache: its cache, which has read something.
        **options: of `torch.compile`, for example mode="reduce-overhead" for CUDA graphs.

    Returns:
        A function from token ids, int64 (rows, 1), to logits (rows, 1, vocabulary).

    Raises:
        ValueError: the cache is not static, has read nothing, or the positions of what it has read are not known.

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
        shared.announced = False  # not read yet: where torch does not compile, the model asks for the length
        try:
            logits = compiled(input_ids=ids, attention_mask=mask, **counted, **{CACHE: cache}).logits
        except BaseException:
            shared.announced = not shared.stale
            shared.catch_up()  # the device knows which layers have read the token, if any
            raise
        shared.announced = not shared.stale  # stale where the host took part
        return logits

    return step
