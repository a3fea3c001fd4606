"""Compactor: keys that stand out, and what tokens nearby attend to, earlier or later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.leverage import Leverage, keep_first, positions_of
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import Scorer, standardise

# Neighbours whose attention is averaged; 3 as in the reference library.
_KERNEL = 3


@dataclass(frozen=True)
class Compactor(Scorer):
    """Keep keys that stand out, and what neighbours attend to.

    The sum of two standard scores: the leverage of a key, see `Leverage`, and the attention within chunks of the
    text, times the norm of the value. In a chunk every query sees every key, later ones too, and dot products are
    taken as they are, without the model's scale, both as in the authors' code. There the heads of a layer also compete
    for its slots, which is `AdaKV(Compactor(), safeguard=0)`; the reference library gives all the same.

    Needs all queries, and the model's rotary positions. Costs O(n (chunk d + sketch^2)). The position of each token,
    and the attention that it got, are its carried state: a token keeps what its own chunk gave it.

    Attributes:
        blending: weight of the leverage; 0.5 as in the authors' code. The reference library takes the share dropped.
        chunk: tokens that attend to each other; 256 as in the reference library.
        sketch: channels of the projection, see `Leverage`.
        sink: first tokens, which are kept and left out; 8 as in the reference library.
        seed: of the projection.

    Source: Chari and Van Durme, arXiv 2507.08143.
    """

    paper: ClassVar[str] = "arXiv 2507.08143"
    needs_rotation: ClassVar[bool] = True
    state_size: ClassVar[int] = 2  # position, attention

    blending: float = 0.5
    chunk: int = 256
    sketch: int = 48
    sink: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blending < 0:
            raise ValueError(f"blending={self.blending} must be at least 0, the weight of the leverage")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1, the tokens that attend to each other")
        Leverage(self.sketch, self.sink)  # raises for what it cannot take

    @property
    def _leverage(self) -> Leverage:
        return Leverage(self.sketch, self.sink, self.seed)

    @property
    def observation(self) -> Observation:
        """All queries, each once."""
        return Observation(latest=None, carried=0)

    @override
    def remember(self, block: KVBlock) -> Tensor:
        return torch.stack((positions_of(block), self._attention(block)), dim=-1)

    @override
    def score(self, block: KVBlock) -> Tensor:
        assert block.carried_state is not None
        values, valid = block.values[:, :, self.sink :].to(torch.float32), block.valid[..., self.sink :]
        attention = block.carried_state[:, :, self.sink :, 1] * torch.linalg.vector_norm(values, dim=-1)
        if attention.shape[-1]:
            attention = F.avg_pool1d(attention.masked_fill(~valid, 0.0), _KERNEL, stride=1, padding=_KERNEL // 2)
        leverage = self._leverage.middle(block)
        # Over all heads of a row: a head whose tokens stand out more may keep more of them, under `AdaKV`.
        scores = standardise(attention, valid, (1, 2)) + self.blending * standardise(leverage, valid, (1, 2))
        return keep_first(scores, block.valid.shape[-1])

    def _attention(self, block: KVBlock) -> Tensor:
        """Sum what the new tokens get within their chunks, and keep what others got, float32 (rows, heads, n)."""
        assert block.carried_state is not None and block.queries is not None
        heads, n = block.keys.shape[1:3]
        gathered = block.carried_state[..., 1].clone()
        before = n - block.queries.shape[2]  # the entry of the first query
        for start in range(max(before, n - block.exact, self.sink), n, self.chunk):
            stop = min(start + self.chunk, n)
            queries = block.queries[:, :, start - before : stop - before].to(torch.float32)
            keys = block.keys[:, :, start:stop].to(torch.float32)
            grouped = queries.unflatten(1, (heads, -1))
            probabilities = torch.matmul(grouped.flatten(2, 3), keys.mT).softmax(-1)
            gathered[:, :, start:stop] = probabilities.sum(-2) / grouped.shape[2]
        return gathered
