"""Slots shared among layers.

Each layer gets what its best items are worth beside those of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def best_by_layer(scores: Sequence[Tensor], slots: int) -> list[Tensor]:
    """Choose the best items of all layers.

    All heads of a layer keep equally many.

    A layer's k-th slot is worth what its heads' k-th best items are, on average.

    Args:
        scores: (rows, heads, n) of each layer, comparable between layers; -inf for what cannot be taken.
        slots: items to take in a head of a layer, on average.

    Returns:
        Bool (rows, heads, n) of each layer.
    """
    # Padding slots differ between heads: what one of them lacks counts as nothing.
    ordered = [layer.sort(dim=-1, descending=True, stable=True) for layer in scores]
    home = scores[0].device  # layers may be spread over devices
    width = max(layer.shape[-1] for layer in scores)  # layers that shared unequally before hold unequally many
    wide = [
        F.pad(layer.values.clamp_min(0.0).mean(1), (0, width - layer.values.shape[-1])).to(home) for layer in ordered
    ]
    worth = torch.stack(wide, dim=1)
    most = torch.stack([(layer > -torch.inf).sum(-1).amax(-1).to(home) for layer in scores], dim=1)  # (rows, layers)
    there = torch.arange(width, device=home) < most.unsqueeze(-1)
    worth = worth.masked_fill_(~there, -torch.inf)
    total = slots * len(scores)
    # The least that is taken, and of what is worth just that the earlier layers'.
    best = worth.flatten(1).topk(min(max(total, 1), worth[0].numel()), dim=-1).values
    least = best[:, -1:].unsqueeze(-1)
    more, equal = (worth > least).sum(-1), ((worth == least) & there).sum(-1)
    left = total - more.sum(-1, keepdim=True) - (equal.cumsum(-1) - equal)
    counts = more + torch.minimum(left.clamp_min(0), equal)
    kept = []
    for index, layer in enumerate(ordered):
        count = counts[:, index, None, None].to(layer.values.device)
        best = torch.arange(layer.values.shape[-1], device=count.device) < count
        best = best & (layer.values > -torch.inf)
        kept.append(torch.zeros_like(best).scatter_(-1, layer.indices, best))
    return kept
