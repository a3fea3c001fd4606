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
    width = packed_width(d, d_v)
    packed = pack(sums, weights, width)
    if width <= 2 * d:  # beyond it the products with zeros cost more than the fused kernel saves
        query, key = widen(query, width), widen(key, width)
    return packed_attention(query.to(sums.dtype), key.to(sums.dtype), packed, d_v, scale)


def packed_width(d: int, d_v: int) -> int:
    """Choose the channels of packed values, which the fused kernel wants for queries and keys, too."""
    return -(-max(d, d_v + 2) // 8) * 8


def pack(sums: Tensor, weights: Tensor, width: int) -> Tensor:
    """Put sums (..., d_v), weights and their magnitudes (...) side by side, and zeros up to a width."""
    packed = sums.new_zeros(*sums.shape[:-1], width)
    d_v = sums.shape[-1]
    packed[..., :d_v] = sums
    packed[..., d_v] = weights
    packed[..., d_v + 1] = weights.abs()
    return packed


def widen(tensor: Tensor, width: int) -> Tensor:
    """Append channels of zeros."""
    return tensor if tensor.shape[-1] == width else F.pad(tensor, (0, width - tensor.shape[-1]))


def packed_attention(query: Tensor, key: Tensor, packed: Tensor, d_v: int, scale: float) -> Tensor:
    """Average packed values, and divide the sums by the weights.

    Args:
        query: (..., q, d).
        key: (..., r, d).
        packed: (..., r, width), the result of `pack`.
        d_v: channels of the sums.
        scale: b.

    Returns:
        (..., q, d_v).
    """
    found = F.scaled_dot_product_attention(query, key, packed, scale=scale)
    numerator, denominator, magnitude = found[..., :d_v], found[..., d_v : d_v + 1], found[..., d_v + 1 : d_v + 2]
    sound = denominator > _DENOMINATOR_FLOOR * magnitude
    return torch.where(sound, numerator / torch.where(sound, denominator, 1.0), 0.0)


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
