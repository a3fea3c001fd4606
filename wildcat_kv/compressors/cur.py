"""CUR: approximate leverage scores of keys and values."""

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
class CUR(Scorer):
    """Keep keys and values of large leverage.

    Approximated by squared norms relative to the neighbourhood. Needs keys and values only, costs one pass over
    each. The score is the product of the key's and the value's share in the squared norms of their window, as in
    the reference library; the paper also has a random projection, which the library leaves out by default.

    Attributes:
        sink: first tokens to keep; 4 as in the reference library.
        window: tokens of a neighbourhood; 16 as in the reference library.

    Source: CurDKV, Sengupta, Chaudhary and Chakraborty, arXiv 2509.15038.
    """

    paper: ClassVar[str] = "arXiv 2509.15038"

    sink: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, the tokens of a neighbourhood")

    @override
    def score(self, block: KVBlock) -> Tensor:
        scores = self._share(block.keys, block.valid) * self._share(block.values, block.valid)
        scores[:, :, : self.sink] = 2.0  # above any share
        return scores

    def _share(self, vectors: Tensor, valid: Tensor) -> Tensor:
        """Divide each squared norm by the sum over its window.

        Returns float32 (rows, heads, n) for vectors (rows, heads, n, d).
        """
        n = vectors.shape[2]
        norms = vectors.to(torch.float32).square().sum(-1).masked_fill(~valid, 0.0)
        parts = F.pad(norms, (0, -n % self.window)).unflatten(-1, (-1, self.window))
        shares = parts / parts.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return shares.flatten(2)[..., :n]
