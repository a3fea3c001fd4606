"""BalanceKV: attention to keys that are halved by a self-balancing walk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, at_least, function_form, wide
from wildcat_kv.attention.kernels import softmax_attention, take
from wildcat_kv.attention.order import cells
from wildcat_kv.coreset.noise import uniform_rows

# e^80: beyond it a step of the walk is certain, and float32 ends at e^88.
_LOG_LARGEST_KERNEL = 80.0


@dataclass(frozen=True, eq=False)
class BalanceKV(Attention):
    """Halve the keys until few are left, so that what stays balances what goes.

    The paper is about a cache that grows; its halving serves any set of keys. A walk gives the keys of a block a side
    each, so that both sides are attended to alike, and half of the block stays. All that stay weigh the same.

    Attributes:
        rank: r, the most keys to keep; halving goes on until there are no more.
        gamma: strength of the push to the side that lacks a key; 4 in the authors' code.
        block: keys of a walk; 128 in the authors' code.
        seed: seed of the walks.

    Source: Kochetkova, Sheth, Han, Zandieh and Kapralov, "BalanceKV", arXiv 2502.07861, SoftmaxBalance.
    """

    name: ClassVar[str] = "balancekv"
    paper: ClassVar[str] = "arXiv 2502.07861"
    complexity: ClassVar[str] = "O(n (block + r) d)"

    rank: int = 512
    gamma: float = 4.0
    block: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, rank=self.rank)
        at_least(0, gamma=self.gamma)
        at_least(2, block=self.block)

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.rank < key.shape[2]:
            chosen = self.choose(key, value, scale)
            key, value = take(key, chosen), take(value, chosen)
        return softmax_attention(query, key, value, scale)

    @torch.no_grad()
    def choose(self, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Choose keys (rows, heads, n, d), int64 (rows, heads, kept), in the order of their places."""
        rows, heads, n = key.shape[:3]
        points, value = wide(key) * scale**0.5, wide(value)
        index, turn = torch.arange(n, device=key.device).expand(rows, heads, -1), 0
        while index.shape[-1] > self.rank:
            left = index.shape[-1]
            # More blocks would round up to more keys than there should be.
            blocks = min(-(-left // self.block), self.rank)
            places, used, _ = cells(left, blocks, key.device)
            kernel = balance_kernel(take(points, index)[:, :, places], take(value, index)[:, :, places], used)
            kept = keep_half(kernel, self.noise(heads, turn, places, key.device), used, self.gamma)
            index, turn = index.gather(-1, (places[:, :1] + kept)[:, :, half_used(used)].sort(-1).values), turn + 1
        return index

    def noise(self, heads: int, turn: int, places: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Draw noise in (0, 1) for places (blocks, t), (heads, blocks, 2 t): for the walk, and for ties."""
        head = torch.arange(heads, device=device).unsqueeze(-1)
        return uniform_rows(
            self.seed + turn, head, torch.arange(len(places), device=device), columns=2 * places.shape[1]
        )

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        left, work = n, 0
        while left > self.rank:
            work += left * min(self.block, left) * (d + d_v + 2)
            left = -(-left // 2)
        return work + q * left * (d + d_v + 1)


def balance_kernel(points: Tensor, value: Tensor, used: Tensor) -> Tensor:
    """Compute e^<x, x'> <v, v'> of blocks, around the mean key of each.

    Args:
        points: (rows, heads, blocks, t, d).
        value: (rows, heads, blocks, t, d_v).
        used: bool (blocks, t).

    Returns:
        (rows, heads, blocks, t, t), 0 where not used.
    """
    present = used.unsqueeze(-1)
    mean = (points * present).sum(-2, keepdim=True) / present.sum(-2, keepdim=True)
    points = points - mean
    kernel = (points @ points.mT).clamp_max(_LOG_LARGEST_KERNEL).exp() * (value @ value.mT)
    return kernel * (present & present.mT)


def keep_half(kernel: Tensor, noise: Tensor, used: Tensor, gamma: float) -> Tensor:
    """Walk through blocks, and keep the larger half of the places in order of their sides.

    Args:
        kernel: (rows, heads, blocks, t, t).
        noise: uniform (heads, blocks, 2 t).
        used: bool (blocks, t).
        gamma: strength of the push.

    Returns:
        int64 (rows, heads, blocks, ceil(t / 2)), places within the blocks, of which those of `half_used` count.
    """
    walk, ties = noise.to(kernel.dtype).chunk(2, dim=-1)
    signs = torch.zeros_like(kernel[..., 0])
    for step in range(kernel.shape[-1]):
        imbalance = (kernel[..., step, :] * signs).sum(-1)
        signs[..., step] = torch.where(walk[..., step] < 0.5 - gamma * imbalance, 1.0, -1.0)
    # The sides are seldom quite equal in number: the noise decides who changes over.
    score = (signs + ties).masked_fill(~used, -torch.inf)
    return score.argsort(dim=-1, descending=True, stable=True)[..., : (kernel.shape[-1] + 1) // 2]


def half_used(used: Tensor) -> Tensor:
    """Mark the larger halves of blocks (blocks, t), bool (blocks, ceil(t / 2))."""
    places = torch.arange((used.shape[1] + 1) // 2, device=used.device)
    return places < (used.sum(-1, keepdim=True) + 1) // 2


balance_attention = function_form(BalanceKV, "balance_attention")
