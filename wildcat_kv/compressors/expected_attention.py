"""Expected Attention: what queries to come, distributed like those so far, will attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import Scorer
from wildcat_kv.coreset.tensors import at_least_float32


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Keep what queries to come are expected to attend to.

    Weighted by the norms of the values. Queries are taken as Gaussian: their rotation is undone, mean and
    covariance are rotated to the positions to come, and the expectation of e^(score) under them is in closed form.

    Needs queries: those since the last fold (of the prompt: all of it) and `carried` from before, and the model's
    rotary positions. Costs O(n d^2).

    Attributes:
        future: positions to come, over which the rotation is averaged; 512 as in the reference library.
        sink: first tokens, which are kept and whose queries are left out; 4 as in the reference library.
        covariance: use the covariance, not only the mean.
        value_norm: weight by the norms of the values.
        carried: queries kept from one fold to the next.

    Source: Devoto, Jeblick and Jégou, arXiv 2510.00636.
    """

    paper: ClassVar[str] = "arXiv 2510.00636"
    needs_rotation: ClassVar[bool] = True

    future: int = 512
    sink: int = 4
    covariance: bool = True
    value_norm: bool = True
    carried: int = 256

    def __post_init__(self) -> None:
        for name in ("future", "carried"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.sink < 0:
            raise ValueError(f"sink={self.sink} must be at least 0, the first tokens to keep")

    @property
    def observation(self) -> Observation:
        """All queries since the last fold, and some from before."""
        return Observation(latest=None, carried=self.carried)

    @override
    def score(self, block: KVBlock) -> Tensor:
        heads, n = block.keys.shape[1:3]
        sink = min(self.sink, n - 1)
        mean, covariance = self._to_come(block)  # (rows, query_heads, d), (rows, query_heads, d, d)
        keys = block.keys[:, :, sink:].to(torch.float32) * block.scale
        expected = torch.einsum("bhgd,bhnd->bhgn", mean.unflatten(1, (heads, -1)), keys)
        if covariance is not None:
            for member, spread in enumerate(covariance.unflatten(1, (heads, -1)).unbind(2)):
                expected[:, :, member] += (torch.matmul(keys, spread) * keys).sum(-1) / 2
        valid = block.valid[:, :, sink:]
        scores = expected.masked_fill(~valid.unsqueeze(2), -torch.inf).softmax(-1).mean(2)
        if self.value_norm:
            values = block.values[:, :, sink:]
            scores = scores * torch.linalg.vector_norm(values, dim=-1, dtype=at_least_float32(values.dtype))
        first = scores.new_full((*scores.shape[:2], sink), torch.inf)
        return torch.cat((first, scores), dim=-1)

    def _to_come(self, block: KVBlock) -> tuple[Tensor, Tensor | None]:
        """Mean and covariance of the queries to come, float32."""
        assert block.queries is not None and block.rotation is not None
        seen = torch.full((block.keys.shape[0], 1), block.seen, device=block.keys.device)
        total = block.queries.shape[2]
        # Positions count from a row's first token. The model may count its padding too: a shift that is undone again.
        positions = seen - total + torch.arange(total, device=seen.device)
        queries = block.rotation.back(block.queries.to(torch.float32), positions)
        counted = (positions >= self.sink) | (seen <= self.sink)
        share = counted.to(torch.float32) / counted.sum(-1, keepdim=True)
        mean = torch.einsum("bm,bhmd->bhd", share, queries).unsqueeze(2)
        future = seen + torch.arange(self.future, device=seen.device)
        average = block.rotation.average
        if not self.covariance:
            return average(mean, future).squeeze(2), None
        centred = queries - mean
        covariance = torch.einsum("bm,bhmi,bhmj->bhij", share, centred, centred)
        return average(mean, future).squeeze(2), average(average(covariance, future).mT, future)
