"""AdaKV: a layer's budget goes to the heads that need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from wildcat_kv.compressors.base import Compressor, KVBlock
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import Scorer, item_mask, keep_best_by_head, rank_descending
from wildcat_kv.compressors.snapkv import SnapKV
from wildcat_kv.coreset.compresskv import Coreset


@dataclass(frozen=True)
class AdaKV(Compressor):
    """Let the heads of a layer compete for its slots.

    By the scores of another method, SnapKV's in the paper.

    Needs what the other method needs. The heads of a row share `heads * budget` slots; heads with fewer than
    others have padding slots, which take memory all the same: this says what unequal heads would give, not yet what
    they would save.

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
    def memory(self) -> int:  # type: ignore[override]
        """What the scorer remembers."""
        return self.scorer.memory

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        """Whether the scorer does."""
        return self.scorer.decodes

    @property
    def needs_rotation(self) -> bool:  # type: ignore[override]
        """Whether the scorer does."""
        return self.scorer.needs_rotation

    @property
    def observation(self) -> Observation | None:
        """What the scorer wants to see."""
        return self.scorer.observation

    def remember(self, block: KVBlock) -> Tensor:
        """See `Compressor`."""
        return self.scorer.remember(block)

    def compress(self, block: KVBlock, budget: Sequence[int]) -> Coreset:
        """See `Compressor`."""
        scores = self.scorer.scores(block)
        safe = [max(1, int(rank * self.safeguard)) if self.safeguard and rank else 0 for rank in budget]
        return share_heads(block, scores, budget, safe)


def share_heads(block: KVBlock, scores: Tensor, budget: Sequence[int], safe: Sequence[int]) -> Coreset:
    """The best `heads * budget` items of each row, whichever heads they are in.

    Args:
        block: the entries.
        scores: (rows, heads, n), comparable between heads.
        budget: slots of each row, on average over its heads.
        safe: slots that every head keeps for its own best items.

    Returns:
        A Coreset as wide as the head with most.
    """
    heads, device = scores.shape[1], scores.device
    candidate = item_mask(block)
    items = block.items(scores).masked_fill(~candidate, -torch.inf)
    safe_slots = torch.tensor(safe).to(device, non_blocking=True).view(-1, 1, 1)
    items = items.masked_fill((rank_descending(items) < safe_slots) & candidate, torch.inf)
    place = rank_descending(items.flatten(1)).unflatten(1, items.shape[1:])
    total = torch.tensor([heads * rank for rank in budget]).to(device, non_blocking=True).view(-1, 1, 1)
    counts = ((place < total) & candidate).sum(-1)
    return keep_best_by_head(block, scores, counts)
