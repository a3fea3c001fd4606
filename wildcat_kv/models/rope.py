"""Find out how each layer rotates queries and keys by position.

A probe of the model shows whether a layer rotates. The family's own modeling file says how, so that scaled, partial and
interleaved rotations are the model's own; what the probe has seen must confirm it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.models.probe import Probe, Seen, probe
from wildcat_kv.models.support import cache_layers

_INSTEAD = "use a method that needs no positions, such as snapkv"
# Relative difference below which vectors count as equal; float32 rounding stays under a tenth of it.
_EQUAL = 1e-3


def rotations_of(config: Any, layers: Sequence[int]) -> dict[int, Rotation]:
    """Find the rotation of each full-attention layer.

    Args:
        config: config of the decoder; it is left as it is.
        layers: indices of all full-attention layers.

    Returns:
        Rotations by the layers' indices.

    Raises:
        ValueError: a layer rotates in a way that is not understood.
    """
    try:
        with torch.no_grad(), torch.device("cpu"):
            seen = probe(config, layers)
            family = functools.cache(functools.partial(_family_rotation, sys.modules[type(seen.model).__module__]))
            return {index: _rotation(seen, index, _kind(config, index), family) for index in layers}
    except Exception as error:
        raise ValueError(
            f"config={type(config).__name__}: the rotary positions of this family are not understood "
            f"({type(error).__name__}: {error}); {_INSTEAD}"
        ) from None


def rotation_of(config: Any, layer_idx: int) -> Rotation:
    """Find the rotation of one full-attention layer; see `rotations_of`."""
    return rotations_of(config, cache_layers(config)[1])[layer_idx]


def rotation_limit(config: Any, rotations: dict[int, Rotation]) -> int | None:
    """Find the length beyond which a model rotates by other frequencies.

    Keys that are cached by then keep the frequencies they have, so that no one rotation holds for all.

    Args:
        config: the decoder's config.
        rotations: the rotations of its layers, by their indices.

    Returns:
        The length in tokens; None if there is none.
    """
    limits = []
    for kind in {_kind(config, index) for index, rotation in rotations.items() if rotation.rotates}:
        parameters = getattr(config, "rope_parameters", None) or {}
        parameters = parameters.get(kind, parameters)
        name = parameters.get("rope_type") or "default"
        if "dynamic" in name:
            limits.append(config.max_position_embeddings)
        elif name == "longrope":
            limits.append(parameters["original_max_position_embeddings"])
    return min(limits, default=None)


def check_images(config: Any, decoder: Any, rotations: dict[int, Rotation]) -> None:
    """Refuse a model whose images have positions in time, height and width.

    The cache is never told these positions; a rotation is undone by the count of tokens.

    Args:
        config: the config that the user gave.
        decoder: its decoder's config.
        rotations: the rotations of the decoder's layers.

    Raises:
        ValueError: says what to use instead.
    """
    if config is not decoder and any(rotation.grids for rotation in rotations.values()):
        raise ValueError(
            f"config={type(config).__name__}: images have positions in time, height and width, which methods that undo "
            f"positions do not follow; {_INSTEAD}, or pass model.config.get_text_config() and prompts without images"
        )


def _kind(config: Any, index: int) -> str:
    """Return a layer's type, by which some families choose frequencies."""
    kinds = getattr(config, "layer_types", None)
    return kinds[index] if kinds else ""


def _rotation(seen: Probe, index: int, kind: str, family: Callable[[Any, str], Rotation]) -> Rotation:
    """Find the rotation that explains what was seen in one layer."""
    for rotary in (None, *seen.rotaries):
        rotation = Rotation(None, None) if rotary is None else family(rotary, kind)
        if _explains(rotation, seen.layers[index], seen.positions):
            return rotation
    raise NotImplementedError(f"layer {index} tells positions apart in another way")


def _explains(rotation: Rotation, layer: Seen, positions: Tensor) -> bool:
    """Tell whether the rotation explains all that differs between positions."""
    for vectors in (layer.query, layer.keys):
        back = rotation.back(vectors, positions)
        last = rotation.average(back[:, :, :1], positions[:, -1:])
        for one, other in ((back, back[:, :, :1]), (last, vectors[:, :, -1:])):
            if not (one - other).abs().max() <= _EQUAL * vectors.abs().max():
                return False
    return True


def _family_rotation(module: Any, rotary: Any, kind: str) -> Rotation:
    """Make the rotation of a family's `rotary` embedding and its apply function."""
    apply = module.apply_rotary_pos_emb
    by_type = [kind] if "layer_type" in inspect.signature(rotary.forward).parameters else []
    pairs = "k" in inspect.signature(apply).parameters  # takes queries and keys at once
    grids = hasattr(rotary, "mrope_section")  # positions in time, height and width, which are one in text

    def both(positions: Tensor) -> tuple[Tensor, Tensor]:
        device = positions.device
        positions = positions.expand(3, -1, -1) if grids else positions
        return rotary.to(device)(torch.zeros(1, dtype=torch.float32, device=device), positions, *by_type)

    # Some have one cosine for a pair of channels, instead of one for each.
    frequencies = getattr(rotary, "_".join([*by_type, "inv_freq"]))
    half = both(torch.tensor([[0]]))[0].shape[-1] == frequencies.shape[-1]

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = both(positions)
        return (cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)) if half else (cos, sin)

    def turn(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if half:
            cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
        # As queries, beside no keys.
        return apply(vectors, vectors[:, :0], cos, sin)[0] if pairs else apply(vectors, cos, sin)

    near, far = angles(torch.tensor([[7]])), angles(torch.tensor([[7, 1 << 22]]))
    if not all(torch.equal(one, other[:, :1]) for one, other in zip(near, far, strict=True)):
        raise NotImplementedError("frequencies change with the length of the text")
    return Rotation(angles, turn, grids)
