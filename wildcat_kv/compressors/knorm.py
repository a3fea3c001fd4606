"""KNorm: the keys with the smallest norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.scorer import Scorer
from wildcat_kv.coreset.tensors import at_least_float32


@dataclass(frozen=True)
class KNorm(Scorer):
    """Keep the keys with the smallest norms.

    They tend to be attended to most. Needs keys only, costs one pass over them. Of equal norms the earlier token is
    kept; the reference library leaves that to `topk`.

    Source: Devoto, Zhao, Scardapane and Minervini, arXiv 2406.11430.
    """

    paper: ClassVar[str] = "arXiv 2406.11430"

    @override
    def score(self, block: KVBlock) -> Tensor:
        return -torch.linalg.vector_norm(block.keys, dim=-1, dtype=at_least_float32(block.keys.dtype))
