"""The "wildcat" attention and mask functions, registered with Transformers.

They find the layers of a compressed cache by marks on the tensors. With any other cache, or none, they hand
everything to the implementation that the config had before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from wildcat_kv.hook.marks import Forward, MarkedLength, fallback_of, switched_name
from wildcat_kv.hook.pattern import Pattern, pattern_of

_NO_PROBABILITIES = (
    "output_attentions=True: tokens in a compressed layer have no attention probabilities of their own; leave it out "
    "and call cache.reset(), or use DynamicCache"
)


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend through the cache layer that marked the keys, or the fallback.

    Args:
        module: attention module; its config names the fallback.
        query: (rows, heads, q, d).
        key: (rows, kv_heads, n, d); a compressed cache's layer has marked it.
        value: (rows, kv_heads, n, d_v).
        attention_mask: mask for the fallback; a compressed layer does not read it.
        *args: further arguments for the fallback.
        **kwargs: `scaling`, `softcap`, `s_aux` and others of Transformers' attention interface.

    Returns:
        Output (rows, q, heads, d_v), and the attention probabilities where the fallback gives them.
    """
    layer = getattr(key, "_wildcat_layer", None)
    if layer is None:
        return _fallback(module)(module, query, key, value, attention_mask, *args, **kwargs)
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.shape[2] > 1:  # reading one token's position would stall decoding
        layer.check_reading(query, module.config, kwargs)
    if layer.needs_module:
        layer.meet(module, query.shape[1], value.shape[-1])
    if layer.uses_fallback:
        output, probabilities = _fallback(module)(module, query, key, value, attention_mask, *args, **kwargs)
    else:
        if kwargs.get("output_attentions"):
            raise ValueError(_NO_PROBABILITIES)
        # `cached_mask` gives a static cache a mask of one number.
        unmasked = attention_mask is None or attention_mask.numel() == 1
        own = getattr(value, "_wildcat_layer", None) is layer and unmasked
        window = kwargs.get("sliding_window")
        if not own or (window is not None and window < layer.get_seq_length()):
            raise RuntimeError(
                f"{type(module).__name__} changes the values, the mask or the window between the cache and its "
                "attention, which compressed layers cannot follow; use DynamicCache for this model"
            )
        output, probabilities = layer.attend(query, key, value, scale, kwargs).transpose(1, 2).contiguous(), None
    layer.after_attention(query, scale)
    return output, probabilities


def cached_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Make a forward pass's mask, and announce the pass to its cache.

    A compressed cache needs no mask: new tokens are causal, everything folded is visible, and the cache knows the
    padding. Otherwise the mask is the fallback's, and new tokens may see later ones of the same pass, such as those
    of an image.

    Args:
        batch_size: rows of the batch.
        q_length: new tokens.
        kv_length: length of the keys; a compressed cache has marked it.
        *args: further arguments for the fallback.
        mask_function: Transformers' function of row, head, query and key.
        attention_mask: bool (rows, kv_length), False for padding; None if none was passed.
        **kwargs: further arguments for the fallback.

    Raises:
        ValueError: a mask that hides earlier tokens, one that shows tokens of a later pass, one that shows later
            tokens to the queries of a compressed cache, or a 2D mask of the wrong width.
    """
    window = kwargs.get("local_size")
    # The fallback makes the masks of layers with a window. A model may ask for one that no layer uses.
    if isinstance(kv_length, MarkedLength) and (window is None or window >= kv_length):
        forward = _announce(batch_size, q_length, kv_length, mask_function, attention_mask, kwargs)
        if not forward.uses_fallback:
            # A traced pass makes no mask of its own only if it is given one: a static cache makes it ahead.
            single = q_length == 1 and kv_length.layer.is_compileable
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=kwargs.get("device")) if single else None
    fallback = _fallback_mask(kwargs.get("config"))
    if fallback is None:
        return None
    return fallback(
        batch_size,
        q_length,
        int(kv_length) if isinstance(kv_length, MarkedLength) else kv_length,
        *args,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def _announce(
    rows: int,
    queries: int,
    length: MarkedLength,
    mask_function: Callable,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> Forward:
    """Announce a forward pass to its cache, if the mask can be followed."""
    if attention_mask is not None and attention_mask.shape[-1] != length:
        raise ValueError(
            f"attention_mask has width {attention_mask.shape[-1]}, but the cache has seen "
            f"{length - queries} tokens and {queries} are new: it must have width {int(length)}; pass the "
            "mask of all tokens so far, or reset() the cache before a new text"
        )
    pattern = Pattern.CAUSAL
    windowed = options.get("local_size") is not None and options.get("allow_is_causal_skip")
    if mask_function is not causal_mask_function and not windowed:
        # With token types even plain text has another function, so compare what the mask shows.
        pattern = pattern_of(
            mask_function,
            rows,
            length - queries,
            queries,
            attention_mask,
            use_vmap=options.get("use_vmap", False),
            device=options.get("device", "cpu"),
        )
        _check_pattern(pattern)
    return length.layer.announce(rows, queries, attention_mask, causal=pattern is Pattern.CAUSAL)


def _check_pattern(pattern: Pattern) -> None:
    """Refuse masks that no pass of a compressed cache can have."""
    if pattern is Pattern.NARROWER:
        raise ValueError(
            "mask_function hides earlier tokens from later ones (packed sequences, for example), which compressed "
            "layers cannot follow; give each text a row of its own, or use DynamicCache for this input"
        )
    if pattern is Pattern.SPLIT:
        raise ValueError(
            "mask_function shows new tokens to some that the cache has read already (an image split between two "
            "forward passes, for example); call cache.reset() and read all tokens of an image in one pass"
        )


def switch(config: Any) -> None:
    """Switch a config to the "wildcat" attention, with the present one to go back to.

    Args:
        config: config of a decoder; one that is switched already stays as it is.
    """
    current = config._attn_implementation
    if fallback_of(current) is None:
        config._attn_implementation = _register("eager" if current is None else str(current))


def _register(fallback: str) -> str:
    """Register the attention and mask functions of one fallback; give their name."""
    name = switched_name(fallback)
    AttentionInterface.register(name, cached_attention)
    AttentionMaskInterface.register(name, cached_mask)
    _FALLBACKS[name] = fallback
    return name


def _fallback_name(config: Any) -> str:
    """Name the implementation that the config had before.

    If it is unknown, "eager" is right for every family.
    """
    # A table, not `fallback_of`: a traced pass comes here for layers with a window.
    return _FALLBACKS.get(getattr(config, "_attn_implementation", None), "eager")


def _fallback(module: nn.Module) -> Callable:
    """Find the attention function for layers that hold nothing compressed."""
    return AttentionInterface().get_interface(_fallback_name(module.config), _eager(module))


def _fallback_mask(config: Any) -> Callable | None:
    """Find the fallback's mask function; None for implementations without masks."""
    return AttentionMaskInterface().get(_fallback_name(config))


def _eager(module: nn.Module) -> Callable | None:
    """Find the eager attention of the module's own modeling file."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    return None


# Fallbacks by the names that configs are switched to.
_FALLBACKS: dict[str | None, str] = {}
# Ahead of any cache, for configs that were switched in another process.
for _name in ("eager", *AttentionInterface().valid_keys()):
    _register(_name)
