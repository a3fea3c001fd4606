"""The noise of `coreset/noise.py` inside a kernel: the same counters give the same numbers.

The bits are equal; the logarithms of two devices may differ in their last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wildcat_kv.coreset import noise

_GOLDEN = tl.constexpr(noise.GOLDEN % 2**64)
_MIX_1 = tl.constexpr(noise.MIX_1 % 2**64)
_MIX_2 = tl.constexpr(noise.MIX_2 % 2**64)


@triton.jit
def absorb(state, counter):
    """Carry the hash on to the next counter: uint64 state, any integer counter."""
    return _mix(state + counter.to(tl.uint64) * _GOLDEN + 1)


@triton.jit
def gumbel_row(state, places):
    """Draw the Gumbel noise of some columns of a row, as `gumbel_rows` does.

    Args:
        state: uint64, the hash of the row's counters.
        places: int32 (t,), columns.

    Returns:
        float32 (t,).
    """
    pair = _mix(state + (places // 2).to(tl.uint64) * _GOLDEN)
    bits = tl.where(places % 2 == 0, pair, pair >> 32) & 0x7FFFFF
    uniform = (bits.to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(-tl.log(uniform))


@triton.jit
def _mix(state):
    state = (state ^ (state >> 30)) * _MIX_1
    state = (state ^ (state >> 27)) * _MIX_2
    return state ^ (state >> 31)
