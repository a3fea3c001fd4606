"""Scores of a fitted scorer: how strongly a token is needed, from what its layer holds of it.

A token's features are its key and the mean query of its group, both without their rotation, its value, and the recall
that its layer estimates. The logit of the fit is linear in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.coreset.tensors import full_precision

# Recall below this counts as none.
_LEAST_RECALL = 1e-6


def fitted_scores(block: KVBlock, recall: Tensor, weights: Tensor) -> Tensor:
    """Score the items by the fit of a layer, or by their recall where it is larger.

    Tokens whose own queries the layer does not hold keep their recall, and so do slots of earlier coresets: their
    positions are not known.

    Args:
        block: entries; positions count from each row's first token.
        recall: float32 (rows, heads, items), of a survey; -inf for padding.
        weights: float32 (heads, features + 1), the constant last.

    Returns:
        float32 (rows, heads, items), in [0, 1]; -inf for padding.
    """
    features, known = item_features(block, recall)
    if not features.shape[2]:
        return recall
    # (rows, heads, k, f) times (heads, f, 1)
    with torch.no_grad(), full_precision(block.keys.device):
        weights = weights.to(features.device)
        logits = torch.matmul(features, weights[:, :-1, None]).squeeze(-1) + weights[:, -1:]
        own = recall[..., known:]
        # What the estimate finds and the fit does not is kept too: the drift is lower.
        found = torch.where(own > -torch.inf, torch.maximum(logits.sigmoid(), own), own)
    return torch.cat((recall[..., :known], found), dim=-1)


def item_features(block: KVBlock, recall: Tensor) -> tuple[Tensor, int]:
    """Gather the features of the items that have a position and a query.

    Args:
        block: entries, as in `fitted_scores`.
        recall: float32 (rows, heads, items), of a survey.

    Returns:
        float32 (rows, heads, k, 2 d + d_v + 1), of the last k items, and the number of items before these.
    """
    assert block.queries is not None and block.rotation is not None
    n, end = block.keys.shape[2], block.first + block.items
    first = min(end, max(block.first, n - min(block.exact, block.queries.shape[2])))
    behind, length, known = n - first, end - first, first - block.first
    with torch.no_grad(), full_precision(block.keys.device):
        keys, values = (tensor.narrow(2, first, length).to(torch.float32) for tensor in (block.keys, block.values))
        queries = block.queries.narrow(2, block.queries.shape[2] - behind, length)
        # A rotation is linear: the mean is turned back, not every query.
        queries = queries.unflatten(1, (keys.shape[1], -1)).mean(2, dtype=torch.float32)
        positions = block.seen - behind + torch.arange(length, device=keys.device)
        positions = positions.expand(keys.shape[0], -1)
        keys, queries = (block.rotation.back(vectors, positions) for vectors in (keys, queries))
        recalled = recall[..., known:].clamp_min(_LEAST_RECALL).log().unsqueeze(-1)
        return torch.cat((keys, values, queries, recalled), dim=-1), known
