"""Checks of a call before any work, and rows sorted by their padding."""

from __future__ import annotations

import torch
from torch import Tensor


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    key_padding_mask: Tensor | None,
) -> None:
    """Refuse what no method can follow, see `Attention.forward`."""
    if is_causal:
        raise ValueError("is_causal=True: every query sees every key here; for causal models use the cache instead")
    if attn_mask is not None:
        raise ValueError(
            f"attn_mask has shape {tuple(attn_mask.shape)}: a mask of single scores cannot be followed; mark padding "
            "by key_padding_mask, and for causal models use the cache"
        )
    if dropout_p:
        raise ValueError(f"dropout_p={dropout_p} in training: no probabilities exist to be dropped; set it to 0")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale={scale} must be positive and finite, for example d ** -0.5")
    _check_tensors(query, key, value)
    if key_padding_mask is not None:
        _check_mask(key_padding_mask, (*query.shape[:-3], key.shape[-2]))
    if torch.compiler.is_compiling():  # to look at numbers would break the graph
        return
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if key_padding_mask is not None and name != "query":
            tensor = tensor.masked_fill(key_padding_mask.unsqueeze(-2).unsqueeze(-1), 0.0)
        if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):  # both are NaN if one number is
            raise ValueError(f"{name} holds NaN or infinity; give finite numbers, and mark padding by key_padding_mask")


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse shapes, dtypes and devices that do not fit together."""
    fit = (
        min(query.dim(), key.dim(), value.dim()) >= 3
        and query.shape[:-3] == key.shape[:-3]
        and key.shape[-3] > 0
        and query.shape[-3] % key.shape[-3] == 0
        and query.shape[-1] == key.shape[-1]
        and key.shape[:-1] == value.shape[:-1]
    )
    if not fit:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: they must "
            "be (..., heads, q, d), (..., kv_heads, n, d) and (..., kv_heads, n, d_v), heads a multiple of kv_heads"
        )
    kinds = {(tensor.dtype, tensor.device) for tensor in (query, key, value)}
    if len(kinds) > 1 or not query.is_floating_point():
        raise ValueError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype} on {query.device}, {key.device} "
            f"and {value.device}; they must have one floating-point dtype and one device"
        )


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(
            f"key_padding_mask is {mask.dtype} {tuple(mask.shape)}; it must be bool {shape}, True for padding"
        )


def rows_by_padding(mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Group rows with the same padding.

    Args:
        mask: bool (rows, n), True for padding.

    Returns:
        For each group its rows, int64 (k,), and the keys that are real, int64 (m,).
    """
    patterns, group = torch.unique(mask, dim=0, return_inverse=True)
    return [
        ((group == number).nonzero().squeeze(-1), (~pattern).nonzero().squeeze(-1))
        for number, pattern in enumerate(patterns)
    ]
