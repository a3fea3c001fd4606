"""Locality-sensitive hashes, and exact attention within blocks of tokens that are sorted by them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.attention.features import normal_matrix
from wildcat_kv.attention.kernels import take
from wildcat_kv.attention.order import cells


class Orders(NamedTuple):
    """Orders that put tokens with similar hashes side by side.

    Attributes:
        query: int64 (rows, heads, q), queries in the order of their hashes.
        key: int64 (rows, heads, n).
    """

    query: Tensor
    key: Tensor

    @staticmethod
    def by(of_query: Tensor, of_key: Tensor) -> Orders:
        """Sort by hashes (rows, heads, ...), equal ones by place."""
        return Orders(of_query.argsort(dim=-1, stable=True), of_key.argsort(dim=-1, stable=True))


class Samples(NamedTuple):
    """Sampled keys, which stand for those outside a query's block.

    Attributes:
        places: int64 (rows, heads, s).
        log_weight: (rows, heads, s).
    """

    places: Tensor
    log_weight: Tensor


def hamming_hash(points: Tensor, planes: Tensor) -> Tensor:
    """Hash by the sides of planes, so that neighbouring hashes differ in one side.

    Args:
        points: (rows, heads, n, d).
        planes: normals (heads, planes, d).

    Returns:
        int64 (rows, heads, n), in [0, 2^planes): the place of the sides in Gray's code.

    Example:
        >>> sides = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])  # neighbours differ in one
        >>> hamming_hash(sides[None, None], torch.eye(2)[None]).tolist()
        [[[0, 1, 2, 3]]]
    """
    sides = (points @ planes.to(points.dtype).mT > 0).long()
    code = (sides << torch.arange(planes.shape[1], device=points.device)).sum(-1)
    shift = 1
    while shift < planes.shape[1]:  # from Gray's code to its place
        code = code ^ code >> shift
        shift *= 2
    return code


@torch.no_grad()
def sides_of_planes(query: Tensor, key: Tensor, planes: int, seed: int) -> Orders:
    """Sort queries and keys (rows, heads, ..., d) by their sides of random planes."""
    normals = normal_matrix(seed, key.shape[1], planes, key.shape[-1], key.device)
    return Orders.by(hamming_hash(query, normals), hamming_hash(key, normals))


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    orders: Orders,
    block: int,
    *,
    before: bool = False,
    samples: Samples | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend within blocks of sorted tokens.

    Sorted queries and keys are cut into equally many blocks, and block meets block.

    Args:
        query: (rows, heads, q, d).
        key: (rows, heads, n, d).
        value: (rows, heads, n, d_v).
        scale: b.
        orders: orders of the tokens.
        block: keys of a block, at most.
        before: True to attend to the block before, too; the last is before the first.
        samples: keys to attend to besides, but not by queries of their own block.

    Returns:
        Outputs (rows, heads, q, d_v), and the log of their normalisers (rows, heads, q, 1).
    """
    parts = -(-key.shape[2] // block)
    q_places, _, q_line = cells(query.shape[2], parts, query.device)
    k_places, k_used, k_line = cells(key.shape[2], parts, key.device)
    queries = take(query, orders.query)[:, :, q_places]
    keys, values = (take(tensor, orders.key)[:, :, k_places] for tensor in (key, value))
    hidden = ~k_used
    if before and parts > 1:
        keys, values = (torch.cat((tensor.roll(1, 2), tensor), dim=3) for tensor in (keys, values))
        hidden = torch.cat((hidden.roll(1, 0), hidden), dim=1)
    queries = queries * scale
    scores = (queries @ keys.mT).masked_fill(hidden.unsqueeze(1), -torch.inf)
    own = scores.shape[-1]
    if samples is not None:
        block_of = (k_line // k_places.shape[1])[orders.key.argsort(dim=-1)]
        scores = torch.cat((scores, _sampled_scores(queries, key, samples, block_of)), dim=-1)
    level = scores.logsumexp(dim=-1, keepdim=True)
    terms = (scores - level).exp()
    output = terms[..., :own] @ values
    if samples is not None:
        output = output + terms[..., own:] @ take(value, samples.places).unsqueeze(2)
    back = q_line[orders.query.argsort(dim=-1)]
    return take(output.flatten(2, 3), back), take(level.flatten(2, 3), back)


def _sampled_scores(queries: Tensor, key: Tensor, samples: Samples, block_of: Tensor) -> Tensor:
    """Compute the scores of sampled keys, -inf for queries of their own block.

    Args:
        queries: (rows, heads, blocks, t, d), scaled.
        key: (rows, heads, n, d).
        samples: sampled keys.
        block_of: int64 (rows, heads, n), the block of each key.

    Returns:
        (rows, heads, blocks, t, s).
    """
    blocks = torch.arange(queries.shape[2], device=key.device).view(-1, 1, 1)
    collides = block_of.gather(-1, samples.places)[:, :, None, None] == blocks
    scores = queries @ take(key, samples.places).unsqueeze(2).mT + samples.log_weight[:, :, None, None]
    return scores.masked_fill(collides, -torch.inf)
