"""Find out how each layer of a model rotates queries and keys by their positions.

A probe of the model shows whether a layer rotates. The family's own modeling file says how, so that scaled, partial and
interleaved rotations are the model's own; what the probe has seen must confirm it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.probe import Probe, Seen, probe
from wildcat_kv.rotation import Rotation
from wildcat_kv.support import cache_layers

_INSTEAD = "use a method that needs no positions, such as snapkv"
# Relative difference below which vectors count as equal; float32 rounding stays under a tenth of it.
_EQUAL = 1e-3


def rotations_of(config: Any, layers: Sequence[int]) -> dict[int, Rotation]:
    """Find the rotation of each full-attention layer.

    Args:
        config: the decoder's config.
        layers: indices of all full-attention layers.

    Returns:
        Rotations by the layers' indices.

    Raises:
        ValueError: a layer rotates in a way that is not understood.
    """
    try:
        with torch.no_grad():
            seen = probe(config, layers)
            return {index: _rotation(seen, index) for index in layers}
    except Exception as error:
        raise ValueError(
            f"config={type(config).__name__}: the rotary positions of this family are not understood "
            f"({type(error).__name__}: {error}); {_INSTEAD}"
        ) from None


def rotation_of(config: Any, layer_idx: int) -> Rotation:
    """Find the rotation of one full-attention layer; see `rotations_of`."""
    return rotations_of(config, cache_layers(config)[1])[layer_idx]


def check_images(config: Any, decoder: Any, rotations: dict[int, Rotation]) -> None:
    """Refuse a model of images and text whose images have positions in time, height and width.

    No layer is told these positions, and a rotation is undone by the count of tokens.

    Args:
        config: the config that the user gave.
        decoder: its decoder's config.
        rotations: of the decoder's layers.

    Raises:
        ValueError: says what to use instead.
    """
    if config is not decoder and any(rotation.grids for rotation in rotations.values()):
        raise ValueError(
            f"config={type(config).__name__}: images have positions in time, height and width, which methods that undo "
            f"positions do not follow; {_INSTEAD}, or pass model.config.get_text_config() and prompts without images"
        )


def _rotation(seen: Probe, index: int) -> Rotation:
    """The rotation that explains what was seen in one layer."""
    layer = seen.layers[index]
    if _explains(Rotation(None, None), layer, seen.positions):
        return Rotation(None, None)
    fault = "no rotary embedding found"
    for rotary in seen.rotaries:
        try:
            rotation = _family_rotation(rotary, sys.modules[type(seen.model).__module__], index)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            continue
        if _explains(rotation, layer, seen.positions):
            return rotation
        fault = f"{type(rotary).__name__} does not explain the queries and keys of layer {index}"
    raise NotImplementedError(fault)


def _explains(rotation: Rotation, layer: Seen, positions: Tensor) -> bool:
    """Whether the rotation is all that sets apart queries, and keys, of one hidden state at several positions."""
    for vectors in (layer.query, layer.keys):
        back = rotation.back(vectors, positions)
        if not (back - back[:, :, :1]).abs().max() <= _EQUAL * back.abs().max():
            return False
        at_zero = rotation.back(vectors[:, :, :1], positions[:, :1])
        again = rotation.average(at_zero, positions[:, -1:])
        if not (again - vectors[:, :, -1:]).abs().max() <= _EQUAL * vectors.abs().max():
            return False
    return True


def _family_rotation(rotary: Any, module: Any, index: int) -> Rotation:
    """The rotation by a family's own `rotary` module and the apply function of its modeling file."""
    apply, config = module.apply_rotary_pos_emb, rotary.config
    by_type = [config.layer_types[index]] if "layer_type" in inspect.signature(rotary.forward).parameters else []
    pairs = "k" in inspect.signature(apply).parameters  # takes queries and keys at once
    grids = hasattr(rotary, "mrope_section")  # positions in time, height and width, which are one in text
    until = _frozen(rotary, *by_type)

    def both(positions: Tensor) -> tuple[Tensor, Tensor]:
        device = positions.device
        positions = positions.expand(3, -1, -1) if grids else positions
        return rotary.to(device)(torch.zeros(1, device=device), positions, *by_type)

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
        raise NotImplementedError("its frequencies change with the length of the text")
    return Rotation(angles, turn, until, grids)


def _frozen(rotary: Any, *by_type: str) -> int | None:
    """Keep the frequencies of short texts, and tell the length beyond which the model takes others, if it does."""
    kinds = getattr(rotary, "rope_type", "default")
    kind, parameters = kinds, getattr(rotary.config, "rope_parameters", None)
    if isinstance(kinds, dict):
        kind, parameters = kinds[by_type[0]], parameters[by_type[0]]
    if "dynamic" in kind:
        until = rotary.original_max_seq_len
    elif kind == "longrope":
        until = parameters["original_max_position_embeddings"]
    else:
        return None
    # Transformers looks this name up in each pass, to change the frequencies or not.
    rotary.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
    return int(until)
