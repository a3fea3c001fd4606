"""StreamingLLM: the first tokens and the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.scorer import Scorer


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """Keep the first tokens and the most recent ones.

    The first are attended to whatever they say. Needs nothing, costs nothing. The paper also moves the kept keys to
    positions side by side; here they keep the positions they were read at, as in the reference libraries.

    Attributes:
        sink: first tokens to keep; 4 in the paper.

    Source: Xiao, Tian, Chen, Han and Lewis, arXiv 2309.17453.
    """

    paper: ClassVar[str] = "arXiv 2309.17453"

    sink: int = 4

    @override
    def score(self, block: KVBlock) -> Tensor:
        n = block.keys.shape[2]
        place = torch.arange(n, device=block.keys.device, dtype=torch.float32)
        return torch.where(place < self.sink, n, place).expand(block.valid.shape)
