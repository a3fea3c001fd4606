"""Attention to a coreset in bins, the bins that matter to a block of queries replaced by their keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wildcat_kv.attention.kernels import divide, take
from wildcat_kv.coreset.bins import Split

# Queries of a block that say which bins are near.
_SPOKESMEN = 4
# The score of the anchor. With keys around their mean, scores of both signs and up to three times this are in range.
_ANCHOR = 40.0


class Entries(NamedTuple):
    """Weighted keys in bins, ready for the fused kernel.

    Queries have 1 in channel d, keys 0. In the values the sums are followed by the weights, their magnitudes and the
    anchor's mark.

    Attributes:
        key: (rows, heads, bins, s, width).
        packed: (rows, heads, bins, s, width).
    """

    key: Tensor
    packed: Tensor

    @staticmethod
    def of(key: Tensor, sums: Tensor, weights: Tensor) -> Entries:
        """Pack keys (..., d), sums U (..., d_v) and weights w (...)."""
        d, d_v = key.shape[-1], sums.shape[-1]
        width = packed_width(d, d_v)
        weights = weights.unsqueeze(-1)
        return Entries(
            F.pad(key, (0, width - d)), F.pad(torch.cat((sums, weights, weights.abs()), dim=-1), (0, width - d_v - 2))
        )

    @staticmethod
    def anchor(like: Entries, d: int, d_v: int, scale: float, share: float) -> Entries:
        """Make an entry of a known score for each bin, which adds to no sum."""
        key, packed = (torch.zeros_like(tensor[..., :1, :]) for tensor in like)
        key[..., d] = _ANCHOR / scale
        packed[..., d_v + 2] = share
        return Entries(key, packed)

    def join(self, *others: Entries) -> Entries:
        """Put the entries of each bin side by side."""
        return Entries(*(torch.cat(parts, dim=-2) for parts in zip(self, *others, strict=True)))

    def in_one_bin(self) -> Entries:
        """Put all bins into one."""
        return Entries(*(tensor.flatten(2, 3).unsqueeze(2) for tensor in self))

    def negative(self, d_v: int) -> Entries:
        """Turn the signs of sums and weights."""
        signs = self.packed.new_ones(self.packed.shape[-1])
        signs[: d_v + 1] = -1
        return Entries(self.key, self.packed * signs)

    def choose(self, index: Tensor) -> Entries:
        """Take bins (rows, heads, blocks, k) for blocks: (rows, heads, blocks, k * s, width)."""
        blocks = index.shape[:3]
        taken = (take(tensor.flatten(3), index.flatten(2)) for tensor in self)
        return Entries(*(tensor.view(*blocks, -1, self.key.shape[-1]) for tensor in taken))


def packed_width(d: int, d_v: int) -> int:
    """Choose the channels of queries, keys and values: the fused kernel wants them equal, and takes eights fastest."""
    return -(-max(d + 1, d_v + 3) // 8) * 8


def near_attention(
    query: Tensor, slots: Entries, whole: Entries, first: Entries, near: int, d_v: int, scale: float
) -> Tensor:
    """Attend to whole bins nearby, and to the slots of those further off.

    All queries attend to all slots; then each block attends to its near bins, with the slots of these once more and
    negative. Every bin owns its slots: nothing is counted twice.

    Args:
        query: (rows, heads, groups, q, d).
        slots: slots of the bins; keys are around their mean.
        whole: all keys of the bins.
        first: keys that all queries see, in one bin.
        near: number of bins that each block attends to whole, less than there are.
        d_v: channels of the values.
        scale: b.

    Returns:
        (rows, heads, groups, q, d_v).
    """
    (rows, heads, groups, length, d), bins = query.shape, slots.key.shape[2]
    query = F.pad(query, (0, slots.key.shape[-1] - d))
    query[..., d] = 1
    everything = slots.in_one_bin().join(first)
    far = everything.join(Entries.anchor(everything, d, d_v, scale, 1.0))
    sums = _sums(query.flatten(2, 3).unsqueeze(2), far, d_v, scale).view(rows, heads * groups, length, -1)

    split = Split(length, min(bins, length))
    blocks = split.rectangle(query.flatten(1, 2), range(split.parts), query.dtype)
    blocks = blocks.view(rows, heads, -1, split.longest, query.shape[-1])
    local = whole.join(slots.negative(d_v), Entries.anchor(slots, d, d_v, scale, 1 / near))
    chosen = nearest_bins(blocks, slots, d_v, near, scale)
    own = _sums(blocks, local.choose(chosen), d_v, scale).view(rows, heads * groups, split.parts, split.longest, -1)
    return divide(sums + split.line(own), d_v).view(rows, heads, groups, length, d_v)


def _sums(query: Tensor, entries: Entries, d_v: int, scale: float) -> Tensor:
    """Sum up e^(b q.k) times the packed values, up to the factor e^-40.

    The kernel averages. What the anchor, whose score is known, has in the average tells the sum.

    Args:
        query: (rows, heads, bins, t, width).
        entries: entries of the bins, an anchor among them.
        d_v: channels of the values.
        scale: b.

    Returns:
        (rows, heads, bins, t, d_v + 2).
    """
    flat, key, packed = (tensor.flatten(0, 1) for tensor in (query, *entries))
    found = F.scaled_dot_product_attention(flat, key, packed, scale=scale)
    share = found[..., d_v + 2 : d_v + 3].clamp_min(torch.finfo(found.dtype).tiny)
    return (found[..., : d_v + 2] / share).unflatten(0, query.shape[:2])


@torch.no_grad()
def nearest_bins(query: Tensor, slots: Entries, d_v: int, near: int, scale: float) -> Tensor:
    """Find the bins with the largest share of attention, as the slots estimate it.

    Four queries of each block are asked, and their shares added up.

    Args:
        query: (rows, heads, blocks, t, width).
        slots: slots of the bins.
        d_v: channels of the values; the weights are the next one.
        near: number of bins.
        scale: b.

    Returns:
        Bins int64 (rows, heads, blocks, near).
    """
    length, bins = query.shape[3], slots.key.shape[2]
    asked = torch.arange(_SPOKESMEN, device=query.device) * length // _SPOKESMEN + length // (2 * _SPOKESMEN)
    scores = (query[:, :, :, asked] * scale).flatten(2, 3) @ slots.key.flatten(2, 3).mT
    terms = (scores - scores.amax(-1, keepdim=True)).exp()
    mass = (terms * slots.packed[..., d_v].clamp_min(0).flatten(2).unsqueeze(2)).unflatten(-1, (bins, -1)).sum(-1)
    shares = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    total = shares.unflatten(2, (-1, _SPOKESMEN)).sum(3)
    return total.argsort(dim=-1, descending=True, stable=True)[..., :near]
