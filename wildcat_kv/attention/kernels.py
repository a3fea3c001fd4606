"""Attention to all keys, and to weighted ones, in one call of torch's fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wildcat_kv.coreset.tensors import take_columns

# A denominator this small against the sum of its terms' magnitudes is cancellation, not information.
_DENOMINATOR_FLOOR = 1e-6


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend exactly.

    Args:
        query: (rows, kv_heads, groups, q, d).
        key: (rows, kv_heads, n, d).
        value: (rows, kv_heads, n, d_v).
        scale: b, the factor of the scores.

    Returns:
        (rows, kv_heads, groups * q, d_v).
    """
    return F.scaled_dot_product_attention(query.flatten(2, 3), key, value, scale=scale)


def weighted_softmax_attention(query: Tensor, key: Tensor, sums: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Compute WTDATTN, without the clip.

    sum_i e^(b q.k_i) U_i / sum_i e^(b q.k_i) w_i. The weights, which may be negative, are further channels of the
    values: the kernel averages these like the others, and its normaliser cancels in the quotient.

    Args:
        query: (rows, heads, q, d).
        key: (rows, heads, r, d).
        sums: (rows, heads, r, d_v), U.
        weights: (rows, heads, r), w.
        scale: b, the factor of the scores.

    Returns:
        (rows, heads, q, d_v) in the dtype of `sums`; 0 where the denominator cancels out.

    Source: arXiv 2602.10056, WTDATTN; `coreset.reference.wtdattn`.
    """
    d, d_v = key.shape[-1], sums.shape[-1]
    weights = weights.unsqueeze(-1)
    packed = torch.cat((sums, weights, weights.abs()), dim=-1)
    query, key = query.to(sums.dtype), key.to(sums.dtype)
    width = -(-max(d, d_v + 2) // 8) * 8  # the fused kernel wants one width for all, and takes eights fastest
    if width <= 2 * d:  # beyond it the products with zeros cost more than the kernel saves
        query, key, packed = (F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (query, key, packed))
    return divide(F.scaled_dot_product_attention(query, key, packed, scale=scale), d_v)


def divide(sums: Tensor, d_v: int) -> Tensor:
    """Divide numerators by denominators.

    Args:
        sums: (..., c), d_v numerators, then the denominator and the sum of its terms' magnitudes.
        d_v: channels of the values.

    Returns:
        (..., d_v), 0 where the denominator cancels out.
    """
    denominator, magnitude = sums[..., d_v : d_v + 1], sums[..., d_v + 1 : d_v + 2]
    sound = denominator > _DENOMINATOR_FLOOR * magnitude
    return torch.where(sound, sums[..., :d_v] / torch.where(sound, denominator, 1.0), 0.0)


def take(tensor: Tensor, index: Tensor) -> Tensor:
    """Copy entries of a tensor by their indices, with a gradient where one is wanted.

    Args:
        tensor: (rows, heads, n, c).
        index: int64 (rows or 1, heads or 1, k).

    Returns:
        (rows, heads, k, c).
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        return tensor.take_along_dim(index.expand(*tensor.shape[:2], -1).unsqueeze(-1), dim=2)
    return take_columns(tensor, index)
