"""Dtypes to compute in, and the way back to the dtype that a cache stores. Pure tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype that holds numbers of `dtype` and of float32: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def saturate_(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert numbers to `dtype`, those beyond its finite range to its ends.

    Args:
        numbers: float32 or float64, any shape; overwritten.
        dtype: any floating point, wider or narrower than the numbers.

    Returns:
        The numbers in `dtype`.
    """
    # A bound beyond the numbers' own range would not convert to their dtype.
    limit = min(torch.finfo(dtype).max, torch.finfo(numbers.dtype).max)
    return numbers.clamp_(-limit, limit).to(dtype)
