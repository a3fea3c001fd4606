"""TOVA: what the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import Scorer, attention_probabilities


@dataclass(frozen=True)
class TOVA(Scorer):
    """Keep what the newest token attends to.

    On average over all heads of the layer. Needs the last query, costs one row of attention. The paper drops one
    token at every step; here a block is dropped at once, which is the same for the prompt. The newest token is
    always kept, as in the reference library.

    Source: Oren, Hassid, Yarden, Adi and Schwartz, arXiv 2401.06104.
    """

    paper: ClassVar[str] = "arXiv 2401.06104"

    @property
    def observation(self) -> Observation:
        """The last query."""
        return Observation(latest=1, carried=1)

    @override
    def score(self, block: KVBlock) -> Tensor:
        n = block.keys.shape[2]
        if block.queries is None or not block.queries.shape[2]:
            return torch.arange(n, device=block.keys.device).expand(block.valid.shape)
        (probabilities,) = attention_probabilities(block, latest=1)
        scores = probabilities.mean(dim=(1, 2, 3))  # heads, groups, the one query
        scores[:, -1] = 1.0 + scores.amax(-1)
        return scores.unsqueeze(1).expand(block.valid.shape)
