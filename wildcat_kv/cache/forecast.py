"""Bytes of a cache, computed from shapes before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wildcat_kv.cache.banding import alike, first_packed, is_unequal
from wildcat_kv.cache.banding_at_once import ROOM
from wildcat_kv.cache.blueprint import Blueprint, layer_choice
from wildcat_kv.cache.budget import FoldPlan, Row, plan_fold
from wildcat_kv.cache.byte_budget import Shape
from wildcat_kv.cache.packed import groups_of
from wildcat_kv.cache.query_log import PARTS
from wildcat_kv.cache.sizes import layer_tensors
from wildcat_kv.cache.storage import Room
from wildcat_kv.compressors import Compressor
from wildcat_kv.compressors.registry import reads_twice
from wildcat_kv.config import WildCatConfig
from wildcat_kv.recipes.presets import Preset
from wildcat_kv.recipes.recipe import Recipe

# Transformers' layers that hold nothing.
_EMPTY = {"DummyLayer"}


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a cache that has read a text, as computed beforehand.

    Attributes:
        settings: settings that it is computed for; those of `max_bytes` are turned into tokens.
        compressor: method that it is computed for.
        nbytes: bytes of the compressed cache.
        exact_nbytes: bytes of all keys and values in the dtype of the model, those behind sliding windows left out.
        estimated: True where what is read decides how many slots a head holds, as it does with `query_wildcat`; else
            `nbytes` is right to the byte.
        not_counted: layers whose states are in neither number: each its index and kind.
    """

    settings: WildCatConfig
    compressor: Compressor
    nbytes: int
    exact_nbytes: int
    estimated: bool
    not_counted: tuple[str, ...]

    @property
    def share(self) -> float:
        """Bytes over those of the exact cache."""
        return self.nbytes / self.exact_nbytes


def cache_size(
    config: Any,
    tokens: int,
    settings: WildCatConfig | None = None,
    *,
    rows: int = 1,
    dtype: torch.dtype | None = None,
    preset: str | Path | Preset | None = None,
    compressor: str | Compressor | None = None,
    **fields: Any,
) -> CacheSize:
    """Compute the bytes that a cache will hold, from the model's config alone.

    It is what `cache.memory_bytes()` counts after a text without padding was read in one forward pass. Tokens that come
    later are exact until the next fold.

    Args:
        config: config of the model, such as `model.config`; left as it is.
        tokens: tokens of the text.
        settings: complete settings of the cache; or:
        rows: rows of the batch, all of `tokens`.
        dtype: dtype of the model; by default that of the config, or one of 2 bytes.
        preset: preset to begin with, by name, file or object; by default what `WildCatCache` begins with.
        compressor: method, instead of the preset's.
        **fields: fields of `WildCatConfig`, such as ratio=0.25, instead of the preset's.

    Raises:
        TypeError: config is no Transformers config.
        ValueError: settings that do not fit, a model that cannot be compressed, or `ratio="auto"`, with which the
            text decides.

    Example:
        >>> from transformers import AutoConfig
        >>> llama = AutoConfig.for_model("llama", num_hidden_layers=32, num_key_value_heads=8, head_dim=128)
        >>> size = cache_size(llama, 131_072, ratio=1.0, bits=4)
        >>> size.exact_nbytes // 2**30, round(size.share, 3)
        (16, 0.287)
    """
    for name, number in (("tokens", tokens), ("rows", rows)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r} must be a positive integer")
    recipe = Recipe.choose(config, settings, preset=preset, compressor=compressor, **fields)
    plan = Blueprint.of(config, recipe.settings, reads_twice(recipe.compressor) or recipe.compressor)
    if plan.settings.ratio == "auto":
        raise ValueError("ratio='auto': the text decides how much is kept; give a ratio that is a number")
    return _count(plan, tokens, rows, dtype)


