"""Keys and values in parts, some of them quantised or in half precision, read a block at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from wildcat_kv.coreset.quantised import Quantised

# Entries in half precision, or in a few bits, converted to float32 at once: as many as stay in a CPU's caches, and
# off the CPU more, where each piece costs a launch.
_CONVERTED_AT_ONCE = 1024
_CONVERTED_ON_DEVICE = 16384
# Scores held at once, in float32 numbers: 256 MiB.
SCORES_AT_ONCE = 2**26

# Keys or values of entries side by side, (..., kv_heads, n_i, channels) each; quantised ones have no `...`.
Parts: TypeAlias = "Sequence[Tensor | Quantised]"


def weighted_sum(terms: Tensor, blocks: Iterable[Tensor]) -> Tensor:
    """Multiply terms (..., q, n) by the values (..., n, d_v) in blocks, in float32."""
    product, start = None, 0
    for block in blocks:
        stop = start + block.shape[-2]
        # The whole of the terms goes as it is, not as a view of itself.
        piece = torch.matmul(terms if stop == terms.shape[-1] and not start else terms[..., start:stop], block)
        product, start = piece if product is None else product.add_(piece), stop
    assert product is not None
    return product


def float32_blocks(parts: Parts) -> Iterator[Tensor]:
    """Cut parts (..., n_i, channels) into float32 pieces (..., k, channels).

    Only a long part that is not in float32 is cut.
    """
    for part in parts:
        if isinstance(part, Quantised):
            most = _CONVERTED_AT_ONCE if part.codes.device.type == "cpu" else _CONVERTED_ON_DEVICE
            yield from (block.unsqueeze(1) for block in part.blocks(most))
        elif part.dtype == torch.float32:
            yield part
        else:
            most = _CONVERTED_AT_ONCE if part.device.type == "cpu" else _CONVERTED_ON_DEVICE
            yield from (piece.to(torch.float32) for piece in part.split(most, dim=-2))


def unseen(n: int, first_own: int, query: Tensor) -> Tensor:
    """Mark the entries after each query's own, bool (q, n).

    `first_own` is the entry of the first query's own token.
    """
    own = torch.arange(first_own, first_own + query.shape[-2], device=query.device)
    return torch.arange(n, device=query.device) > own.unsqueeze(-1)
