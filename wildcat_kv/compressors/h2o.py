"""H2O: tokens that have gathered attention, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import Compressed, KVBlock
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import Scorer, attention_probabilities, keep_best


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
    state_size: ClassVar[int] = 2  # attention gathered, queries that could give it

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
        """Sum the attention that every entry gets; count the queries that could give it."""
        return _gathered(block)

    @override
    def score(self, block: KVBlock) -> Tensor:
        assert block.carried_state is not None
        total, queries = block.carried_state.unbind(-1)
        return total / queries.clamp_min(1) if self.average else total

    @override
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        scores = self.scores(block)
        stop = scores.shape[2] - block.window
        recent = slice(stop - int(self.recent * rank), stop)
        scores[:, :, recent] = scores[:, :, recent].masked_fill(block.valid[:, :, recent], torch.inf)
        return keep_best(block, scores, rank)


def _gathered(block: KVBlock) -> Tensor:
    """Add the attention of the queries since the last fold to the carried state."""
    assert block.carried_state is not None and block.queries is not None
    n, total = block.keys.shape[2], block.queries.shape[2]
    state = block.carried_state.clone()
    for probabilities in attention_probabilities(block):
        state[..., 0] += probabilities.sum(-2).mean(2)
    # The newest token has been seen by one query, its own; older ones by one more each.
    behind = n - torch.arange(n, device=state.device)
    visible = torch.where(behind <= block.exact, behind.clamp_max(total), total)
    state[..., 1] += visible
    return state
