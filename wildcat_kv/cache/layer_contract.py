"""Methods that Transformers calls on one layer: lengths, rows, rollback, device."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from wildcat_kv.cache.blueprint import layer_choice
from wildcat_kv.cache.forward import PassState, fold_layer
from wildcat_kv.cache.model_layer import ModelLayer
from wildcat_kv.cache.state import LayerState
from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.hook.marks import Forward


class LayerContract(CacheLayerMixin):
    """Transformers' side of a compressed layer, except `update` and attention.

    Args:
        shared: state that all layers of the cache share.
        index: index of the layer in the model.
        place: index among the full-attention layers.
        sharing: places of the layers that share one budget.
        rotation: rotary positions of the layer; None if the method needs none.
    """

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
        settings, compressor = layer_choice(settings, compressor, exact=self._index in shared.exact_layers)
        self._state = LayerState(
            settings,
            compressor,
            self._index,
            self._place,
            self._sharing,
            ModelLayer(self._rotation),
            fixed=self.fixed,
        )
        self._pass_state.states[self._index] = self._state
        self.needs_module = compressor.needs_output_projection
        self._offloading = False
        self._arrival: Any = None  # event of a copy to the device on another stream
        self._forward: Forward | None = None  # last pass that reached this layer

    @property
    def state(self) -> LayerState:
        """Contents of the layer."""
        return self._state

    @property
    def keys(self) -> Tensor | None:
        """Stored keys (rows, kv_heads, stored, d): pivots, then exact tokens.

        None when empty.
        """
        storage = self.state.storage
        return None if storage is None else storage.entries.keys

    @keys.setter
    def keys(self, keys: None) -> None:
        pass  # the base class sets None

    @property
    def values(self) -> Tensor | None:
        """Stored values (rows, kv_heads, stored, d_v): slots, then exact tokens.

        The value of a slot is its numerator over its mass. None when empty.
        """
        storage = self.state.storage
        return None if storage is None else storage.entries.values

    @values.setter
    def values(self, values: None) -> None:
        pass  # the base class sets None

    @property
    def record_past(self) -> bool:
        """True if folds wait for `crop`, so that tokens can be taken back."""
        return self._state.progress.record_past

    @record_past.setter
    def record_past(self, record: bool) -> None:
        self._state.progress.record_past = record

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values of these shapes, in the first `update`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._state.allocate(key_states, value_states)
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Count the tokens seen, padding included; `stored` counts the entries held."""
        return self._state.progress.seen

    def get_max_length(self) -> int:
        """Return -1: any number of tokens can be read."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._clear()
        self._pass_state.reset()

    def activate_past_recording(self) -> None:
        """Fold nothing until `crop`, so that new tokens can be taken back.

        Several forward passes may come before the crop. Tokens before the window cannot be taken back then: they are
        folded all the same, so that the layer stays bounded.
        """
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back, then do the folds that waited.

        Args:
            tokens_to_remove: minus the number of columns to take back; 0 to take none.

        Raises:
            ValueError: a positive number, or tokens that are folded. The layer is left as it was.
        """
        tokens_to_remove = operator.index(tokens_to_remove)
        self.check_crop(tokens_to_remove)
        if not self.is_initialized:
            return
        self._bring_to(self.device)
        if tokens_to_remove:
            self._pass_state.padded = self._pass_state.padded and None
            if -tokens_to_remove == self.get_seq_length():  # nothing of the text is left
                record_past = self.record_past
                self._clear()
                self.record_past = record_past
                return
            self._state.take_back(-tokens_to_remove)
        fold_layer(self._pass_state, self._index, self.get_seq_length())
        self._return_to_cpu()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse a `crop` that cannot be done.

        Args:
            tokens_to_remove: minus the number of columns to take back; 0 to take none.

        Raises:
            ValueError: a positive number, or tokens that are folded.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove} must be negative: minus the number of tokens to take back"
            )
        exact, seen = self._state.croppable, self.get_seq_length()
        if -tokens_to_remove == seen == self._state.progress.since_fold:  # removing everything is always allowed
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
        """Select rows: row i becomes the former row `beam_idx[i]`.

        Args:
            beam_idx: int64 (k,); rows may be left out or repeated.
        """
        self.select_rows(beam_idx, None if self._state.alike else beam_idx.tolist())

    def select_rows(self, index: Tensor, on_host: list[int] | None) -> None:
        """Select rows by indices that the host may have read already.

        Args:
            index: int64 (k,).
            on_host: the same indices; None if all rows hold the same number of tokens.
        """
        if not self.is_initialized:
            return
        self._bring_to(self.device)
        self._state.select_rows(index, on_host)
        self._return_to_cpu()

    def offload(self) -> None:
        """Keep keys and values on the CPU between forward passes.

        It begins after the attention of the current pass.
        """
        self._offloading = self.is_initialized

    def prefetch(self) -> None:
        """Bring keys and values back to the layer's device ahead of time.

        The copy runs on the current stream.
        """
        if self.is_initialized:
            self._bring_to(self.device)
            if self.device.type == "cuda":
                self._arrival = torch.cuda.current_stream(self.device).record_event()

    # Device

    def _bring_to(self, device: torch.device) -> None:
        """Move everything to `device`.

        It is the layer's device, or, for a cache from a file, the device of the first keys.
        """
        self.wait()
        self._state.move(device)
        self.device = device

    def wait(self) -> None:
        """Let the current stream wait for a copy on another stream."""
        if self._arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrival)
            self._arrival = None

    def _return_to_cpu(self) -> None:
        """Move keys and values to the CPU, if offloading is on."""
        if self._offloading:
            assert self._state.storage is not None
            self._state.storage.offload()
