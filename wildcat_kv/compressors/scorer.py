"""Methods that score every token and keep the best, as eviction methods do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import Compressed, Compressor, KVBlock
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.tensors import full_precision, take_columns

# Attention probabilities held at once, in float32 numbers: 256 MiB.
_PROBABILITIES_AT_ONCE = 2**26


class Scorer(Compressor):
    """A method that keeps the tokens with the highest scores.

    They stay unchanged with weight 1; the others are dropped.

    A subclass says how to score. All that the layer holds takes part in the scoring, as the papers have it; what
    is kept is chosen among the items, since sinks and window stay anyway.
    """

    keeps_tokens: ClassVar[bool] = True

    @abstractmethod
    def score(self, block: KVBlock) -> Tensor:
        """Score each entry, the higher the better.

        Args:
            block: entries of rows that hold equally much.

        Returns:
            (rows, heads, n), any dtype. Only the order within a row and head counts; NaN is the lowest.
        """

    def scores(self, block: KVBlock) -> Tensor:
        """Compute `score` in float32 (rows, heads, n), -inf for padding slots."""
        with torch.no_grad(), full_precision(block.keys.device):
            scores = self._score(block)
        return scores.masked_fill(~block.valid, -torch.inf)

    def _score(self, block: KVBlock) -> Tensor:
        scores, wanted = self.score(block), block.valid.shape
        if scores.shape != wanted:
            raise ValueError(
                f"compressor={type(self).__name__}: its scores have shape {tuple(scores.shape)}; they must be (rows, "
                f"heads, entries), here {tuple(wanted)}"
            )
        scores = scores.to(torch.float32)
        return torch.where(scores.isnan(), -torch.inf, scores)  # else it would be the highest of all

    @override
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        return keep_best(block, self.scores(block), rank)


def keep_best(block: KVBlock, scores: Tensor, rank: int) -> Compressed:
    """Keep each head's `rank` items with the highest scores, unchanged.

    The scores are (rows, heads, n).

    Of equal scores the earlier item is kept.
    """
    return take_items(block, *best_items(block, block.slice_items(scores), rank))


def keep_best_by_head(block: KVBlock, scores: Tensor, slots: Tensor) -> Compressed:
    """Keep the best items, a number of slots for each head.

    The slots are int64 (rows, heads); the result is as wide as the head with most.
    """
    columns = slots.amax(-1).tolist()
    kept = take_items(block, *_best(block, block.slice_items(scores), slots.unsqueeze(-1), max(columns)))
    return replace(kept, columns=columns)


def best_items(block: KVBlock, scores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Choose the items that `keep_best` keeps, by scores (rows, heads, items).

    Returns:
        int64 (rows, heads, rank), in the order of their positions, right-aligned; and bool, False for padding slots.
    """
    return _best(block, scores, rank, rank)


def _best(block: KVBlock, scores: Tensor, slots: Tensor | int, width: int) -> tuple[Tensor, Tensor]:
    """Choose `best_items` for `slots`, a number or int64 (rows, heads, 1).

    None of them is above `width`.
    """
    candidate = block.slice_items(block.valid)
    place = rank_descending(scores.masked_fill(~candidate, -torch.inf))
    kept = (place < slots) & candidate
    assert width <= block.items, "a budget is below the number of items"
    index = kept.to(torch.int8).argsort(dim=-1, stable=True)[..., block.items - width :]
    return index, kept.gather(-1, index)


def rank_descending(scores: Tensor) -> Tensor:
    """Rank each of (..., n) from the highest down, int64.

    Of equal ones the earlier is first.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, places)


def standardise(scores: Tensor, valid: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Bring the valid scores to mean 0 and deviation 1 along some dimensions.

    Args:
        scores: float32, any shape.
        valid: bool, broadcasts to the scores; others become 0.
        dim: dimensions that a mean is over.
    """
    counts = valid.expand(scores.shape).sum(dim, keepdim=True).clamp_min(1)
    mean = scores.masked_fill(~valid, 0.0).sum(dim, keepdim=True) / counts
    centred = (scores - mean).masked_fill(~valid, 0.0)
    deviation = (centred.square().sum(dim, keepdim=True) / counts).sqrt()
    return centred / deviation.clamp_min(1e-6)


def take_items(block: KVBlock, index: Tensor, valid: Tensor) -> Compressed:
    """Keep the items at `index`, int64 (rows, heads, c), unchanged.

    Slots that are not `valid` become padding.
    """
    empty = ~valid

    def take(entries: Tensor) -> Tensor:
        taken = take_columns(block.slice_items(entries), index)
        return taken.masked_fill_(empty.view(*empty.shape, *[1] * (taken.dim() - 3)), 0)

    coreset = Coreset(
        keys=take(block.keys),
        values=take(block.values),
        weights=valid.to(torch.float32) if block.weights is None else take(block.weights),
        valid=valid,
    )
    return Compressed(coreset, carried_state=None if block.carried_state is None else take(block.carried_state))


def attention_probabilities(block: KVBlock, latest: int | None = None) -> Iterator[Tensor]:
    """Compute how the observed queries attend to the entries.

    It yields a few queries at a time.

    A query sees its own token, those before it, and all slots: it is not known which of them came after it.

    Args:
        block: entries and queries.
        latest: newest queries to look at; all by default.

    Yields:
        float32 (rows, heads, group, q, n), the query heads of a group beside each other, each row of n sums to 1.
    """
    assert block.queries is not None
    rows, heads, n, _ = block.keys.shape
    queries = block.queries if latest is None else block.queries[:, :, max(0, block.queries.shape[2] - latest) :]
    total, exact = queries.shape[2], block.exact
    keys, device = block.keys.to(torch.float32), block.keys.device
    behind = n - torch.arange(n, device=device)  # entry -1 is the newest
    step = max(1, _PROBABILITIES_AT_ONCE // (rows * queries.shape[1] * n))
    for start in range(0, total, step):
        part = queries[:, :, start : start + step].to(torch.float32) * block.scale
        age = total - start - torch.arange(part.shape[2], device=device)
        hidden = (behind < age.unsqueeze(-1)) & (behind <= exact)
        grouped = part.unflatten(1, (heads, -1))
        # Heads of a group as further queries: keys are never repeated.
        scores = torch.matmul(grouped.flatten(2, 3), keys.mT).unflatten(2, grouped.shape[2:4])
        scores = scores.masked_fill_(hidden, -torch.inf).masked_fill_(~block.valid[:, :, None, None], -torch.inf)
        yield scores.softmax(-1)
