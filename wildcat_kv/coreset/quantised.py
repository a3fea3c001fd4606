"""Slots in 8, 4, 3 or 2 bits a number.

Keys have channels of very different size, the same for all tokens, so each channel has a scale of its own: keys are
quantised per channel, in groups along the slots. Values are quantised per slot, in groups along the channels. A number
is lowest + scale * code; scale and lowest take 16 bits, and codes are chosen for these as they are stored. Those of
keys are float16, fine enough for a channel far from 0; those of values are bfloat16, as numerators can be of any size.

Source: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.coreset.tensors import ordinary_tensors

# Bits of the planes that the codes of each width are stored in: a byte holds whole codes of one plane.
_PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
# Memory that blocks are unpacked to, by device: one for all layers. A thread has its own.
_scratch = threading.local()
# Numbers of slots in a group are multiples of this: every plane then takes whole bytes.
OCTET = 8


@dataclass(frozen=True)
class Quantised:
    """Quantised numbers of slots in groups, (batch, groups * size, channels).

    Attributes:
        codes: uint8 (batch, groups, size * bits / 8, channels).
        scale: float16 (batch, groups, 1, channels) for keys, bfloat16 (batch, groups, size, parts) for values.
        lowest: dtype and shape of `scale`.
        bits: bits of a number.
        by_slot: True for values, whose scales belong to slots.
    """

    codes: Tensor
    scale: Tensor
    lowest: Tensor
    bits: int
    by_slot: bool

    @staticmethod
    def keys(keys: Tensor, bits: int, size: int) -> Quantised:
        """Quantise keys (batch, n, d), finite; n is a multiple of `size`, which is a multiple of 8."""
        grouped = keys.to(torch.float32).unflatten(1, (-1, size))
        scale, lowest = _scales(grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True), bits, torch.float16)
        return Quantised(_pack(_codes(grouped, scale, lowest, bits), bits), scale, lowest, bits, by_slot=False)

    @staticmethod
    def values(values: Tensor, bits: int, size: int, channels: int) -> Quantised:
        """Quantise values (batch, n, d_v), finite; `channels` of a slot share a scale, all where they do not divide."""
        d_v = values.shape[-1]
        parts = d_v // channels if d_v % channels == 0 else 1
        grouped = values.to(torch.float32).unflatten(1, (-1, size)).unflatten(-1, (parts, -1))
        scale, lowest = _scales(grouped.amin(-1), grouped.amax(-1), bits, torch.bfloat16)
        codes = _codes(grouped, scale.unsqueeze(-1), lowest.unsqueeze(-1), bits)
        return Quantised(_pack(codes.flatten(-2), bits), scale, lowest, bits, by_slot=True)

    @property
    def size(self) -> int:
        """Slots of a group."""
        return self.codes.shape[2] * 8 // self.bits

    @property
    def slots(self) -> int:
        """Slots in all."""
        return self.codes.shape[1] * self.size

    @property
    def channels(self) -> int:
        """Channels of a slot."""
        return self.codes.shape[-1]

    def blocks(self, most: int) -> Iterator[Tensor]:
        """Unpack piece by piece: float32 (batch, k, channels), k at most `most` or one group.

        A piece holds until the next one is asked for.
        """
        step = max(1, most // self.size)
        for start in range(0, self.codes.shape[1], step):
            codes = self.codes[:, start : start + step]
            shape = (*codes.shape[:2], self.size, self.channels)
            yield self._unpack(start, start + step, scratch_of(shape, codes.device))

    def unpack(self) -> Tensor:
        """Unpack all: float32 (batch, groups * size, channels)."""
        shape = (*self.codes.shape[:2], self.size, self.channels)
        return self._unpack(0, shape[1], torch.empty(shape, dtype=torch.float32, device=self.codes.device))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give the three tensors."""
        return self.codes, self.scale, self.lowest

    def of(self, codes: Tensor, scale: Tensor, lowest: Tensor) -> Quantised:
        """Give numbers of the same kind made of other tensors."""
        return Quantised(codes, scale, lowest, self.bits, self.by_slot)

    def _unpack(self, start: int, stop: int, numbers: Tensor) -> Tensor:
        """Unpack the groups [start, stop) to `numbers`, float32 (batch, groups, size, channels)."""
        _unpack(self.codes[:, start:stop], self.bits, numbers)
        scale, lowest = (side[:, start:stop].to(torch.float32) for side in (self.scale, self.lowest))
        if self.by_slot:
            parted = numbers.unflatten(-1, (scale.shape[-1], -1))
            torch.addcmul(lowest.unsqueeze(-1), parted, scale.unsqueeze(-1), out=parted)
        else:
            torch.addcmul(lowest, numbers, scale, out=numbers)
        return numbers.flatten(1, 2)


