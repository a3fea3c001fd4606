"""Reformer: exact attention among tokens with similar hashes, in several rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, at_least, function_form, wide
from wildcat_kv.attention.features import normal_matrix
from wildcat_kv.attention.hashing import Orders, block_attention
from wildcat_kv.attention.kernels import softmax_attention


@dataclass(frozen=True, eq=False)
class Reformer(Attention):
    """Attend within chunks of tokens that are sorted by a hash.

    A round rotates tokens at random and hashes them by their nearest axis. Chunks attend to themselves and the chunk
    before. Rounds are averaged by their normalisers, so that a key found twice counts twice.

    Attributes:
        chunk: keys of a chunk; exact where one or two hold all.
        rounds: number of hashes.
        seed: seed of the rotations.

    Source: Kitaev, Kaiser and Levskaya, "Reformer: The Efficient Transformer", arXiv 2001.04451. In the paper's
    models keys are the queries. For others, as here, queries and recentred keys are hashed alike, and no token is kept
    from seeing itself.
    """

    name: ClassVar[str] = "reformer"
    paper: ClassVar[str] = "arXiv 2001.04451"
    complexity: ClassVar[str] = "O(rounds n (chunk d + log n))"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "biggan": {"chunk": 64, "rounds": 8},
        "t2t_1": {"chunk": 49, "rounds": 2},
        "t2t_2": {"chunk": 12, "rounds": 2},
    }

    chunk: int = 64
    rounds: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, chunk=self.chunk, rounds=self.rounds)

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if 2 * self.chunk >= key.shape[2]:
            return softmax_attention(query, key, value, scale)
        query, key, value = wide(query).flatten(2, 3), wide(key), wide(value)
        output, total = None, None
        for turn in range(self.rounds):
            found, level = block_attention(
                query, key, value, scale, self.orders(query, key, turn), self.chunk, before=True
            )
            if output is None or total is None:
                output, total = found, level
            else:
                joint = torch.logaddexp(total, level)
                output, total = output * (total - joint).exp() + found * (level - joint).exp(), joint
        assert output is not None
        return output

    @torch.no_grad()
    def orders(self, query: Tensor, key: Tensor, turn: int) -> Orders:
        """Sort queries and keys (rows, heads, ..., d) by the hash of a round."""
        chunks = -(-key.shape[2] // self.chunk)
        buckets = chunks + chunks % 2
        directions = normal_matrix(self.seed + turn, key.shape[1], buckets // 2, key.shape[-1], key.device)
        directions = directions.to(key.dtype).mT
        hashes = (
            torch.cat((rotated, -rotated), dim=-1).argmax(-1)
            for rotated in (query @ directions, (key - key.mean(2, keepdim=True)) @ directions)
        )
        return Orders.by(*hashes)

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        if 2 * self.chunk >= n:
            return q * n * (d + d_v + 1)
        hashes = (q + n) * d * -(-n // (2 * self.chunk))
        return self.rounds * (hashes + q * 2 * self.chunk * (d + d_v + 1))


reformer_attention = function_form(Reformer, "reformer_attention")
