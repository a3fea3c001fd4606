"""One token's attention to a whole layer by the kernels of `kernels/decode.py`: two launches.

What the layer holds is cut into items of work once, when its memory changes, and not at every token. The tables of
items hold addresses, so that heads that hold unequally much need no further launch. Tokens that come later are one
number: they are written behind the entries that the tables know.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.kernels.switch import DEVICES as DEVICES
from wildcat_kv.coreset.quantised import Quantised
from wildcat_kv.coreset.wtdattn import AttentionOptions

# Query heads of a group: tensor cores take 16 rows, and each head has two.
_MOST_GROUP = 8
_MOST_CHANNELS = 256
# Scales of a quantised value: each costs a product.
_MOST_SHARES = 8
# Addresses and strides are multiples of this, so that the kernel reads 16 bytes at once.
_ALIGNED = 16
# Items of work for each multiprocessor, which runs a few of them side by side.
_ITEMS_PER_PROCESSOR = 4
# Entries of an item: fewer are not worth a program.
_LEAST_ENTRIES = 128
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OPEN, _PACKED = 0, 1


class PackedPart(NamedTuple):
    """Quantised slots of the heads of a band.

    Attributes:
        keys: (batch, n, d).
        values: (batch, n, d_v), numerators over masses.
        weights: float16 (batch, n); None where all are valid and weigh 1.
        valid: bool (batch, n), with `weights`.
    """

    keys: Quantised
    values: Quantised
    weights: Tensor | None
    valid: Tensor | None


class HeldBand(NamedTuple):
    """Entries of some heads that hold equally many.

    Attributes:
        places: the heads, each as row * kv_heads + head.
        keys: (..., columns, d), a line for each place, free columns included.
        values: (..., columns, d_v), numerators over masses.
        weights: float32 (..., columns).
        valid: bool (..., columns).
        length: columns in use.
        packed: quantised slots of the same heads.
    """

    places: Sequence[int]
    keys: Tensor
    values: Tensor
    weights: Tensor
    valid: Tensor
    length: int
    packed: Sequence[PackedPart] = ()


class _Work(NamedTuple):
    """Part of the table of parts, and how its lines are cut.

    Attributes:
        row: row of the table.
        places: places of the lines.
        units: entries, or groups, of a line.
        step: units of an item.
    """

    row: list[int]
    places: Sequence[int]
    units: int
    step: int


@cache
def _is_recent(device: torch.device) -> bool:
    """Tell if a device has the shared memory that the kernels take, up to 80 KB a program."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def supports(bands: Sequence[HeldBand], dtype: torch.dtype, group: int) -> bool:
    """Tell if the kernels can attend to these entries.

    Args:
        bands: entries of a layer.
        dtype: dtype of the query.
        group: query heads of a group.
    """
    d, d_v = bands[0].keys.shape[-1], bands[0].values.shape[-1]
    packed = [part for band in bands for part in band.packed]
    kinds = {(part.keys.bits, part.values.bits, part.values.scale.shape[-1]) for part in packed}
    whole = [tensor for band in bands for tensor in (band.keys, band.values, band.weights, band.valid)]
    for part in packed:
        whole += [*part.keys.tensors(), *part.values.tensors()]
        whole += [side for side in (part.weights, part.valid) if side is not None]
    return (
        _is_recent(bands[0].keys.device)
        and dtype in _DTYPES
        and all(band.keys.dtype == band.values.dtype == dtype for band in bands)
        and 1 <= group <= _MOST_GROUP
        and all(size % _ALIGNED == 0 and size <= _MOST_CHANNELS for size in (d, d_v))
        and len(kinds) <= 1
        and all(bits == other and shares <= _MOST_SHARES for bits, other, shares in kinds)
        and all(tensor.is_contiguous() and tensor.data_ptr() % _ALIGNED == 0 for tensor in whole)
    )


