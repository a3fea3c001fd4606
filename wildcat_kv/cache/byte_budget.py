"""A budget in bytes, turned into a number of entries once the shapes are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from wildcat_kv.cache.budget import BINS_A_BLOCK
from wildcat_kv.cache.query_log import PARTS
from wildcat_kv.cache.storage import LEAST_ROOM
from wildcat_kv.compressors import Compressor
from wildcat_kv.config import WildCatConfig

# Bits of a slot where a budget in bytes does not say: they cost little accuracy where measured (docs/budget.md).
_BITS = 4
# Bytes of float32 and of the flag beside an entry in the dtype of the model, and of half precision and the flag of a
# quantised one.
_BESIDE_ENTRY = 5
_BESIDE_SLOT = 3
# Bytes of a scale and its lowest number.
_SCALE = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of the keys and values of one layer.

    Attributes:
        rows: rows of the batch.
        heads: key heads.
        d: channels of a key.
        d_v: channels of a value.
        itemsize: bytes of a number.
    """

    rows: int
    heads: int
    d: int
    d_v: int
    itemsize: int

    @staticmethod
    def of(keys: Tensor, values: Tensor) -> Shape:
        """Read the sizes of keys and values (rows, kv_heads, n, channels)."""
        rows, heads, _, d = keys.shape
        return Shape(rows, heads, d, values.shape[3], keys.element_size())

    @staticmethod
    def expected(decoder: Any, rows: int = 1, dtype: torch.dtype | None = None) -> Shape:
        """Read the sizes from a decoder's config; its dtype by default, or one of 2 bytes."""
        heads = decoder.num_attention_heads
        d = getattr(decoder, "head_dim", None) or decoder.hidden_size // heads
        itemsize = getattr(dtype or getattr(decoder, "dtype", None), "itemsize", 2)
        return Shape(rows, getattr(decoder, "num_key_value_heads", None) or heads, d, d, itemsize)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's key and value in the dtype of the model, over all heads of a row."""
        return self.heads * (self.d + self.d_v) * self.itemsize

    @property
    def range_bytes(self) -> int:
        """Bytes of the two boxes around the values of a row."""
        return 4 * self.heads * self.d_v * self.itemsize

    def entry_bytes(self, state_size: int) -> int:
        """Count the bytes of an entry in the dtype of the model, over all heads of a row."""
        return self.token_bytes + self.heads * (_BESIDE_ENTRY + 4 * state_size)

    def slot_bytes(
        self, bits: int | None, group: int, state_size: int, size: int | None = None, *, weighted: bool = True
    ) -> float:
        """Count the bytes of a slot, over all heads of a row.

        Args:
            bits: bits of a number; None for those of an entry in the dtype of the model.
            group: slots of a group, and channels that share a scale of the values.
            state_size: numbers that the method keeps of a slot.
            size: slots of this slot's group, if it is a smaller one.
            weighted: False where all slots are valid and weigh 1, which takes no bytes.
        """
        if bits is None:
            return self.entry_bytes(state_size)
        parts = self.d_v // group if self.d_v % group == 0 else 1
        scales = _SCALE * (self.d / (size or group) + parts)
        beside = (_BESIDE_SLOT if weighted else 0) + 4 * state_size
        return self.heads * ((self.d + self.d_v) * bits / 8 + scales + beside)

    def slot_cost(self, settings: WildCatConfig, compressor: Compressor) -> float:
        """Give the bytes of a quantised slot over those of an entry in the dtype of the model.

        It is 0 where queries are kept for all exact tokens: then these are quantised as soon as possible.
        """
        seen, size = compressor.observation, compressor.state_size
        if settings.bits is None or (seen is not None and seen.latest is None):
            return 0.0
        return self.slot_bytes(settings.bits, settings.group, size) / self.entry_bytes(size)


@dataclass(frozen=True)
class ByteBudget:
    """What a budget in bytes is for: the whole cache of one model.

    Attributes:
        settings: settings with `max_bytes`.
        compressor: method.
        layers: number of compressed layers.
        query_heads: query heads of a layer.
        windows: tokens that each layer with a sliding window holds.
    """

    settings: WildCatConfig
    compressor: Compressor
    layers: int
    query_heads: int
    windows: tuple[int, ...]

    @classmethod
    def of(
        cls, settings: WildCatConfig, compressor: Compressor, decoder: Any, layers: Sequence[Any], full: Sequence[int]
    ) -> Self:
        """Plan for a model, and check the budget for one row.

        Args:
            settings: settings with `max_bytes`.
            compressor: method.
            decoder: config of the decoder.
            layers: Transformers' layers of an uncompressed cache.
            full: indices of the compressed layers.

        Raises:
            ValueError: a layer whose size is not known, or too few bytes.
        """
        windows = []
        for index, layer in enumerate(layers):
            if index in full:
                continue
            window = getattr(layer, "sliding_window", None)
            if window is None:
                raise ValueError(
                    f"max_bytes={settings.max_bytes}: layer {index} ({type(layer).__name__}) holds states that are not "
                    "counted; give ratio or max_tokens for this model"
                )
            windows.append(int(window))
        budget = cls(settings, compressor, len(full), decoder.num_attention_heads, tuple(windows))
        budget.settle(Shape.expected(decoder))
        return budget

    def settle(self, shape: Shape) -> WildCatConfig:
        """Give the settings with the number of entries that fit, and the bits of a slot.

        Raises:
            ValueError: too few bytes for sink, window and one bin.
        """
        settings, method = self.settings, self.compressor
        assert settings.max_bytes is not None
        bits = settings.bits or (_BITS if method.takes_bits else None)
        slot = shape.slot_bytes(bits, settings.group, method.state_size)
        left = settings.max_bytes / shape.rows / self.layers - self._fixed(shape)
        slots, ends = int(left // slot), settings.sink + settings.window
        if slots < settings.bin_rank:
            least = shape.rows * self.layers * (self._fixed(shape) + settings.bin_rank * slot)
            raise ValueError(
                f"max_bytes={settings.max_bytes} is too small: sink={settings.sink}, window={settings.window} and one "
                f"bin of {shape.rows} rows and {self.layers} layers take {int(least) + 1:,} bytes; raise it, or lower "
                "sink and window"
            )
        return settings.changed(max_tokens=slots + ends, bits=bits)

    def _fixed(self, shape: Shape) -> float:
        """Count the bytes of a row and layer that do not depend on the number of slots."""
        settings, seen = self.settings, self.compressor.observation
        block = max(BINS_A_BLOCK * settings.bin_rank, settings.group)
        dense = settings.sink + settings.window + block + LEAST_ROOM
        queries = 0
        if seen is not None:  # those of the last fold, and of what came since or may be taken back
            queries = seen.carried + settings.window + (block if seen.latest is None else seen.latest) + PARTS
        asked = queries * self.query_heads * shape.d * shape.itemsize
        beside = sum(self.windows) * shape.token_bytes / self.layers
        return dense * shape.entry_bytes(self.compressor.state_size) + shape.range_bytes + asked + beside
