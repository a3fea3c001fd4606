"""KeyDiff: the keys that are least like the average key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.scorer import Scorer


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Keep the keys that are least like the mean key.

    By the angle to the mean direction of the head's keys. Needs keys only, costs two passes over them. The paper
    compresses a prompt block by block as it is read; a cache that reads it whole compresses it whole, as the
    reference library does.

    Source: Park, Jones, Morse, Goel, Lee and Lott, arXiv 2504.15364.
    """

    paper: ClassVar[str] = "arXiv 2504.15364"

    @override
    def score(self, block: KVBlock) -> Tensor:
        directions = F.normalize(block.keys.to(torch.float32), dim=-1)
        counted = directions.masked_fill(~block.valid.unsqueeze(-1), 0.0)
        return -F.cosine_similarity(directions, counted.mean(dim=2, keepdim=True), dim=-1)
