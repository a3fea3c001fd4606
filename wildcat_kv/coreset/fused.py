"""Attention by one softmax: to weights that are not negative, whose logarithms join the scores.

On GPUs no kernel takes a bias at full speed, and cuDNN's, which torch prefers, is planned anew for every length, for
half a second each. So no bias is passed to it in passes whose length changes: one query takes plain products, and
several take FlashAttention, with log-weights as two more channels of the keys, if the kernels are switched on.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

from wildcat_kv.coreset.kernels.switch import DEVICES
from wildcat_kv.coreset.parts import SCORES_AT_ONCE, Parts, float32_blocks, unseen, weighted_sum
from wildcat_kv.coreset.tensors import full_precision, has_full_precision

# The widest heads of FlashAttention; widths are multiples of the second number.
_WIDEST, _WIDTHS = 256, 8
# A log-weight that leaves nothing: e^-10000.
_LEAST_LOG_WEIGHT = -1e4


def fused(
    query: Tensor, keys: Tensor, values: Tensor, weights: Tensor, scale: float, *, weighted: bool, causal: bool
) -> Tensor:
    """Attend the fastest way for the device, with log-weights as a bias of the scores.

    Args:
        query: (rows, heads, q, d).
        keys: (rows, kv_heads, n, d).
        values: (rows, kv_heads, n, d_v), numerators over their masses.
        weights: float32 (rows, kv_heads, n), 0 where not valid.
        scale: b, the factor of the scores.
        weighted: False if all entries are valid and weigh 1.
        causal: True if the last q entries are the queries' own tokens.

    Returns:
        (rows, heads, q, d_v) in the query's dtype.
    """
    (rows, heads, total, d), (kv_heads, n) = query.shape, keys.shape[1:3]
    groups = heads // kv_heads
    if total == 1 and by_products(query):
        return one_query(query, (keys,), (values,), weights, scale, weighted=weighted)
    if total > 1 and query.is_cuda and causal and _has_channels(query, values):
        return by_channels(query, keys, values, weights if weighted else None, scale)
    if total == 1:  # no kernel takes a bias and shared key heads: the heads of a group as further queries
        bias = None if not weighted else _log_weights(weights, query).unsqueeze(-2)
        grouped = query.reshape(rows, kv_heads, groups, d)
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scale)
        return output.reshape(rows, heads, 1, -1)
    bias = _log_weights(weights, query).unsqueeze(-2)
    step = max(1, SCORES_AT_ONCE // (rows * heads * n))
    parts = []
    for start in range(0, total, step):
        part = query[:, :, start : start + step]
        mask = bias
        if causal:
            hidden = unseen(n, n - total + start, part)
            mask = bias.masked_fill(hidden, torch.finfo(bias.dtype).min).repeat(1, 1, groups, 1)
        grouped = part.reshape(rows, kv_heads, -1, d)
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        parts.append(output.reshape(rows, heads, part.shape[2], -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def is_fusable(query: Tensor, values: Tensor, *, causal: bool) -> bool:
    """Tell if `fused` has a way to attend on a GPU that needs no plan for each length; its arguments."""
    if query.shape[2] == 1 or query.dtype in (torch.float32, torch.float64):
        return True
    return torch.compiler.is_compiling() or (causal and _has_channels(query, values))


def by_products(query: Tensor) -> bool:
    """Tell if plain products are faster than torch's kernel: on CPUs, by far in half precision, and on GPUs."""
    if query.dtype == torch.float64 or torch.compiler.is_compiling():
        return False
    return query.is_cuda or (query.device.type == "cpu" and has_full_precision(query.device))


def _has_channels(query: Tensor, values: Tensor) -> bool:
    """Tell if FlashAttention takes these heads with two more channels."""
    return (
        "cuda" in DEVICES
        and query.dtype in (torch.float16, torch.bfloat16)
        and _width(query.shape[-1], values.shape[-1]) <= _WIDEST
        and not torch.compiler.is_compiling()
        and _has_flash_attention(query.device)
    )


@cache
def _has_flash_attention(device: torch.device) -> bool:
    available = torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability(device) >= (8, 0)


def _width(d: int, d_v: int) -> int:
    """Compute the channels of keys and values alike, with two more for the keys."""
    return -(-max(d + 2, d_v) // _WIDTHS) * _WIDTHS


def by_channels(query: Tensor, keys: Tensor, values: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """Attend causally with log-weights as two more channels of the keys: q.k + log w / b = [q, 1, 1].[k, hi, lo].

    Two, as one number of 16 bits is too coarse for a log-weight. FlashAttention wants keys and values of one width.

    Args:
        query: (rows, heads, q, d), the last q entries' own.
        keys: (rows, kv_heads, n, d).
        values: (rows, kv_heads, n, d_v), numerators over their masses.
        weights: float32 (rows, kv_heads, n), 0 where not valid; None if all are valid and weigh 1.
        scale: b, the factor of the scores.

    Returns:
        (rows, heads, q, d_v) in the query's dtype.
    """
    (d, d_v), n = (query.shape[-1], values.shape[-1]), keys.shape[2]
    width = _width(d, d_v) if weights is not None or d != d_v else d
    query, keys, values = (pad(side, (0, width - side.shape[-1])) for side in (query, keys, values))
    if weights is not None:
        logs = weights.log().clamp_min_(_LEAST_LOG_WEIGHT) / scale
        limit = torch.finfo(keys.dtype).max / 2
        logs = logs.clamp_min_(-limit)
        query[..., d : d + 2] = 1.0
        keys[..., d] = logs
        keys[..., d + 1] = logs - keys[..., d].to(torch.float32)
    mask = causal_lower_right(query.shape[2], n)
    output = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return output[..., :d_v]


def one_query(query: Tensor, keys: Parts, values: Parts, weights: Tensor, scale: float, *, weighted: bool) -> Tensor:
    """Attend with one token's queries (rows, heads, 1, d), in float32, by plain products.

    The other arguments are those of `fused`, keys and values in parts.
    """
    if query.is_cuda and not has_full_precision(query.device):
        with full_precision(query.device):
            return one_query(query, keys, values, weights, scale, weighted=weighted)
    rows, heads, _, d = query.shape
    # In three dimensions: a product of more of them takes several small calls besides.
    grouped = (query.to(torch.float32) * scale).view(rows * weights.shape[1], -1, d)
    # Keys times queries: with few queries the other way round takes up to twice as long.
    products = [torch.bmm(block.flatten(0, -3), grouped.mT) for block in float32_blocks(keys)]
    scores = (products[0] if len(products) == 1 else torch.cat(products, dim=1)).mT.contiguous()
    if weighted:
        scores += weights.log().clamp_min_(torch.finfo(torch.float32).min).view(len(scores), 1, -1)
    found = weighted_sum(scores.softmax(-1), (block.flatten(0, -3) for block in float32_blocks(values)))
    return found.to(query.dtype).view(rows, heads, 1, -1)


def _log_weights(weights: Tensor, query: Tensor) -> Tensor:
    """Compute the bias of the scores.

    Finite where the weight is 0: a query that sees nothing gives no NaN.
    """
    bias = weights.log()
    # Off the CPU, and for float64, the kernels want the dtype of the query.
    if query.device.type != "cpu" or query.dtype == torch.float64:
        bias = bias.to(query.dtype)
    return bias.clamp_min_(torch.finfo(query.dtype).min)
