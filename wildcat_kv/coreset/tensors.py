"""Helpers for tensors: dtypes to compute in and to store, gathering, precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.coreset.launching import is_launched


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype to compute in: float64 for float64, else float32."""
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


def take_columns(tensor: Tensor, index: Tensor) -> Tensor:
    """Copy entries of a tensor by their indices.

    Args:
        tensor: (rows, heads, n, ...).
        index: int64 (rows or 1, heads or 1, k).

    Returns:
        (rows, heads, k, ...).
    """
    rows, heads = tensor.shape[:2]
    if not is_launched(tensor.device):  # whole runs of memory at a time: several times as fast
        taken = tensor.new_empty(rows, heads, index.shape[-1], *tensor.shape[3:])
        index = index.expand(rows, heads, -1)
        for row in range(rows):
            for head in range(heads):
                torch.index_select(tensor[row, head], 0, index[row, head], out=taken[row, head])
        return taken
    index = index.view(*index.shape, *[1] * (tensor.dim() - 3))
    return tensor.gather(2, index.expand(rows, heads, -1, *tensor.shape[3:]))


def keep_where_(numbers: Tensor, mask: Tensor) -> Tensor:
    """Multiply finite numbers by 0 where a bool mask of a shape that broadcasts is False, in place."""
    # Processors multiply by numbers much faster than by bools; a device would launch the conversion.
    return numbers.mul_(mask if is_launched(numbers.device) else mask.to(numbers.dtype))


# Switched one by one: torch refuses its older global switch once a program has used these.
_BACKENDS: list[Any] = [
    backend
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    if hasattr(backend, "fp32_precision")
]


def has_full_precision(device: torch.device) -> bool:
    """Tell if float32 products on `device` are true float32 already."""
    for backend in _BACKENDS:
        if backend.fp32_precision not in ("none", "ieee"):
            return False
    return bool(_BACKENDS) and not torch.is_autocast_enabled(device.type)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in true float32: no autocast, TF32 or bfloat16."""
    before = [backend.fp32_precision for backend in _BACKENDS]
    try:
        for backend in _BACKENDS:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(_BACKENDS, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that outlive the forward pass.

    They have no graph, and stay writable after inference_mode.
    """
    if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():  # usual, and entering costs time
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