def _count(plan: Blueprint, tokens: int, rows: int, dtype: torch.dtype | None) -> CacheSize:
    """Count layer by layer."""
    chosen = plan.settings
    if plan.byte_budget is not None:
        chosen = plan.byte_budget.settle(Shape.expected(plan.decoder, rows, dtype))
    sharing = [place for place, index in enumerate(plan.full) if index not in plan.exact]
    nbytes, exact_nbytes, estimated, not_counted = 0.0, 0, False, []
    for index, layer in enumerate(plan.layers):
        config = _config_of(plan.decoder, index)
        window, shape = getattr(layer, "sliding_window", None), Shape.expected(config, rows, dtype)
        if index in plan.full:
            rule = layer_choice(chosen, plan.compressor, exact=index in plan.exact)
            own = _Layer(*rule, shape, plan.full.index(index), sharing, tokens)
            nbytes += rows * own.row_bytes(config.num_attention_heads)
            exact_nbytes += rows * tokens * shape.token_bytes
            estimated = estimated or own.estimated
        elif window is not None:
            held = rows * min(tokens, window - 1) * shape.token_bytes
            nbytes += held + sum(tensor.nbytes for tensor in layer_tensors(layer))
            exact_nbytes += held
        elif type(layer).__name__ not in _EMPTY:
            not_counted.append(f"layer {index} ({type(layer).__name__})")
    return CacheSize(chosen, plan.compressor, round(nbytes), exact_nbytes, estimated, tuple(not_counted))


def _config_of(decoder: Any, index: int) -> Any:
    """Give the config that holds for one layer; some models have layers of several shapes."""
    parts = getattr(decoder, "per_layer_config", None)
    return decoder if parts is None else parts[index]


@dataclass(frozen=True)
class _Layer:
    """One layer after it has read a text.

    Attributes:
        settings: its settings.
        method: its method.
        shape: sizes of its keys and values.
        place: place among those that can be compressed.
        sharing: places of the layers that share one budget.
        tokens: tokens read.
    """

    settings: WildCatConfig
    method: Compressor
    shape: Shape
    place: int
    sharing: Sequence[int]
    tokens: int

    @property
    def fold(self) -> FoldPlan | None:
        """Fold that followed the text; None for none."""
        row = Row(seen=self.tokens, exact=self.tokens)
        cost = self.shape.slot_cost(self.settings, self.method)
        return plan_fold(row, self.settings, prefill=self.tokens > 1, slot_cost=cost)

    @property
    def estimated(self) -> bool:
        """True if what is read decides how many slots a head holds."""
        fold = self.fold
        return fold is not None and not fold.packs and not self.method.fixed_slots

    def row_bytes(self, query_heads: int) -> float:
        """Count the bytes of a row."""
        fold, room = self.fold, Room.under(self.settings.max_tokens)
        queries = self._queries(folded=fold is not None) * query_heads * self.shape.d * self.shape.itemsize
        held = room.capacity(self.tokens)
        if fold is None:
            return self._entries(held) + queries
        beside = self.shape.range_bytes + queries
        slots = self._slots(fold)
        if self.settings.bits is not None or self.estimated or is_unequal([slots]):
            return beside + self._bands(fold, slots)
        columns = fold.sink + slots[0] + fold.window
        return beside + self._entries(held if room.suits(held, columns) else room.capacity(columns))

    def _slots(self, fold: FoldPlan) -> list[int]:
        """Count the slots of each head."""
        heads = self.shape.heads
        if fold.packs:
            return [fold.items] * heads
        return self.method.expect_slots(self.place, self.sharing, heads, fold.items, fold.rank)

    def _entries(self, columns: int, heads: int | None = None, state_size: int | None = None) -> float:
        """Count the bytes of entries in the dtype of the model; those of all heads by default."""
        size = self.method.state_size if state_size is None else state_size
        return columns * self.shape.entry_bytes(size) * (heads or self.shape.heads) / self.shape.heads

    def _bands(self, fold: FoldPlan, slots: Sequence[int]) -> float:
        """Count the bytes of heads that hold so many slots, in bands."""
        bits, group, total = self.settings.bits, self.settings.group, 0.0
        size = 0 if self.method.reads_twice else self.method.state_size  # it is about the text that was read
        for places in alike(range(len(slots)), slots):
            most, fewest = (find(slots[place] for place in places) for find in (max, min))
            width = most if bits is None else first_packed(most)
            waiting = width if bits is None else 0
            total += self._entries(ROOM.capacity(fold.sink + waiting + fold.window), len(places), size)
            for number, (count, own) in enumerate(groups_of(width, group) if bits is not None else ()):
                weighted = not self.method.keeps_tokens or (number == 0 and fewest < width)
                a_slot = self.shape.slot_bytes(bits, group, size, own, weighted=weighted)
                total += count * a_slot * len(places) / self.shape.heads
        return total

    def _queries(self, *, folded: bool) -> int:
        """Count the queries that the method keeps."""
        seen = self.method.observation
        if seen is None:
            return 0
        if folded:
            return min(seen.carried, self.tokens if seen.latest is None else min(seen.latest, self.tokens))
        kept = self.tokens if seen.latest is None else seen.latest + self.settings.window
        return kept if self.tokens > kept + PARTS else self.tokens
