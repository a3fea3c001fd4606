"""One layer on the path of a token: `update`, attention, fold.

`state.py` has the contents of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from wildcat_kv.cache.bands import Band
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.folding import will_fold
from wildcat_kv.cache.forward import announce, beyond_rollback, check_reading, check_update, fold_layer
from wildcat_kv.cache.layer_contract import LayerContract
from wildcat_kv.cache.progress import Progress
from wildcat_kv.cache.refilling import trim_queries
from wildcat_kv.cache.value_range import ValueRange
from wildcat_kv.coreset.wtdattn import AttentionOptions
from wildcat_kv.hook.marks import Forward, MarkedLength, mark
from wildcat_kv.models.attention_module import AttentionModule


class WildCatLayer(LayerContract):
    """One full-attention layer: a coreset of the past, and exact new tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append exact tokens; return the keys and values to attend to.

        Args:
            key_states: (rows, kv_heads, q, d), rotated.
            value_states: (rows, kv_heads, q, d_v).
            *args: ignored.
            **kwargs: ignored.

        Returns:
            Views of all stored keys and values; they lead the "wildcat" attention to this layer.

        Raises:
            RuntimeError: the forward pass did not come through the "wildcat" attention.
            ValueError: shapes or a dtype that do not fit, another batch size than before, or on a CPU NaN or
                infinity in the keys of a prompt. The layer is left as it was then.
        """
        shared, state = self._pass_state, self._state
        forward = check_update(shared, self._index, self._forward, key_states, value_states)
        if not self.is_initialized:
            shared.settle_bytes(key_states, value_states)
            self.lazy_initialization(key_states, value_states)
        if self._offloading or self._arrival is not None or key_states.device != self.device:
            self._bring_to(key_states.device)
        if forward.relabelled:
            state.span()
        if state.progress.record_past:
            until = beyond_rollback(shared, state.progress.seen)
            # Asked in every layer, as `announce` asks the first: ends that fold nothing are decided on the way.
            if will_fold(state, until) and not forward.uses_fallback:
                fold_layer(shared, self._index, until)
        state.append(key_states, value_states, None if forward.mask is None else forward.new_valid(key_states.device))
        self._forward, shared.waiting, shared.begun = forward, self._index, False
        assert state.storage is not None
        return mark(*state.storage.shown(key_states, value_states), self)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset for the mask; the length is marked."""
        return MarkedLength(self.get_seq_length() + query_length, self), 0

    def announce(self, rows: int, queries: int, mask: Tensor | None, *, causal: bool = True) -> Forward:
        """Begin a forward pass, for all layers of the cache.

        Args:
            rows: rows of the batch.
            queries: new tokens.
            mask: bool (rows, seen + queries), False for padding, or None.
            causal: True if no new token sees later ones.

        Raises:
            ValueError: the pass cannot be served, see `forward.announce`. Nothing has changed then.
        """
        return announce(
            self._pass_state,
            self._state,
            self.get_seq_length(),
            rows,
            queries,
            mask,
            causal=causal,
            served=self._forward,
            weighted=self.fixed and queries == 1 and self.is_initialized,
        )

    def check_reading(self, query: Tensor, config: Any, options: dict[str, Any]) -> None:
        """Refuse new tokens that the cache has read before.

        Args:
            query: queries of the newest tokens, (rows, heads, q, d).
            config: config of the decoder.
            options: keyword arguments of the attention call.

        Raises:
            ValueError: the tokens were read before, see `forward.check_reading`.
        """
        check_reading(self._pass_state, self._index, query, config, options)

    def meet(self, module: nn.Module, heads: int, channels: int) -> None:
        """Take what the method needs of the layer's attention module.

        Args:
            module: attention module.
            heads: query heads.
            channels: channels of a value.

        Raises:
            ValueError: the module has no output projection that can be read.
        """
        self._state.model.attention = AttentionModule.of(module, heads, channels, self._state.compressor)
        self.needs_module = False

    @property
    def uses_fallback(self) -> bool:
        """True if this forward pass attends exactly, through the fallback."""
        assert self._forward is not None
        return self._forward.uses_fallback

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
        """Attend to the stored entries, by their weights.

        Args:
            query: queries of the newest tokens, (rows, heads, q, d).
            keys: keys that `update` returned, (rows, kv_heads, stored, d).
            values: values that `update` returned, (rows, kv_heads, stored, d_v).
            scale: factor b of the attention scores.
            options: keyword arguments of the attention call; `softcap` and `s_aux` are used.

        Returns:
            Outputs (rows, heads, q, d_v).
        """
        storage, value_range = self._state.storage, self._state.value_range
        assert storage is not None
        box = None if value_range is None else (value_range.lowest, value_range.highest)
        given = AttentionOptions(scale, None, True, box, options.get("softcap"), options.get("s_aux"))
        return storage.attend(query, keys, values, given)

    def after_attention(self, query: Tensor, scale: float) -> None:
        """Fold the rows over their budget, once the newest tokens have attended.

        Args:
            query: queries of the newest tokens, (rows, heads, q, d).
            scale: factor b of the attention scores.

        Raises:
            ValueError: NaN or infinity among the keys to fold; they stay as they are.
        """
        self._pass_state.waiting = None
        state, progress = self._state, self._state.progress
        learns = state.log is not None
        if learns:
            state.observe(query)
        due = progress.end_forward(scale)
        try:
            if not progress.record_past:
                if due:
                    fold_layer(self._pass_state, self._index, progress.seen)
                elif learns:
                    trim_queries(state)
        finally:
            if learns:
                state.keep_queries()
        if self._offloading:
            self._return_to_cpu()

    def restore(
        self,
        progress: Progress,
        allocated: Entries,
        length: int,
        folded_range: ValueRange | None,
        carried: Tensor | None = None,
        recent: Tensor | None = None,
        bands: Sequence[Band] = (),
    ) -> None:
        """Fill this new layer with the contents of another; see `LayerState.restore`."""
        self._pass_state.settle_bytes(allocated.keys, allocated.values)
        self._state.restore(progress, allocated, length, folded_range, carried, recent, bands)
        self.dtype, self.device, self.is_initialized = allocated.keys.dtype, allocated.keys.device, True
        self._pass_state.compressed = self._pass_state.compressed or folded_range is not None
        self._pass_state.padded = None

    def tensors(self) -> list[Tensor]:
        """List all tensors of the layer, free room included."""
        return self._state.tensors()

    @property
    def stored(self) -> int:
        """Entries held in a row: slots, exact tokens and padding; on average where heads differ, rounded up."""
        storage = self._state.storage
        return 0 if storage is None else storage.columns

    @property
    def batch_rows(self) -> int:
        """Rows of the batch; 0 before the first forward pass."""
        return len(self._state.progress.rows)
