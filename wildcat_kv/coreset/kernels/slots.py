"""Triton kernels that compress the bins of all rows and heads, one program a bin.

Arguments of both, pointers first:

    keys, values    (rows, heads, n, channels), strides `_row`, `_head` and `_token`, then 1
    mass            float32 (rows, heads, n), w; None for 1
    valid           bool (rows, heads, n); None for all
    bound           float32 (rows, heads), s^2; None to leave the values out of the importance
    centre          float32 (rows, heads, d), mean key of the head
    roots           float32 (rows, heads, bins), sqrt(b) / tau; None for `root` in all bins
    noise           float32 (rows or 1, heads, bins, slots, longest); None to draw it from `fold`
    *_out           written, of slots (rows, heads, rank, ...) as in `compresskv.Coreset`; of bins (rows, heads, bins)
    fold            hash of the fold's counters, of which each bin makes its own noise
    n, parts, rank  tokens, bins and slots of a row and head
    longest, slots  tokens and slots of the largest bin

and known when the kernel is compiled:

    LIMIT           largest number of the values' dtype
    KEEP            True if there may be bins with no more tokens than slots, which keep them as they are
    CLIPPED         True for the non-negative part of the weights
    D, D_V          channels of keys and values
    T, R            places of a bin and slots, powers of two
    BLOCK           channels at a time
"""

from __future__ import annotations

import triton
import triton.language as tl

from wildcat_kv.coreset.kernels import steps
from wildcat_kv.coreset.kernels.noise import absorb


@triton.jit(do_not_specialize=["n", "parts"])
def bin_norms(
    keys, valid, centre, norms_out, counts_out,
    n, parts, key_row, key_head, key_token,
    D: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute R_K and the number of valid tokens of every bin, for `squared_temperature`."""
    bin, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = (row * tl.num_programs(1) + head).to(tl.int64)
    first, used = _tokens(valid, line, bin, n, parts, T)
    keys += _offset(row, key_row, head, key_head, first, key_token)
    norm = steps.largest_distance(keys, key_token, used, centre + line * D, D, T, BLOCK)
    tl.store(norms_out + line * parts + bin, norm)
    tl.store(counts_out + line * parts + bin, tl.sum(used.to(tl.int32), 0))


@triton.jit(do_not_specialize=["fold", "n", "parts", "rank", "longest", "slots"])
def bin_slots(
    keys, values, mass, valid, bound, centre, roots, noise,
    source_out, valid_out, keys_out, values_out, weights_out,
    fold: tl.int64, root, n, parts, rank, longest, slots,
    key_row, key_head, key_token, value_row, value_head, value_token, noise_row,
    LIMIT: tl.constexpr, KEEP: tl.constexpr, CLIPPED: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, T: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compress every bin: `source_out` gets the token of each slot, 0 for empty ones, the others its content."""
    bin, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = (row * tl.num_programs(1) + head).to(tl.int64)
    first, used = _tokens(valid, line, bin, n, parts, T)
    keys += _offset(row, key_row, head, key_head, first, key_token)
    values += _offset(row, value_row, head, value_head, first, value_token)
    count = tl.sum(used.to(tl.int32), 0)
    first_slot, own_rank = _part(bin, rank, parts)

    if roots is not None:
        root = tl.load(roots + line * parts + bin)
    half, log_scale, kernel = steps.kernel(keys, key_token, used, count, centre + line * D, root, D, T, BLOCK)
    log_mass, weight = log_scale, used.to(tl.float32)
    if mass is not None:
        weight = tl.load(mass + line * n + first + tl.arange(0, T), mask=used, other=0.0)
        log_mass += steps.importance(weight, used, values, value_token, bound, line, D_V, T, BLOCK)
    state = absorb(absorb(fold.to(tl.uint64), head), bin)
    if noise is not None:
        noise += row * noise_row + (head * parts + bin).to(tl.int64) * (slots * longest)
    factor = steps.draw(kernel, half, log_mass, used, own_rank, state, noise, longest, slots, T, R)
    pivots, found, rows, triangle = factor
    matrix = steps.weights(pivots, found, rows, triangle, log_scale, used, slots, T, R)
    if CLIPPED:
        matrix = tl.maximum(matrix, 0.0)
    if KEEP:
        pivots, found, matrix = steps.keep_all(pivots, found, matrix, used, count, own_rank, T, R)

    order = steps.position_order(pivots, found, R)
    out, written = line * rank + first_slot + order, order < own_rank
    tl.store(source_out + out, tl.where(found, first + pivots, 0).to(tl.int64), mask=written)
    tl.store(valid_out + out, found, mask=written)
    tl.store(weights_out + out, tl.sum(matrix * weight[None, :], 1), mask=written)
    _store_sums(matrix, values, value_token, used, values_out, out, written, LIMIT, D_V, T, BLOCK)
    _store_keys(keys, key_token, pivots, found, keys_out, out, written, D, BLOCK)


@triton.jit
def _part(bin, total, parts):
    """Find the first item of a bin and their number, see `bins.Split`."""
    size, longer = total // parts, total % parts
    return bin * size + tl.minimum(bin, longer), size + (bin < longer).to(tl.int32)


@triton.jit
def _tokens(valid, line, bin, n, parts, T: tl.constexpr):
    """Find the tokens of a bin: the first of them, and the places that take part, bool (t,)."""
    first, size = _part(bin, n, parts)
    places = tl.arange(0, T)
    used = places < size
    if valid is not None:
        used = used & (tl.load(valid + line * n + first + places, mask=used, other=0) != 0)
    return first, used


@triton.jit
def _offset(row, row_stride, head, head_stride, token, token_stride):
    """Find a token in memory; beyond 2^31 numbers, too."""
    return row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride + token.to(tl.int64) * token_stride


@triton.jit
def _store_sums(
    matrix, values, stride, used, target, out, written,
    LIMIT: tl.constexpr, D_V: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store U = W V, block by block of channels."""
    for first in range(0, D_V, BLOCK):
        block = steps.load_block(values, stride, first, used, D_V, T, BLOCK)
        sums = tl.dot(matrix, block, input_precision="ieee")
        sums = tl.minimum(tl.maximum(sums, -LIMIT), LIMIT)
        channels = first + tl.arange(0, BLOCK)
        where = target + out[:, None] * D_V + channels[None, :]
        tl.store(where, sums.to(target.dtype.element_ty), mask=written[:, None] & (channels < D_V)[None, :])


@triton.jit
def _store_keys(keys, stride, pivots, found, target, out, written, D: tl.constexpr, BLOCK: tl.constexpr):
    """Store the pivots' keys as they are, 0 in empty slots."""
    for first in range(0, D, BLOCK):
        channels = first + tl.arange(0, BLOCK)
        inside = (channels < D)[None, :]
        block = tl.load(keys + pivots[:, None] * stride + channels[None, :], mask=found[:, None] & inside, other=0.0)
        tl.store(target + out[:, None] * D + channels[None, :], block, mask=written[:, None] & inside)
