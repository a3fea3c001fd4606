"""LagKV: tokens that stand out against those that follow."""

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
class LagKV(Scorer):
    """Keep what stands out against the tokens that follow.

    Tokens whose keys and values vary most, measured in the range of the partition that comes after. Needs keys and
    values only, costs a few passes over them. Every partition keeps the same share of its tokens; the last one, and
    what is left over behind it, are kept. So a text too short for two partitions, or a budget smaller than one, keeps
    sinks and the newest tokens alone. Scores are ranks within a partition, so many are equal: the earlier token is
    kept, where the reference library leaves the choice to `topk`.

    Attributes:
        sink: first tokens to keep, before the partitions begin; 4 as in the reference library (the paper has 16).
        lag: tokens of a partition; 128 in the paper.

    Source: Liang, Zhang, Li and Li, arXiv 2504.04704.
    """

    paper: ClassVar[str] = "arXiv 2504.04704"

    sink: int = 4
    lag: int = 128

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise ValueError(f"sink={self.sink} must be at least 0, the first tokens to keep")
        if self.lag < 2:
            raise ValueError(f"lag={self.lag} must be at least 2, the tokens of a partition")

    @override
    def score(self, block: KVBlock) -> Tensor:
        rows, heads, n, _ = block.keys.shape
        recency = torch.arange(n, dtype=torch.float32, device=block.keys.device) / n
        partitions = (n - self.sink) // self.lag
        # What is always kept has equal scores: of these the newest go last, and then the first.
        ends = torch.where(torch.arange(n, device=recency.device) < self.sink, 1.0, recency)
        if partitions < 2:
            return ends.expand(rows, heads, n)
        stop = self.sink + partitions * self.lag
        parts = [
            self._variation(tensor[:, :, self.sink : stop].to(torch.float32).unflatten(2, (partitions, self.lag)))
            for tensor in (block.keys, block.values)
        ]
        ranks = (parts[0] + parts[1]).argsort(dim=-1, stable=True).argsort(dim=-1).flatten(2)
        ranks = ranks.to(torch.float32) / self.lag
        scores = F.pad(ranks, (self.sink, n - self.sink - ranks.shape[-1]), value=1.0)
        return torch.where(scores == 1.0, 1.0 + ends, scores)

    @staticmethod
    def _variation(parts: Tensor) -> Tensor:
        """Measure how each token varies within its own partition.

        The parts are (..., partitions, lag, d); the result is (rows, heads, partitions - 1, lag).
        """
        later = parts[:, :, 1:]
        lowest, highest = later.amin(-2, keepdim=True), later.amax(-2, keepdim=True)
        span = (highest - lowest).clamp_min(torch.finfo(torch.float32).tiny)
        spread = ((parts[:, :, :-1] - lowest) / span).std(-1)
        return spread.nan_to_num(posinf=torch.finfo(torch.float32).max).softmax(-1)
