"""R-KV: tokens that are attended to and unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import Scorer

# Cosines held at once, in float32 numbers: 64 MiB.
_COSINES_AT_ONCE = 2**24


@dataclass(frozen=True)
class RKV(Scorer):
    """Keep what is attended to and says nothing twice.

    Made for long chains of thought. A token is important if the last tokens attend to it or to a neighbour, and
    redundant if its key points where many other keys do. Of tokens that are alike the newest is spared.

    Needs the last `window` queries. Costs O(n^2 d), the cosines of all pairs of keys. The window itself is always
    kept.

    Attributes:
        window: queries to observe, in tokens; 8 in the paper.
        kernel: positions to take the maximum over, odd; 7 as in the authors' code.
        importance: share of the importance in the score, lambda in the paper; the rest is that of the redundancy.
        alike: cosine from which two keys are alike; 0.5 as in the authors' code.

    Source: Cai et al., arXiv 2505.24133.
    """

    paper: ClassVar[str] = "arXiv 2505.24133"

    window: int = 8
    kernel: int = 7
    importance: float = 0.1
    alike: float = 0.5

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, the queries to observe")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd and positive, the positions to take the maximum over")
        if not 0 <= self.importance <= 1:
            raise ValueError(f"importance={self.importance} must be in [0, 1], its share of the score")
        if not -1 <= self.alike <= 1:
            raise ValueError(f"alike={self.alike} must be in [-1, 1], the cosine of two keys")

    @property
    def observation(self) -> Observation:
        """The queries of the observation window."""
        return Observation(latest=self.window, carried=self.window)

    @override
    def score(self, block: KVBlock) -> Tensor:
        n = block.keys.shape[2]
        assert block.queries is not None
        window = min(self.window, block.queries.shape[2], n)
        own = torch.arange(window, dtype=torch.float32, device=block.keys.device)
        own = (own + 2).expand(*block.valid.shape[:2], window)  # above any other score, the newest first
        past = n - window
        if not past:
            return own
        importance = self._importance(block, past)
        scores = self.importance * importance - (1 - self.importance) * self._redundancy(block)[..., :past]
        return torch.cat((scores, own), dim=-1)

    def _importance(self, block: KVBlock, past: int) -> Tensor:
        """Average what the last queries give the entries before them.

        Every head of a group counts with its largest score, float32 (rows, heads, past).
        """
        assert block.queries is not None
        latest = block.queries[:, :, max(0, block.queries.shape[2] - self.window) :].to(torch.float32)
        grouped = latest.unflatten(1, (block.keys.shape[1], -1)) * block.scale
        keys = block.keys[:, :, :past].to(torch.float32)
        scores = torch.matmul(grouped.flatten(2, 3), keys.mT).unflatten(2, grouped.shape[2:4]).amax(2)
        hidden = ~block.valid[:, :, None, :past]
        given = scores.masked_fill_(hidden, torch.finfo(torch.float32).min).softmax(-1).mean(2)
        return F.max_pool1d(given, self.kernel, stride=1, padding=self.kernel // 2)

    def _redundancy(self, block: KVBlock) -> Tensor:
        """Take the softmax of each key's average cosine with the others, float32 (rows, heads, n)."""
        units = F.normalize(block.keys.to(torch.float32), dim=-1)
        rows, heads, n = block.valid.shape
        place = torch.arange(n, dtype=torch.int32, device=units.device)
        total = units.new_zeros(rows, heads, n)
        step = max(1, _COSINES_AT_ONCE // (rows * heads * n))
        for start in range(0, n, step):
            cosines = torch.matmul(units[:, :, start : start + step], units.mT)
            cosines.diagonal(offset=start, dim1=-2, dim2=-1).zero_()
            newest = torch.where(cosines > self.alike, place, -1).amax(-1, keepdim=True)
            total += cosines.masked_fill_(place == newest, 0.0).sum(-2)
        average = total / block.valid.sum(-1, keepdim=True)
        return average.masked_fill(~block.valid, -torch.inf).softmax(-1)
