"""TriAttention: what the average query will attend to, at distances to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import Scorer, standardise


@dataclass(frozen=True)
class TriAttention(Scorer):
    """Keep what the average query will attend to, further on.

    Queries whose rotation is undone lie around a centre. Its product with a key, as the text goes on, is a
    trigonometric series in their distance. To its average over distances comes a sum of norms: of the key in each plane
    of the rotation, times how far queries stray from their centre there.

    Needs queries: those since the last fold (of the prompt: all of it) and `carried` from before, and the model's
    rotary positions. Costs O(n d). The authors find the centres in other texts, once a model; here they are those of
    the text itself. Of query heads that share a key head each is brought to mean 0 and deviation 1, and the largest
    score counts.

    Attributes:
        future: farthest position to come; the distances are 1, 2, 4 and so on up to it. 65,536 in the paper.
        carried: queries kept from one fold to the next; a few, as they lie close to their centre.

    Source: Mao et al., arXiv 2604.04921.
    """

    paper: ClassVar[str] = "arXiv 2604.04921"
    needs_rotation: ClassVar[bool] = True

    future: int = 65536
    carried: int = 32

    def __post_init__(self) -> None:
        for name in ("future", "carried"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def observation(self) -> Observation:
        """All queries since the last fold, and some from before."""
        return Observation(latest=None, carried=self.carried)

    @override
    def score(self, block: KVBlock) -> Tensor:
        assert block.queries is not None and block.rotation is not None
        rotation, heads = block.rotation, block.keys.shape[1]
        keys, queries = block.keys.to(torch.float32), block.queries.to(torch.float32)
        now = torch.full((block.keys.shape[0], 1), block.seen, device=keys.device)
        total = queries.shape[2]
        # Positions count from a row's first token. The model may count its padding too: a shift that is undone again.
        positions = now - total + torch.arange(total, device=keys.device)
        centre = rotation.back(queries, positions).mean(2, keepdim=True)
        powers = 2 ** torch.arange(self.future.bit_length(), device=keys.device)
        to_come = rotation.average(centre, now + powers)
        strayed = rotation.radii(queries).mean(2) - rotation.radii(rotation.average(centre, now)).squeeze(2)
        scores = torch.einsum("bhgd,bhnd->bhgn", to_come.squeeze(2).unflatten(1, (heads, -1)), keys)
        scores += torch.einsum("bhgd,bhnd->bhgn", strayed.unflatten(1, (heads, -1)), rotation.radii(keys))
        return standardise(scores, block.valid.unsqueeze(2), -1).amax(2)
