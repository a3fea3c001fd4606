"""One token's attention to all bands of a layer, in as few calls as there can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.cache.packed import Segment
from wildcat_kv.cache.storage import Storage
from wildcat_kv.coreset.groups import Groups, Packed
from wildcat_kv.coreset.wtdattn import WeightSigns


@dataclass(frozen=True)
class Together:
    """Heads of all bands side by side, with what is quantised in groups.

    Attributes:
        groups: quantised slots.
        order: int64 (heads,), the head at each place; None if they are in order.
        back: int64 (heads,), the place of each head.
    """

    groups: Groups
    order: Tensor | None
    back: Tensor | None

    @staticmethod
    def of(places: Sequence[int], opens: Sequence[Storage], packed: Sequence[Sequence[Segment]]) -> Together | None:
        """Put bands side by side; None where they are not on the CPU, not quantised, or have negative weights.

        Args:
            places: heads of all bands, one band after the other.
            opens: open entries of each band.
            packed: quantised slots of each band.
        """
        signed = any(segment.signs is WeightSigns.SIGNED for band in packed for segment in band)
        if signed or any(held.weighting is WeightSigns.SIGNED for held in opens):
            return None
        if any(tensor.device.type != "cpu" for held in opens for tensor in held.tensors()):
            return None
        groups = Groups.of(
            [
                (held.allocated.keys.shape[0], [Packed(one.keys, one.values, one.weights) for one in band])
                for held, band in zip(opens, packed, strict=True)
            ]
        )
        if groups is None:
            return None
        order = torch.tensor(places)
        if order.equal(torch.arange(len(places))):
            return Together(groups, None, None)
        return Together(groups, order, order.argsort())

    def attend(self, opens: Sequence[Storage], query: Tensor, scale: float) -> Tensor:
        """Attend with one token's queries.

        Args:
            opens: open entries of each band; they may have grown since `of`.
            query: (heads, group, 1, d).
            scale: factor of the scores.

        Returns:
            float32 (heads, group, d_v).
        """
        grouped = query.squeeze(2).to(torch.float32) * scale
        if self.order is not None:
            grouped = grouped.index_select(0, self.order)
        parts = _open_parts(opens)
        scores, start = [], 0
        for keys, _, bias in parts:
            own = torch.bmm(grouped[start : start + len(keys)], keys.mT)
            scores.append(own if bias is None else own.add_(bias.unsqueeze(1)))
            start += len(keys)
        packed = self.groups.scores(grouped)
        largest = torch.maximum(self.groups.largest(packed), _joined([own.amax(-1) for own in scores])).unsqueeze(-1)
        packed.sub_(largest.index_select(0, self.groups.owner)).exp_()
        every = largest.split([len(own) for own in scores])
        terms = [own.sub_(most).exp_() for own, most in zip(scores, every, strict=True)]
        sums, products = self.groups.weighted_sums(packed)
        products += _joined([torch.bmm(own, values) for own, (_, values, _) in zip(terms, parts, strict=True)])
        found = products.div_(sums + _joined([own.sum(-1, keepdim=True) for own in terms]))
        return found if self.back is None else found.index_select(0, self.back)


def _open_parts(opens: Sequence[Storage]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Give keys, values (heads, n, ...), float32, and log-weights, None for 1; bands of one length in one part."""
    sides = [
        (held.allocated.keys[:, 0, : held.length], held.allocated.values[:, 0, : held.length], _bias(held))
        for held in opens
    ]
    if len({held.length for held in opens}) == 1:
        keys, values, biases = zip(*sides, strict=True)
        given = [bias for bias in biases if bias is not None]
        if len(given) in (0, len(biases)):
            sides = [(_joined(keys), _joined(values), _joined(given) if given else None)]
    return [(keys.to(torch.float32), values.to(torch.float32), bias) for keys, values, bias in sides]


def _bias(held: Storage) -> Tensor | None:
    """Give log-weights, float32 (heads, n); None where all are valid and weigh 1."""
    if held.weighting is WeightSigns.NONE:
        return None
    return held.allocated.weights[:, 0, : held.length].log().clamp_min_(torch.finfo(torch.float32).min)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
