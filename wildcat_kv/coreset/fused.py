"""Attention by one softmax: to weights that are not negative, whose logarithms join the scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from wildcat_kv.coreset.parts import SCORES_AT_ONCE, Parts, float32_blocks, unseen, weighted_sum
from wildcat_kv.coreset.tensors import has_full_precision


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


def by_products(query: Tensor) -> bool:
    """Tell if plain products are faster than torch's kernel: on CPUs, by far in half precision."""
    on_cpu = query.device.type == "cpu" and query.dtype != torch.float64
    return on_cpu and not torch.compiler.is_compiling() and has_full_precision(query.device)


def one_query(query: Tensor, keys: Parts, values: Parts, weights: Tensor, scale: float, *, weighted: bool) -> Tensor:
    """Attend with one token's queries (rows, heads, 1, d), in float32, by plain products.

    The other arguments are those of `fused`, keys and values in parts.
    """
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
