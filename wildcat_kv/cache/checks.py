"""Check rows of a batch and layers of Transformers before a change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def kept_rows(indices: Tensor | Sequence[int], rows: int) -> Tensor:
    """Check the rows of a batch to keep.

    Args:
        indices: int64 (k,) or integers, negative ones counted from the end; or a bool mask over the rows.
        rows: rows that the cache holds, at least 1.

    Returns:
        int64 (k,), without negative ones.

    Raises:
        ValueError: rows that the cache does not hold, or no rows.
    """
    indices = torch.as_tensor(indices)
    kept = indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices
    wrong_mask = indices.dtype == torch.bool and indices.shape != (rows,)
    if wrong_mask or kept.dim() != 1 or not kept.numel() or not -rows <= int(kept.min()) <= int(kept.max()) < rows:
        raise ValueError(
            f"indices={indices.tolist()} must name rows of the batch, of which the cache holds {rows}: int64 "
            "(k,), or a bool mask over all rows with at least one of them True"
        )
    return torch.where(kept < 0, kept + rows, kept)


def check_foreign_crop(layer: Any, tokens_to_remove: int) -> None:
    """Refuse a crop that a layer of Transformers cannot do.

    Such a layer would refuse it after others have changed, or do it wrongly.

    Args:
        layer: uncompressed layer of the cache.
        tokens_to_remove: minus the number of tokens to take back.

    Raises:
        ValueError: the layer keeps no past, or has dropped tokens that would be in sight again.
    """
    name, refused = type(layer).__name__, f"tokens_to_remove={tokens_to_remove}"
    if not layer.is_croppable:
        raise ValueError(f"{refused}: {name} keeps no past to go back to; reset() the cache and read the text again")
    if getattr(layer, "is_sliding", False):
        left, held = layer.get_seq_length() + tokens_to_remove, layer.keys.shape[-2] + tokens_to_remove
        dropped = held < min(left, layer.sliding_window - 1)
    else:
        dropped = not getattr(layer, "record_past", True)
    if dropped:
        raise ValueError(
            f"{refused}: {name} has dropped older tokens that would be in sight again; call "
            "cache.activate_past_recording() before the tokens to take back are read, and crop once"
        )