def scratch_of(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Give float32 memory of this shape, the same for every call that does not record gradients."""
    if torch.is_grad_enabled():  # a graph would hold on to it
        return torch.empty(shape, dtype=torch.float32, device=device)
    buffers: dict[str, Tensor] = _scratch.__dict__
    needed, name = math.prod(shape), str(device)
    held = buffers.get(name)
    if held is None or held.numel() < needed:
        with ordinary_tensors():
            held = buffers[name] = torch.empty(needed, dtype=torch.float32, device=device)
    return held[:needed].view(shape)


def planes(bits: int) -> tuple[int, ...]:
    """Give the bits of the planes that codes are stored in."""
    return _PLANES[bits]


def fits_half(numbers: Tensor) -> bool:
    """Tell if scales of these numbers are within half precision."""
    return bool(numbers.abs().amax() <= torch.finfo(torch.float16).max) if numbers.numel() else True


def _scales(lowest: Tensor, highest: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Choose scale and lowest number in a dtype of 16 bits, so that the codes reach both ends."""
    start = lowest.to(dtype)
    start = torch.where(start > lowest, start.nextafter(start.new_tensor(-torch.inf)), start)
    exact = (highest - start.to(torch.float32)) / (2**bits - 1)
    scale = exact.to(dtype)
    scale = torch.where(scale < exact, scale.nextafter(scale.new_tensor(torch.inf)), scale)
    return scale, start


def _codes(numbers: Tensor, scale: Tensor, lowest: Tensor, bits: int) -> Tensor:
    """Find the nearest codes, uint8 in the shape of `numbers`; 0 where all numbers are equal."""
    step = scale.to(torch.float32)
    codes = (numbers - lowest.to(torch.float32)) / torch.where(step > 0, step, 1.0)
    return codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (..., size, channels) of `bits` bits to bytes (..., size * bits / 8, channels)."""
    planes, shift = [], 0
    for width in _PLANES[bits]:
        plane = (codes >> shift) & (2**width - 1)
        # The first byte holds the first slot of each part: unpacking then writes whole parts.
        parts = plane.unflatten(-2, (8 // width, -1)).unbind(-3)
        packed = torch.zeros_like(parts[0])
        for place, part in enumerate(parts):
            packed |= part << (width * place)
        planes.append(packed)
        shift += width
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-2)


def _unpack(packed: Tensor, bits: int, numbers: Tensor) -> None:
    """Unpack what `_pack` packed to `numbers`, float32 (..., size, channels)."""
    if bits == 8:
        numbers.copy_(packed)
        return
    size, start, shift = numbers.shape[-2], 0, 0
    for width in _PLANES[bits]:
        rows = size * width // 8
        plane, start = packed[..., start : start + rows, :], start + rows
        for place in range(8 // width):
            part = plane if not place else plane >> (width * place)
            if width * (place + 1) < 8:
                part = part & (2**width - 1)
            target = numbers[..., place * rows : (place + 1) * rows, :]
            if shift:
                target.add_(part << shift)
            else:
                target.copy_(part)
        shift += width
