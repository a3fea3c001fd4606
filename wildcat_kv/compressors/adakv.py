"""AdaKV: a layer's budget goes to the heads that need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import Compressed, KVBlock
from wildcat_kv.compressors.over_scorer import OverScorer
from wildcat_kv.compressors.scorer import keep_best_by_head, rank_descending


@dataclass(frozen=True)
class AdaKV(OverScorer):
    """Let the heads of a layer compete for its slots.

    By the scores of another method, SnapKV's in the paper.

    Needs what the other method needs. The heads of a row share `heads * budget` slots.

    Attributes:
        scorer: gives the scores, which must be comparable between heads.
        safeguard: share of the budget that every head keeps for itself; 0.2 as in the reference library.

    Source: Feng, Lv, Cao, Xie and Zhou, arXiv 2407.11550.
    """

    paper: ClassVar[str] = "arXiv 2407.11550"

    fixed_slots: ClassVar[bool] = False

    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard={self.safeguard} must be in [0, 1], the share that every head keeps")

    @override
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        safe = max(1, int(rank * self.safeguard)) if self.safeguard else 0
        return share_heads(block, self.scorer.scores(block), rank, safe)


def share_heads(block: KVBlock, scores: Tensor, rank: int, safe: int) -> Compressed:
    """Keep the best `heads * rank` items of each row.

    The heads compete for them, so the result is as wide as the head with most. The arguments are those of `compete`.
    """
    return keep_best_by_head(block, scores, compete(block, scores, rank, safe))


def compete(block: KVBlock, scores: Tensor, rank: int, safe: int) -> Tensor:
    """Share `heads * rank` slots of each row out among its heads.

    Args:
        block: entries.
        scores: (rows, heads, n), comparable between heads.
        rank: slots of a row, on average over its heads.
        safe: slots that every head keeps for its own best items.

    Returns:
        int64 (rows, heads), the slots of each head.
    """
    candidate = block.slice_items(block.valid)
    items = block.slice_items(scores).masked_fill(~candidate, -torch.inf)
    items = items.masked_fill((rank_descending(items) < safe) & candidate, torch.inf)
    place = rank_descending(items.flatten(1)).unflatten(1, items.shape[1:])
    return ((place < rank * scores.shape[1]) & candidate).sum(-1)
