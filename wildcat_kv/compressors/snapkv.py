"""SnapKV: what the last tokens of the prompt attend to."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import Scorer, attention_probabilities


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Keep what the last tokens attend to.

    The attention of an observation window at the end, smoothed over neighbouring positions. Needs the last `window`
    queries, costs as many rows of attention. The query heads that share a key head are averaged, as the authors do
    for grouped queries; the window itself is always kept.

    Attributes:
        window: queries to observe, in tokens; 64 as in the reference library (the paper has 16 to 64).
        kernel: positions to average over, odd; 5 as in the reference library.

    Source: Li et al., arXiv 2404.14469.
    """

    paper: ClassVar[str] = "arXiv 2404.14469"

    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, the queries to observe")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd and positive, the positions to average over")

    @property
    def observation(self) -> Observation:
        """The queries of the observation window."""
        return Observation(latest=self.window, carried=self.window)

    @override
    def score(self, block: KVBlock) -> Tensor:
        n = block.keys.shape[2]
        assert block.queries is not None
        window = min(self.window, block.queries.shape[2], n)
        if not window:
            return torch.arange(n, device=block.keys.device).expand(block.valid.shape)
        total = functools.reduce(torch.add, (part.sum(-2) for part in attention_probabilities(block, latest=window)))
        # The window comes first; among its own tokens too attention decides, by the queries that can see each.
        visible = torch.arange(window, 0, -1, device=total.device)
        own = 2.0 + total[..., n - window :].mean(2) / visible  # above any probability
        if window == n:
            return own
        seen = total[..., : n - window]
        rows, heads, group, length = seen.shape
        smooth = F.avg_pool1d(
            (seen / window).reshape(rows, heads * group, length), self.kernel, stride=1, padding=self.kernel // 2
        )
        scores = smooth.view(rows, heads, group, length).mean(2)
        return torch.cat((scores, own), dim=-1)
