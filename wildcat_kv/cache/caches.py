"""The cache of the user: its full-attention layers are compressed."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from wildcat_kv.cache.blueprint import Blueprint, check_budget, exact_layers
from wildcat_kv.cache.contract import CacheContract
from wildcat_kv.cache.disk.read import read
from wildcat_kv.cache.disk.saved import SavedCache, SavedLayer, SavedText
from wildcat_kv.cache.disk.write import write
from wildcat_kv.cache.error_report import ErrorReport, report
from wildcat_kv.cache.forward import PassState
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.cache.positions import RopeDeltas
from wildcat_kv.cache.sizes import cache_bytes, stored_entries, stored_tokens
from wildcat_kv.cache.static import StaticPassState, StaticWildCatLayer
from wildcat_kv.cache.window_layer import hold_windows
from wildcat_kv.compressors import Compressor
from wildcat_kv.config import BUDGETS, WildCatConfig
from wildcat_kv.hook.attention import switch
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.models.identity import ModelIdentity
from wildcat_kv.models.support import dropped_from
from wildcat_kv.recipes.presets import Preset
from wildcat_kv.recipes.recipe import Recipe


class WildCatCache(CacheContract):
    """A Transformers cache that keeps its full-attention layers within a budget.

    The method is the best one for the model, the published WildCat, or any other. Pass the cache to
    `generate(cache=...)` or to the model; before Transformers 5.24 that argument is `past_key_values=...`.

    The constructor switches the config's attention implementation to one of ours, "wildcat+sdpa" for example. With
    other caches, and as long as nothing is compressed, it calls the previous one, so the switch can stay. The cache is
    for inference: compressed layers keep keys and values without their gradients.

    Args:
        config: the model's own config, `model.config`; a copy of it never reaches the model.
        settings: budget and exact ends; or give its fields by name.
        preset: preset to begin with, by name, file or object. Without one, a budget goes with the defaults of
            `WildCatConfig`. Without a budget too, take the section that `patch_config` wrote, or the preset "default".
        compressor: method: a name from `wildcat_kv.compressors.available()`, or a `Compressor`. By default "auto", the
            best one that the model and the settings support; `cache.compressor` tells which.
        offloading: True to keep keys and values on the CPU while other layers work, as Transformers' own offloaded
            cache does; needs CUDA.
        offload_only_non_sliding: True to leave sliding-window layers on their device.
        static: True, with `max_tokens`, to keep all shapes and addresses fixed, so that decoding can be compiled by
            `compile_decoding`. Not for models with other than full-attention layers, nor for methods that learn from
            queries.
        **fields: fields of `WildCatConfig`, such as `ratio=0.25`, `max_tokens=1024`, `max_bytes="2GiB"`, `bits=4`.

    Raises:
        TypeError: config is no Transformers config, or compressor no method.
        ValueError: settings that do not fit, an unknown method or preset, a model that cannot be compressed, or
            offloading without CUDA.

    Source: Schröder and Mackey, arXiv 2602.10056.

    Example:
        cache = WildCatCache(model.config, ratio=0.25)
        out = model.generate(**inputs, cache=cache)
    """

    def __init__(
        self,
        config: Any,
        settings: WildCatConfig | None = None,
        *,
        preset: str | Path | Preset | None = None,
        compressor: str | Compressor | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        static: bool = False,
        **fields: Any,
    ) -> None:
        if settings is None and preset is None and any(fields.get(name) is not None for name in BUDGETS):
            settings, fields = WildCatConfig(**fields), {}
        recipe = Recipe.choose(config, settings, preset=preset, compressor=compressor, **fields)
        plan = Blueprint.of(config, recipe.settings, recipe.compressor, static=static, offloading=offloading)
        positions = getattr(plan.decoder, "max_position_embeddings", None)
        self._pass_state = (StaticPassState if static else PassState)(
            plan.settings,
            plan.compressor,
            positions,
            exact_layers=plan.exact,
            rotation_limit=plan.rotation_limit,
            byte_budget=plan.byte_budget,
        )
        layers, kind = plan.layers, StaticWildCatLayer if static else WildCatLayer
        sharing = [place for place, index in enumerate(plan.full) if index not in plan.exact]
        for place, index in enumerate(plan.full):
            layers[index] = kind(self._pass_state, index, place, sharing, plan.rotations.get(index))
        hold_windows(layers)
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        # `reset` copies these: in some versions not every layer of Transformers can be reset.
        self._beside = {index: copy.deepcopy(layer) for index, layer in enumerate(layers) if index not in plan.full}
        self._model = ModelIdentity.of(plan.decoder, config)
        if (length := dropped_from(plan.decoder)) is not None:
            warnings.warn(
                f"config={type(config).__name__}: generate() of this model drops any cache where a text grows past "
                f"{length} tokens; read longer prompts by model(input_ids, {CACHE}=cache) before generate()",
                stacklevel=2,
            )
        switch(plan.decoder)

    @property
    def settings(self) -> WildCatConfig:
        """Settings: budget and exact ends."""
        return self._pass_state.settings

    @property
    def compressor(self) -> Compressor:
        """Method of compression."""
        return self._pass_state.compressor

    @property
    def exact_layers(self) -> frozenset[int]:
        """Indices of the layers left uncompressed."""
        return self._pass_state.exact_layers

    @property
    def static(self) -> bool:
        """True if shapes and addresses are fixed."""
        return isinstance(self._pass_state, StaticPassState)

    @property
    def model(self) -> ModelIdentity:
        """Model that the cache was built for."""
        return self._model

    @property
    def rope(self) -> RopeDeltas:
        """Positions that the model would keep on itself."""
        return self._pass_state.rope

    def stored_length(self, layer_idx: int | None = None) -> int:
        """Count the entries that a layer stores in a row.

        These are slots and exact tokens, and the padding among them.

        Args:
            layer_idx: index of the layer; by default the average over those that have a budget, rounded up.
        """
        layers = self._pass_state.folding if layer_idx is None else [layer_idx]
        return -(-sum(stored_entries(self.layers[index]) for index in layers) // len(layers))

    def memory_bytes(self) -> int:
        """Count the bytes of all tensors held."""
        return cache_bytes(self)

    def error_report(self) -> ErrorReport:
        """Report the estimated error of attention, by layer and query head.

        It is the method's own estimate for future queries, made at the last fold. A cache from a file has none.

        Raises:
            ValueError: the method makes no estimate, or nothing has been compressed yet.

        Example:
            cache = WildCatCache(model.config, compressor="query_wildcat", ratio=0.25)
            model.generate(**inputs, cache=cache)
            print(cache.error_report())
        """
        return report(self.compressor, self._pass_state.folding)

    def go_on_from(self, other: WildCatCache) -> None:
        """Take over the positions of a cache with as many tokens and rows."""
        self._pass_state.rope = RopeDeltas(other.rope.carry(self.get_seq_length()))

    def clone(self) -> Self:
        """Copy the cache, as `copy.deepcopy` does."""
        return copy.deepcopy(self)

    def fresh(self, settings: WildCatConfig | None = None) -> Self:
        """Make an empty cache of the same kind.

        Args:
            settings: new settings with the same exact layers; by default the cache's own.

        Raises:
            ValueError: settings that leave other layers exact, or set a limit that the method cannot keep.
        """
        if settings is not None:
            check_budget(settings, self.compressor)
            if exact_layers(settings, len(self.layers), list(self._pass_state.states)) != self.exact_layers:
                raise ValueError(
                    f"settings.exact_layers={list(settings.exact_layers)}: the cache leaves layers "
                    f"{sorted(self.exact_layers)} exact; give settings that do, too"
                )
        twin = self.clone()
        if settings is not None:
            twin._pass_state.take(settings)
        twin.reset()
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file, for another process to load.

        The file is either complete or absent. It holds the settings and the shape of the model, not its weights:
        load it with the model that read the context.

        Args:
            path: file; an existing one is replaced.

        Raises:
            ValueError: nothing was read yet, or a layer is of a kind that cannot be saved.
            RuntimeError: an earlier forward pass failed half-way.
            OSError: the file cannot be written.
        """
        write(path, self.saved())

    def saved(self, text: SavedText | None = None) -> SavedCache:
        """Collect the parts of the cache that a file keeps.

        Args:
            text: text that was read, for the file to describe; None if unknown.

        Raises:
            ValueError: nothing was read yet.
            RuntimeError: an earlier forward pass failed half-way.
        """
        self._synchronize()
        self.check_in_step()
        layers = [layer.state if isinstance(layer, WildCatLayer) else layer for layer in self.layers]
        rope = RopeDeltas(self.rope.carry(self.get_seq_length()))
        return SavedCache.of(self.model, self.settings, self.compressor, layers, rope, text)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: Any,
        *,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Self:
        """Load a cache from a file that `save` wrote.

        On the CPU the file is mapped into memory, not copied: processes that load one file share it, and a page is
        copied when it is written to. Do not write to the file itself while a cache uses it; `save` replaces it.
        A `clone()` of the loaded cache goes on bit for bit like the saved one. The loaded cache itself reads its
        tensors in place: sums can differ in their last bits if kernels depend on the alignment of memory.

        Args:
            path: file.
            config: config of the model that goes on, `model.config`.
            device: device of the tensors. Full-attention layers follow the model from there; other layers stay.
            **options: further arguments of the class. Settings and method come from the file; a method that is not
                built in must be given as `compressor`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no cache, is damaged, or comes from another version, model or method. Nothing is
                changed then.
        """
        return cls.restored(read(path, config, device), config, **options)

    @classmethod
    def restored(cls, saved: SavedCache, config: Any, **options: Any) -> Self:
        """Build a cache from the contents of a file; see `load`."""
        given = options.pop("compressor", None)
        method = given if isinstance(given, Compressor) else saved.method(given)
        saved.check_method(method)
        cache = cls(config, saved.settings, compressor=method, **options)
        _fill(cache.layers, saved)
        cache.rope.steps = saved.rope.steps
        return cache

    def __repr__(self) -> str:
        layers, mebibytes = self._compressed_layers(), self.memory_bytes() / 2**20
        chosen = _describe(self.settings, self.compressor)
        return (
            f"{type(self).__name__}({chosen}; {len(layers)} of {len(self.layers)} layers compressed; "
            f"{layers[0].get_seq_length()} tokens seen, {stored_tokens(self):.0f} stored, {mebibytes:.1f} MiB)"
        )


def _fill(layers: list[Any], saved: SavedCache) -> None:
    """Fill the layers of a new cache from the contents of a file."""
    for layer, kept in zip(layers, saved.layers, strict=True):
        if isinstance(kept, SavedLayer):
            queries = (kept.carried, kept.recent)
            layer.restore(kept.progress, kept.entries, kept.length, kept.folded_range, *queries, kept.bands)
        else:
            vars(layer).update(kept.attributes)


def _describe(settings: WildCatConfig, compressor: Compressor) -> str:
    """Describe the method, and the settings that are not the default ones."""
    given = [f"{name}={value!r}" for name, value in settings.model_dump(exclude_defaults=True).items()]
    method = type(compressor)
    own = [f"{name}={value!r}" for name, value in vars(compressor).items() if value != getattr(method, name, None)]
    return ", ".join([f"{method.__name__}({', '.join(own)})", *given])


# The same class, by a name that promises no method.
CompressedCache = WildCatCache
