"""Compare the mask of a forward pass with the causal one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from enum import Enum

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

# Pairs of a query and a key to compare at once: a few arrays of 4 MiB.
_PAIRS_AT_ONCE = 2**22


class Pattern(Enum):
    """Difference of a mask from the causal one, padding aside."""

    CAUSAL = "every new token sees itself and all before it"
    WIDER = "new tokens see later ones too, all of them new"
    SPLIT = "tokens of earlier passes would see new ones"
    NARROWER = "tokens are hidden from later ones"


def pattern_of(
    mask_function: Callable,
    rows: int,
    seen: int,
    queries: int,
    valid: Tensor | None,
    *,
    use_vmap: bool,
    device: torch.device | str,
) -> Pattern:
    """Compare a mask with the causal one, pair by pair.

    Args:
        mask_function: Transformers' function of row, head, query and key.
        rows: batch size.
        seen: tokens of earlier passes.
        queries: new tokens.
        valid: bool (rows, seen + queries), False for padding tokens; None for none.
        use_vmap: True if the function takes single numbers only, not tensors of them.
        device: device of its tensors.

    Returns:
        NARROWER if anything is hidden, else SPLIT if an earlier token sees a new one, else WIDER or CAUSAL.
    """
    total = seen + queries
    valid = None if valid is None or bool(valid.all()) else valid.to(device)
    shown = functools.partial(
        sdpa_mask, rows, mask_function=mask_function, allow_is_causal_skip=False, use_vmap=use_vmap, device=device
    )
    found = list(_differences(shown, valid, range(seen, total), range(total), rows))
    if any(less for _, less in found):
        return Pattern.NARROWER
    if seen and next(_differences(shown, valid, range(seen), range(seen, total), rows), None):
        return Pattern.SPLIT
    return Pattern.WIDER if found else Pattern.CAUSAL


def _differences(
    shown: Callable, valid: Tensor | None, queries: range, keys: range, rows: int
) -> Iterator[tuple[bool, bool]]:
    """Compare with the causal mask, a block of queries at a time.

    Yields:
        For each block that differs: True if it sees too much, and True if it sees too little.
    """
    step = max(1, _PAIRS_AT_ONCE // (rows * len(keys)))
    for at in range(queries.start, queries.stop, step):
        block = range(at, min(at + step, queries.stop))
        mask = shown(len(block), len(keys), q_offset=at, kv_offset=keys.start)
        assert mask is not None, "a mask that may not be skipped"
        places = torch.arange(keys.start, keys.stop, device=mask.device)
        causal = places <= torch.arange(block.start, block.stop, device=mask.device).unsqueeze(-1)
        differs = mask[:, 0] ^ causal
        if valid is not None:
            differs &= valid[:, block.start : block.stop, None] & valid[:, None, keys.start : keys.stop]
        if bool(differs.any()):
            yield bool((differs & ~causal).any()), bool((differs & causal).any())
