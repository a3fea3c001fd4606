"""Noise from a stateless counter hash.

The same counters give the same noise on every device.
Nothing is drawn in sequence, so a padded row, a larger batch or an earlier fold changes no other draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The finalizer of SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit numbers that wrap around.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def gumbel_noise(seed: int, *counters: Tensor) -> Tensor:
    """Draw standard Gumbel noise keyed by `seed` and the counters, see `uniform_noise`.

    Returns:
        float32 tensor of the broadcast shape, between -2.8 and 16.7.
    """
    return _gumbel_(uniform_noise(seed, *counters))


def gumbel_rows(seed: int | Tensor, *counters: Tensor, columns: int) -> Tensor:
    """Draw rows of standard Gumbel noise, keyed by counters and column.

    The law of `gumbel_noise` with the column as the last counter, in a stream of its own, for a third of the work.

    Args:
        seed: any integer in [0, 2**63), or int64 hashes of `fold_key`, to which the counters broadcast.
        *counters: integer tensors, see `uniform_noise`.
        columns: length of each row. A shorter row is the beginning of a longer one.

    Returns:
        float32 tensor of the counters' broadcast shape and (columns,), between -2.8 and 16.7.
    """
    return _gumbel_(uniform_rows(seed, *counters, columns=columns))


def uniform_noise(seed: int, *counters: Tensor) -> Tensor:
    """Draw uniform noise keyed by `seed` and the counters.

    Args:
        seed: any integer in [0, 2**63).
        *counters: integer tensors of shapes that broadcast together, all on one device; their order
            matters. The small ones go first: the hash is carried from one to the next.

    Returns:
        float32 tensor of the broadcast shape, in (0, 1).
    """
    # 23 bits and a half: the numbers closest to 0 and 1 that float32 holds exactly on both sides.
    return _shift(_hash(seed, counters), 41).to(torch.float32).add_(0.5).mul_(2.0**-23)


def uniform_rows(seed: int | Tensor, *counters: Tensor, columns: int) -> Tensor:
    """Draw rows of uniform noise in (0, 1), keyed like `gumbel_rows`."""
    # A number of 64 bits makes two columns.
    pairs = torch.arange((columns + 1) // 2, device=counters[0].device)
    state = _mix_(torch.add(_hash(seed, counters).unsqueeze(-1), pairs, alpha=GOLDEN))
    bits = state.view(torch.int32)[..., :columns]
    return bits.bitwise_and_(2**23 - 1).to(torch.float32).add_(0.5).mul_(2.0**-23)


def fold_key(seed: int, *counters: int) -> int:
    """Hash a seed and counters on the host, as `uniform_noise` begins to on the device.

    As a seed with the counters that follow, it gives the numbers that all the counters give.
    """
    state = seed
    for counter in counters:
        state = (state + counter * GOLDEN + 1) % 2**64
        for bits, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
            state = (state ^ (state >> bits)) * factor % 2**64
    return state - 2**64 if state >= 2**63 else state


def _gumbel_(uniform: Tensor) -> Tensor:
    return uniform.log_().neg_().log_().neg_()


def _hash(seed: int | Tensor, counters: tuple[Tensor, ...]) -> Tensor:
    if isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=counters[0].device)
    state = seed
    for counter in counters:
        state = _mix_(torch.add(state, counter.to(torch.int64), alpha=GOLDEN).add_(1))
    return state


def _mix_(state: Tensor) -> Tensor:
    state.bitwise_xor_(_shift(state, 30)).mul_(MIX_1)
    state.bitwise_xor_(_shift(state, 27)).mul_(MIX_2)
    return state.bitwise_xor_(_shift(state, 31))


def _shift(state: Tensor, bits: int) -> Tensor:
    """Shift to the right logically; the operator's shift is arithmetic."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)
