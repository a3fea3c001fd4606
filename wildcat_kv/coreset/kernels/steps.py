"""Steps of the compression of a bin, on tensors that one program holds.

The functions of `rpnys.py` and `binned.py` for one bin, in their order and with their constants. Sizes: t places of a
bin and r slots, both rounded up to a power of two of at least 16, the least that `tl.dot` takes. Places without a token
are not `used`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wildcat_kv.coreset import pivots, rpnys
from wildcat_kv.coreset.kernels.noise import absorb, gumbel_row

_TOLERANCE = tl.constexpr(pivots.TOLERANCE)
_ROUNDING = tl.constexpr(2 * pivots.ROUNDING)
_LARGEST_WEIGHT = tl.constexpr(rpnys.LARGEST_WEIGHT)
_LARGEST_EXPONENT = tl.constexpr(rpnys.LARGEST_EXPONENT)
_NEVER = tl.constexpr(pivots.NEVER)
_TINY = tl.constexpr(pivots.TINY)
_LEAST_IMPORTANCE = tl.constexpr(-80.0)
_LAST = tl.constexpr(2**30)  # sorts after every place


@triton.jit
def load_block(base, stride, first, used, width: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """Load BLOCK channels of the tokens of a bin: float32 (t, BLOCK), 0 where not used."""
    channels = first + tl.arange(0, BLOCK)
    inside = used[:, None] & (channels < width)[None, :]
    return tl.load(base + tl.arange(0, T)[:, None] * stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def kernel(keys, stride, used, count, centre, root, width: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the kernel of a bin, block by block of channels.

    The scaled keys z lie around the mean of the bin, o is that mean around the head's.

    Args:
        keys: pointer to the first key of the bin.
        stride: numbers from a key to the next.
        used: bool (t,).
        count: int32, tokens that are used.
        centre: pointer to the mean key of the head, float32 (width,).
        root: float32, sqrt(b) / tau.

    Returns:
        |z|^2 / 2 (t,), log D^2 = |z + o|^2 - |o|^2 (t,), and G (t, t), 0 where not used; float32.
    """
    gram, across = tl.zeros((T, T), tl.float32), tl.zeros((T,), tl.float32)
    tokens = tl.maximum(count, 1).to(tl.float32)
    for first in range(0, width, BLOCK):
        block = load_block(keys, stride, first, used, width, T, BLOCK)
        mean = tl.sum(block, 0) / tokens
        channels = first + tl.arange(0, BLOCK)
        offset = (mean - tl.load(centre + channels, mask=channels < width, other=0.0)) * root
        z = tl.where(used[:, None], (block - mean[None, :]) * root, 0.0)
        gram = tl.dot(z, tl.trans(z), gram, input_precision="ieee")
        across += tl.sum(z * offset[None, :], 1)
    places = tl.arange(0, T)
    # From the diagonal: points that are the same are at a distance of exactly 0.
    half = tl.sum(tl.where(places[:, None] == places[None, :], gram, 0.0), 1) / 2
    gaussian = tl.exp(tl.minimum(gram - (half[:, None] + half[None, :]), 0.0))
    return half, 2 * (half + across), tl.where(used[:, None] & used[None, :], gaussian, 0.0)


