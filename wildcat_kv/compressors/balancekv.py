"""BalanceKV: halve the tokens again and again, so that what goes balances what stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wildcat_kv.compressors.base import Compressor, KVBlock
from wildcat_kv.compressors.scorer import item_mask, rank_descending, take_items
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.noise import uniform_noise
from wildcat_kv.coreset.tensors import full_precision, saturate_, take_columns

# e^80: beyond it a step of the walk is certain, and float32 ends at e^88.
_LOG_LARGEST_KERNEL = 80.0


@dataclass(frozen=True)
class BalanceKV(Compressor):
    """Halve again and again, so that what stays balances what goes.

    A self-balancing walk splits tokens into two halves that are attended to alike; one half stays, its weights doubled.

    Needs keys and values only. Costs `block` sequential steps a halving, O(n * block) time and memory. Blocks of
    consecutive tokens walk at the same time. Only tokens of equal weight are halved, the lightest first, as the
    paper's merge-and-reduce does; budgets are no powers of two, so the last halving takes only as many of the oldest
    as are still too many. So the weights add up to the number of tokens read, unless a budget is below ten or so.

    Attributes:
        gamma: how strongly a token is pushed to the side that lacks it; 4 in the authors' code.
        block: tokens of a walk; 128 in the authors' code.
        seed: of the walk.

    Source: Kochetkova, Sheth, Han, Zandieh and Kapralov, arXiv 2502.07861, SoftmaxBalance; as in the authors' first
    code, one walk serves numerator and denominator. (Their code has become another method since.) Who changes over
    where the halves are unequal is drawn at random here, and goes by position there, which favours old tokens.
    """

    paper: ClassVar[str] = "arXiv 2502.07861"

    gamma: float = 4.0
    block: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise ValueError(f"gamma={self.gamma} must be at least 0; 0 gives a fair coin")
        if self.block < 2:
            raise ValueError(f"block={self.block} must be at least 2, the tokens of a walk")

    def compress(self, block: KVBlock, budget: Sequence[int]) -> Coreset:
        """See `Compressor`."""
        keys, values, valid = block.items(block.keys), block.items(block.values), item_mask(block)
        old = valid.to(torch.float32) if block.weights is None else block.items(block.weights).masked_fill(~valid, 0.0)
        if block.weights is None:
            levels: list[Counter[float]] = [Counter({1.0: length}) for length in block.lengths]
        else:
            levels = [Counter(weight for weight in row if weight) for row in old[:, 0].tolist()]  # alike in all heads
        index, weights = _by_weight(torch.arange(keys.shape[2], device=keys.device).expand(valid.shape), old)
        halving = 0
        with torch.no_grad(), full_precision(keys.device):
            while any(spans := [_take_pairs(*row) for row in zip(levels, budget, strict=True)]):
                pairs = _Pairs.of(levels, spans, index)
                tokens = index.gather(-1, pairs.place)
                factor = (weights / old.gather(-1, index).clamp_min(1.0)).gather(-1, pairs.place)
                kernel = self._kernel(
                    take_columns(keys, tokens).to(torch.float32) * block.scale**0.5,
                    take_columns(values, tokens).to(torch.float32) * factor.unsqueeze(-1),
                    pairs.used.expand(tokens.shape),
                )
                walk, ties = (self._noise(block, 2 * halving + draw, tokens.shape) for draw in range(2))
                sides = self._walk(kernel, walk)[..., : tokens.shape[-1]] + ties
                index, weights = _by_weight(*_keep_half(index, weights, pairs, sides))
                for level, span in zip(levels, spans, strict=True):
                    if span is not None:
                        level[span.weight] -= span.tokens
                        level[2 * span.weight] += span.tokens // 2
                halving += 1
        width = max(budget)
        index, weights = index[..., index.shape[-1] - width :], weights[..., index.shape[-1] - width :]
        # Of too few tokens to pair, the lightest go.
        surplus = torch.arange(width) < width - torch.tensor(budget).unsqueeze(-1)
        weights = weights.masked_fill(surplus.to(weights.device).unsqueeze(1), 0.0)
        index, order = index.masked_fill(weights == 0, -1).sort(dim=-1)
        index, weights = index.clamp_min(0), weights.gather(-1, order)
        coreset = take_items(block, index, weights > 0)
        factor = weights / coreset.weights.clamp_min(1.0)
        numerators = saturate_(coreset.values.to(torch.float32) * factor.unsqueeze(-1), values.dtype)
        return replace(coreset, values=numerators, weights=weights)

    def _kernel(self, keys: Tensor, values: Tensor, used: Tensor) -> Tensor:
        """float32 (rows, heads, walks, block, block): e^<x_i, x_j> <v_i, v_j>, 0 where not used."""
        rest = -keys.shape[2] % self.block
        keys, values = (F.pad(tensor, (0, 0, 0, rest)).unflatten(2, (-1, self.block)) for tensor in (keys, values))
        used = F.pad(used, (0, rest)).unflatten(2, (-1, self.block)).unsqueeze(-1)
        keys = keys.masked_fill(~used, 0.0)
        keys = (keys - keys.sum(-2, keepdim=True) / used.sum(-2, keepdim=True).clamp_min(1)).masked_fill(~used, 0.0)
        kernel = (keys @ keys.mT).clamp_max_(_LOG_LARGEST_KERNEL).exp_().mul_(values @ values.mT + 1e-8)
        return kernel.masked_fill_(~(used & used.mT), 0.0).nan_to_num_()

    def _walk(self, kernel: Tensor, noise: Tensor) -> Tensor:
        """The sides, 1 or -1, that tokens take one after the other: float32 (rows, heads, walks * block)."""
        noise = F.pad(noise, (0, kernel.shape[2] * self.block - noise.shape[-1])).unflatten(-1, (-1, self.block))
        signs, side = torch.zeros_like(kernel[..., 0]), kernel.new_ones(())
        for step in range(self.block):
            imbalance = (kernel[..., step, :] * signs).sum(-1)
            signs[..., step] = torch.where(noise[..., step] < 0.5 - self.gamma * imbalance, side, -side)
        return signs.flatten(2)

    def _noise(self, block: KVBlock, draw: int, shape: torch.Size) -> Tensor:
        """Uniform noise for the tokens of a halving, keyed by what a row is by itself."""
        device = block.keys.device
        return uniform_noise(
            self.seed,
            torch.full((1, 1, 1), block.layer_index, device=device),
            torch.tensor(block.seen).to(device, non_blocking=True).view(-1, 1, 1),
            torch.full((1, 1, 1), draw, device=device),
            torch.arange(shape[1], device=device).view(-1, 1),
            torch.arange(shape[2], device=device),
        ).expand(shape)


class _Span(NamedTuple):
    """So many tokens of one weight, the oldest that have it, an even number."""

    weight: float
    tokens: int


def _take_pairs(level: Counter[float], rank: int) -> _Span | None:
    """What to halve next of a row with `level[w]` tokens of weight w; None for nothing: enough, or no pair left."""
    excess = sum(level.values()) - rank
    weight = min((weight for weight, count in level.items() if count > 1), default=None)
    if excess <= 0 or weight is None:
        return None
    return _Span(weight, 2 * min(level[weight] // 2, excess))


class _Pairs(NamedTuple):
    """The tokens to halve, of all rows.

    Attributes:
        place: int64 (rows, heads, s), where they are among those that remain; any place where not used.
        used: bool (rows, 1, s).
        half: int64 (rows, 1, 1), half their number.
    """

    place: Tensor
    used: Tensor
    half: Tensor

    @staticmethod
    def of(levels: Sequence[Counter[float]], spans: Sequence[_Span | None], index: Tensor) -> _Pairs:
        """Lay out `spans`, one a row, of tokens at `index` in the order of `_by_weight`."""
        n, device = index.shape[-1], index.device
        lighter = [
            sum(count for weight, count in level.items() if span is not None and weight < span.weight)
            for level, span in zip(levels, spans, strict=True)
        ]
        start = torch.tensor([n - sum(level.values()) + skip for level, skip in zip(levels, lighter, strict=True)])
        tokens = torch.tensor([0 if span is None else span.tokens for span in spans]).view(-1, 1, 1)
        offset = torch.arange(int(tokens.max()))
        place = (start.view(-1, 1, 1) + offset).clamp_max(n - 1).expand(-1, index.shape[1], -1)
        return _Pairs(place.to(device), (offset < tokens).to(device), (tokens // 2).to(device))


def _by_weight(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens at `index` (rows, heads, n) sorted by weight, those of equal weight by position; weight 0 comes first."""
    index, order = index.sort(dim=-1)
    weights = weights.gather(-1, order)
    order = weights.argsort(dim=-1, stable=True)
    return index.gather(-1, order), weights.gather(-1, order)


def _keep_half(index: Tensor, weights: Tensor, pairs: _Pairs, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Double the weights of the half of `pairs` whose `sides`, -1 or 1 and noise in (0, 1), are lowest; drop the rest.

    The sides are seldom quite equal in number: the noise decides who changes over.
    """
    doubled = rank_descending(-torch.where(pairs.used, sides, 3.0)) < pairs.half
    before = weights.gather(-1, pairs.place)
    change = torch.where(doubled, before, -before).masked_fill(~pairs.used, 0.0)
    return index, weights.scatter_add(-1, pairs.place, change)
