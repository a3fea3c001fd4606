"""Attention methods inside Transformers models, through Transformers' attention interface.

An attention module looks up its implementation by a name in its config. A layer that is replaced gets a copy of this
config with another name, and carries its method itself. Nothing else changes: not the model's config, which an encoder
may share with a decoder, not the masks, and no other layer.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from wildcat_kv.attention.base import Attention
from wildcat_kv.attention.layers import check_able, methods_by_layer
from wildcat_kv.attention.masks import key_padding

NAME = "wildcat_attention"

# Keywords of Transformers' attention interface that change the scores, and what they do.
_SCORE_CHANGES = {
    "position_bias": "adds a position bias to the scores",
    "sliding_window": "attends within a window",
    "softcap": "caps the scores",
    "s_aux": "has attention sinks",
}


@dataclass(frozen=True)
class Replaced:
    """Record that a replaced attention module carries as its attribute "wildcat_attention".

    Attributes:
        method: the method, with the layer's own seed.
        layer: name of the layer's module.
        config: the config that the module had before.
    """

    method: Attention
    layer: str
    config: Any


def enable(
    model: nn.Module, method: Attention | Mapping[int | str, Attention], layers: Iterable[int | str] | None = None
) -> tuple[str, ...]:
    """Let a model's encoder attend by a method, until `disable`.

    Works for every encoder that dispatches through Transformers' `AttentionInterface`: ViT, DeiT, DINOv2, CLIP, SigLIP,
    BERT, ModernBERT, the encoder of Whisper, the vision tower of a multimodal model. Masks of padding are followed. A
    layer that is causal, adds a position bias or attends within a window stays exact, and is refused if it is named.
    A copy of the model, or a pickled one, is enabled too.

    Args:
        model: a Transformers model, or a part of one.
        method: the method of all layers, each with a seed of its own; or methods by number or name of
            the layer.
        layers: numbers of layers, counted over those that can be replaced, negative ones from the end; or names of
            modules. All that can be replaced by default.

    Returns:
        The names of the replaced layers, in order.

    Raises:
        TypeError: the method is no `Attention`.
        ValueError: a model without such layers, an unknown layer or one that cannot be replaced, or a model that is
            enabled already. The model is left as it was.
    """
    found = attention_layers(model)
    taken = next((name for name, module in found.items() if _replaced(module) is not None), None)
    if taken is not None:
        raise ValueError(f"model={type(model).__name__} has a method in {taken!r} already; disable(model) first")
    able = _able(found)
    check_able(model, able, found, _obstacle, "none dispatches through Transformers' AttentionInterface")
    methods = methods_by_layer(method, layers, able, found, _obstacle)
    for name, chosen in methods.items():
        module: Any = found[name]
        config = copy.copy(module.config)
        # The property would set it in the configs of the model's parts, too.
        config._attn_implementation_internal = NAME
        setattr(module, NAME, Replaced(chosen, name, module.config))
        module.config = config
    return tuple(methods)


def disable(model: nn.Module) -> None:
    """Make an enabled model what it was.

    Args:
        model: the model that was given to `enable`.

    Raises:
        ValueError: a model that is not enabled.
    """
    replaced = [module for module in model.modules() if _replaced(module) is not None]
    if not replaced:
        raise ValueError(f"model={type(model).__name__} has no method of attention; there is nothing to disable")
    for module in replaced:
        module.config = vars(module).pop(NAME).config


@contextmanager
def use(
    model: nn.Module, method: Attention | Mapping[int | str, Attention], layers: Iterable[int | str] | None = None
) -> Iterator[tuple[str, ...]]:
    """Let a model's encoder attend by a method inside a `with` block.

    Afterwards the model is exactly what it was, an exception or not. Arguments and errors are those of `enable`, and
    the names of the replaced layers are what `as` gives.

    Example:
        with wildcat_kv.attention.use(model, WildCatAttention(rank=256, bins=16)):
            features = model(pixel_values).last_hidden_state
    """
    names = enable(model, method, layers)
    try:
        yield names
    finally:
        disable(model)


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """List the modules that dispatch through Transformers' attention interface, by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(vars(module).get("config"), PreTrainedConfig) and _dispatches(type(module))
    }


def method_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend by the method that the module's config carries.

    Args:
        module: attention module of a replaced layer.
        query: (rows, heads, q, d).
        key: (rows, kv_heads, n, d).
        value: (rows, kv_heads, n, d_v).
        attention_mask: mask of any of Transformers' implementations, see `key_padding`.
        *args: none.
        **kwargs: `scaling`, `dropout` and others of Transformers' attention interface.

    Returns:
        Output (rows, q, heads, d_v), and None for the probabilities, which do not exist.

    Raises:
        ValueError: what cannot be followed; names the layer.
    """
    replaced: Replaced = vars(module)[NAME]
    reasons = [does for keyword, does in _SCORE_CHANGES.items() if kwargs.get(keyword) is not None]
    if kwargs.get("is_causal"):
        reasons.append("is causal in this call")
    if kwargs.get("output_attentions"):
        reasons.append("is asked for attention probabilities")
    if kwargs.get("dropout"):
        reasons.append(f"drops probabilities in training (dropout={kwargs['dropout']}; eval() drops none)")
    if reasons:
        method = type(replaced.method).__name__
        raise ValueError(
            f"layer {replaced.layer!r} {reasons[0]}, which {method} cannot follow; leave it out of `layers`"
        )
    try:
        padding = key_padding(attention_mask, query.shape[0], key.shape[2])
    except ValueError as error:
        raise ValueError(f"layer {replaced.layer!r}: {error}") from None
    output = replaced.method(query, key, value, scale=kwargs.get("scaling"), key_padding_mask=padding)
    return output.transpose(1, 2).contiguous(), None


def _dispatches(cls: type) -> bool:
    """Tell whether a class looks up its attention in Transformers' interface."""
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False


def _obstacle(module: nn.Module) -> str | None:
    """Say why a layer cannot be replaced; None where it can."""
    if _is_causal(module):
        return "is causal: compress its cache instead, with wildcat_kv.enable"
    if "position_bias" in inspect.signature(module.forward).parameters:
        return "adds a position bias to the scores, which no method here can follow"
    if (window := getattr(module, "sliding_window", None)) is not None:
        return f"attends within a window of {window}, which no method here can follow"
    return None


def _is_causal(module: nn.Module) -> bool:
    """Tell whether a layer is causal: unless it says that it is not, as Transformers' own functions take it."""
    return bool(getattr(module, "is_causal", True))


def _able(layers: Mapping[str, nn.Module]) -> list[str]:
    """List the layers to replace by default: those that can be, outside of decoders."""
    causal = {_block(name) for name, module in layers.items() if _is_causal(module)}
    return [name for name, module in layers.items() if _obstacle(module) is None and _block(name) not in causal]


def _block(name: str) -> str:
    """Name the block of a layer: all up to the first number.

    Example:
        >>> _block("model.decoder.layers.3.encoder_attn")
        'model.decoder.layers.3'
    """
    parts = name.split(".")
    last = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: last + 1])


def _replaced(module: nn.Module) -> Replaced | None:
    return vars(module).get(NAME)


AttentionInterface.register(NAME, method_attention)
