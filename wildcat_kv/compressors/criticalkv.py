"""CriticalKV: scores times what a value changes in the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.adakv import compete
from wildcat_kv.compressors.base import Compressed, KVBlock
from wildcat_kv.compressors.output_norms import output_norms
from wildcat_kv.compressors.over_scorer import OverScorer
from wildcat_kv.compressors.scorer import best_items, keep_best_by_head, rank_descending, take_items
from wildcat_kv.coreset.tensors import full_precision


@dataclass(frozen=True)
class CriticalKV(OverScorer):
    """Weigh the scores of another method by the norms of the projected values.

    The first part of a head's slots goes to its highest scores, SnapKV's by default. The others go to what has the
    highest (score + epsilon) ||W_O v||_1 of the rest; the norm is the mean over the query heads that share the value.

    Needs what the other method needs, and the weights of the model's output projections. Costs O(n d_v hidden) for each
    query head beside it.

    Attributes:
        scorer: gives the scores: attention, or what else is not negative. Of Expected Attention take
            `ExpectedAttention(value_norm=False)`, whose values are not weighed already.
        first: share of the slots that the scores alone fill; 0.5 as in the paper.
        epsilon: added to the scores, so that a value that nothing attends to counts a little.
        safeguard: share of the budget that every head keeps for itself where heads compete, as in `AdaKV`; None to
            give all heads the same.

    Source: Feng, Lv, Cao, Xie and Zhou, arXiv 2502.03805, algorithm 1.
    """

    paper: ClassVar[str] = "arXiv 2502.03805"

    first: float = 0.5
    epsilon: float = 1e-4
    safeguard: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first <= 1:
            raise ValueError(f"first={self.first} must be in [0, 1], the share that the scores alone fill")
        if self.epsilon < 0:
            raise ValueError(f"epsilon={self.epsilon} must be at least 0")
        if self.safeguard is not None and not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard={self.safeguard} must be in [0, 1], the share that every head keeps, or None")

    @property
    def needs_output_projection(self) -> bool:  # type: ignore[override]
        """True: it weighs values behind it."""
        return True

    @property
    def fixed_slots(self) -> bool:  # type: ignore[override]
        """True if heads do not compete."""
        return self.safeguard is None

    @override
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        scores = self.scorer.scores(block)
        if self.safeguard is None:
            sure = max(1, int(rank * self.first)) if self.first else 0
            return take_items(block, *best_items(block, self._weigh(block, scores, sure), rank))
        safe = max(1, int(rank * self.safeguard)) if self.safeguard else 0
        slots = compete(block, scores, rank, safe)
        weighed = scores.clone()
        block.slice_items(weighed).copy_(self._weigh(block, scores, (slots * self.first).long().clamp_min(safe)))
        return keep_best_by_head(block, weighed, slots)

    def _weigh(self, block: KVBlock, scores: Tensor, sure: Tensor | int) -> Tensor:
        """Weigh the scores (rows, heads, n) of the items: (rows, heads, items), infinite for those that are sure.

        These are the best `sure` of each head, a number or int64 (rows, heads).
        """
        assert block.output_projection is not None
        items = block.slice_items(scores)
        with torch.no_grad(), full_precision(block.keys.device):
            norms = output_norms(block.slice_items(block.values), block.output_projection, order=1).mean(2)
        weighed = torch.where(items.isinf(), items, (items + self.epsilon) * norms)
        best = sure.unsqueeze(-1) if isinstance(sure, Tensor) else sure
        return weighed.masked_fill(rank_descending(items) < best, torch.inf)
