"""Slots shared among layers and heads.

Each layer, or each head, gets what its best items are worth beside those of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Parties that compete for slots; "equal" where none do.
Share = Literal["layers", "heads", "equal"]


def best_items(scores: Sequence[Tensor], slots: int, share: Share) -> list[Tensor]:
    """Choose the best items of all layers.

    Args:
        scores: (rows, heads, n) of each layer, comparable between layers; -inf for what cannot be taken.
        slots: items to take in a head of a layer, on average.
        share: "layers" where all heads of a layer keep equally many, "heads" where each head competes by itself,
            "equal" where all heads of all layers keep equally many.

    Returns:
        Bool (rows, heads, n) of each layer.
    """
    if share == "equal":
        return [take_counted(layer, [slots]) for layer in scores]
    return (_best_by_layer if share == "layers" else _best_by_head)(scores, slots)


def take_counted(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Choose the best items of each head, a number for each.

    Of equal ones the earlier is taken.

    Args:
        scores: (rows, heads, n), -inf for what cannot be taken.
        counts: numbers of the heads, or one for all of them.

    Returns:
        Bool (rows, heads, n).
    """
    most = min(max(1, *counts), scores.shape[-1])
    total = torch.tensor(counts, device=scores.device).view(-1, 1)
    least = scores.topk(most, dim=-1).values.gather(-1, (total - 1).clamp(0, most - 1).expand(*scores.shape[:2], 1))
    more, equal = scores > least, scores == least
    more |= equal & (equal.cumsum(-1) <= total - more.sum(-1, keepdim=True))
    return more & (scores > -torch.inf)


def _take(values: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """Mark the first `counts` of sorted scores, where they stood before."""
    best = torch.arange(values.shape[-1], device=values.device) < counts
    best = best & (values > -torch.inf)
    return torch.zeros_like(best).scatter_(-1, indices, best)


def _best_by_layer(scores: Sequence[Tensor], slots: int) -> list[Tensor]:
    """Choose the best items of all layers, equally many in all heads of a layer.

    A layer's k-th slot is worth what its heads' k-th best items are, on average.
    """
    # Padding slots differ between heads: what one of them lacks counts as nothing.
    home = scores[0].device  # layers may be spread over devices
    width = max(layer.shape[-1] for layer in scores)  # layers that shared unequally before hold unequally many
    ordered = [layer.sort(dim=-1, descending=True, stable=True) for layer in scores]
    worth = [F.pad(_worth(layer.values), (0, width - layer.values.shape[-1]), value=-torch.inf) for layer in ordered]
    taken = _best(torch.cat([layer.to(home) for layer in worth], dim=-1), slots * len(scores))
    counts = taken.unflatten(-1, (len(scores), width)).sum(-1).unbind(1)
    return [
        _take(*layer, count[:, None, None].to(layer.values.device))
        for layer, count in zip(ordered, counts, strict=True)
    ]


def _worth(ordered: Tensor) -> Tensor:
    """Average sorted scores (rows, heads, n) over heads: (rows, n), -inf where no head has an item."""
    most = (ordered > -torch.inf).sum(-1).amax(-1, keepdim=True)
    there = torch.arange(ordered.shape[-1], device=ordered.device) < most
    return ordered.clamp_min(0.0).mean(1).masked_fill_(~there, -torch.inf)


def _best_by_head(scores: Sequence[Tensor], slots: int) -> list[Tensor]:
    """Choose the best items of all heads of all layers."""
    home = scores[0].device
    pool = torch.cat([layer.flatten(1).to(home) for layer in scores], dim=-1)
    taken = _best(pool, slots * sum(layer.shape[1] for layer in scores))
    parts = taken.split([layer.shape[1] * layer.shape[2] for layer in scores], dim=-1)
    return [part.view(layer.shape).to(layer.device) for part, layer in zip(parts, scores, strict=True)]


def _best(worth: Tensor, total: int) -> Tensor:
    """Mark the `total` best of each row of (rows, m); of equal ones the earlier, and never one of -inf."""
    least = worth.topk(min(max(total, 1), worth.shape[-1]), dim=-1).values[:, -1:]
    more, equal = worth > least, (worth == least) & (worth > -torch.inf)
    return more | (equal & (equal.cumsum(-1) <= total - more.sum(-1, keepdim=True)))
