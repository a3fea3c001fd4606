"""Tensors of a layer whose heads hold unequally much, or whose slots are quantised.

The heads of all rows are sorted into bands that hold equally many entries. A band is a rectangle of its own: quantised
slots, and a `Storage` for all else. So a layer takes what its heads hold in sum.

In a line of a band, in the order of attention: quantised slots, sink, other slots, exact tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from wildcat_kv.cache.budget import Row
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.kernel_way import KernelWay
from wildcat_kv.cache.one_token import Together
from wildcat_kv.cache.packed import Segment
from wildcat_kv.cache.storage import Storage
from wildcat_kv.cache.value_range import ValueRange
from wildcat_kv.coreset import decoding
from wildcat_kv.coreset.tensors import ordinary_tensors
from wildcat_kv.coreset.wtdattn import AttentionOptions, attends_by_products, coreset_attention, parted_attention


@dataclass
class Band:
    """Some heads of some rows that hold equally many entries.

    Attributes:
        places: the heads, each as row * heads + head.
        open: entries in the dtype of the model, (batch, 1, n, ...): sink, slots, exact tokens.
        packed: quantised slots of the same heads.
        sink: exact tokens at the beginning of a line.
        waiting: slots in the dtype of the model, behind the sink.
    """

    places: list[int]
    open: Storage
    packed: tuple[Segment, ...]
    sink: int
    waiting: int

    def __post_init__(self) -> None:
        first, last = self.places[0], self.places[-1]
        device = self.open.device
        # A slice where possible: a view costs less than a copy.
        in_order = self.places == list(range(first, last + 1))
        self.select: slice | Tensor = slice(first, last + 1) if in_order else torch.tensor(self.places, device=device)

    @property
    def slots(self) -> int:
        """Slots of a line, padding included."""
        return sum(segment.slots for segment in self.packed) + self.waiting

    @property
    def columns(self) -> int:
        """Entries of a line."""
        return self.open.length + self.slots - self.waiting

    def attend(self, query: Tensor, options: AttentionOptions) -> Tensor:
        """Attend to the entries: (batch, group, q, d) gives (batch, group, q, d_v)."""
        held, length = self.open.allocated, self.open.length
        keys, values = self.open.view()
        weights, valid = held.weights[:, :, :length], held.valid[:, :, :length]
        if not self.packed:
            options = options._replace(valid=valid)
            return coreset_attention(query, keys, values, weights, self.open.weighting, options)
        signs, shown = self.open.weighting, [segment.shown() for segment in self.packed]
        for segment in self.packed:
            signs = signs.join(segment.signs)
        return parted_attention(
            query,
            [*(segment.keys for segment in self.packed), keys],
            [*(segment.values for segment in self.packed), values],
            torch.cat((*(side[0] for side in shown), weights), dim=-1),
            signs,
            options._replace(valid=torch.cat((*(side[1] for side in shown), valid), dim=-1)),
        )

    def all_slots(self) -> list[Entries]:
        """Give all slots, unpacked, (batch, 1, n_i, ...) each."""
        keys, values = self.open.allocated.keys.dtype, self.open.allocated.values.dtype
        waiting = self.open.entries.slice(self.sink, self.sink + self.waiting)
        return [*(segment.entries(keys, values) for segment in self.packed), waiting]


class BandedStorage:
    """Entries of a layer in bands; what it offers is what `Storage` does.

    Args:
        shape: rows and heads.
        bands: bands that hold each head of each row once.

    Attributes:
        bands: bands.
        allocated: entries without columns, which have the shapes and dtypes of those held.
        slots_of_rows: slots of each row's head with most.
        length: columns of the rectangle that `entries` makes.
    """

    def __init__(self, shape: tuple[int, int], bands: Sequence[Band]) -> None:
        self._hold(shape, bands)

    @staticmethod
    def whole(bands: Sequence[Band], rows: int) -> BandedStorage:
        """Make a storage of bands that hold all heads of `rows` rows."""
        return BandedStorage((rows, sum(len(band.places) for band in bands) // rows), bands)

    def _hold(self, shape: tuple[int, int], bands: Sequence[Band]) -> None:
        """Hold these bands from now on."""
        self._shape, self.bands, self._way = shape, list(bands), KernelWay()
        self._together: Together | Literal[False] | None = None  # made at the first single token; False if it cannot be
        with ordinary_tensors():
            self.allocated = self._blank(0)  # asked for at every token
        self.slots_of_rows = [0] * shape[0]
        at = [(place // shape[1], band) for band in bands for place in band.places]
        for row, band in at:
            self.slots_of_rows[row] = max(self.slots_of_rows[row], band.slots)
        self.length = max(self.slots_of_rows[row] - band.waiting + band.open.length for row, band in at)

    def __getstate__(self) -> dict[str, Any]:
        """Copy or store without views of what is there already."""
        return self.__dict__ | {"_together": None}

    @property
    def device(self) -> torch.device:
        """Device of what the host may read."""
        return self.bands[0].open.device

    @property
    def columns(self) -> int:
        """Columns in use, on average over the heads, rounded up."""
        return -(-sum(band.columns * len(band.places) for band in self.bands) // (self._shape[0] * self._shape[1]))

    @property
    def entries(self) -> Entries:
        """Copy all entries to one rectangle, right-aligned: padding, sink, padding, slots, exact tokens."""
        made = self._blank(self.length)
        for band in self.bands:
            held = band.open.entries
            exact = self._place(made, band, self.length, held.slice(band.sink + band.waiting, band.open.length))
            stop = exact
            for part in reversed(band.all_slots()):
                stop = self._place(made, band, stop, part)
            sink = held.slice(0, band.sink)
            rows = sorted({place // self._shape[1] for place in band.places})
            for row in rows:  # behind the widest head's slots, so that all sinks of a row are in line
                at = [number for number, place in enumerate(band.places) if place // self._shape[1] == row]
                self._place(made, band, exact - self.slots_of_rows[row], sink, at)
        return made

    def newest(self, columns: int) -> Entries:
        """Copy the newest columns, all of them exact tokens."""
        made = self._blank(columns)
        for band in self.bands:
            self._place(made, band, columns, band.open.newest(columns))
        return made

    def _blank(self, columns: int) -> Entries:
        """Make entries that are padding."""
        return Entries(
            *(
                tensor.new_zeros(*self._shape, columns, *tensor.shape[3:])
                for tensor in self.bands[0].open.allocated.tensors()
            )
        )

    def _place(self, made: Entries, band: Band, stop: int, part: Entries, at: Sequence[int] | None = None) -> int:
        """Copy a part of a band's lines to the columns before `stop`; return the first of them."""
        start = stop - part.keys.shape[2]
        select = band.select
        if at is not None and len(at) < len(band.places):
            index = torch.tensor(at, device=part.weights.device)
            part = Entries(*(tensor.index_select(0, index.to(tensor.device)) for tensor in part.tensors()))
            select = torch.tensor([band.places[number] for number in at])
        for target, source in zip(made.tensors(), part.tensors(), strict=True):
            where = select.to(target.device) if isinstance(select, Tensor) else select
            target.flatten(0, 1)[where, start:stop] = source.squeeze(1)
        return start

    def shown(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that a model gets for new ones: views of these alone."""
        return keys[:], values[:]

    def view(self) -> tuple[Tensor, Tensor]:
        """Copy all keys and values to rectangles (rows, heads, length, channels)."""
        return (entries := self.entries).keys, entries.values

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions) -> Tensor:
        """Attend to all entries, by their weights.

        Args:
            query: (rows, query_heads, q, d).
            keys: not read.
            values: not read.
            options: arguments of the attention call, without `valid`.

        Returns:
            (rows, query_heads, q, d_v).
        """
        rows, heads = self._shape
        if query.shape[2] == 1 and query.device.type in decoding.DEVICES:
            by_kernel = self._way.attend(query, heads, self.bands, options)
            if by_kernel is not None:
                return by_kernel
        flat = query.reshape(rows * heads, -1, *query.shape[2:])
        sinks = options.sink_logits
        if sinks is not None:
            sinks = sinks.view(heads, -1).repeat(rows, 1)
        box = options.value_range
        options = options._replace(value_range=None)
        together = self._for_one_token(flat, options)
        if together is not None:
            opens = [band.open for band in self.bands]
            found = together.attend(opens, flat, options.scale).to(query.dtype).unsqueeze(2)
        elif len(self.bands) == 1 and isinstance(self.bands[0].select, slice):
            found = self.bands[0].attend(flat, options if sinks is None else options._replace(sink_logits=sinks))
        else:
            parts = []
            for band in self.bands:
                own = options if sinks is None else options._replace(sink_logits=sinks[band.select])
                parts.append(band.attend(flat[band.select], own))
            found = parts[0].new_empty(rows * heads, *parts[0].shape[1:])
            for band, part in zip(self.bands, parts, strict=True):
                found[band.select] = part
        if box is not None:
            lowest, highest = (side.flatten(0, 1).unsqueeze(1).to(found.dtype) for side in box)
            found = found.clamp(lowest, highest)
        return found.reshape(rows, -1, *found.shape[2:])

    def _for_one_token(self, query: Tensor, options: AttentionOptions) -> Together | None:
        """Give all bands side by side if they can be read so, with queries (heads, group, q, d)."""
        plain = query.shape[2] == 1 and query.device.type == "cpu" and not query.requires_grad
        if not (plain and attends_by_products(query, options)):
            return None
        if self._together is None:
            places = [place for band in self.bands for place in band.places]
            packed = [band.packed for band in self.bands]
            self._together = Together.of(places, [band.open for band in self.bands], packed) or False
        return self._together or None

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Append exact tokens; arguments as of `Storage.append`."""
        if keys.shape[2] == 1 and valid is None and self._together:
            opens = [band.open for band in self.bands]
            if self._together.opened.holds(opens):
                self._together.opened.append(opens, keys.flatten(0, 2), values.flatten(0, 2))
                self.length += 1
                return
        every_key, every_value = keys.flatten(0, 1).unsqueeze(1), values.flatten(0, 1).unsqueeze(1)
        if valid is not None:
            valid = valid.repeat_interleave(self._shape[1], dim=0)
        for band in self.bands:
            at = band.select
            band.open.append(every_key[at], every_value[at], None if valid is None else valid[at])
        self.length += keys.shape[2]

    def relabel(self, valid: Tensor) -> None:
        """Mark anew which of the newest tokens are valid, bool (rows, k)."""
        valid = valid.to(self.device).repeat_interleave(self._shape[1], dim=0)
        for band in self.bands:
            band.open.relabel(valid[band.select])

    def carry(self, state: Tensor) -> None:
        """Keep the newest tokens' carried state, float32 (rows, heads, k, m)."""
        for band in self.bands:
            band.open.carry(state.flatten(0, 1).unsqueeze(1)[band.select])

    def exact_box(self, rows: Sequence[Row], later: int, masked: bool) -> ValueRange:
        """Find the box around the values of exact tokens; arguments as of `Storage.exact_box`."""
        by_length: dict[tuple[int, int], list[Band]] = {}
        for band in self.bands:
            by_length.setdefault((band.sink, band.open.length - band.waiting), []).append(band)
        boxes = [_exact_box(alike, masked) for alike in by_length.values()]
        places = [place for alike in by_length.values() for band in alike for place in band.places]
        if len(boxes) == 1 and places == list(range(len(places))):
            [box] = boxes
            return ValueRange(*(side.view(*self._shape, 1, -1) for side in box.tensors()))
        # Find each head's place among the bands.
        order = torch.tensor(sorted(range(len(places)), key=places.__getitem__))
        order = order.to(boxes[0].lowest.device, non_blocking=True)
        sides = zip(*(box.tensors() for box in boxes), strict=True)
        return ValueRange(*(torch.cat(side).index_select(0, order).view(*self._shape, 1, -1) for side in sides))

    def truncate(self, length: int) -> None:
        """Free the columns from `length` on; they are exact tokens."""
        for band in self.bands:
            band.open.truncate(band.open.length - (self.length - length))
        self.length = length

    def select_rows(self, index: Tensor, on_host: Sequence[int] | None = None) -> None:
        """Keep the rows at `index`, int64 (k,), in that order; `on_host` are the same numbers."""
        _, heads = self._shape
        chosen = index.tolist() if on_host is None else list(on_host)
        bands = []
        with ordinary_tensors():
            for band in self.bands:
                at = {place: number for number, place in enumerate(band.places)}
                wanted = [
                    (new * heads + head, at[old * heads + head])
                    for new, old in enumerate(chosen)
                    for head in range(heads)
                    if old * heads + head in at
                ]
                if not wanted:
                    continue
                taken = torch.tensor([number for _, number in wanted], device=band.open.device)
                band.open.select_rows(taken)
                packed = tuple(segment.rows(taken) for segment in band.packed)
                bands.append(replace(band, places=[place for place, _ in wanted], packed=packed))
        self._hold((len(chosen), heads), bands)

    def to(self, device: torch.device) -> None:
        """Move everything to `device`, unless it is there already."""
        with ordinary_tensors():
            for band in self.bands:
                band.open.to(device)
                band.packed = tuple(segment.to(device) for segment in band.packed)
                band.__post_init__()
            self._together = None
            self.allocated = self._blank(0)

    def offload(self) -> None:
        """Move keys and values to the CPU, as `Storage.offload` does."""
        self._together = None
        with ordinary_tensors():
            for band in self.bands:
                band.open.offload()
                band.packed = tuple(segment.to(torch.device("cpu"), numbers_only=True) for segment in band.packed)

    def tensors(self) -> list[Tensor]:
        """List all tensors, free columns included."""
        packed = [tensor for band in self.bands for segment in band.packed for tensor in segment.tensors()]
        held = [tensor for band in self.bands for tensor in band.open.tensors()]
        return [*held, *packed, *self._way.tensors()]


def _exact_box(bands: Sequence[Band], masked: bool) -> ValueRange:
    """Find the boxes around the values of exact tokens of bands that hold equally many, (heads, 1, 1, d_v).

    Some of the tokens may be padding if `masked`.
    """
    spans = [[(band.sink + band.waiting, band.open.length) for band in bands]]
    if bands[0].sink:
        spans.append([(0, band.sink) for band in bands])
    boxes = []
    for span in spans:
        parts = [band.open.allocated.slice(*columns) for band, columns in zip(bands, span, strict=True)]
        valid = torch.cat([part.valid for part in parts]) if masked else None
        boxes.append(ValueRange.of(torch.cat([part.values for part in parts]), valid))
    return boxes[0].join(boxes[1]) if len(boxes) > 1 else boxes[0]
