"""Quantised slots of many heads, read in groups of one size: a few calls for all heads together.

A number is lowest + scale * code, and only codes are unpacked. Scales of keys belong to channels, so they join the
query: q.k = (q * scale).code + q.lowest. Scales of values belong to slots, so they join the softmax's terms:
sum_i t_i v_i = sum_i (t_i * scale_i) code_i + sum_i t_i lowest_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.quantised import Quantised, planes, scratch_of
from wildcat_kv.coreset.tensors import ordinary_tensors

# Codes unpacked at once: 1 MiB of float32.
_UNPACKED_AT_ONCE = 2**18

# Filled memory by dtype and number, the same for all layers; a short group is read with some of it behind.
_filled: dict[tuple[torch.dtype, int], Tensor] = {}


class Packed(NamedTuple):
    """Quantised slots of some heads that hold equally many.

    Attributes:
        keys: (batch, n, d).
        values: (batch, n, d_v), numerators over their masses.
        weights: float16 (batch, n), 0 for padding; None where all are valid and weigh 1.
    """

    keys: Quantised
    values: Quantised
    weights: Tensor | None


class _Block(NamedTuple):
    """Codes that are unpacked together: rows of bytes of keys and of values, in pieces."""

    groups: int
    keys: list[Tensor]
    values: list[Tensor]


@dataclass
class Groups:
    """Groups of slots, those of a head side by side, each with as many rows of bytes as the largest.

    It holds views of what is quantised, and copies nothing but an index.

    Attributes:
        bits: bits of a number.
        size: slots of a group.
        counts: int64 (heads,), groups of each head.
        owner: int32 (groups,), head of each group.
        blocks: codes.
        keys: pieces of the scales of keys, then of their lowest numbers, (k, d) each.
        values: pieces of the scales of values, then of their lowest numbers, (k * size, parts) each.
        weights: pieces of the weights, (k * size, 1) each; empty where all are 1.
    """

    bits: int
    size: int
    counts: Tensor
    owner: Tensor
    blocks: list[_Block]
    keys: list[Tensor]
    values: list[Tensor]
    weights: list[Tensor]

    @staticmethod
    def of(bands: Sequence[tuple[int, Sequence[Packed]]]) -> Groups | None:
        """Cut the slots of bands, each with its number of heads, into groups.

        None is returned where nothing is quantised, or in bits whose codes lie in two planes.
        """
        every = [packed for _, band in bands for packed in band]
        if not every or len(planes(every[0].keys.bits)) > 1:
            return None
        bits, size = every[0].keys.bits, max(packed.keys.size for packed in every)
        weighted = any(packed.weights is not None or packed.keys.size < size for packed in every)
        units: list[_Block] = []
        sides: tuple[list[Tensor], ...] = ([], [], [], [], [])
        counts = []
        for heads, band in bands:
            counts += [sum(packed.keys.codes.shape[1] for packed in band)] * heads
            together = len(band) == 1 and band[0].keys.size == size
            for head in [slice(0, heads)] if together else [slice(head, head + 1) for head in range(heads)]:
                for packed in band:
                    units += _units(packed, head, size * bits // 8)
                    for side, pieces in zip(sides, _sides(packed, head, size, weighted=weighted), strict=True):
                        side += pieces
        with ordinary_tensors():
            lengths = torch.tensor(counts)
            owner = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(lengths)
        scale, lowest, high, low, weights = sides
        return Groups(bits, size, lengths, owner, _blocks(units, size), scale + lowest, high + low, weights)

    def scores(self, query: Tensor) -> Tensor:
        """Compute scores with log-weights.

        Args:
            query: float32 (heads, q, d), times the factor of the scores.

        Returns:
            float32 (groups, q, size); -inf where the weight is 0.
        """
        own = query.index_select(0, self.owner)
        scaled, lowest = (torch.cat(self.keys).view(2, len(own), 1, -1) * own).unbind(0)
        offset, found, start = lowest.sum(-1, keepdim=True), [], 0
        for block in self.blocks:
            part = slice(start, start + block.groups)
            whole = block.groups == len(own)
            codes = self._codes(block.keys, block.groups).mT
            found.append(torch.baddbmm(*((offset, scaled) if whole else (offset[part], scaled[part])), codes))
            start += block.groups
        scores = _joined(found)
        if self.weights:
            scores += _joined(self.weights).to(torch.float32).log_().view(len(own), 1, -1)
        return scores

    def largest(self, scores: Tensor) -> Tensor:
        """Find the largest score of each head and query, (heads, q); -inf for a head without groups."""
        return torch.segment_reduce(scores.amax(-1), "max", lengths=self.counts, unsafe=True)

    def weighted_sums(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """Sum terms (groups, q, size), and their products with the values.

        Returns:
            (heads, q, 1) and (heads, q, d_v).
        """
        groups, q = terms.shape[:2]
        sides = torch.cat(self.values).view(2, groups, self.size, -1)
        products = self._products(terms, sides)
        sums = torch.cat((terms.sum(-1, keepdim=True), products), dim=-1).flatten(1)
        sums = torch.segment_reduce(sums, "sum", lengths=self.counts, unsafe=True).view(len(self.counts), q, -1)
        return sums[..., :1], sums[..., 1:]

    def _products(self, terms: Tensor, sides: Tensor) -> Tensor:
        """Multiply terms (groups, q, size) by the values, of scale and lowest (2, groups, size, parts)."""
        parts = sides.shape[-1]
        sided = [(side.unsqueeze(2) * terms).unbind(0) for side in sides.unbind(-1)]
        shifted = [(scaled, lowest.sum(-1, keepdim=True)) for scaled, lowest in sided]
        found, start = [], 0
        for block in self.blocks:
            part = slice(start, start + block.groups)
            whole = block.groups == len(terms)
            codes = self._codes(block.values, block.groups)
            pieces = [
                torch.baddbmm(*((offset, scaled) if whole else (offset[part], scaled[part])), own)
                for (scaled, offset), own in zip(
                    shifted, (codes,) if parts == 1 else codes.chunk(parts, -1), strict=True
                )
            ]
            found.append(_joined(pieces, dim=-1))
            start += block.groups
        return _joined(found)

    def _codes(self, pieces: list[Tensor], groups: int) -> Tensor:
        """Unpack codes, float32 (groups, size, channels); they hold until the next call."""
        packed = _joined(pieces)
        packed = packed.view(groups, -1, packed.shape[-1])
        numbers = scratch_of((groups, self.size, packed.shape[-1]), packed.device)
        runs = numbers.view(groups, 8 // self.bits, -1, packed.shape[-1]).unbind(1)
        mask = _number(2**self.bits - 1)
        for place, run in enumerate(runs):
            part = torch.bitwise_right_shift(packed, _number(self.bits * place)) if place else packed
            run.copy_(torch.bitwise_and(part, mask) if place + 1 < len(runs) else part)
        return numbers


@cache
def _number(number: int) -> Tensor:
    """Give a number as a tensor: with a plain one every call makes such."""
    with ordinary_tensors():
        return torch.tensor(number, dtype=torch.uint8)


def _joined(pieces: list[Tensor], dim: int = 0) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _units(packed: Packed, head: slice, rows: int) -> list[_Block]:
    """Cut the codes of some heads into runs of whole groups, or single groups with filling."""
    keys, values = packed.keys.codes[head].flatten(0, 1), packed.values.codes[head].flatten(0, 1)
    if keys.shape[1] == rows:
        return [_Block(len(keys), [keys.flatten(0, 1)], [values.flatten(0, 1)])]
    return [
        _Block(1, _lengthened(key[None], rows), _lengthened(value[None], rows))
        for key, value in zip(keys, values, strict=True)
    ]


def _sides(packed: Packed, head: slice, size: int, *, weighted: bool) -> list[list[Tensor]]:
    """Take the scales and the weights of some heads, those of slots in the order that codes are unpacked in."""
    keys, values = packed.keys, packed.values
    runs = 8 // keys.bits
    slots = [values.scale[head], values.lowest[head]]
    if weighted:
        shape = values.scale[head].shape[:3]
        slots.append(
            _fill(torch.float16, 1, (*shape, 1)) if packed.weights is None else packed.weights[head].view(*shape, 1)
        )
    cut = [side.reshape(-1, side.shape[2] // runs, side.shape[3]) for side in slots]
    found = [[side[head].flatten(0, 2)] for side in (keys.scale, keys.lowest)]
    found += [_lengthened(side, size // runs) for side in cut]
    return found if weighted else [*found, []]


def _lengthened(runs: Tensor, rows: int) -> list[Tensor]:
    """Lay out runs (k, n, channels) in pieces (..., channels), each run with zeros behind it up to `rows`."""
    lacking = rows - runs.shape[1]
    if not lacking:
        return [runs.flatten(0, 1)]
    zeros = _fill(runs.dtype, 0, (lacking, runs.shape[2]))
    return [piece for run in runs for piece in (run, zeros)]


def _fill(dtype: torch.dtype, number: int, shape: tuple[int, ...]) -> Tensor:
    """Give memory full of one number; it is read only."""
    needed, held = torch.Size(shape).numel(), _filled.get((dtype, number))
    if held is None or len(held) < needed:
        with ordinary_tensors():
            held = _filled[dtype, number] = torch.full((needed,), number, dtype=dtype)
    return held[:needed].view(shape)


def _blocks(units: Sequence[_Block], size: int) -> list[_Block]:
    """Join neighbours that are unpacked together, and cut what is too long."""
    blocks: list[_Block] = []
    for unit in units:
        channels = max(unit.keys[0].shape[-1], unit.values[0].shape[-1])
        most = max(1, _UNPACKED_AT_ONCE // (size * channels))
        for start in range(0, unit.groups, most):
            groups, parts = min(most, unit.groups - start), unit
            if unit.groups > most:
                rows = len(unit.keys[0]) // unit.groups
                cut = slice(start * rows, (start + groups) * rows)
                parts = _Block(groups, [unit.keys[0][cut]], [unit.values[0][cut]])
            if blocks and blocks[-1].groups + groups <= most:
                last = blocks[-1]
                blocks[-1] = _Block(last.groups + groups, [*last.keys, *parts.keys], [*last.values, *parts.values])
            else:
                blocks.append(_Block(groups, list(parts.keys), list(parts.values)))
    return blocks
