"""Methods that Transformers calls on a cache."""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from typing_extensions import Self, override

from wildcat_kv.cache.checks import check_foreign_crop, kept_rows
from wildcat_kv.cache.forward import PassState
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.cache.positions import NAME
from wildcat_kv.cache.sizes import layer_tensors
from wildcat_kv.models.identity import ModelIdentity


class CacheContract(Cache):
    """Transformers' side of a cache: lengths, masks, rows, rollback and copies."""

    _pass_state: PassState
    _model: ModelIdentity
    _beside: dict[int, Any]

    def reset(self) -> None:
        """Forget everything; the next text is read from its beginning."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, WildCatLayer):
                layer.reset()
            else:
                self.layers[index] = copy.deepcopy(self._beside[index])

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back, bit for bit as if never read.

        Tokens since the last fold can be taken back. A method that learns from queries holds some queries only: then
        at least `window` tokens can be taken back. After `activate_past_recording()` folds wait for `crop`. Then
        the whole last forward pass can be taken back, and at least `window` tokens of the passes since the last crop.
        `crop(0)` takes nothing back and does the folds that have waited.

        Args:
            tokens_to_remove: minus the number of tokens (columns, padding included).

        Raises:
            ValueError: a positive number, tokens that are folded, or an uncompressed layer that cannot take tokens
                back. The cache is left as it was.
            RuntimeError: an earlier forward pass failed half-way.
        """
        tokens_to_remove = operator.index(tokens_to_remove)
        self.check_in_step()
        for layer in self.layers:
            if isinstance(layer, WildCatLayer):
                layer.check_crop(tokens_to_remove)
            elif tokens_to_remove and layer_tensors(layer):
                check_foreign_crop(layer, tokens_to_remove)
        if not self._compressed_layers()[0].get_seq_length():
            return
        for layer in self.layers:
            if tokens_to_remove or getattr(layer, "record_past", True):
                layer.crop(tokens_to_remove)
        if tokens_to_remove:
            self._pass_state.rope.crop(self._compressed_layers()[0].get_seq_length())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Count the tokens seen, padding included.

        A model that keeps positions on itself is given this cache's positions, see `positions.py`.

        Raises:
            ValueError: these positions are not known, or another model read the tokens.
        """
        seen = super().get_seq_length(layer_idx)
        # A traced caller has no frame to look at.
        if not torch.compiler.is_compiling() and NAME in (caller := sys._getframe(1)).f_code.co_names:
            self._pass_state.rope.place(caller, seen, self._model)
        return seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return length and offset for the mask; a forward pass begins here.

        Raises:
            RuntimeError: an earlier forward pass failed half-way.
        """
        self.check_in_step()
        return super().get_mask_sizes(query_length, layer_idx)

    def announce_step(self, rows: int) -> Tensor:
        """Prepare a forward pass of one token that may be traced.

        The cache is static, and no row has padding in this pass.

        Args:
            rows: rows of the batch.

        Returns:
            The 4D mask to pass to the model as `attention_mask`.
        """
        self.check_in_step()
        layer = self._compressed_layers()[0]
        layer.announce(rows, 1, None)
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=layer.device)

    @override
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self._pass_state.note_linear(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    @override
    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self._pass_state.note_linear(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows: row i becomes the former row `beam_idx[i]`.

        Args:
            beam_idx: int64 (k,); rows may be left out or repeated.
        """
        self._pass_state.padded = self._pass_state.padded and None
        self._pass_state.rope.select_rows(beam_idx)
        # The host reads the indices once for all layers, and only if rows hold different numbers of tokens.
        on_host = None if all(layer.state.alike for layer in self._compressed_layers()) else beam_idx.tolist()
        for layer in self.layers:
            if isinstance(layer, WildCatLayer):
                layer.select_rows(beam_idx, on_host)
            else:
                layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies side by side.

        It serves several questions about one context.

        Args:
            repeats: number of copies of each row.

        Raises:
            ValueError: repeats is no positive integer.
        """
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"repeats={repeats!r} must be a positive integer, the copies of each row")
        self.reorder_cache(torch.arange(self._rows()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep some rows, in the given order; rows may be repeated.

        Args:
            indices: int64 (k,) or a sequence of integers, negative ones counted from the end; or a bool mask
                over the rows.

        Raises:
            ValueError: rows that the cache does not hold, or no rows. The cache is left as it was.
        """
        if rows := self._rows():
            self.reorder_cache(kept_rows(indices, rows))

    def check_in_step(self) -> None:
        """Refuse to go on from a forward pass that failed half-way.

        Raises:
            RuntimeError: some layers have read tokens that others have not.
        """
        counts, begun = set(), self._pass_state.begun
        for state in self._pass_state.states.values():
            counts.add(state.progress.seen)
        for layer in self.layers:
            if getattr(layer, "is_sliding", False):
                counts.add(layer.get_seq_length())
        if begun or len(counts) > 1:
            raise RuntimeError(
                "some layers have read tokens that others have not: an earlier forward pass failed half-way, then call "
                "cache.reset() and read the text again; or the model has fewer layers than its config says"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self._synchronize()
        # The method has no state, and a stream of the device cannot be copied: both are shared.
        for shared in (self._pass_state.compressor, getattr(self, "prefetch_stream", None)):
            memo[id(shared)] = shared
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _synchronize(self) -> None:
        """Wait for the device's copies and for compiled steps.

        The host can read the tensors after that.
        """
        layers = [layer for layer in self._compressed_layers() if layer.is_initialized] if self.offloading else []
        for layer in self._compressed_layers():
            layer.state  # noqa: B018  # a static layer catches up
        for layer in layers:
            layer.wait()
            if layer.device.type == "cuda":
                torch.cuda.synchronize(layer.device)

    def _compressed_layers(self) -> list[WildCatLayer]:
        return [layer for layer in self.layers if isinstance(layer, WildCatLayer)]

    def _rows(self) -> int:
        """Count the rows of the batch, 0 before the first forward pass."""
        return self._compressed_layers()[0].batch_rows
