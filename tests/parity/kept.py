"""Which tokens were kept: found again by their keys, which rotary positions make distinct."""

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_mask(keys: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """Find kept keys among all keys, bit for bit.

    Args:
        keys: (heads, n, d), no two equal in a head.
        kept: of each head (c, d), some of its keys in any order.

    Returns:
        bool (heads, n).
    """
    mask = torch.zeros(keys.shape[:2], dtype=torch.bool)
    for head, (every, some) in enumerate(zip(keys, kept, strict=True)):
        places = {key.tobytes(): place for place, key in enumerate(every.numpy())}
        assert len(places) == len(every), "two tokens have the same key"
        for key in some.numpy():
            mask[head, places[key.tobytes()]] = True
        assert int(mask[head].sum()) == len(some), "a token was kept twice"
    return mask
