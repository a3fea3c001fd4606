"""Performer: attention through positive orthogonal random features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, at_least, function_form, wide
from wildcat_kv.attention.features import log_features, orthogonal_directions


@dataclass(frozen=True, eq=False)
class Performer(Attention):
    """Replace the softmax kernel by a product of positive random features.

    f(Q) (f(K)^T V) / f(Q) (f(K)^T 1), with m features that are orthogonal in blocks (FAVOR+).

    Attributes:
        features: m, the number of features.
        seed: seed of the directions, which are redrawn for no call.

    Source: Choromanski et al., "Rethinking Attention with Performers", arXiv 2009.14794. Features are computed in logs,
    less the largest of a query and the largest of all keys, so they never overflow.
    """

    name: ClassVar[str] = "performer"
    paper: ClassVar[str] = "arXiv 2009.14794"
    complexity: ClassVar[str] = "O(n m d)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "biggan": {"features": 128},
        "t2t_1": {"features": 49},
        "t2t_2": {"features": 64},
    }

    features: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, features=self.features)

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = wide(query).flatten(2, 3), wide(key), wide(value)
        directions = orthogonal_directions(self.seed, key.shape[1], self.features, key.shape[-1], key.device)
        of_query = log_features(query, directions, scale)
        of_query = (of_query - of_query.amax(-1, keepdim=True)).exp()  # cancels in the quotient
        of_key = log_features(key, directions, scale)
        of_key = (of_key - of_key.amax((-1, -2), keepdim=True)).exp()
        denominator = of_query @ of_key.sum(-2).unsqueeze(-1)
        return of_query @ (of_key.mT @ value) / denominator.clamp_min(torch.finfo(value.dtype).tiny)

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        return (q + n) * self.features * (d + d_v + 2)


performer_attention = function_form(Performer, "performer_attention")
