"""One token's attention to all bands of a layer, in as few calls as there can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.cache.opened import Opened
from wildcat_kv.cache.packed import Segment
from wildcat_kv.cache.storage import Storage
from wildcat_kv.coreset.groups import Groups, Packed
from wildcat_kv.coreset.parts import float32_blocks, weighted_sum
from wildcat_kv.coreset.tensors import ordinary_tensors
from wildcat_kv.coreset.wtdattn import WeightSigns


@dataclass(frozen=True)
class Together:
    """Heads of all bands side by side, with what is quantised in groups.

    Attributes:
        groups: quantised slots.
        order: int64 (heads,), the head at each place; None if they are in order.
        back: int64 (heads,), the place of each head.
        opened: open entries of all bands.
    """

    groups: Groups | None
    order: Tensor | None
    back: Tensor | None
    opened: Opened

    @staticmethod
    def of(places: Sequence[int], opens: Sequence[Storage], packed: Sequence[Sequence[Segment]]) -> Together | None:
        """Put bands side by side; None where they are not on the CPU, or have negative weights.

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
        groups = None
        if any(packed):
            sides = [[Packed(one.keys, one.values, one.weights) for one in band] for band in packed]
            heads = [held.allocated.keys.shape[0] for held in opens]
            groups = Groups.of(list(zip(heads, sides, strict=True)))
            if groups is None:
                return None
        opened = Opened(opens, places)
        if list(places) == list(range(len(places))):
            return Together(groups, None, None, opened)
        with ordinary_tensors():
            order = torch.tensor(places)
            return Together(groups, order, order.argsort(), opened)

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
        if self.groups is None:
            found = self._by_band(opens, grouped)
            return found if self.back is None else found.index_select(0, self.back)
        parts, scores, start = self._parts(opens), [], 0
        for keys, _, bias in parts:
            query_part = grouped if len(parts) == 1 else grouped[start : start + len(keys)]
            own = torch.bmm(query_part, keys.mT)
            scores.append(own if bias is None else own.add_(bias.unsqueeze(1)))
            start += len(keys)
        packed = self.groups.scores(grouped)
        largest = torch.maximum(self.groups.largest(packed), _joined([own.amax(-1) for own in scores])).unsqueeze(-1)
        packed.sub_(largest.index_select(0, self.groups.owner)).exp_()
        every = [largest] if len(parts) == 1 else largest.split([len(own) for own in scores])
        terms = [own.sub_(most).exp_() for own, most in zip(scores, every, strict=True)]
        sums, products = self.groups.weighted_sums(packed)
        products += _joined([torch.bmm(own, values) for own, (_, values, _) in zip(terms, parts, strict=True)])
        sums += _joined([own.sum(-1, keepdim=True) for own in terms])
        found = products.div_(sums)
        return found if self.back is None else found.index_select(0, self.back)

    def _by_band(self, opens: Sequence[Storage], grouped: Tensor) -> Tensor:
        """Attend to bands that hold open entries alone."""
        found, start = [], 0
        for held in opens:
            n, stop = held.length, start + held.allocated.keys.shape[0]
            keys, values = held.allocated.keys[:, 0, :n], held.allocated.values[:, 0, :n]
            query = grouped[start:stop].mT
            scores = _joined([torch.bmm(block, query) for block in float32_blocks((keys,))], dim=1).mT.contiguous()
            if held.weighting is not WeightSigns.NONE:
                scores += _log(held.allocated.weights[:, :, :n])
            found.append(weighted_sum(scores.softmax(-1), float32_blocks((values,))))
            start = stop
        return _joined(found)

    def _parts(self, opens: Sequence[Storage]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Give open keys and values (heads, n, ...), float32, and log-weights (heads, n), None for 1."""
        weighted = any(held.weighting is not WeightSigns.NONE for held in opens)
        lengths, alike = [held.length for held in opens], self.opened.alike
        if alike is not None and len(set(lengths)) == 1 and self.opened.holds(opens):
            every = [(alike.keys, alike.values, alike.weights)]
        else:
            every = [
                (own.keys[:, 0], own.values[:, 0], own.weights[:, 0]) for own in (held.allocated for held in opens)
            ]
        return [
            (keys[:, :n].to(torch.float32), values[:, :n].to(torch.float32), _log(weights[:, :n]) if weighted else None)
            for (keys, values, weights), n in zip(every, lengths, strict=False)
        ]


def _log(weights: Tensor) -> Tensor:
    return weights.log().clamp_min_(torch.finfo(torch.float32).min)


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=dim)
