"""Attention methods inside Transformers models, through Transformers' attention interface.

An attention module looks up its implementation by a name in its config. A layer that is replaced gets a copy of this
config, with a name that carries the method. Nothing else changes: not the model's config, which an encoder may share
with a decoder, not the masks, and no other layer.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from typing_extensions import Self

from wildcat_kv.attention.base import Attention

NAME = "wildcat_attention"

# Keywords of Transformers' attention interface that change the scores, and what they do.
_SCORE_CHANGES = {
    "position_bias": "adds a position bias to the scores",
    "sliding_window": "attends within a window",
    "softcap": "caps the scores",
    "s_aux": "has attention sinks",
}


class MethodName(str):
    """Name "wildcat_attention", which carries a layer's method.

    Attributes:
        method: the method, with the layer's own seed.
        layer: name of the layer's module.
        config: the config that the module had before.
    """

    method: Attention
    layer: str
    config: Any

    def __new__(cls, method: Attention, layer: str, config: Any) -> Self:
        """Make a str equal to `NAME`."""
        name = super().__new__(cls, NAME)
        name.method, name.layer, name.config = method, layer, config
        return name

    def __getnewargs__(self) -> tuple[Attention, str, Any]:  # type: ignore[override]
        """Return the arguments that copy and pickle make it anew from."""
        return self.method, self.layer, self.config


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
    taken = next((name for name, module in found.items() if isinstance(_implementation(module), MethodName)), None)
    if taken is not None:
        raise ValueError(f"model={type(model).__name__} has a method in {taken!r} already; disable(model) first")
    able = _able(found)
    if not able:
        reasons = ((name, _obstacle(module)) for name, module in found.items())
        known = (f"{name!r} {reason}" for name, reason in reasons if reason is not None)
        reason = next(known, "none dispatches through Transformers' AttentionInterface")
        raise ValueError(f"model={type(model).__name__} has no attention layer to replace: {reason}")
    methods = _methods_by_layer(method, layers, able, found)
    for name, chosen in methods.items():
        module: Any = found[name]
        config = copy.copy(module.config)
        # The property would set it in the configs of the model's parts, too.
        config._attn_implementation_internal = MethodName(chosen, name, module.config)
        module.config = config
    return tuple(methods)


def disable(model: nn.Module) -> None:
    """Make an enabled model what it was.

    Args:
        model: the model that was given to `enable`.

    Raises:
        ValueError: a model that is not enabled.
    """
    replaced = [module for module in model.modules() if isinstance(_implementation(module), MethodName)]
    if not replaced:
        raise ValueError(f"model={type(model).__name__} has no method of attention; there is nothing to disable")
    for module in replaced:
        module.config = _implementation(module).config


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
    name = _implementation(module)
    reasons = [does for keyword, does in _SCORE_CHANGES.items() if kwargs.get(keyword) is not None]
    if kwargs.get("is_causal"):
        reasons.append("is causal in this call")
    if kwargs.get("output_attentions"):
        reasons.append("is asked for attention probabilities, which do not exist")
    if kwargs.get("dropout"):
        reasons.append(f"drops probabilities in training (dropout={kwargs['dropout']}); set it to 0 or call eval()")
    if reasons:
        method = type(name.method).__name__
        raise ValueError(f"layer {name.layer!r} {reasons[0]}, which {method} cannot follow; leave it out of `layers`")
    try:
        padding = key_padding(attention_mask, query.shape[0], key.shape[2])
    except ValueError as error:
        raise ValueError(f"layer {name.layer!r}: {error}") from None
    output = name.method(query, key, value, scale=kwargs.get("scaling"), key_padding_mask=padding)
    return output.transpose(1, 2).contiguous(), None


def key_padding(mask: Any, rows: int, n: int) -> Tensor | None:
    """Read which keys are padding from a mask of Transformers.

    Args:
        mask: None, numbers or bool (rows, n) with 1 for tokens, bool (rows, heads, q, n) with True for what is seen, or
            the same as numbers to add to the scores.
        rows: rows of the batch.
        n: number of keys.

    Returns:
        bool (rows, n), True for padding; None if there is none.

    Raises:
        ValueError: a mask that is more than padding.

    Example:
        >>> key_padding(torch.tensor([[1, 1, 0]]), 1, 3)
        tensor([[False, False,  True]])
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() not in (2, 4):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; it must be (rows, n) or (rows, heads, q, n)")
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask is a {type(mask).__name__}; load the model with attn_implementation='sdpa'")
    seen = mask.bool() if mask.dim() == 2 else _seen_by_all(mask)
    return None if bool(seen.all()) else ~seen[..., -n:].expand(rows, n)


def _seen_by_all(mask: Tensor) -> Tensor:
    """Read the keys (rows, n) that a mask (rows, heads, q, n) shows to all queries alike."""
    first = mask[:, :1, :1]
    expanded = all(mask.stride(dim) == 0 or mask.shape[dim] == 1 for dim in (1, 2))
    if not expanded and not torch.equal(mask, first.expand_as(mask)):
        raise ValueError(
            f"attention_mask {tuple(mask.shape)} differs between queries or heads, and only padding can be followed; "
            "for causal models use the cache, else leave the layer out of `layers`"
        )
    seen = first[:, 0, 0]
    if mask.dtype == torch.bool:
        return seen
    hidden = seen <= torch.finfo(mask.dtype).min / 2
    if not bool((hidden | (seen == 0)).all()):
        raise ValueError("attention_mask adds a bias to scores, and only padding can be followed; leave the layer out")
    return ~hidden


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


def _methods_by_layer(
    method: Attention | Mapping[int | str, Attention],
    layers: Iterable[int | str] | None,
    able: list[str],
    found: Mapping[str, nn.Module],
) -> dict[str, Attention]:
    """Choose the layers and give each its method, in the order of the model."""
    if isinstance(method, Mapping):
        if layers is not None:
            raise ValueError("layers is given beside a method for each layer; give one of them")
        chosen = {_named(number, able, found): one for number, one in method.items()}
    else:
        chosen = {_named(layer, able, found): method for layer in (able if layers is None else layers)}
    if not chosen:
        raise ValueError("layers names no layer; leave it out for all of them")
    for one in chosen.values():
        if not isinstance(one, Attention):
            raise TypeError(f"method={one!r} is no Attention; give one of wildcat_kv.attention's, such as Exact()")
    return {name: chosen[name].for_layer(number) for number, name in enumerate(found) if name in chosen}


def _named(layer: int | str, able: list[str], found: Mapping[str, nn.Module]) -> str:
    """Find the name of a layer that is given by name or number.

    Raises:
        ValueError: there is no such layer, or it cannot be replaced.
    """
    if isinstance(layer, int):
        if not -len(able) <= layer < len(able):
            raise ValueError(f"layers: {layer} is none of the {len(able)} layers that can be replaced, counted from 0")
        return able[layer]
    if layer not in found:
        raise ValueError(f"layers: there is no attention layer {layer!r}; the first is {next(iter(found))!r}")
    if (reason := _obstacle(found[layer])) is not None:
        raise ValueError(f"layers: {layer!r} {reason}")
    return layer


def _implementation(module: nn.Module) -> Any:
    return getattr(vars(module).get("config"), "_attn_implementation", None)


AttentionInterface.register(NAME, method_attention)
