"""H2O: tokens that have gathered attention, and the most recent ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import Scorer, attention_probabilities, keep_best
from wildcat_kv.coreset.compresskv import Coreset


@dataclass(frozen=True)
class H2O(Scorer):
    """Keep what has gathered most attention, and recent tokens.

    Heavy hitters are the tokens with the most attention accumulated over all queries so far.

    Needs all queries, costs a second pass of attention over the prompt, O(n^2). What a token has gathered is
    remembered from fold to fold. Query heads that share a key head are averaged.

    Attributes:
        recent: share of the slots for the most recent tokens; one half in the paper.
        average: divide by the number of queries that could see the token, as the reference library's "observed
            attention" does (with `recent=0`); the paper's sum favours early tokens.

    Source: Zhang et al., arXiv 2306.14048.
    """

    paper: ClassVar[str] = "arXiv 2306.14048"
    memory: ClassVar[int] = 2  # attention gathered, queries that could give it

    recent: float = 0.5
    average: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.recent < 1:
            raise ValueError(f"recent={self.recent} must be in [0, 1), the share of the slots for recent tokens")

    @property
    def observation(self) -> Observation:
        """All queries, each once."""
        return Observation(latest=None, carried=0)

    def remember(self, block: KVBlock) -> Tensor:
        """The attention that every entry has gathered, and how many queries could give it."""
        return block.map_rows(_gathered)

    def score(self, block: KVBlock) -> Tensor:
        """See `Scorer`."""
        assert block.memory is not None
        total, queries = block.memory.unbind(-1)
        return total / queries.clamp_min(1) if self.average else total

    def compress(self, block: KVBlock, budget: Sequence[int]) -> Coreset:
        """See `Compressor`."""
        scores = self.scores(block)
        recent = torch.tensor([int(self.recent * rank) for rank in budget])
        newest = scores.shape[2] - torch.tensor(block.window)
        place = torch.arange(scores.shape[2])
        kept = (place >= (newest - recent).unsqueeze(-1)) & (place < newest.unsqueeze(-1))
        kept = kept.to(scores.device, non_blocking=True).unsqueeze(1) & block.valid
        return keep_best(block, scores.masked_fill(kept, torch.inf), budget)


def _gathered(block: KVBlock) -> Tensor:
    """The memory, brought up to date with the queries since the last fold."""
    assert block.memory is not None and block.queries is not None
    n, total = block.keys.shape[2], block.queries.shape[2]
    memory = block.memory.clone()
    for probabilities in attention_probabilities(block):
        memory[..., 0] += probabilities.sum(-2).mean(2)
    # The newest token has been seen by one query, its own; older ones by one more each.
    behind = n - torch.arange(n, device=memory.device)
    visible = torch.where(behind <= block.exact[0], behind.clamp_max(total), total)
    memory[..., 1] += visible
    return memory
