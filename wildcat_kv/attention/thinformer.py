"""Thinformer: attention to some sqrt(n) keys, chosen by kernel thinning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, at_least, function_form, wide
from wildcat_kv.attention.kernels import softmax_attention, take
from wildcat_kv.coreset.noise import uniform_rows


@dataclass(frozen=True, eq=False)
class Thinformer(Attention):
    """Halve the keys again and again, so that those kept stand for all.

    KH-Compress: buckets of 4^(g + 1) keys are halved and joined by twos, until 2^g sqrt(n) are left, which weigh the
    same. A halving keeps one of each two consecutive keys, by a walk that balances a kernel of keys and values.

    Attributes:
        g: oversampling; 2^g sqrt(n) keys are kept, and all where there are no more.
        seed: seed of the walks.

    Source: Carrell, Gong, Shetty, Dwivedi and Mackey, "Low-Rank Thinning", arXiv 2502.12063. n is lowered to a power of
    4 by evenly spaced keys, as in the authors' code.
    """

    name: ClassVar[str] = "thinformer"
    paper: ClassVar[str] = "arXiv 2502.12063"
    complexity: ClassVar[str] = "O(n 4^g log(n) d + n^1.5 2^g d)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"t2t_1": {"g": 2}, "t2t_2": {"g": 4}}

    g: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, g=self.g)

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.kept(key.shape[2]) < key.shape[2]:
            chosen = self.choose(key, value, scale)
            key, value = take(key, chosen), take(value, chosen)
        return softmax_attention(query, key, value, scale)

    def kept(self, n: int) -> int:
        """Count the keys that are kept of n; n where thinning would keep no fewer."""
        power = _log4(n)
        return 2 ** (self.g + power) if self.g < power else n

    @torch.no_grad()
    def choose(self, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Choose keys (rows, heads, n, d), int64 (rows, heads, kept), in the order of their places."""
        rows, heads, n = key.shape[:3]
        power = _log4(n)
        total, rounds, size = 4**power, power - self.g, 4 ** (self.g + 1)
        points, value = wide(key) * scale**0.5, wide(value)
        limits = (points.square().sum(-1).amax(-1), value.square().sum(-1).amax(-1))
        index = (torch.arange(total, device=key.device) * n // total).expand(rows, heads, -1)
        failure = 0.5 * size**2 / (4 ** (self.g + 1) * rounds * total)
        for turn in range(rounds):
            own_points, own_value = (take(tensor, index).unflatten(2, (-1, size)) for tensor in (points, value))
            kernel = _kernel(own_points, own_value, *limits)
            noise = self.noise(heads, turn, kernel.shape[2], size // 2, key.device)
            second = halve(kernel, noise.to(kernel.dtype), failure)
            index = index.unflatten(2, (-1, 2)).gather(-1, second.flatten(2, 3).long().unsqueeze(-1)).squeeze(-1)
        return index

    def noise(self, heads: int, turn: int, buckets: int, pairs: int, device: torch.device | str = "cpu") -> Tensor:
        """Draw noise in (0, 1), (heads, buckets, pairs + 1): for the steps of each walk, and which half stays."""
        head = torch.arange(heads, device=device).unsqueeze(-1)
        bucket = torch.arange(buckets, device=device)
        return uniform_rows(self.seed + turn, head, bucket, columns=pairs + 1)

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        kept = self.kept(n)
        if kept == n:
            return q * n * (d + d_v + 1)
        power, size = _log4(n), 4 ** (self.g + 1)
        halvings = 2 * 4**power  # keys of all rounds: each has half of the one before
        return halvings * size * (d + d_v + 3) + q * kept * (d + d_v + 1)


def halve(kernel: Tensor, noise: Tensor, failure: float) -> Tensor:
    """Keep one of each two consecutive points.

    Args:
        kernel: (rows, heads, buckets, s, s).
        noise: uniform (heads, buckets, s / 2 + 1).
        failure: delta, the probability that a bound on the walk fails.

    Returns:
        bool (rows, heads, buckets, s / 2), True where the second one stays.

    Source: Dwivedi and Mackey, "Kernel Thinning", arXiv 2105.05842, halving with fixed pairs.
    """
    size = kernel.shape[-1]
    between = kernel[..., ::2, :] - kernel[..., 1::2, :]
    between = between[..., ::2] - between[..., 1::2]
    root = between.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    bound = root * root.cummax(-1).values * (0.5 + math.log(2 * size / failure))
    threshold = bound * (2 * noise[..., :-1] - 1)
    signs, sums = torch.zeros_like(root), torch.zeros_like(root)
    for step in range(size // 2):
        signs[..., step] = torch.where(threshold[..., step] <= sums[..., step], -1.0, 1.0)
        sums.addcmul_(signs[..., step, None], between[..., step, :])
    return (signs < 0) ^ (noise[..., -1:] < 0.5)


def _kernel(points: Tensor, value: Tensor, point_limit: Tensor, value_limit: Tensor) -> Tensor:
    """Compute e^(<x, x'> - max |x|^2) (<v, v'> + max |v|^2) in buckets (rows, heads, buckets, s, s)."""
    point_limit, value_limit = (limit[:, :, None, None, None] for limit in (point_limit, value_limit))
    return (points @ points.mT - point_limit).exp() * (value @ value.mT + value_limit)


def _log4(n: int) -> int:
    """Find the largest power of 4 that is at most n."""
    return (n.bit_length() - 1) // 2


thinformer_attention = function_form(Thinformer, "thinformer_attention")
