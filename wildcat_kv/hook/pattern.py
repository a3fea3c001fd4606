"""Mask patterns of a forward pass, held against the causal one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

# Pairs of a query and a key that are looked at together: a few arrays of 4 MiB.
_PAIRS_AT_ONCE = 2**22


class Pattern(Enum):
    """How a mask differs from the causal one, padding aside."""

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
        mask_function: takes a row, a head, a query and a key, as Transformers' mask functions do.
        rows: batch size.
        seen: tokens of earlier passes.
        queries: new tokens.
        valid: bool (rows, seen + queries), False for padding tokens; None for none.
        use_vmap: whether the function takes single numbers only, not tensors of them.
        device: where its tensors are.

    Returns:
        NARROWER if anything is hidden, else SPLIT if an earlier token sees a new one, else WIDER or CAUSAL.
    """
    total = seen + queries
    places = torch.arange(total, device=device)
    valid = None if valid is None or bool(valid.all()) else valid.to(device)

    def differences(start: int, stop: int, first: int) -> Iterator[tuple[bool, bool]]:
        """Tell whether queries of [start, stop) see too much, and too little, of the keys from `first` on."""
        step = max(1, _PAIRS_AT_ONCE // (rows * (total - first)))
        for at in range(start, stop, step):
            block = slice(at, min(at + step, stop))
            shown = sdpa_mask(
                rows,
                block.stop - at,
                total - first,
                q_offset=at,
                kv_offset=first,
                mask_function=mask_function,
                allow_is_causal_skip=False,
                use_vmap=use_vmap,
                device=device,
            )
            assert shown is not None, "a mask that may not be skipped"
            causal = places[first:] <= places[block, None]
            differs = shown[:, 0] ^ causal
            if valid is not None:
                differs &= valid[:, block, None] & valid[:, None, first:]
            if bool(differs.any()):
                yield bool((differs & ~causal).any()), bool((differs & causal).any())

    found = list(differences(seen, total, 0))
    if any(less for _, less in found):
        return Pattern.NARROWER
    if seen and next(differences(0, seen, seen), None):
        return Pattern.SPLIT
    return Pattern.WIDER if found else Pattern.CAUSAL
