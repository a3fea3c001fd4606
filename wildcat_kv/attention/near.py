"""Exact attention to the bins that matter to a block of queries, and to the slots of all others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.attention.kernels import packed_attention, take

# Queries of a block that say which bins are near.
_SPOKESMEN = 4


class Bins(NamedTuple):
    """Weighted keys in bins, their values packed.

    Attributes:
        key: (rows, heads, bins, s, width).
        packed: (rows, heads, bins, s, width).
    """

    key: Tensor
    packed: Tensor

    def choose(self, index: Tensor) -> Bins:
        """Take bins (rows, heads, blocks, k) for blocks, (rows, heads, blocks, k * s, ...)."""

        def chosen(tensor: Tensor) -> Tensor:
            found = take(tensor.flatten(3), index.flatten(2))
            return found.view(*index.shape[:3], -1, tensor.shape[-1])

        return Bins(chosen(self.key), chosen(self.packed))


def near_attention(query: Tensor, slots: Bins, whole: Bins, first: Bins, near: int, d_v: int, scale: float) -> Tensor:
    """Attend to whole bins nearby, and to the slots of those further off.

    Every bin owns its slots: where it is attended to whole they are left out, and nothing is counted twice.

    Args:
        query: (rows, heads, blocks, t, width), blocks of queries.
        slots: slots of the bins.
        whole: all keys of the bins.
        first: keys that all queries see, as one bin.
        near: number of bins that each block attends to whole, less than there are.
        d_v: channels of the values.
        scale: b.

    Returns:
        (rows, heads, blocks, t, d_v).
    """
    chosen, others = nearest_bins(query, slots, d_v, near, scale)
    parts = [whole.choose(chosen), slots.choose(others)]
    if first.key.shape[3]:
        parts.append(first.choose(torch.zeros_like(chosen[..., :1])))
    keys, packed = (torch.cat(tensors, dim=3).flatten(1, 2) for tensors in zip(*parts, strict=True))
    return packed_attention(query.flatten(1, 2), keys, packed, d_v, scale).unflatten(1, query.shape[1:3])


@torch.no_grad()
def nearest_bins(query: Tensor, slots: Bins, d_v: int, near: int, scale: float) -> tuple[Tensor, Tensor]:
    """Find the bins with the largest share of attention, as the slots estimate it.

    Four queries of each block are asked, and their shares added up.

    Args:
        query: (rows, heads, blocks, t, width).
        slots: slots of the bins.
        d_v: channels of the values; the weights are the next one.
        near: number of bins.
        scale: b.

    Returns:
        Bins int64 (rows, heads, blocks, near), and the others (rows, heads, blocks, bins - near).
    """
    length, bins = query.shape[3], slots.key.shape[2]
    asked = torch.arange(_SPOKESMEN, device=query.device) * length // _SPOKESMEN + length // (2 * _SPOKESMEN)
    scores = (query[:, :, :, asked] * scale).flatten(2, 3) @ slots.key.flatten(2, 3).mT
    terms = (scores - scores.amax(-1, keepdim=True)).exp()
    mass = (terms * slots.packed[..., d_v].clamp_min(0).flatten(2).unsqueeze(2)).unflatten(-1, (bins, -1)).sum(-1)
    shares = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    total = shares.unflatten(2, (-1, _SPOKESMEN)).sum(3)
    order = total.argsort(dim=-1, descending=True, stable=True)
    return order[..., :near].sort(-1).values, order[..., near:].sort(-1).values
