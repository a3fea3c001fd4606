"""Measure values behind the output projection, where the model adds them up."""

from __future__ import annotations

import torch
from torch import Tensor

# Projected channels held at once, in float32 numbers: 64 MiB.
_CHANNELS_AT_ONCE = 2**24


def output_norms(values: Tensor, projection: Tensor, order: float) -> Tensor:
    """Compute the norms of values after the layer's output projection.

    Costs O(n d_v hidden) for each query head.

    Args:
        values: (rows, heads, n, d_v), any dtype.
        projection: (query_heads, d_v, hidden), as in `KVBlock.output_projection`.
        order: order of the norm, 1 or 2.

    Returns:
        float32 (rows, heads, group, n): the norm of each value as each query head of its group projects it.
    """
    rows, heads, n, _ = values.shape
    blocks = projection.unflatten(0, (heads, -1))
    norms = values.new_empty(rows, heads, blocks.shape[1], n, dtype=torch.float32)
    step = max(1, _CHANNELS_AT_ONCE // (rows * projection.shape[-1]))
    for head in range(heads):
        for member in range(blocks.shape[1]):
            weights = blocks[head, member].to(torch.float32)
            for start in range(0, n, step):
                part = values[:, head, start : start + step].to(torch.float32) @ weights
                norms[:, head, member, start : start + step] = torch.linalg.vector_norm(part, order, dim=-1)
    return norms
