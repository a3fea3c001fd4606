"""Scores of a fitted scorer: how strongly a token is needed, from what its layer holds of it.

A token's features are its key and the mean query of its group, both without their rotation, its value, and the recall
that its layer estimates. The logit of the fit is linear in them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.coreset.tensors import full_precision

# Recall below this counts as none.
_LEAST_RECALL = 1e-6


class _Items(NamedTuple):
    """Last k items of a layer, those that have a position and a query.

    Attributes:
        keys: float32 (rows, heads, k, d), rotated.
        values: float32 (rows, heads, k, d_v).
        queries: float32 (rows, heads, k, d), the mean of each group, rotated.
        recalled: float32 (rows, heads, k), the logarithm of the recall.
        positions: int64 (rows, k).
        before: number of the items before these.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    recalled: Tensor
    positions: Tensor
    before: int

    def unrotated(self, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Undo the rotation of keys and queries."""
        back = rotation.undoing(self.positions)
        return back(self.keys), back(self.queries)


def fitted_scores(block: KVBlock, recall: Tensor, weights: Tensor) -> Tensor:
    """Score the items by the fit of a layer, or by their recall where it is larger.

    Tokens whose own queries the layer does not hold keep their recall, and so do slots of earlier coresets: their
    positions are not known.

    Args:
        block: entries; positions count from each row's first token.
        recall: float32 (rows, heads, items), of a survey; -inf for padding.
        weights: float32 (heads, features + 1), of the features of `item_features`, the constant last.

    Returns:
        float32 (rows, heads, items), in [0, 1]; -inf for padding.
    """
    assert block.rotation is not None
    with torch.no_grad(), full_precision(block.keys.device):
        items = _items(block, recall)
        if not items.positions.shape[1]:
            return recall
        widths = items.keys.shape[-1], items.values.shape[-1], items.queries.shape[-1], 1, 1
        of_key, of_value, of_query, of_recall, constant = weights.to(recall.device).split(widths, dim=-1)
        logits = torch.addcmul(constant, items.recalled, of_recall)
        keys, queries = items.unrotated(block.rotation)
        # One product for each part of the features: side by side they are as large as all that the layer holds.
        for part, weight in ((keys, of_key), (items.values, of_value), (queries, of_query)):
            # This way around: a column takes a slow path of torch's on CPU.
            logits += torch.matmul(weight.unsqueeze(-2), part.mT).squeeze(-2)
        own = recall[..., items.before :]
        # What the estimate finds and the fit does not is kept too: the drift is lower.
        found = torch.where(own > -torch.inf, torch.maximum(logits.sigmoid_(), own), own)
    return torch.cat((recall[..., : items.before], found), dim=-1)


def item_features(block: KVBlock, recall: Tensor) -> tuple[Tensor, int]:
    """Gather the features of the items that have a position and a query, for a fit.

    Args:
        block: entries, as in `fitted_scores`.
        recall: float32 (rows, heads, items), of a survey.

    Returns:
        float32 (rows, heads, k, 2 d + d_v + 1), of the last k items, and the number of items before these.
    """
    assert block.rotation is not None
    with torch.no_grad(), full_precision(block.keys.device):
        items = _items(block, recall)
        keys, queries = items.unrotated(block.rotation)
        return torch.cat((keys, items.values, queries, items.recalled.unsqueeze(-1)), dim=-1), items.before


def _items(block: KVBlock, recall: Tensor) -> _Items:
    """Take what is known of the items from a block and their recall."""
    assert block.queries is not None
    n, end = block.keys.shape[2], block.first + block.items
    first = min(end, max(block.first, n - min(block.exact, block.queries.shape[2])))
    behind, length, before = n - first, end - first, first - block.first
    keys, values = (tensor.narrow(2, first, length).to(torch.float32) for tensor in (block.keys, block.values))
    start = max(0, block.queries.shape[2] - behind)  # with fewer queries than tokens behind the items, length is 0
    queries = block.queries.narrow(2, start, length).unflatten(1, (keys.shape[1], -1))
    # A rotation is linear: the mean is turned back, not every query.
    mean = queries[:, :, 0].to(torch.float32, copy=True)
    for query in queries.unbind(2)[1:]:
        mean += query
    mean /= queries.shape[2]
    positions = block.seen - behind + torch.arange(length, device=keys.device)
    recalled = recall[..., before:].clamp_min(_LEAST_RECALL).log_()
    return _Items(keys, values, mean, recalled, positions.expand(keys.shape[0], -1), before)
