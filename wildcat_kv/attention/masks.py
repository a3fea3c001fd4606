"""Masks of other libraries: which keys are padding, and refusal of what is more than padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def key_padding(mask: Any, rows: int, n: int) -> Tensor | None:
    """Read which keys are padding from a mask of Transformers or diffusers.

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
