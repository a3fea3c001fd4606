"""Attention of one token's queries to weighted entries, split over the entries.

`attend` takes one item of work: some entries of one head, in the model's dtype or in a few bits, for all query heads of
its group. `combine` joins the items of each query head. `coreset/decoding.py` makes the tables that they read, and
`wtdattn._attend` says what they compute.

A weight joins its score, s + log m, with the mass m = w, or 1 where w is small or negative (`mass_of`). The terms
p = e^(s + log m - shift) are then at most 1. They sum up to the numerator, sum p v, and to the denominator, sum p w/m.

Tensor cores take 16 rows and there are at most 8 query heads, so each row comes twice. Terms are rounded to 16 bits in
the first 8 rows and what the rounding left is in the other 8: their sum has the precision of 16 significant bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from wildcat_kv.coreset import wtdattn

# Columns of the two tables.
ITEM_COLUMNS = 8
PART_COLUMNS = 16

_LOG2_E = tl.constexpr(1.4426950408889634)
_LEAST_MASS = tl.constexpr(wtdattn.LEAST_MASS)
_DENOMINATOR_FLOOR = tl.constexpr(wtdattn.DENOMINATOR_FLOOR)
_ITEM_COLUMNS = tl.constexpr(ITEM_COLUMNS)
_PART_COLUMNS = tl.constexpr(PART_COLUMNS)


@triton.jit
def _column(part, column: tl.constexpr, dtype: tl.constexpr):
    """Read an address of the table of parts; all of them are multiples of 16."""
    return tl.multiple_of(tl.load(part + column).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _stride(part, column: tl.constexpr, line):
    """Compute where a line begins, in numbers, a multiple of 16."""
    return tl.multiple_of(tl.load(part + column) * line, 16)


@triton.jit
def _halves(terms, dtype: tl.constexpr):
    """Round terms (16, n): to `dtype` in the first 8 rows, what that left in the others; nothing is left in float32."""
    first = (tl.arange(0, 16) < 8)[:, None]
    rounded = terms.to(dtype)
    return tl.where(first, rounded, (terms - rounded.to(tl.float32)).to(dtype))


@triton.jit
def _weigh(scores, weights, live, peak, total, magnitude, scale, softcap, SOFTCAP: tl.constexpr):
    """Turn products (16, n) into terms, and add them to the two sums of the denominator.

    Returns:
        Terms (16, n), the factor (16,) of all earlier terms, and the new peak (16,), total and magnitude (16, n).
    """
    scores *= scale
    if SOFTCAP:
        small = tl.exp2(-2 * _LOG2_E * tl.abs(scores / softcap))
        bent = softcap * (1 - small) / (1 + small)
        scores = tl.where(scores < 0, -bent, bent)
    masses = tl.where(weights >= _LEAST_MASS, weights, 1.0)
    scores = tl.where(live[None, :], scores * _LOG2_E + tl.log2(masses)[None, :], -float("inf"))
    highest = tl.maximum(peak, tl.max(scores, 1))
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    factor = tl.exp2(peak - shift)
    terms = tl.exp2(scores - shift[:, None])
    shares = weights / masses
    total = total * factor[:, None] + terms * shares[None, :]
    magnitude = magnitude * factor[:, None] + terms * tl.abs(shares)[None, :]
    return terms, factor, highest, total, magnitude


@triton.jit
def _codes(base, inner, inside, size, channels, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Unpack codes of one group, int32 (n, channels), as `quantised._unpack` does.

    Args:
        base: pointer to the group's first byte.
        inner: int32 (n,), slots within the group.
        inside: bool (n,), slots that there are.
        size: slots of the group.
        channels: int32, channels to take of WIDTH.
    """
    shown = inside[:, None] & (channels < WIDTH)[None, :]
    if BITS == 8:
        return tl.load(base + inner[:, None] * WIDTH + channels[None, :], mask=shown, other=0).to(tl.int32)
    wide: tl.constexpr = 2 if BITS == 3 else BITS  # bits of the first plane
    rows = size * wide // 8
    packed = tl.load(base + (inner % rows)[:, None] * WIDTH + channels[None, :], mask=shown, other=0)
    codes = (packed.to(tl.int32) >> (inner // rows * wide)[:, None]) & (2**wide - 1)
    if BITS == 3:
        ones = size // 8
        packed = tl.load(base + (rows + inner % ones)[:, None] * WIDTH + channels[None, :], mask=shown, other=0)
        codes += ((packed.to(tl.int32) >> (inner // ones)[:, None]) & 1) << 2
    return codes


@triton.jit
def _attend_open(
    part, line, first, stop, added, query, scale, softcap, sums,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, N: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Attend to entries [first, stop) of a line in the model's dtype."""
    peak, total, magnitude, output = sums
    dtype: tl.constexpr = query.dtype
    keys, values = _column(part, 1, dtype) + _stride(part, 2, line), _column(part, 3, dtype) + _stride(part, 4, line)
    beside = tl.load(part + 7) * line
    weights, valid = _column(part, 5, tl.float32) + beside, _column(part, 6, tl.uint8) + beside
    stop = tl.minimum(stop, (tl.load(part + 8) + added).to(tl.int32))
    channels, value_channels = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for start in range(first, stop, N):
        slots = start + tl.arange(0, N)
        inside = slots < stop
        shown = inside[:, None] & (channels < D)[None, :]
        key = tl.load(keys + slots[:, None] * D + channels[None, :], mask=shown, other=0.0)
        weight = tl.load(weights + slots, mask=inside, other=0.0)
        live = tl.load(valid + slots, mask=inside, other=0) != 0
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        terms, factor, peak, total, magnitude = _weigh(
            scores, weight, live, peak, total, magnitude, scale, softcap, SOFTCAP
        )
        shown = inside[:, None] & (value_channels < D_V)[None, :]
        value = tl.load(values + slots[:, None] * D_V + value_channels[None, :], mask=shown, other=0.0)
        output = tl.dot(_halves(terms, dtype), value, output * factor[:, None], input_precision="ieee")
    return peak, total, magnitude, output


@triton.jit
def _packed_keys(
    query, codes, scale, lowest, inner, inside, size, D: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr
):
    """Unpack keys of one group without their lowest numbers, whose products with the query come beside them.

    Returns:
        Keys (n, channels) in the query's dtype and float32 (16,).
    """
    dtype: tl.constexpr = query.dtype
    channels, pieces = tl.arange(0, BLOCK_D), tl.arange(0, 16)
    factors = tl.load(scale + channels, mask=channels < D, other=0.0).to(tl.float32)
    keys = (_codes(codes, inner, inside, size, channels, D, BITS).to(tl.float32) * factors[None, :]).to(dtype)
    least = tl.load(lowest + channels, mask=channels < D, other=0.0).to(tl.float32)
    rounded = least.to(dtype)
    rest = (least - rounded.to(tl.float32)).to(dtype)
    both = tl.where((pieces == 0)[None, :], rounded[:, None], rest[:, None])
    products = tl.where((pieces < 2)[None, :], tl.dot(query, both, input_precision="ieee"), 0.0)
    return keys, tl.sum(products, 1)


@triton.jit
def _packed_values(
    codes, scale, lowest, inner, inside, size, dtype: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr,
    BITS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Unpack values of one group, (n, channels); `scale` and `lowest` are pointers (n,) to the slots' first numbers."""
    channels = tl.arange(0, BLOCK_V)
    share_of = channels // (D_V // SHARES)
    steps = tl.load(scale, mask=inside, other=0.0).to(tl.float32)[:, None]
    least = tl.load(lowest, mask=inside, other=0.0).to(tl.float32)[:, None]
    for share in tl.static_range(1, SHARES):
        own = (share_of == share)[None, :]
        steps = tl.where(own, tl.load(scale + share, mask=inside, other=0.0).to(tl.float32)[:, None], steps)
        least = tl.where(own, tl.load(lowest + share, mask=inside, other=0.0).to(tl.float32)[:, None], least)
    return (_codes(codes, inner, inside, size, channels, D_V, BITS).to(tl.float32) * steps + least).to(dtype)


@triton.jit
def _attend_packed(
    part, line, first, stop, query, scale, softcap, sums,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, N: tl.constexpr,
    SOFTCAP: tl.constexpr, BITS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Attend to groups [first, stop) of a line of quantised slots.

    Numbers are rounded to the model's dtype, as those that are not quantised. Keys are so without the lowest number of
    their channel, which may be far from 0: q.(l + s c) = q.l + q.(s c), and l comes in two pieces.
    """
    peak, total, magnitude, output = sums
    dtype: tl.constexpr = query.dtype
    size = tl.load(part + 8).to(tl.int32)
    rows = size * BITS // 8
    keys = _column(part, 1, tl.uint8) + _stride(part, 2, line)
    values = _column(part, 3, tl.uint8) + _stride(part, 4, line)
    weighted = tl.load(part + 5) != 0
    beside = tl.load(part + 7) * line
    weights, valid = _column(part, 5, tl.float16) + beside, _column(part, 6, tl.uint8) + beside
    along = _stride(part, 11, line)
    key_scale, key_lowest = _column(part, 9, tl.float16) + along, _column(part, 10, tl.float16) + along
    along = tl.load(part + 14) * line
    value_scale, value_lowest = _column(part, 12, tl.bfloat16) + along, _column(part, 13, tl.bfloat16) + along

    tiles = tl.cdiv(size, N)
    for tile in range(first * tiles, stop * tiles):
        group = tile // tiles
        inner = tile % tiles * N + tl.arange(0, N)
        inside = inner < size
        slots = group * size + inner
        key, offset = _packed_keys(
            query, keys + group * rows * D, key_scale + group * D, key_lowest + group * D,
            inner, inside, size, D, BLOCK_D, BITS,
        )  # fmt: skip
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") + offset[:, None]
        weight = tl.load(weights + slots, mask=inside & weighted, other=1.0).to(tl.float32)
        live = inside & (tl.load(valid + slots, mask=inside & weighted, other=1) != 0)
        terms, factor, peak, total, magnitude = _weigh(
            scores, weight, live, peak, total, magnitude, scale, softcap, SOFTCAP
        )
        value = _packed_values(
            values + group * rows * D_V, value_scale + slots * SHARES, value_lowest + slots * SHARES,
            inner, inside, size, dtype, D_V, BLOCK_V, BITS, SHARES,
        )  # fmt: skip
        output = tl.dot(_halves(terms, dtype), value, output * factor[:, None], input_precision="ieee")
    return peak, total, magnitude, output


@triton.jit
def _write(
    partial, item, count, peak, total, magnitude, output, GROUP: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Write the sums of an item where `combine` finds them."""
    rows, head, channels = tl.arange(0, 16), tl.arange(0, 8), tl.arange(0, BLOCK_V)
    joined = tl.sum(tl.reshape(output, (2, 8, BLOCK_V)), 0)
    shown = (head < GROUP)[:, None] & (channels < D_V)[None, :]
    tl.store(partial + (item * GROUP + head)[:, None] * D_V + channels[None, :], joined, mask=shown)
    beside = partial + count * GROUP * D_V + item * 3 * GROUP + rows
    tl.store(beside, peak, mask=rows < GROUP)
    tl.store(beside + GROUP, tl.sum(total, 1), mask=rows < GROUP)
    tl.store(beside + 2 * GROUP, tl.sum(magnitude, 1), mask=rows < GROUP)


@triton.jit(do_not_specialize=["added", "count"])
def attend(
    items, parts, query, partial, count, added, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    N: tl.constexpr, SOFTCAP: tl.constexpr, BITS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Attend to the entries of one item.

    Args:
        items: int32 (count, 8), each a part, a line of it, a place, and the first entry or group and the one after the
            last.
        parts: int64 (parts, 16): kind, then addresses and strides, see `decoding._open_row` and `_packed_row`.
        query: (places * GROUP, D).
        partial: float32, for each item the sums of p v (GROUP, D_V); then for each item peaks and the sums of p w/m and
            of p |w|/m (3, GROUP).
        count: number of items.
        added: tokens that came since the tables were made.
        scale: b, the factor of the scores.
        softcap: c, if SOFTCAP.
        GROUP, D, D_V, BITS, SHARES: of the plan, see `decoding.DecodePlan`.
        BLOCK_D, BLOCK_V: D and D_V rounded up to powers of two.
        N: entries to read at once, at least 16.
        SOFTCAP: True to bend the scores.
    """
    item = tl.program_id(0)
    row = items + item * _ITEM_COLUMNS
    part = parts + tl.load(row) * _PART_COLUMNS
    line, place = tl.load(row + 1).to(tl.int64), tl.load(row + 2)
    first, stop = tl.load(row + 3), tl.load(row + 4)
    heads, channels = tl.arange(0, 16) % 8, tl.arange(0, BLOCK_D)
    shown = (heads < GROUP)[:, None] & (channels < D)[None, :]
    own = tl.load(query + (place * GROUP + heads)[:, None] * D + channels[None, :], mask=shown, other=0.0)
    sums = (
        tl.full((16,), -float("inf"), tl.float32),
        tl.zeros((16, N), tl.float32),
        tl.zeros((16, N), tl.float32),
        tl.zeros((16, BLOCK_V), tl.float32),
    )
    if BITS == 0:  # noqa: SIM114  # known to the compiler, which then leaves the rest out
        peak, total, magnitude, output = _attend_open(
            part, line, first, stop, added, own, scale, softcap, sums, D, D_V, BLOCK_D, BLOCK_V, N, SOFTCAP
        )
    elif tl.load(part) == 0:
        peak, total, magnitude, output = _attend_open(
            part, line, first, stop, added, own, scale, softcap, sums, D, D_V, BLOCK_D, BLOCK_V, N, SOFTCAP
        )
    else:
        peak, total, magnitude, output = _attend_packed(
            part, line, first, stop, own, scale, softcap, sums, D, D_V, BLOCK_D, BLOCK_V, N, SOFTCAP, BITS, SHARES
        )
    _write(partial, item, count, peak, total, magnitude, output, GROUP, D_V, BLOCK_V)


@triton.jit
def _finish(
    output, head, numerator, total, magnitude, lowest, highest, place, D_V: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Divide, clip and write the output of one query head."""
    channels = tl.arange(0, BLOCK_V)
    real = channels < D_V
    cancelled = total <= _DENOMINATOR_FLOOR * magnitude  # false for NaN, which must not be hidden
    found = tl.where(cancelled, 0.0, numerator / tl.where(cancelled, 1.0, total))
    if lowest is not None:
        low = tl.load(lowest + place * D_V + channels, mask=real, other=0.0).to(tl.float32)
        high = tl.load(highest + place * D_V + channels, mask=real, other=0.0).to(tl.float32)
        found = tl.where(found < low, low, found)
        found = tl.where(found > high, high, found)
    tl.store(output + head * D_V + channels, found.to(output.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["count", "query_heads"])
def combine(
    places, partial, count, sinks, query_heads, lowest, highest, output,
    GROUP: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Join the items of one query head.

    Args:
        places: int32 (places, 2), the first item of each place and the one after its last.
        partial: what `attend` has written.
        count: number of items.
        sinks: (query_heads,), logits that join the denominator; None without.
        query_heads: query heads of a row.
        lowest: (places, D_V), to clip the output to; None without.
        highest: (places, D_V), with `lowest`.
        output: (places * GROUP, D_V).
        GROUP, D_V, BLOCK_V: as in `attend`.
        ITEMS: items to read at once.
    """
    head = tl.program_id(0)
    place, own = head // GROUP, head % GROUP
    first, stop = tl.load(places + 2 * place), tl.load(places + 2 * place + 1)
    channels = tl.arange(0, BLOCK_V)
    real = channels < D_V
    beside = partial + count * GROUP * D_V + own
    peak = tl.full((1,), -float("inf"), tl.float32)
    total, magnitude = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    numerator = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(first, stop, ITEMS):
        items = start + tl.arange(0, ITEMS)
        inside = items < stop
        peaks = tl.load(beside + items * 3 * GROUP, mask=inside, other=-float("inf"))
        totals = tl.load(beside + items * 3 * GROUP + GROUP, mask=inside, other=0.0)
        magnitudes = tl.load(beside + items * 3 * GROUP + 2 * GROUP, mask=inside, other=0.0)
        shown = inside[:, None] & real[None, :]
        sums = tl.load(partial + (items * GROUP + own)[:, None] * D_V + channels[None, :], mask=shown, other=0.0)
        reached = tl.maximum(peak, tl.max(peaks, 0))
        shift = tl.where(reached == -float("inf"), 0.0, reached)
        factor, factors = tl.exp2(peak - shift), tl.exp2(peaks - shift)
        total = total * factor + tl.sum(totals * factors, 0)
        magnitude = magnitude * factor + tl.sum(magnitudes * factors, 0)
        numerator = numerator * factor + tl.sum(sums * factors[:, None], 0)
        peak = reached
    if sinks is not None:
        sink = tl.load(sinks + head % query_heads).to(tl.float32) * _LOG2_E
        shift = tl.maximum(peak, sink)
        factor, extra = tl.exp2(peak - shift), tl.exp2(sink - shift)
        total, magnitude, numerator = total * factor + extra, magnitude * factor + extra, numerator * factor
    _finish(output, head, numerator, total, magnitude, lowest, highest, place, D_V, BLOCK_V)
