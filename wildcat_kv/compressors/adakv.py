"""AdaKV: a layer's budget goes to the heads that need it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import Compressed, Compressor, KVBlock
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import Scorer, keep_best_by_head, rank_descending
from wildcat_kv.compressors.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(Compressor):
    """Let the heads of a layer compete for its slots.

    By the scores of another method, SnapKV's in the paper.

    Needs what the other method needs. The heads of a row share `heads * budget` slots.

    Attributes:
        scorer: gives the scores, which must be comparable between heads.
        safeguard: share of the budget that every head keeps for itself; 0.2 as in the reference library.

    Source: Feng, Lv, Cao, Xie and Zhou, arXiv 2407.11550.
    """

    paper: ClassVar[str] = "arXiv 2407.11550"

    scorer: Scorer = field(default_factory=SnapKV)
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer):
            raise ValueError(f"scorer={self.scorer!r} gives no scores; pass a Scorer, for example SnapKV()")
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard={self.safeguard} must be in [0, 1], the share that every head keeps")

    @property
    def state_size(self) -> int:  # type: ignore[override]
        """Numbers that the scorer keeps of an entry."""
        return self.scorer.state_size

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        """True if the scorer does."""
        return self.scorer.decodes

    @property
    def needs_rotation(self) -> bool:  # type: ignore[override]
        """True if the scorer does."""
        return self.scorer.needs_rotation

    @property
    def observation(self) -> Observation | None:
        """Queries that the scorer wants to see."""
        return self.scorer.observation

    @override
    def remember(self, block: KVBlock) -> Tensor:
        return self.scorer.remember(block)

    @override
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        safe = max(1, int(rank * self.safeguard)) if self.safeguard else 0
        return share_heads(block, self.scorer.scores(block), rank, safe)


def share_heads(block: KVBlock, scores: Tensor, rank: int, safe: int) -> Compressed:
    """Keep the best `heads * rank` items of each row.

    The heads compete for them, so some keep more than others.

    Args:
        block: entries.
        scores: (rows, heads, n), comparable between heads.
        rank: slots of a row, on average over its heads.
        safe: slots that every head keeps for its own best items.

    Returns:
        Slots as many as the head with most has.
    """
    candidate = block.slice_items(block.valid)
    items = block.slice_items(scores).masked_fill(~candidate, -torch.inf)
    items = items.masked_fill((rank_descending(items) < safe) & candidate, torch.inf)
    place = rank_descending(items.flatten(1)).unflatten(1, items.shape[1:])
    counts = ((place < rank * scores.shape[1]) & candidate).sum(-1)
    return keep_best_by_head(block, scores, counts)