@triton.jit
def largest_distance(keys, stride, used, centre, width: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """Compute R_K of a bin, the largest distance of a key from the head's centre; 0 without keys."""
    square = tl.zeros((T,), tl.float32)
    for first in range(0, width, BLOCK):
        channels = first + tl.arange(0, BLOCK)
        block = load_block(keys, stride, first, used, width, T, BLOCK)
        block -= tl.load(centre + channels, mask=channels < width, other=0.0)[None, :]
        square += tl.sum(block * block, 1)
    return tl.sqrt(tl.max(tl.where(used, square, 0.0), 0))


@triton.jit
def importance(mass, used, values, stride, bound, line, width: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the log importance of weighted tokens, float32 (t,), see `binned`.

    Args:
        mass: float32 (t,), w.
        values: pointer to the first value of the bin.
        bound: pointer to s^2 of all heads; None to leave the values out.
        line: number of the head among them.
    """
    log_importance = 2 * _log(tl.abs(mass))
    if bound is not None:
        square = tl.zeros((T,), tl.float32)
        for first in range(0, width, BLOCK):
            block = load_block(values, stride, first, used, width, T, BLOCK)
            square += tl.sum(block * block, 1)
        least = tl.maximum(tl.load(bound + line), 1.1754943508222875e-38)  # the smallest normal number
        log_importance = tl.maximum(log_importance, _log(square) - tl.log(least))
    return tl.maximum(log_importance, _LEAST_IMPORTANCE)


@triton.jit
def draw(left, half, log_mass, used, rank, state, noise, longest, count, T: tl.constexpr, R: tl.constexpr):
    """Draw the pivots of a bin and factorise along them, see `rpnys.pivoted_cholesky`.

    Args:
        left: float32 (t, t), G; what the pivots leave of it from then on.
        half: float32 (t,), |z|^2 / 2.
        log_mass: float32 (t,), log D^2 and the log importance.
        used: bool (t,).
        rank: slots of the bin.
        state: uint64, the hash of the bin's counters.
        noise: pointer to the noise of the bin, float32 (count, longest); None to draw it from `state`.
        longest: columns of the noise.
        count: steps to take, at least `rank`.

    Returns:
        Pivots int32 (r,), found bool (r,), rows float32 (r, t) and triangle float32 (r, r), as in `Factor`.
    """
    places, slots = tl.arange(0, T), tl.arange(0, R)
    floor = tl.minimum(tl.maximum(half * _ROUNDING, _TOLERANCE), 0.5)
    floor = tl.where(used, floor, float("inf"))
    residual = tl.full((T,), 1.0, tl.float32)
    rows = tl.zeros((R, T), tl.float32)
    triangle = tl.zeros((R, R), tl.float32)
    pivots = tl.zeros((R,), tl.int32)
    found = tl.zeros((R,), tl.int32)
    for step in range(count):
        if noise is None:
            gumbel = gumbel_row(absorb(state, tl.full((), step, tl.int64)), places)
        else:
            gumbel = tl.load(noise + step * longest + places, mask=places < longest, other=0.0)
        score = (gumbel + log_mass) + tl.log(tl.maximum(residual, _TINY))
        score = tl.where(residual <= floor, _NEVER, score)
        best, pivot = tl.max(score, 0, return_indices=True)
        drawn = (best > _NEVER / 2) & (step < rank)
        here = places == pivot

        # The residual of G is symmetric: its row and its column at the pivot are the same numbers.
        height = tl.maximum(tl.sum(tl.where(here, residual, 0.0), 0), _TOLERANCE)
        factor = tl.where(drawn, tl.rsqrt(height), 0.0)
        row = tl.sum(tl.where(here[:, None], left, 0.0), 0) * factor
        column = tl.sum(tl.where(here[None, :], left, 0.0), 1) * factor
        left -= column[:, None] * row[None, :]
        residual = tl.where(here, 0.0, residual - row * row)

        rows = tl.where((slots == step)[:, None], row[None, :], rows)
        at_pivot = tl.where(drawn, tl.sum(tl.where(here[None, :], rows, 0.0), 1), 0.0)
        triangle = tl.where((slots == step)[None, :], at_pivot[:, None], triangle)
        pivots = tl.where(slots == step, pivot, pivots)
        found = tl.where(slots == step, drawn.to(tl.int32), found)
    return pivots, found != 0, rows, triangle


@triton.jit
def weights(pivots, found, rows, triangle, log_scale, used, count, T: tl.constexpr, R: tl.constexpr):
    """Compute W = H_SS^-1 H_S, see `rpnys.nystrom_weights`.

    Args:
        pivots: int32 (r,), with the next three what `draw` returns.
        found: bool (r,).
        rows: float32 (r, t).
        triangle: float32 (r, r).
        log_scale: float32 (t,), log D^2.
        used: bool (t,).
        count: steps that were taken.

    Returns:
        float32 (r, t), in the order of the draws.
    """
    places, slots = tl.arange(0, T), tl.arange(0, R)
    at_pivot = places[None, :] == pivots[:, None]
    own = tl.sum(tl.where(at_pivot, log_scale[None, :], 0.0), 1)
    diagonal = tl.sum(tl.where(slots[:, None] == slots[None, :], triangle, 0.0), 1)
    level = tl.log(tl.maximum(diagonal, _TINY)) + 0.5 * own
    matrix = _relative(rows, log_scale, level)
    unit = tl.where(slots[:, None] < slots[None, :], _relative(triangle, own, level), 0.0)
    for turn in range(count - 1):  # back substitution, from the last slot
        last = count - 1 - turn
        column = tl.sum(tl.where((slots == last)[None, :], unit, 0.0), 1)
        row = tl.sum(tl.where((slots == last)[:, None], matrix, 0.0), 0)
        matrix -= column[:, None] * row[None, :]
    matrix = _within(tl.where(matrix == matrix, matrix, 0.0), _LARGEST_WEIGHT)
    unity = tl.where(at_pivot & found[:, None], 1.0, 0.0)
    others = used & (tl.sum(unity, 0) == 0.0)
    return tl.where(others[None, :], matrix, 0.0) + unity


@triton.jit
def keep_all(pivots, found, matrix, used, count, rank, T: tl.constexpr, R: tl.constexpr):
    """Make every token a slot that stands for itself alone, in a bin with no more tokens than slots.

    Args:
        pivots: int32 (r,).
        found: bool (r,).
        matrix: float32 (r, t), W.
        used: bool (t,).
        count: tokens that are used.
        rank: slots of the bin.

    Returns:
        Pivots, found and W; as they were in other bins.
    """
    places, slots = tl.arange(0, T), tl.arange(0, R)
    kept = count <= rank
    ordinal = tl.cumsum(used.to(tl.int32), 0) - 1
    chosen = used[None, :] & (ordinal[None, :] == slots[:, None])
    every = tl.sum(tl.where(chosen, places[None, :], 0), 1)
    matrix = tl.where(kept, tl.where(chosen, 1.0, 0.0), matrix)
    return tl.where(kept, every, pivots), tl.where(kept, slots < count, found), matrix


@triton.jit
def position_order(pivots, found, R: tl.constexpr):
    """Find the place of each slot among those sorted by position, empty ones last: int32 (r,)."""
    slots = tl.arange(0, R)
    position = tl.where(found, pivots, _LAST)
    same = (position[None, :] == position[:, None]) & (slots[None, :] < slots[:, None])
    return tl.sum(((position[None, :] < position[:, None]) | same).to(tl.int32), 1)


@triton.jit
def _relative(rows, log_scale, level):
    """Put each row over the entry at its own pivot, see `rpnys.relative_rows`."""
    exponent = _within(log_scale[None, :] / 2 - level[:, None], _LARGEST_EXPONENT)
    return _within(tl.exp(exponent) * rows, _LARGEST_WEIGHT)


@triton.jit
def _within(numbers, limit: tl.constexpr):
    return tl.minimum(tl.maximum(numbers, -limit), limit)


@triton.jit
def _log(numbers):
    """Take logarithms, minus infinity of 0."""
    positive = numbers > 0
    return tl.where(positive, tl.log(tl.where(positive, numbers, 1.0)), -float("inf"))
