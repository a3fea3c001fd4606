"""Attention over entries that carry weights: slots of a coreset and exact tokens, side by side. Pure tensors.

What is computed has one definition, `weighted_attention`, and two ways. Where no weight is negative, its logarithm
joins the scores and torch's fused kernel does the rest, on values that are divided by their weights beforehand
(`mass_of`). Negative weights need numerator and denominator apart.

Source: WildCat, arXiv 2602.10056, the weighted attention WTDATTN.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from wildcat_kv.coreset.tensors import full_precision

# A denominator this small against the sum of its terms' magnitudes is cancellation, not information.
_DENOMINATOR_FLOOR = 1e-6
# A numerator is not divided by a weight smaller than this, which would leave the range of half precision.
_LEAST_MASS = 2.0**-7
# Entries of a half-precision cache converted to float32 at once.
_CONVERTED_AT_ONCE = 4096
# Scores held at once, in float32 numbers: 256 MiB.
_SCORES_AT_ONCE = 2**26


class Weighting(Enum):
    """What is known of the weights of some entries, and so which way there is to attend to them."""

    NONE = "all are valid and weigh 1"
    POSITIVE = "none that is valid weighs less than the least mass"
    SIGNED = "any weights"

    @staticmethod
    def of(weights: Tensor, valid: Tensor) -> Weighting:
        """That of `weights` and `valid` (...), which the host reads."""
        none = ((weights == 1) & valid).all()
        positive = ((weights >= _LEAST_MASS) | ~valid).all()
        return (Weighting.SIGNED, Weighting.POSITIVE, Weighting.NONE)[int(none.int() + positive.int())]


def mass_of(weights: Tensor) -> Tensor:
    """What numerators are divided by where they are stored: the weight, or 1 where that is small or negative.

    Args:
        weights: float32 (...).

    Returns:
        float32 (...), at least 2^-7.
    """
    return torch.where(weights >= _LEAST_MASS, weights, 1.0)


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
    return _in_blocks(
        query,
        keys,
        values,
        weights,
        None,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        valid=valid,
        causal=causal,
        value_range=value_range,
        softcap=softcap,
        sink_logits=sink_logits,
    )


def coreset_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor,
    *,
    weighting: Weighting,
    scale: float,
    valid: Tensor,
    causal: bool = False,
    value_range: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """`weighted_attention` to entries as a cache stores them, the fastest way that there is.

    Args:
        query: (rows, heads, q, d).
        keys: (rows, kv_heads, n, d).
        values: (rows, kv_heads, n, d_v), numerators over their masses, `mass_of(weights)`.
        weights: float32 (rows, kv_heads, n), 0 where not valid.
        weighting: what is known of them.
        scale: b; so are the arguments below as in `weighted_attention`.
        valid: bool (rows, kv_heads, n).
        causal: whether the last q entries are the queries' own tokens.
        value_range: box around the values seen.
        softcap: of the scores.
        sink_logits: of the denominator.

    Returns:
        (rows, heads, q, d_v) in the query's dtype.
    """
    fused = (
        weighting is not Weighting.SIGNED
        and softcap is None
        and sink_logits is None
        and query.dtype == keys.dtype == values.dtype
        and not torch.is_autocast_enabled(query.device.type)
    )
    if fused:
        output = _fused(query, keys, values, weights, weighting=weighting, scale=scale, causal=causal)
        if value_range is None or weighting is Weighting.NONE:  # of values that were seen, an average is in their box
            return output
        grouped = output.view(*values.shape[:2], -1, values.shape[-1])
        return grouped.clamp(*value_range).view_as(output)
    return _in_blocks(
        query,
        keys,
        values,
        weights,
        mass_of(weights),
        scale=scale,
        valid=valid,
        causal=causal,
        value_range=value_range,
        softcap=softcap,
        sink_logits=sink_logits,
    )


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, weights: Tensor, *, weighting: Weighting, scale: float, causal: bool
) -> Tensor:
    """By torch's kernel, with log-weights as its bias."""
    (rows, heads, total, d), (kv_heads, n) = query.shape, keys.shape[1:3]
    groups = heads // kv_heads
    if total == 1 and query.device.type == "cpu":  # shares out the work by query heads, of which there are more
        bias = None
        if weighting is not Weighting.NONE:
            bias = _log_weights(weights, query).repeat_interleave(groups, dim=1).unsqueeze(-2)
        return scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale, enable_gqa=True)
    if total == 1:  # elsewhere, no kernel takes a bias and shared key heads: the heads of a group as further queries
        bias = None if weighting is Weighting.NONE else _log_weights(weights, query).unsqueeze(-2)
        grouped = query.reshape(rows, kv_heads, groups, d)
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scale)
        return output.reshape(rows, heads, 1, -1)
    bias = _log_weights(weights, query).unsqueeze(-2)
    step = max(1, _SCORES_AT_ONCE // (rows * heads * n))
    parts = []
    for start in range(0, total, step):
        part = query[:, :, start : start + step]
        mask = bias
        if causal:
            own = torch.arange(n - total + start, n - total + start + part.shape[2], device=query.device)
            hidden = torch.arange(n, device=query.device) > own.unsqueeze(-1)
            mask = bias.masked_fill(hidden, torch.finfo(bias.dtype).min).repeat(1, 1, groups, 1)
        grouped = part.reshape(rows, kv_heads, -1, d)
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        parts.append(output.reshape(rows, heads, part.shape[2], -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _log_weights(weights: Tensor, query: Tensor) -> Tensor:
    """The bias of the scores; a finite number where the weight is 0, so that a query that sees nothing gives no NaN."""
    bias = weights.log()
    # Off the CPU, and for float64, the kernels want the dtype of the query.
    if query.device.type != "cpu" or query.dtype == torch.float64:
        bias = bias.to(query.dtype)
    return bias.clamp_min_(torch.finfo(query.dtype).min)


def _in_blocks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor | None,
    masses: Tensor | None,
    *,
    scale: float,
    valid: Tensor | None,
    causal: bool,
    value_range: tuple[Tensor, Tensor] | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Numerator and denominator apart, for a few queries at a time; `masses` of the values, if they were divided."""
    total = query.shape[-2]
    step = max(1, _SCORES_AT_ONCE // max(1, query.shape[:-2].numel() * keys.shape[-2]))
    # The switches of backends cannot be traced; then what is set for the program holds.
    traced = torch.compiler.is_compiling()
    with torch.autocast(query.device.type, enabled=False) if traced else full_precision(query.device):
        columns = _columns(keys, weights)
        parts = [
            _attend(
                query[..., start : start + step, :],
                keys,
                values,
                columns,
                masses,
                scale=scale,
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
        return torch.ones(*keys.shape[:-1], 2, dtype=torch.float32, device=keys.device)
    return torch.stack((weights, weights.abs()), dim=-1)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    masses: Tensor | None,
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
    parts = [torch.matmul(grouped, part.mT) for part in _float32_blocks(keys)]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
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
    denominator, magnitude = torch.matmul(terms, columns).split(1, dim=-1)
    if masses is not None:
        terms.mul_(masses.unsqueeze(-2))
    first, *others = _float32_blocks(values)
    numerator = terms[..., : first.shape[-2]] @ first
    for piece, block in zip(terms[..., first.shape[-2] :].split(_CONVERTED_AT_ONCE, dim=-1), others, strict=False):
        numerator += piece @ block
    if sinks is not None:
        extra = (sinks - largest).exp()
        denominator, magnitude = denominator + extra, magnitude + extra
    cancelled = denominator <= _DENOMINATOR_FLOOR * magnitude  # false for NaN, which must not be hidden
    output = torch.where(cancelled, 0.0, numerator / denominator).to(query.dtype)
    if value_range is not None:
        output = output.clamp(*(bound.to(query.dtype) for bound in value_range))
    return output.reshape(*batch, heads, length, -1)


def _float32_blocks(tensor: Tensor) -> list[Tensor]:
    """float32 pieces (..., k, channels) of a tensor (..., n, channels); of long half-precision ones few at once."""
    if tensor.shape[-2] <= _CONVERTED_AT_ONCE or tensor.dtype == torch.float32:
        return [tensor.to(torch.float32)]
    return [part.to(torch.float32) for part in tensor.split(_CONVERTED_AT_ONCE, dim=-2)]
