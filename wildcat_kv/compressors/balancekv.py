"""BalanceKV: halve the tokens again and again, so that what goes balances what stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from wildcat_kv.compressors.base import Compressed, Compressor, KVBlock
from wildcat_kv.compressors.keyed_noise import keyed_noise
from wildcat_kv.compressors.scorer import rank_descending, take_items
from wildcat_kv.coreset.compresskv import Coreset
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
        gamma: strength of the push to the side that lacks a token; 4 in the authors' code.
        block: tokens of a walk; 128 in the authors' code.
        seed: seed of the walk.

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

    @override
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        valid = block.slice_items(block.valid)
        old = valid.to(torch.float32)
        if block.weights is not None:
            old = block.slice_items(block.weights).masked_fill(~valid, 0.0)
        levels = [Counter({1.0: block.items})]
        if block.weights is not None:  # alike in all heads
            levels = [Counter(weight for weight in row if weight) for row in old[:, 0].tolist()]
        if any(level != levels[0] for level in levels):
            alone = (self.compress(block.take_rows([row]), rank) for row in range(len(levels)))
            return _side_by_side(list(alone))
        with torch.no_grad(), full_precision(block.keys.device):
            index, weights = self._halve(block, levels[0], old, rank)
        index, weights = index[..., block.items - rank :], weights[..., block.items - rank :]
        index, order = index.masked_fill(weights == 0, -1).sort(dim=-1)
        index, weights = index.clamp_min(0), weights.gather(-1, order)
        kept = take_items(block, index, weights > 0)
        factor = weights / kept.coreset.weights.clamp_min(1.0)
        numerators = kept.coreset.values.to(torch.float32) * factor.unsqueeze(-1)
        values = saturate_(numerators, block.values.dtype)
        return replace(kept, coreset=replace(kept.coreset, values=values, weights=weights))

    def _halve(self, block: KVBlock, level: Counter[float], old: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Halve items of equal weight until `rank` are left.

        It stops earlier if no two of them have equal weights.

        Args:
            block: entries.
            level: number of items of each weight, in every row and head; changed.
            old: float32 (rows, heads, items), their weights, 0 for padding.
            rank: items to keep.

        Returns:
            The items int64 (rows, heads, items) and their weights, sorted by weight; 0 for those that are dropped.
        """
        keys, values = block.slice_items(block.keys), block.slice_items(block.values)
        index, weights = _by_weight(torch.arange(block.items, device=keys.device).expand(old.shape), old)
        halving = 0
        while (span := _take_pairs(level, rank)) is not None:
            start = block.items - sum(count for weight, count in level.items() if weight >= span.weight)
            pairs = slice(start, start + span.tokens)
            tokens = index[..., pairs]
            factor = weights[..., pairs] / old.gather(-1, tokens).clamp_min(1.0)
            kernel = self._kernel(
                take_columns(keys, tokens).to(torch.float32) * block.scale**0.5,
                take_columns(values, tokens).to(torch.float32) * factor.unsqueeze(-1),
            )
            walk, ties = (keyed_noise(block, self.seed, span.tokens, 2 * halving + draw) for draw in range(2))
            sides = self._walk(kernel, walk)[..., : span.tokens] + ties
            # The sides are seldom quite equal in number: the noise decides who changes over.
            doubled = rank_descending(-sides) < span.tokens // 2
            before = weights[..., pairs]
            weights[..., pairs] += torch.where(doubled, before, -before)
            index, weights = _by_weight(index, weights)
            level[span.weight] -= span.tokens
            level[2 * span.weight] += span.tokens // 2
            halving += 1
        return index, weights

    def _kernel(self, keys: Tensor, values: Tensor) -> Tensor:
        """Compute e^<x_i, x_j> <v_i, v_j>, float32 (rows, heads, walks, block, block).

        It is 0 where the last walk is shorter.
        """
        rest = -keys.shape[2] % self.block
        used = torch.arange(keys.shape[2] + rest, device=keys.device).view(-1, self.block, 1) < keys.shape[2]
        keys, values = (F.pad(tensor, (0, 0, 0, rest)).unflatten(2, (-1, self.block)) for tensor in (keys, values))
        keys = keys.masked_fill(~used, 0.0)
        keys = (keys - keys.sum(-2, keepdim=True) / used.sum(-2, keepdim=True).clamp_min(1)).masked_fill(~used, 0.0)
        kernel = (keys @ keys.mT).clamp_max_(_LOG_LARGEST_KERNEL).exp_().mul_(values @ values.mT + 1e-8)
        return kernel.masked_fill_(~(used & used.mT), 0.0).nan_to_num_()

    def _walk(self, kernel: Tensor, noise: Tensor) -> Tensor:
        """Choose sides, 1 or -1, for tokens one after the other.

        Returns float32 (rows, heads, walks * block).
        """
        noise = F.pad(noise, (0, kernel.shape[2] * self.block - noise.shape[-1])).unflatten(-1, (-1, self.block))
        signs, side = torch.zeros_like(kernel[..., 0]), kernel.new_ones(())
        for step in range(self.block):
            imbalance = (kernel[..., step, :] * signs).sum(-1)
            signs[..., step] = torch.where(noise[..., step] < 0.5 - self.gamma * imbalance, side, -side)
        return signs.flatten(2)


class _Span(NamedTuple):
    """So many tokens of one weight, the oldest that have it, an even number."""

    weight: float
    tokens: int


def _take_pairs(level: Counter[float], rank: int) -> _Span | None:
    """Choose what to halve next of `level[w]` tokens of weight w.

    None means nothing: enough are gone, or no pair is left.
    """
    excess = sum(level.values()) - rank
    weight = min((weight for weight, count in level.items() if count > 1), default=None)
    if excess <= 0 or weight is None:
        return None
    return _Span(weight, 2 * min(level[weight] // 2, excess))


def _by_weight(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the tokens at `index` (rows, heads, n) by weight.

    Tokens of equal weight are in the order of their positions; weight 0 comes first.
    """
    index, order = index.sort(dim=-1)
    weights = weights.gather(-1, order)
    order = weights.argsort(dim=-1, stable=True)
    return index.gather(-1, order), weights.gather(-1, order)


def _side_by_side(rows: Sequence[Compressed]) -> Compressed:
    """Join the slots of rows, equally many each, to a batch."""
    coresets = [row.coreset for row in rows]
    states = [row.carried_state for row in rows if row.carried_state is not None]
    return Compressed(
        Coreset(
            keys=torch.cat([coreset.keys for coreset in coresets]),
            values=torch.cat([coreset.values for coreset in coresets]),
            weights=torch.cat([coreset.weights for coreset in coresets]),
            valid=torch.cat([coreset.valid for coreset in coresets]),
        ),
        carried_state=torch.cat(states) if states else None,
    )
