"""KVzip: what the model attends to when it repeats the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from wildcat_kv.compressors.base import Compressor, KVBlock
from wildcat_kv.compressors.scorer import item_mask, keep_best_by_head, rank_descending
from wildcat_kv.config import WildCatConfig
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.tensors import full_precision

# Queries whose probabilities are held at once, over one chunk.
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class KVzip(Compressor):
    """Keep what the model attends to as it repeats the context.

    In any layer and head. Needs the model: a second pass over the context, which `wildcat_kv.compress_context`
    makes. So it compresses a context once, and nothing that comes later. Layers and heads compete for all slots;
    those with fewer than others have padding slots. The whole context is repeated, chat prefix included, and what is
    always kept are the cache's sinks and window; the reference library leaves the prefix out and keeps four tokens.

    Attributes:
        scores: float32 (layers, rows, heads, n), of the compressed layers.
        layerwise: give every layer the same number of slots.

    Source: Kim et al., arXiv 2505.23416.
    """

    paper: ClassVar[str] = "arXiv 2505.23416"
    decodes: ClassVar[bool] = False

    scores: Tensor | None = field(default=None, repr=False, compare=False)
    layerwise: bool = False
    _shares: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, settings: WildCatConfig) -> Self:
        """Refused: the method is nothing without a context."""
        raise ValueError(
            "compressor='kvzip' reads the context a second time, which a cache cannot do by itself; call "
            "wildcat_kv.compress_context(model, tokenizer, text, compressor='kvzip', ...)"
        )

    @property
    def needs_queries(self) -> bool:
        """Those of the second pass."""
        return True

    def compress(self, block: KVBlock, budget: Sequence[int]) -> Coreset:
        """See `Compressor`."""
        if self.scores is None:
            raise ValueError(
                "KVzip has no scores; call wildcat_kv.compress_context(model, tokenizer, text, compressor='kvzip', ...)"
            )
        if self.scores.shape[1::2] != block.keys.shape[0:3:2]:
            raise ValueError(
                f"KVzip has scores for {self.scores.shape[1]} rows of {self.scores.shape[3]} tokens, and the cache "
                f"holds {block.keys.shape[0]} of {block.keys.shape[2]}; the scores are of another context"
            )
        place = block.sharing.index(block.layer_index)
        counts = self._slots(block, budget)[place].to(block.keys.device)
        return keep_best_by_head(block, self.scores[block.layer_index].to(block.keys.device), counts)

    def _slots(self, block: KVBlock, budget: Sequence[int]) -> Tensor:
        """int64 (layers, rows, heads), how many items each head keeps in the layers that share; the same for all."""
        asked = (*block.lengths, *block.window, *budget, *block.sharing)
        if asked not in self._shares:
            assert self.scores is not None
            inside = item_mask(replace(block, valid=torch.ones_like(block.valid[:, :1]))).to(self.scores.device)
            items = torch.stack([block.items(self.scores[layer]) for layer in block.sharing]).masked_fill(
                ~inside, -torch.inf
            )
            layers, rows, heads, length = items.shape
            items = items.transpose(0, 1)  # rows first: each shares out its own slots
            pools = items.flatten(2) if self.layerwise else items.flatten(1).unsqueeze(1)
            share = torch.tensor(budget, device=items.device) * (heads if self.layerwise else heads * layers)
            kept = rank_descending(pools) < share.view(rows, 1, 1)
            kept = kept.view(rows, layers, heads, length) & inside.unsqueeze(1)
            self._shares[asked] = kept.sum(-1).transpose(0, 1)
        return self._shares[asked]


def reconstruction_scores(queries: Tensor, keys: Tensor, *, sink: int, start: int, stop: int, scale: float) -> Tensor:
    """How much a chunk of the context is attended to while it is repeated, at the most.

    Args:
        queries: (rows, query_heads, q, d), of the tokens that repeat it.
        keys: (rows, heads, n + q, d), of the context and of those tokens.
        sink: first tokens that they see besides.
        start: first token of the chunk.
        stop: the one after its last.
        scale: b, the factor of the attention scores.

    Returns:
        float32 (rows, heads, stop - start): the largest probability over queries and heads of a group, in the
        softmax over sinks, chunk and the repeating tokens up to the query's own.

    Source: arXiv 2505.23416.
    """
    heads, total = keys.shape[1], queries.shape[2]
    sink = min(sink, start)
    seen = torch.cat((keys[:, :, :sink], keys[:, :, start:stop], keys[:, :, -total:]), dim=2).to(torch.float32)
    before, best = seen.shape[2] - total, keys.new_zeros(*keys.shape[:2], stop - start, dtype=torch.float32)
    own = torch.arange(total, device=keys.device)
    with torch.no_grad(), full_precision(keys.device):
        for first in range(0, total, _QUERIES_AT_ONCE):
            part = queries[:, :, first : first + _QUERIES_AT_ONCE].to(torch.float32).unflatten(1, (heads, -1)) * scale
            scores = torch.matmul(part.flatten(2, 3), seen.mT).unflatten(2, part.shape[2:4])
            later = own > own[first : first + part.shape[3], None]
            scores[..., before:].masked_fill_(later, -torch.inf)
            chunk = scores.softmax(-1)[..., sink : sink + stop - start]
            best = torch.maximum(best, chunk.amax((2, 3)))
    return best
