"""Attention over a weighted coreset, and the "wildcat" attention of Transformers that uses it.

`weighted_attention` is pure. The rest is what Transformers calls: an attention function and a mask function,
registered under one name. With a cache of ours they find its layers through marks that travel with the
tensors; with any other cache, or none, they hand everything to the implementation that the config had before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from wildcat_kv.compress import full_precision

NAME = "wildcat"

# A denominator this small against the sum of its terms' magnitudes is cancellation, not information.
_DENOMINATOR_FLOOR = 1e-6
# Entries of a half-precision cache converted to float32 at once.
_CONVERTED_AT_ONCE = 512
# Scores held at once, in float32 numbers: 256 MiB.
_SCORES_AT_ONCE = 2**26


def weighted_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor | None = None,
    *,
    scale: float | None = None,
    valid: Tensor | None = None,
    causal: bool = False,
    value_range: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention over entries that carry weights: sum_i e^(b q.k_i) U_i / sum_i e^(b q.k_i) w_i.

    Slots of a coreset and exact tokens (weight 1) stand side by side. Accumulated in float32.

    Args:
        query: (..., heads, q, d).
        keys: (..., kv_heads, n, d); `heads` is a multiple of `kv_heads`, query heads grouped in order.
        values: (..., kv_heads, n, d_v), numerators U, which are the values v where the weight is 1.
        weights: float32 (..., kv_heads, n), w, negative ones allowed; 1 by default.
        scale: b, the factor of the scores; d^-1/2 by default.
        valid: bool (..., kv_heads, n), False for padding; all by default.
        causal: whether the last q entries are the queries' own tokens, each seen from itself on.
        value_range: the smallest and largest value seen, each (..., kv_heads, 1, d_v); the output is
            clipped to it.
        softcap: scores become softcap * tanh(scores / softcap).
        sink_logits: (heads,), learned logits that join the denominator only (GPT-OSS).

    Returns:
        (..., heads, q, d_v) in the query's dtype. A denominator that cancels out gives 0, then the clip.

    Raises:
        ValueError: heads that do not divide, or shapes that do not fit.

    Source: WildCat, arXiv 2602.10056, the weighted attention WTDATTN.

    Example:
        >>> q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
        >>> weighted_attention(q, k, v, weights=torch.ones(1, 2, 5)).shape
        torch.Size([1, 4, 3, 8])
    """
    _check_shapes(query, keys, values, weights, valid)
    total = query.shape[-2]
    step = max(1, _SCORES_AT_ONCE // max(1, query.shape[:-2].numel() * keys.shape[-2]))
    with full_precision(query.device):
        columns = _columns(keys, weights)
        parts = [
            _attend(
                query[..., start : start + step, :],
                keys,
                values,
                columns,
                scale=query.shape[-1] ** -0.5 if scale is None else scale,
                valid=valid,
                first_own=keys.shape[-2] - total + start if causal and total > 1 else None,
                value_range=value_range,
                softcap=softcap,
                sink_logits=sink_logits,
            )
            for start in range(0, total, step)
        ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _check_shapes(query: Tensor, keys: Tensor, values: Tensor, weights: Tensor | None, valid: Tensor | None) -> None:
    fit = (
        min(query.dim(), keys.dim()) >= 3
        and query.shape[:-3] == keys.shape[:-3]
        and query.shape[-3] % keys.shape[-3] == 0
        and query.shape[-1] == keys.shape[-1]
        and keys.shape[:-1] == values.shape[:-1]
    )
    if not fit:
        raise ValueError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit: they "
            "must be (..., heads, q, d), (..., kv_heads, n, d), (..., kv_heads, n, d_v), heads a multiple of kv_heads"
        )
    for name, tensor in (("weights", weights), ("valid", valid)):
        if tensor is not None and tensor.shape != keys.shape[:-1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(keys.shape[:-1])}, as keys")


def _columns(keys: Tensor, weights: Tensor | None) -> Tensor:
    """float32 (..., n, 2): w and |w|, the two sums of the denominator in one product."""
    if weights is None:
        return torch.ones(*keys.shape[:-1], 2, device=keys.device)
    return torch.stack((weights, weights.abs()), dim=-1)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    *,
    scale: float,
    valid: Tensor | None,
    first_own: int | None,
    value_range: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """One block of queries; `first_own` is the entry of the first one's own token, or None for no causality."""
    *batch, heads, length, d = query.shape
    kv_heads, n = keys.shape[-3:-1]
    # Query heads of a group become further queries of their key head: keys are never repeated.
    grouped = (query.to(torch.float32) * scale).reshape(*batch, kv_heads, -1, d)
    scores = torch.cat([torch.matmul(grouped, part.mT) for part in _float32_blocks(keys)], dim=-1)
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)
    if valid is not None:
        scores = scores.masked_fill_(~valid.unsqueeze(-2), -torch.inf)
    if first_own is not None:
        own = torch.arange(first_own, first_own + length, device=query.device)
        hidden = torch.arange(n, device=query.device) > own.unsqueeze(-1)
        scores = scores.masked_fill_(hidden.repeat(heads // kv_heads, 1), -torch.inf)

    # Masked before the maximum: a padding slot must not set the scale. All masked: any finite shift will do.
    largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    sinks = None
    if sink_logits is not None:
        sinks = sink_logits.to(torch.float32).reshape(kv_heads, -1, 1).expand(*batch, -1, -1, length)
        sinks = sinks.reshape(*batch, kv_heads, -1, 1)
        largest = torch.maximum(largest, sinks)
    terms = scores.sub_(largest).exp_()
    pieces = zip(terms.split(_CONVERTED_AT_ONCE, dim=-1), _float32_blocks(values), strict=False)
    numerator = torch.matmul(terms, values) if values.dtype == torch.float32 else sum(t @ v for t, v in pieces)
    denominator, magnitude = torch.matmul(terms, columns).split(1, dim=-1)
    if sinks is not None:
        extra = (sinks - largest).exp()
        denominator, magnitude = denominator + extra, magnitude + extra
    cancelled = denominator <= _DENOMINATOR_FLOOR * magnitude  # false for NaN, which must not be hidden
    output = torch.where(cancelled, 0.0, numerator / denominator)
    if value_range is not None:
        output = output.clamp(value_range[0].to(torch.float32), value_range[1].to(torch.float32))
    return output.reshape(*batch, heads, length, -1).to(query.dtype)


def _float32_blocks(tensor: Tensor) -> list[Tensor]:
    """float32 pieces (..., k, channels) of a tensor (..., n, channels); half precision is never copied whole."""
    if tensor.dtype == torch.float32:
        return [tensor]
    return [part.to(torch.float32) for part in tensor.split(_CONVERTED_AT_ONCE, dim=-2)]


@dataclass
class Forward:
    """One forward pass of the model, as its mask call announces it to the cache.

    Attributes:
        seen: tokens of earlier passes.
        queries: new tokens.
        mask: bool (rows, seen + queries), False for padding tokens; None where none was passed.
        exact: whether the layers attend exactly, through the implementation that the config had before.
        relabelled: whether the mask says something new of tokens since the last fold.
    """

    seen: int
    queries: int
    mask: Tensor | None
    exact: bool
    relabelled: bool = False

    def new_valid(self, device: torch.device) -> Tensor | None:
        """bool (rows, queries), False for new tokens that are padding; None where no mask was passed."""
        return None if self.mask is None else self.mask[:, -self.queries :].to(device)


class CompressedLayer(Protocol):
    """What the mask and the attention function need of a cache layer of ours."""

    @property
    def exact(self) -> bool:
        """Whether this forward pass attends exactly, through the fallback."""
        ...

    def get_seq_length(self) -> int:
        """Tokens seen, the newest included."""
        ...

    def announce(self, rows: int, queries: int, mask: Tensor | None) -> Forward:
        """Take note, for all layers of the cache, that a forward pass over `queries` new tokens has begun."""
        ...

    def attend(self, query: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
        """Weighted attention of the newest tokens' queries, (rows, heads, q, d_v)."""
        ...

    def after_attention(self, query: Tensor, scale: float) -> None:
        """Fold what no longer fits; the newest tokens have been attended to by `query`."""
        ...


class MarkedLength(int):
    """A key length that leads the mask function, which is never given the cache, to the layer it came from."""

    layer: CompressedLayer

    def __new__(cls, length: int, layer: CompressedLayer) -> MarkedLength:
        """An int of value `length`."""
        marked = super().__new__(cls, length)
        marked.layer = layer
        return marked


class AttentionName(str):
    """The name "wildcat", carrying the implementation to use wherever nothing is compressed.

    It travels with `config._attn_implementation`, into copies of the config but not to disk.
    """

    fallback: str

    def __new__(cls, fallback: str) -> AttentionName:
        """A str equal to `NAME`."""
        name = super().__new__(cls, NAME)
        name.fallback = fallback
        return name

    def __getnewargs__(self) -> tuple[str]:
        """For copy and pickle."""
        return (self.fallback,)


def mark(tensor: Tensor, layer: CompressedLayer) -> Tensor:
    """Let keys or values lead the attention function to `layer`; they arrive there as they are."""
    tensor._wildcat_layer = layer  # type: ignore[attr-defined]
    return tensor


def wildcat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered as "wildcat".

    Args:
        module: the attention module, whose config names the implementation to fall back on.
        query: (rows, heads, q, d).
        key: (rows, kv_heads, n, d), marked by the layer of ours that it comes from, if any.
        value: (rows, kv_heads, n, d_v).
        attention_mask: of the fallback; not read where the layer is compressed.
        *args: passed on to the fallback.
        **kwargs: `scaling`, `softcap`, `s_aux` and others of Transformers' attention interface.

    Returns:
        Output (rows, q, heads, d_v), and the attention probabilities where the fallback gives them.
    """
    layer = getattr(key, "_wildcat_layer", None)
    if layer is None:
        return _fallback(module)(module, query, key, value, attention_mask, *args, **kwargs)
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if layer.exact:
        output, probabilities = _fallback(module)(module, query, key, value, attention_mask, *args, **kwargs)
    else:
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions=True: tokens in a compressed layer have no attention probabilities of their own; "
                "leave it out and call cache.reset(), or use DynamicCache"
            )
        own = getattr(value, "_wildcat_layer", None) is layer and attention_mask is None
        if not own or (kwargs.get("sliding_window") or sys.maxsize) < layer.get_seq_length():
            raise RuntimeError(
                f"{type(module).__name__} changes the values, the mask or the window between the cache and its "
                "attention, which compressed layers cannot follow; use DynamicCache for this model"
            )
        output, probabilities = layer.attend(query, scale, kwargs).transpose(1, 2).contiguous(), None
    layer.after_attention(query, scale)
    return output, probabilities


def wildcat_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The mask function registered as "wildcat".

    A length that one of our caches has marked announces the forward pass to that cache. Where the cache is
    compressed no mask is needed (causality among new tokens is known, everything folded is visible), and
    padding is kept by the cache. Otherwise the mask is the fallback's.

    Raises:
        ValueError: a mask pattern other than the causal one, or a 2D mask of the wrong width.
    """
    fallback = _fallback_mask(kwargs.get("config"))
    window = kwargs.get("local_size")
    if isinstance(kv_length, MarkedLength) and window is not None and window < kv_length:
        # For layers with a window. A model may ask even if it has none; then no layer uses it.
        kv_length = int(kv_length)
    if isinstance(kv_length, MarkedLength):
        plain = mask_function is causal_mask_function or (window is not None and kwargs.get("allow_is_causal_skip"))
        if not plain:
            raise ValueError(
                "mask_function is not the causal one (image blocks or packed sequences, for example): tokens that "
                "see later ones cannot be compressed; use DynamicCache for this input"
            )
        if attention_mask is not None and attention_mask.shape[-1] != kv_length:
            raise ValueError(
                f"attention_mask has width {attention_mask.shape[-1]}, but the cache has seen "
                f"{kv_length - q_length} tokens and {q_length} are new: it must have width {int(kv_length)}; pass the "
                "mask of all tokens so far, or reset() the cache before a new text"
            )
        forward = kv_length.layer.announce(batch_size, q_length, attention_mask)
        if not forward.exact:
            return None
        kv_length = int(kv_length)
    if fallback is None:
        return None
    return fallback(
        batch_size,
        q_length,
        kv_length,
        *args,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def _fallback_name(config: Any) -> str:
    """The implementation that the config had before; eager, which is right for every family, if unknown."""
    return getattr(getattr(config, "_attn_implementation", None), "fallback", "eager")


def _fallback(module: nn.Module) -> Callable:
    """The attention function to use where nothing is compressed."""
    return AttentionInterface().get_interface(_fallback_name(module.config), _eager(module))


def _fallback_mask(config: Any) -> Callable | None:
    """The mask function that belongs to it; None for implementations that take no mask."""
    return AttentionMaskInterface().get(_fallback_name(config))


def _eager(module: nn.Module) -> Callable | None:
    """The eager attention of the module's own modeling file, where its family's peculiarities are."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    return None


AttentionInterface.register(NAME, wildcat_attention)
AttentionMaskInterface.register(NAME, wildcat_mask)
