"""Quantised slots of some heads: groups that were filled together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.cache.entries import Entries
from wildcat_kv.coreset.quantised import OCTET, Quantised
from wildcat_kv.coreset.tensors import saturate_
from wildcat_kv.coreset.wtdattn import WeightSigns, mass_of


@dataclass(frozen=True)
class Segment:
    """Quantised slots in groups of one size, for heads that hold equally many.

    Attributes:
        keys: (batch, n, d).
        values: (batch, n, d_v), numerators over masses as in `Entries`.
        weights: float16 (batch, n), 0 for padding; None where all are valid and weigh 1.
        valid: bool (batch, n); None where all are valid and weigh 1.
        carried_state: float32 (batch, n, m), as in `Entries`.
        signs: signs of the weights.
    """

    keys: Quantised
    values: Quantised
    weights: Tensor | None
    valid: Tensor | None
    carried_state: Tensor
    signs: WeightSigns

    @staticmethod
    def of(entries: Entries, bits: int, size: int, channels: int) -> Segment:
        """Quantise entries (batch, 1, n, ...); n is a multiple of the group's `size`."""
        keys, values, weights, valid, state = (tensor.squeeze(1) for tensor in entries.tensors())
        half = _half(weights)
        signs = WeightSigns.of(half.to(torch.float32), valid)
        plain = signs is WeightSigns.NONE
        return Segment(
            Quantised.keys(keys, bits, size),
            Quantised.values(values, bits, size, channels),
            None if plain else half,
            None if plain else valid.clone(),
            state.clone(),
            signs,
        )

    @property
    def slots(self) -> int:
        """Slots of a head, padding included."""
        return self.keys.slots

    def shown(self) -> tuple[Tensor, Tensor]:
        """Give weights, float32, and valid, both (batch, 1, n)."""
        if self.weights is None or self.valid is None:
            shape = (self.keys.codes.shape[0], 1, self.slots)
            # Offloaded numbers are not where the host reads what is beside them.
            whole = self.carried_state.new_ones(shape)
            return whole, whole.to(torch.bool)
        return self.weights.to(torch.float32).unsqueeze(1), self.valid.unsqueeze(1)

    def entries(self, keys: torch.dtype, values: torch.dtype) -> Entries:
        """Unpack to entries (batch, 1, n, ...) in these dtypes."""
        weights, valid = self.shown()
        own_keys, own_values = self.keys.unpack().to(keys).unsqueeze(1), self.values.unpack().to(values).unsqueeze(1)
        return Entries(own_keys, own_values, weights, valid, self.carried_state.unsqueeze(1))

    def join(self, other: Segment) -> Segment:
        """Put the groups of another segment of the same group size behind these."""
        weights = valid = None
        if self.weights is not None or other.weights is not None:
            (ours, mine), (theirs, their) = self.shown(), other.shown()
            weights = torch.cat((ours, theirs), dim=2).squeeze(1).to(torch.float16)
            valid = torch.cat((mine, their), dim=2).squeeze(1)
        return Segment(
            _joined(self.keys, other.keys),
            _joined(self.values, other.values),
            weights,
            valid,
            torch.cat((self.carried_state, other.carried_state), dim=1),
            self.signs.join(other.signs),
        )

    def rows(self, index: Tensor) -> Segment:
        """Copy the heads at `index`, int64 (k,)."""

        def taken(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index.to(tensor.device))

        return self._map(taken, taken)

    def to(self, device: torch.device, *, numbers_only: bool = False) -> Segment:
        """Move everything to `device`, or keys and values alone."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return self._map(moved, (lambda tensor: tensor) if numbers_only else moved)

    def tensors(self) -> list[Tensor]:
        """List all tensors."""
        sides = [side for side in (self.weights, self.valid) if side is not None]
        return [*self.keys.tensors(), *self.values.tensors(), *sides, self.carried_state]

    def _map(self, numbers: Callable[[Tensor], Tensor], sides: Callable[[Tensor], Tensor]) -> Segment:
        return Segment(
            self.keys.of(*map(numbers, self.keys.tensors())),
            self.values.of(*map(numbers, self.values.tensors())),
            None if self.weights is None else sides(self.weights),
            None if self.valid is None else sides(self.valid),
            sides(self.carried_state),
            self.signs,
        )


def pack(entries: Entries, bits: int, group: int) -> list[Segment]:
    """Quantise entries (batch, 1, n, ...) in whole groups, and a smaller one for the rest.

    n is a multiple of 8.
    """
    segments, start = [], 0
    for slots, size in groups_of(entries.keys.shape[2], group):
        segments.append(Segment.of(entries.slice(start, start + slots), bits, size, group))
        start += slots
    return segments


def groups_of(slots: int, group: int) -> list[tuple[int, int]]:
    """Divide slots, a multiple of 8, into segments: how many slots, and how many of them a group has."""
    assert slots % OCTET == 0
    rest = slots % group
    return [(count, size) for count, size in ((slots - rest, group), (rest, rest)) if count]


def add_segments(held: Sequence[Segment], new: Sequence[Segment]) -> tuple[Segment, ...]:
    """Add segments to those held; groups of one size are held together."""
    result = list(held)
    for segment in new:
        for place, other in enumerate(result):
            if other.keys.size == segment.keys.size:
                result[place] = other.join(segment)
                break
        else:
            result.append(segment)
    return tuple(result)


def _half(weights: Tensor) -> Tensor:
    """Round weights to half precision; one that divides no numerator must not become one that does."""
    half = saturate_(weights.clone(), torch.float16)
    grown = (mass_of(half) != 1) & (mass_of(weights) == 1) & (weights < 1)
    return torch.where(grown, half.nextafter(half.new_zeros(())), half)


def _joined(first: Quantised, second: Quantised) -> Quantised:
    with torch.autocast(first.codes.device.type, enabled=False):  # it cannot join half precision while set to bfloat16
        return first.of(*(torch.cat(pair, dim=1) for pair in zip(first.tensors(), second.tensors(), strict=True)))