@dataclass(frozen=True)
class DecodePlan:
    """Tables of the work for one token, on the device.

    They hold addresses: they serve as long as the bands' tensors stay where they are.

    Attributes:
        items: int32 (items, 8), items of work, those of a place side by side.
        parts: int64 (parts, 16), addresses and strides.
        places: int32 (places, 2), the first item of each place and the one after its last.
        group: query heads of a group.
        kv_heads: key heads of a row.
        d: channels of a key.
        d_v: channels of a value.
        tile: entries that a program reads at once.
        bits: bits of quantised slots, 0 if there are none.
        shares: scales of a quantised value.
    """

    items: Tensor
    parts: Tensor
    places: Tensor
    group: int
    kv_heads: int
    d: int
    d_v: int
    tile: int
    bits: int
    shares: int

    @staticmethod
    def of(bands: Sequence[HeldBand], kv_heads: int, group: int, least: int = _LEAST_ENTRIES) -> DecodePlan:
        """Cut what the bands hold into items; `supports` must be True.

        Args:
            bands: entries of a layer; each place is in one of them.
            kv_heads: key heads of a row.
            group: query heads of a group.
            least: entries of an item, at least.
        """
        keys, values, device = bands[0].keys, bands[0].values, bands[0].keys.device
        entries = sum(_columns(band) * len(band.places) for band in bands)
        tile = _tile(keys, values, bands)
        step = -(-max(least, -(-entries // _most_items(device))) // tile) * tile
        work = []
        for band in bands:
            work.append(_Work(_open_row(band), band.places, band.keys.shape[-2], step))
            for part in band.packed:
                groups, size = part.keys.codes.shape[1], part.keys.size
                work.append(_Work(_packed_row(part), band.places, groups, max(1, step // size)))
        items, places = _cut(work, sum(len(band.places) for band in bands))
        packed = [part for band in bands for part in band.packed]
        # One copy to the device for all tables. Each begins at a multiple of 16 bytes.
        raw = b"".join(
            (array("q", [number for one in work for number in one.row]), array("i", items), array("i", places))
        )
        table = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device, non_blocking=True)
        sizes = (128 * len(work), 4 * len(items), 4 * len(places))
        rows, cut, spans = table.split(sizes)
        return DecodePlan(
            cut.view(torch.int32).view(-1, 8),
            rows.view(torch.int64).view(-1, 16),
            spans.view(torch.int32).view(-1, 2),
            group,
            kv_heads,
            keys.shape[-1],
            values.shape[-1],
            tile,
            packed[0].keys.bits if packed else 0,
            packed[0].values.scale.shape[-1] if packed else 1,
        )

    def attend(self, query: Tensor, added: int, options: AttentionOptions) -> Tensor:
        """Attend with one token's queries.

        Args:
            query: (rows, heads, 1, d), in the dtype of the keys, on their device.
            added: tokens that came since the tables were made; negative if some were taken back.
            options: arguments of the attention call; `valid` and `causal` are not read.

        Returns:
            (rows, heads, 1, d_v) in the query's dtype.
        """
        device = query.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():  # Triton launches on the current one
            with torch.cuda.device(device):
                return self._launch(query, added, options)
        return self._launch(query, added, options)

    def _launch(self, query: Tensor, added: int, options: AttentionOptions) -> Tensor:
        kernels = _kernels()
        count, group, d_v = len(self.items), self.group, self.d_v
        rows, heads = query.shape[:2]
        output = query.new_empty(rows, heads, 1, d_v)
        partial = torch.empty(count * group * (d_v + 3), dtype=torch.float32, device=query.device)
        block_v, softcap = _power(d_v), options.softcap
        kernels.attend[(count,)](
            self.items, self.parts, query.contiguous(), partial, count, added,
            float(options.scale), float(softcap or 1.0),
            group, self.d, d_v, _power(self.d), block_v, self.tile, softcap is not None, self.bits, self.shares,
        )  # fmt: skip
        low, high = (None, None) if options.value_range is None else options.value_range
        if low is not None and high is not None:
            low, high = low.contiguous(), high.contiguous()
        sinks = options.sink_logits
        kernels.combine[(rows * heads,)](
            self.places, partial, count, None if sinks is None else sinks.contiguous(), heads, low, high, output,
            group, d_v, block_v, _ITEMS_AT_ONCE,
        )  # fmt: skip
        return output

    def tensors(self) -> list[Tensor]:
        """List the tables."""
        return [self.items, self.parts, self.places]


# Items that one program of `combine` reads at once.
_ITEMS_AT_ONCE = 32


@cache
def _kernels() -> Any:
    """Import the kernels, once: Triton is not installed everywhere."""
    return import_module("wildcat_kv.coreset.kernels.decode")


@cache
def _most_items(device: torch.device) -> int:
    """Count the items that keep all multiprocessors of a device at work."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return processors * _ITEMS_PER_PROCESSOR


@cache
def _power(size: int) -> int:
    """Round up to a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def _tile(keys: Tensor, values: Tensor, bands: Sequence[HeldBand]) -> int:
    """Choose the entries that a program reads at once: 64, fewer where they are wide or groups small.

    In float32 there are no tensor cores, and the compiler unrolls all of a product.
    """
    wide = max(keys.shape[-1], values.shape[-1]) > 128
    tile = 16 if keys.dtype == torch.float32 else 32 if wide else 64
    sizes = [part.keys.size for band in bands for part in band.packed]
    return min(tile, _power(max(sizes))) if sizes else tile


def _columns(band: HeldBand) -> int:
    """Count the columns of a line, free ones included."""
    return band.keys.shape[-2] + sum(part.keys.slots for part in band.packed)


def _open_row(band: HeldBand) -> list[int]:
    """Write a row of the table of parts for entries in the model's dtype.

    Kind, then addresses of keys and values with their strides from line to line, of weights and of valid with theirs,
    and the entries in use.
    """
    columns, d, d_v = band.keys.shape[-2], band.keys.shape[-1], band.values.shape[-1]
    keys, values = (band.keys.data_ptr(), columns * d), (band.values.data_ptr(), columns * d_v)
    beside = (band.weights.data_ptr(), band.valid.data_ptr(), columns)
    return [_OPEN, *keys, *values, *beside, band.length, *[0] * 7]


def _packed_row(part: PackedPart) -> list[int]:
    """Write a row of the table of parts for quantised slots.

    As `_open_row`, with codes for numbers and the size of a group for the entries in use; then addresses of scales and
    lowest numbers of the keys with their stride, and of the values with theirs. Weights are at 0 if all are 1.
    """
    keys, values, slots = part.keys, part.values, part.keys.slots
    weighted = part.weights is not None and part.valid is not None
    beside = (part.weights.data_ptr(), part.valid.data_ptr()) if weighted else (0, 0)  # type: ignore[union-attr]
    sides: list[int] = []
    for numbers in (keys, values):
        sides += (numbers.scale.data_ptr(), numbers.lowest.data_ptr(), numbers.scale[0].numel())
    codes = [side for one in (keys, values) for side in (one.codes.data_ptr(), one.codes[0].numel())]
    return [_PACKED, *codes, *beside, slots, keys.size, *sides, 0]


def _cut(work: Sequence[_Work], places: int) -> tuple[list[int], list[int]]:
    """Cut all lines into items.

    Args:
        work: parts, in the order of the table.
        places: number of places.

    Returns:
        The two tables, flat: items, place by place, and the items of each place.
    """
    lines: list[list[tuple[int, int, _Work]]] = [[] for _ in range(places)]
    for number, one in enumerate(work):
        for line, place in enumerate(one.places):
            lines[place].append((number, line, one))
    items: list[int] = []
    spans: list[int] = []
    for place, parts in enumerate(lines):
        spans.append(len(items) // 8)
        for number, line, one in parts:
            for first in range(0, one.units, one.step):
                items += (number, line, place, first, min(one.units, first + one.step), 0, 0, 0)
        spans.append(len(items) // 8)
    return items, spans
