"""KVzip: what the model attends to when it repeats the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import Compressed, KVBlock, SharingCompressor
from wildcat_kv.compressors.repetition import Repetition
from wildcat_kv.compressors.scorer import keep_best_by_head, rank_descending
from wildcat_kv.coreset.tensors import full_precision

# Queries whose probabilities are held at once, over one chunk.
_QUERIES_AT_ONCE = 256
# First tokens that are seen besides the chunk; 4 as in the paper.
SINK = 4


@dataclass(frozen=True)
class KVzip(SharingCompressor):
    """Keep what the model attends to as it repeats the context.

    In any layer and head. Needs the model: a second pass over the context, which `wildcat_kv.compress_context`
    makes. So it compresses a context once, and nothing that comes later. Layers and heads compete for all slots.
    The whole context is repeated, chat prefix included, and what is
    always kept are the cache's sinks and window; the reference library leaves the prefix out and keeps four tokens.

    The score of each token is its carried state.

    Attributes:
        layerwise: give every layer the same number of slots.

    Source: Kim et al., arXiv 2505.23416.
    """

    paper: ClassVar[str] = "arXiv 2505.23416"
    decodes: ClassVar[bool] = False
    reads_twice: ClassVar[bool] = True
    keeps_tokens: ClassVar[bool] = True
    state_size: ClassVar[int] = 1

    layerwise: bool = False

    @property
    def needs_queries(self) -> bool:
        """True: it needs the queries of the second pass."""
        return True

    @override
    def reread(self, repetition: Repetition) -> Tensor:
        return reconstruction_scores(repetition, sink=SINK).unsqueeze(-1)

    def survey(self, block: KVBlock) -> Tensor:
        """Score the items, float32 (rows, heads, items).

        Raises:
            ValueError: the context was not read a second time.
        """
        if block.carried_state is None or not bool(block.carried_state.any()):
            raise ValueError(
                f"{type(self).__name__} has no scores; call wildcat_kv.compress_context(model, tokenizer, text, "
                f"compressor={self!r}, ...)"
            )
        scores = block.slice_items(block.carried_state)[..., 0]
        return scores.masked_fill(~block.slice_items(block.valid), -torch.inf)

    def deal(self, surveys: Sequence[Tensor], rank: int) -> list[Tensor]:
        """Count the items that each head keeps, int64 (rows, heads) of each layer."""
        home = surveys[0].device  # layers may be spread over devices
        scores = torch.stack([survey.to(home) for survey in surveys], dim=1)  # rows first: each deals its own slots out
        layers, heads = scores.shape[1:3]
        pools = scores.flatten(2) if self.layerwise else scores.flatten(1).unsqueeze(1)
        kept = rank_descending(pools) < rank * (heads if self.layerwise else heads * layers)
        counts = (kept.view(scores.shape) & (scores > -torch.inf)).sum(-1)
        return [count.to(survey.device) for count, survey in zip(counts.unbind(1), surveys, strict=True)]

    @override
    def compress_share(self, block: KVBlock, rank: int, share: Tensor) -> Compressed:
        assert block.carried_state is not None
        return keep_best_by_head(block, block.carried_state[..., 0], share)


def reconstruction_scores(repetition: Repetition, *, sink: int, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Score a chunk of the context while it is repeated.

    A token's score is the most attention it gets.

    Args:
        repetition: chunk, and the queries that repeat it.
        sink: first tokens that they see besides.
        factors: norms of the asking tokens' hidden states (rows, q), which attention is divided by, and norms of the
            chunk's values behind the output projection (rows, heads, group, chunk), which it is multiplied with; None
            for plain attention.

    Returns:
        float32 (rows, heads, stop - start): the largest probability over queries and heads of a group, in the
        softmax over sinks, chunk and the repeating tokens up to the query's own.

    Source: arXiv 2505.23416; arXiv 2601.07891 for the factors.
    """
    queries, keys, start, stop = repetition.queries, repetition.keys, repetition.start, repetition.stop
    heads, total = keys.shape[1], queries.shape[2]
    sink = min(sink, start)
    seen = torch.cat((keys[:, :, :sink], keys[:, :, start:stop], keys[:, :, -total:]), dim=2).to(torch.float32)
    before, group = seen.shape[2] - total, queries.shape[1] // heads
    best = keys.new_zeros(*keys.shape[:2], group, stop - start, dtype=torch.float32)
    own = torch.arange(total, device=keys.device)
    with torch.no_grad(), full_precision(keys.device):
        for first in range(0, total, _QUERIES_AT_ONCE):
            asking = slice(first, first + _QUERIES_AT_ONCE)
            part = queries[:, :, asking].to(torch.float32).unflatten(1, (heads, -1)) * repetition.scale
            scores = torch.matmul(part.flatten(2, 3), seen.mT).unflatten(2, part.shape[2:4])
            scores[..., before:].masked_fill_(own > own[asking, None], -torch.inf)
            chunk = scores.softmax(-1)[..., sink : sink + stop - start]
            if factors is not None:
                chunk = chunk / factors[0][:, None, None, asking, None]
            best = torch.maximum(best, chunk.amax(3))
    return (best if factors is None else best * factors[1]).amax(2)
