"""Bands of a layer in a file: their tensors by name, and what is checked when they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wildcat_kv.cache.banding import ROOM
from wildcat_kv.cache.bands import Band
from wildcat_kv.cache.disk.format import ENTRIES, MEMORY, BandHeader, DamageError
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.packed import Segment
from wildcat_kv.cache.progress import Progress
from wildcat_kv.cache.storage import Storage
from wildcat_kv.coreset.quantised import Quantised
from wildcat_kv.coreset.wtdattn import WeightSigns

# Tensors of quantised keys or values, behind their own name.
_QUANTISED = ("codes", "scale", "lowest")


def name_bands(bands: Sequence[Band], tensors: dict[str, Tensor]) -> list[BandHeader]:
    """Describe the bands of a layer; their tensors are added to `tensors`."""
    headers = []
    for number, band in enumerate(bands):
        prefix = f"bands.{number}."
        tensors |= name_entries(band.open.snapshot(), prefix)
        for place, segment in enumerate(band.packed):
            inner = f"{prefix}{place}."
            for name, quantised in (("keys", segment.keys), ("values", segment.values)):
                parts = zip(_QUANTISED, quantised.tensors(), strict=True)
                tensors |= {f"{inner}{name}.{part}": tensor for part, tensor in parts}
            sides = {"weights": segment.weights, "valid": segment.valid, MEMORY: segment.carried_state}
            named = {name: side for name, side in sides.items() if side is not None and side.shape[-1]}
            tensors |= {f"{inner}{name}": side for name, side in named.items()}
        headers.append(
            BandHeader(
                places=band.places,
                sink=band.sink,
                waiting=band.waiting,
                length=band.open.length,
                segments=len(band.packed),
            )
        )
    return headers


def name_entries(entries: Entries, prefix: str = "") -> dict[str, Tensor]:
    """Name the tensors of entries."""
    *held, memory = entries.tensors()
    named = dict(zip((prefix + name for name in ENTRIES), held, strict=True))
    return named | ({prefix + MEMORY: memory} if memory.shape[-1] else {})


def read_entries(own: dict[str, Tensor], prefix: str = "") -> Entries:
    """Take entries out of the tensors of a layer.

    Raises:
        DamageError: a tensor is missing, or shapes or dtypes do not fit.
    """
    if missing := [name for name in ENTRIES if prefix + name not in own]:
        raise DamageError(f"{prefix}{missing[0]} is missing")
    keys, values, weights, valid = (own.pop(prefix + name) for name in ENTRIES)
    if keys.dim() != 4 or values.dim() != 4 or not keys.shape[:3] == values.shape[:3] == weights.shape == valid.shape:
        raise DamageError("the shapes of its tensors do not fit each other")
    dtypes = (keys.dtype, torch.float32, torch.bool)
    if not keys.is_floating_point() or (values.dtype, weights.dtype, valid.dtype) != dtypes:
        raise DamageError("the dtypes of its tensors do not fit each other")
    memory = own.pop(prefix + MEMORY, weights.new_zeros(*weights.shape, 0))
    if memory.shape[:3] != weights.shape or memory.dim() != 4 or memory.dtype != torch.float32:
        raise DamageError("what its method remembers does not fit")
    return Entries(keys, values, weights, valid, memory)


def read_bands(
    headers: Sequence[BandHeader], own: dict[str, Tensor], progress: Progress, bits: int | None
) -> list[Band]:
    """Take the bands out of the tensors of a layer.

    Args:
        headers: descriptions of the bands.
        own: tensors of the layer by name; those of the bands are removed.
        progress: numbers of the layer.
        bits: bits of a quantised number.

    Raises:
        DamageError: something is missing, or contradicts the rest.
    """
    bands = []
    for number, header in enumerate(headers):
        prefix = f"bands.{number}."
        entries = read_entries(own, prefix)
        segments = tuple(_segment(own, f"{prefix}{place}.", bits, entries) for place in range(header.segments))
        fits = (
            len(header.places) == entries.keys.shape[0] > 0 == entries.keys.shape[1] - 1
            and header.sink >= 0
            and header.waiting >= 0
            and header.sink + header.waiting + progress.since_fold <= header.length <= entries.keys.shape[2]
        )
        if not fits:
            raise DamageError("the numbers of its bands do not fit its tensors")
        held = Storage.adopt(entries, header.length, ROOM)
        bands.append(Band(list(header.places), held, segments, header.sink, header.waiting))
    rows, kinds = len(progress.rows), {_kind(band.open.allocated) for band in bands}
    places = sorted(place for band in bands for place in band.places)
    in_order = all(band.places == sorted(band.places) for band in bands)
    if len(kinds) != 1 or not in_order or places != list(range(len(places))) or not rows or len(places) % rows:
        raise DamageError("its bands do not fit each other")
    if not _fit_rows(bands, progress):
        raise DamageError("its bands do not fit the numbers of its rows")
    return bands


def _fit_rows(bands: Sequence[Band], progress: Progress) -> bool:
    """Tell whether bands hold what the numbers of their rows say."""
    rows = progress.rows
    heads, most = sum(len(band.places) for band in bands) // len(rows), [0] * len(rows)
    for band in bands:
        exact = band.open.length - band.sink - band.waiting - progress.since_fold
        for row in {place // heads for place in band.places}:
            if (band.sink, exact) != (rows[row].sink, rows[row].exact):
                return False
            most[row] = max(most[row], band.slots)
    return most == [row.slots + row.spare for row in rows]


def _segment(own: dict[str, Tensor], prefix: str, bits: int | None, like: Entries) -> Segment:
    """Take one segment of quantised slots out of the tensors of a layer."""
    (batch, (d, d_v)) = like.keys.shape[0], _channels(like)
    keys = _quantised(own, f"{prefix}keys.", bits, (batch, d), by_slot=False)
    values = _quantised(own, f"{prefix}values.", bits, (batch, d_v), by_slot=True)
    weights, valid = own.pop(prefix + "weights", None), own.pop(prefix + "valid", None)
    state = own.pop(prefix + MEMORY, like.carried_state.new_zeros(batch, keys.slots, 0))
    given = [(side.shape, side.dtype) for side in (weights, valid) if side is not None]
    shape = (batch, keys.slots)
    alike = keys.codes.shape[1:3] == values.codes.shape[1:3]
    if not alike or given not in ([], [(shape, torch.float16), (shape, torch.bool)]):
        raise DamageError("its quantised slots do not fit each other")
    if state.shape != (*shape, like.carried_state.shape[3]) or state.dtype != torch.float32:
        raise DamageError("what its method remembers does not fit")
    signs = WeightSigns.NONE
    if weights is not None and valid is not None:
        signs = WeightSigns.of(weights.to(torch.float32), valid)
    return Segment(keys, values, weights, valid, state, signs)


def _quantised(
    own: dict[str, Tensor], prefix: str, bits: int | None, shape: tuple[int, int], *, by_slot: bool
) -> Quantised:
    """Take quantised numbers out of the tensors of a layer; `shape` is heads and channels."""
    if missing := [name for name in _QUANTISED if prefix + name not in own]:
        raise DamageError(f"{prefix}{missing[0]} is missing")
    codes, scale, lowest = (own.pop(prefix + name) for name in _QUANTISED)
    if bits is None or codes.dim() != 4 or codes.dtype != torch.uint8 or codes.shape[::3] != shape:
        raise DamageError("its quantised slots do not fit")
    found = Quantised(codes, scale, lowest, bits, by_slot)
    sides = (*codes.shape[:2], found.size) if by_slot else (*codes.shape[:2], 1)
    fits = scale.shape == lowest.shape and scale.dim() == 4 and scale.shape[:3] == sides and scale.shape[3] > 0
    width = codes.shape[3] % scale.shape[3] if fits and by_slot else codes.shape[3] - scale.shape[-1]
    if not fits or width or codes.shape[2] * 8 % bits:
        raise DamageError("its quantised slots do not fit their scales")
    dtype = torch.bfloat16 if by_slot else torch.float16
    if {scale.dtype, lowest.dtype} != {dtype} or not torch.isfinite(scale.float().sum() + lowest.float().sum()):
        raise DamageError("its scales are no numbers")
    return found


def _kind(entries: Entries) -> tuple[int, int, int, torch.dtype]:
    """Give the channels of keys and values, the numbers of a state, and the dtype."""
    return *_channels(entries), entries.carried_state.shape[3], entries.keys.dtype


def _channels(entries: Entries) -> tuple[int, int]:
    """Count the channels of keys and values."""
    return entries.keys.shape[3], entries.values.shape[3]
