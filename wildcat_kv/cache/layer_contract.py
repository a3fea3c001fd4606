"""Answer what Transformers asks of one layer: lengths, rows, rollback, and the device it lives on."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from wildcat_kv.cache.forward import PassState, fold_layer
from wildcat_kv.cache.state import LayerState
from wildcat_kv.compressors import Everything
from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.hook.marks import Forward


class LayerContract(CacheLayerMixin):
    """Transformers' side of a compressed layer, but for `update` and what follows it."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = True
    fixed = False

    def __init__(
        self, shared: PassState, index: int, place: int, sharing: Sequence[int], rotation: Rotation | None = None
    ) -> None:
        super().__init__()
        self._pass_state = shared
        self._index = index
        self._place = place
        self._sharing = sharing
        self._rotation = rotation
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        shared, settings, compressor = self._pass_state, self._pass_state.settings, self._pass_state.compressor
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
        self._pass_state.states[self._index] = self._state
        self._offloading = False
        self._arrival: Any = None  # of a copy to the device, on another stream
        self._forward: Forward | None = None  # the last one that was served

    @property
    def state(self) -> LayerState:
        """What the layer holds."""
        return self._state

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

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: positions continue from it. What is stored is `stored`."""
        return self._state.progress.seen

    def get_max_length(self) -> int:
        """-1: any number of tokens can be read."""
        return -1

    def reset(self) -> None:
        """Forget everything, as if new."""
        self._clear()
        self._pass_state.reset()

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
            self._pass_state.padded = self._pass_state.padded and None
            if -tokens_to_remove == self.get_seq_length():  # of this text, nothing is left
                record_past = self.record_past
                self._clear()
                self.record_past = record_past
                return
            self._state.take_back(-tokens_to_remove)
        fold_layer(self._pass_state, self._index, self.get_seq_length())
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
            window = self._pass_state.settings.window
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

    # Its device

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
