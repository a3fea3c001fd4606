"""A cache as plain data, to be saved and restored from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from wildcat_kv.cache.bands import Band, BandedStorage
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.positions import RopeDeltas
from wildcat_kv.cache.progress import Progress
from wildcat_kv.cache.state import LayerState
from wildcat_kv.cache.value_range import ValueRange
from wildcat_kv.compressors import Compressor, Everything, resolve
from wildcat_kv.compressors.describe import describe, rebuild
from wildcat_kv.compressors.registry import AUTO, OURS
from wildcat_kv.config import WildCatConfig
from wildcat_kv.models.identity import ModelIdentity


@dataclass(frozen=True)
class SavedText:
    """The text of a saved cache: its tokens and its model's weight samples.

    Attributes:
        ids: tokens whose positions the cache continues, int64 (1, n).
        tokens: number of tokens read in all.
        weights: samples of the model's weights, see `weight_samples`.
    """

    ids: Tensor
    tokens: int
    weights: dict[str, list[float]]


@dataclass(frozen=True)
class SavedLayer:
    """One compressed layer.

    Attributes:
        progress: numbers of the layer.
        entries: stored entries, with the free room behind them; none of a layer in bands.
        length: number of entries in use.
        folded_range: box around the values of folded tokens; None before the first fold.
        carried: queries kept from earlier folds (rows, query_heads, q, d); None for none.
        recent: queries since the last fold, of the same shape; None for none.
        bands: bands of a layer that is held in bands.
    """

    progress: Progress
    entries: Entries
    length: int
    folded_range: ValueRange | None
    carried: Tensor | None
    recent: Tensor | None
    bands: Sequence[Band] = ()

    @staticmethod
    def of(state: LayerState) -> SavedLayer:
        """Take what a layer holds; tensors in one piece are not copied."""
        storage = state.held
        carried, recent = (None, None) if state.log is None else (state.log.carried, state.log.recent())
        if isinstance(storage, BandedStorage):
            entries, bands = storage.allocated, storage.bands
        else:
            entries, bands = storage.snapshot(), []
        return SavedLayer(state.progress, entries, storage.length, state.folded_range, carried, recent, bands)

    def unfit(self, compressor: Compressor) -> str | None:
        """Say why `compressor` cannot go on from here; None if it can."""
        # Earlier releases kept no state of a method that reads twice: it is used up by the one fold there is.
        sizes = {compressor.state_size, *([0] if compressor.reads_twice else [])}
        if self.entries.carried_state.shape[-1] not in sizes:
            return "what its method remembers does not fit the method"
        observation, exact = compressor.observation, self.progress.since_fold
        if observation is None:
            if self.carried is None and self.recent is None:
                return None
            return "it has queries, and its method learns from none"
        held = 0 if self.recent is None else self.recent.shape[2]
        needed = exact if observation.latest is None else min(exact, observation.latest)
        return None if held >= needed else "queries are missing"


@dataclass(frozen=True)
class ForeignLayer:
    """One of Transformers' own layers.

    Attributes:
        kind: name of its class.
        attributes: its attributes by name.
    """

    kind: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class SavedCache:
    """A cache as plain data, with its text if there is one.

    Attributes:
        model: model that the cache was built for.
        settings: settings of the cache.
        compressor: description of the method, see `describe`.
        layers: one a layer of the model.
        rope: positions that the model would keep on itself.
        text: text with its ids; None for a cache alone.
        path: file that it was read from; empty before it is written.
    """

    model: ModelIdentity
    settings: WildCatConfig
    compressor: JsonValue
    layers: list[SavedLayer | ForeignLayer]
    rope: RopeDeltas
    text: SavedText | None = None
    path: str = ""

    @staticmethod
    def of(
        model: ModelIdentity,
        settings: WildCatConfig,
        compressor: Compressor,
        layers: Sequence[LayerState | Any],
        rope: RopeDeltas,
        text: SavedText | None = None,
    ) -> SavedCache:
        """Gather what a cache consists of.

        Args:
            model: model that the cache was built for.
            settings: settings of the cache.
            compressor: method of the cache.
            layers: states of the compressed layers, and Transformers' own layers as they are.
            rope: positions that have an effect after the tokens read.
            text: text with its ids; None for a cache alone.

        Raises:
            ValueError: nothing was read yet, or a method whose parameters cannot be saved.
        """
        if not any(layer.stored for layer in layers if isinstance(layer, LayerState)):
            raise ValueError("the cache is empty: read a context with the model before saving it")
        saved: list[SavedLayer | ForeignLayer] = [
            SavedLayer.of(layer) if isinstance(layer, LayerState) else ForeignLayer(type(layer).__name__, vars(layer))
            for layer in layers
        ]
        return SavedCache(model, settings, describe(compressor), saved, rope, text)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the keys in compressed layers."""
        return next(layer.entries.keys.dtype for layer in self.layers if isinstance(layer, SavedLayer))

    def method(self, name: str | None) -> Compressor:
        """Rebuild the method that compressed the cache, or resolve another `name`.

        Raises:
            ValueError: the method is none of this library's and no name is given, or there is no such method.
        """
        try:
            found = rebuild(self.compressor)
        except ValueError as error:
            if name in (None, AUTO):
                raise ValueError(f"path={self.path!r} was compressed by {error}") from None
            return resolve(name, self.settings)
        return found if name in (None, AUTO) or OURS.get(name) is type(found) else resolve(name, self.settings)

    def check_method(self, compressor: Compressor) -> None:
        """Refuse a method that cannot go on with the cache.

        Raises:
            ValueError: names both methods, or the damage.
        """
        given = describe(compressor)
        if given != self.compressor:
            raise ValueError(
                f"path={self.path!r} was compressed by {self.compressor}, and the cache to load it into compresses by "
                f"{given}; load it with the class and the compressor that saved it"
            )
        exact = {index % len(self.layers) for index in self.settings.exact_layers}
        for index, layer in enumerate(self.layers):
            quantised = self.settings.share == 1 and self.settings.bits is not None
            method = Everything() if index in exact or quantised else compressor
            if isinstance(layer, SavedLayer) and (fault := layer.unfit(method)):
                raise ValueError(f"path={self.path!r} is damaged: layer {index}: {fault}; write it anew")
