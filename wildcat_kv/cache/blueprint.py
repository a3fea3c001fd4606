"""Plan a cache: check its parts before anything is built or switched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import Self

from wildcat_kv.cache.automatic import best_method
from wildcat_kv.cache.byte_budget import ByteBudget
from wildcat_kv.compressors import Compressor, Everything, resolve
from wildcat_kv.compressors.registry import AUTO
from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.config import WildCatConfig
from wildcat_kv.models.rope import check_images, rotation_limit, rotations_of
from wildcat_kv.models.support import cache_layers, decoder_config


@dataclass(frozen=True)
class Blueprint:
    """Plan of a cache that fits its model; making one switches nothing.

    Attributes:
        settings: budget and exact ends.
        compressor: method.
        decoder: config of the decoder; the only one that is switched.
        layers: Transformers' layers of an uncompressed cache, one for each layer of the model.
        full: indices of the full-attention layers.
        exact: indices of the full-attention layers left uncompressed.
        rotations: rotary positions of each full-attention layer, by index; empty if the method needs none.
        rotation_limit: tokens that the rotations hold for; None for any number.
        byte_budget: budget in bytes; None for another one.
    """

    settings: WildCatConfig
    compressor: Compressor
    decoder: Any
    layers: list[Any]
    full: list[int]
    exact: frozenset[int]
    rotations: dict[int, Rotation]
    rotation_limit: int | None
    byte_budget: ByteBudget | None

    @classmethod
    def of(
        cls,
        config: Any,
        settings: WildCatConfig,
        compressor: str | Compressor,
        *,
        static: bool = False,
        offloading: bool = False,
    ) -> Self:
        """Check that a cache can be made, and plan it.

        Args:
            config: config of the model; left as it is.
            settings: budget and exact ends.
            compressor: method, its name, or "auto".
            static: True for fixed shapes.
            offloading: True to keep keys and values on the CPU.

        Raises:
            TypeError: config is no Transformers config, or compressor no method.
            ValueError: settings, method and model do not fit together; the message names the argument.
        """
        if compressor != AUTO:  # a wrong name is told before a wrong model
            compressor = resolve(compressor, settings)
        decoder = decoder_config(config)
        layers, full = cache_layers(decoder)
        rotations: dict[int, Rotation] = {}
        if not isinstance(compressor, Compressor):
            compressor, rotations = best_method(config, decoder, full, settings, static=static, offloading=offloading)
        check_budget(settings, compressor)
        if offloading:
            _check_offloading(compressor)
        compressor.check_model(decoder, len(full))
        if static:
            window = getattr(decoder, "sliding_window", None) if getattr(decoder, "use_sliding_window", True) else None
            _check_static(settings, compressor, offloading, len(full) < len(layers) or window is not None)
        exact = exact_layers(settings, len(layers), full)
        if compressor.needs_rotation and not rotations:
            rotations = rotations_of(decoder, full)
        check_images(config, decoder, rotations)
        limit = rotation_limit(decoder, rotations)
        in_bytes = None
        if settings.max_bytes is not None:
            in_bytes = ByteBudget.of(settings, compressor, decoder, layers, full)
        return cls(settings, compressor, decoder, layers, full, exact, rotations, limit, in_bytes)


def layer_choice(settings: WildCatConfig, compressor: Compressor, *, exact: bool) -> tuple[WildCatConfig, Compressor]:
    """Choose settings and method of one layer: an exact one keeps everything, and so does a share of 1 in bits."""
    if exact:
        settings = settings.model_copy(update={"ratio": 1.0, "bits": None})
    return settings, Everything() if exact or (settings.share == 1 and settings.bits is not None) else compressor


def check_budget(settings: WildCatConfig, compressor: Compressor) -> None:
    """Refuse a limit or a tolerance that the method cannot keep."""
    if not (settings.max_tokens is None and settings.max_bytes is None) and not compressor.decodes:
        name = "max_bytes" if settings.max_tokens is None else "max_tokens"
        raise ValueError(
            f"{name}={getattr(settings, name)}: {type(compressor).__name__} compresses the prompt alone, so what "
            "is generated cannot be bounded; give a ratio, or another compressor"
        )
    if settings.ratio == "auto" and not compressor.estimates:
        raise ValueError(
            f"ratio='auto': {type(compressor).__name__} does not estimate its error; give a number, or take "
            "compressor='query_wildcat'"
        )
    if settings.bits is not None and not compressor.takes_bits:
        raise ValueError(
            f"bits={settings.bits}: the slots of {type(compressor).__name__} must not be quantised; leave bits out, or "
            "take another compressor, such as wildcat"
        )
    own = getattr(compressor, "tolerance", None)
    if compressor.estimates and own != settings.tolerance:
        raise ValueError(
            f"tolerance={settings.tolerance}: {type(compressor).__name__} was made with tolerance={own}; give both the "
            "same, or name the method"
        )


def exact_layers(settings: WildCatConfig, total: int, full: Sequence[int]) -> frozenset[int]:
    """Find the layers to leave uncompressed, by index.

    Args:
        settings: settings that name them.
        total: number of layers of the model.
        full: indices of the full-attention layers.

    Raises:
        ValueError: an index of no full-attention layer, or no layer left to compress.
    """
    named = f"exact_layers={list(settings.exact_layers)}"
    found = set()
    for index in settings.exact_layers:
        layer = index + total if index < 0 else index
        if layer not in full:
            raise ValueError(
                f"{named}: layer {index} is none of those that can be compressed, {list(full)}; name some of these"
            )
        found.add(layer)
    if len(found) == len(full):
        raise ValueError(f"{named}: nothing is left to compress; leave some of {list(full)} out")
    return frozenset(found)


def _check_offloading(compressor: Compressor) -> None:
    """Refuse offloading without a device, or with layers that fold together."""
    if not torch.cuda.is_available():
        raise ValueError("offloading=True needs a CUDA device to offload from; leave it out on this machine")
    if compressor.waits:
        raise ValueError(
            f"offloading=True: the layers of {type(compressor).__name__} compress together, when the last has been "
            "read; leave it out, or take a method that compresses layer by layer, such as wildcat, or query_wildcat "
            "with a profile"
        )


def _check_static(settings: WildCatConfig, compressor: Compressor, offloading: bool, windows: bool) -> None:
    """Refuse fixed shapes if the cache grows, learns from queries or moves."""
    method = type(compressor).__name__
    if settings.max_tokens is None:
        name = "ratio" if settings.max_bytes is None else "max_bytes"
        raise ValueError(
            f"static=True with {name}={getattr(settings, name)}: fixed shapes need a fixed number of columns; give "
            "max_tokens instead"
        )
    if settings.bits is not None:
        raise ValueError(
            f"static=True with bits={settings.bits}: a compiled step reads keys and values in the model's dtype; leave "
            "one of them out"
        )
    if compressor.needs_queries or compressor.state_size:
        raise ValueError(
            f"static=True: {method} learns from the queries of every token; take a method that needs keys and values "
            "only, such as wildcat"
        )
    if compressor.needs_output_projection:
        raise ValueError(
            f"static=True: {method} reads weights of the model's layers, which a compiled step does not; take a method "
            "that needs keys and values only, such as wildcat"
        )
    if offloading:
        raise ValueError("static=True with offloading=True: addresses change when layers move; choose one of them")
    if windows:  # a window wider than the positions too: the model would ask for its mask
        raise ValueError(
            "static=True: the model has layers with windows or of other kinds; leave it out for this model"
        )
