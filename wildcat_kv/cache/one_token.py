"""One token's attention to all bands of a layer, in as few calls as there can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.packed import Segment
from wildcat_kv.cache.storage import Storage
from wildcat_kv.coreset.groups import Groups, Packed
from wildcat_kv.coreset.tensors import ordinary_tensors
from wildcat_kv.coreset.wtdattn import WeightSigns


@dataclass(frozen=True)
class Together:
    """Heads of all bands side by side, with what is quantised in groups.

    Attributes:
        groups: quantised slots.
        order: int64 (heads,), the head at each place; None if they are in order.
        back: int64 (heads,), the place of each head.
        opened: open entries of all heads, (heads, 1, n, ...), of which each band has a view; None if unlike.
        views: those views.
    """

    groups: Groups
    order: Tensor | None
    back: Tensor | None
    opened: Entries | None
    views: list[Entries]

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
        opened = _side_by_side(opens)
        views = [held.allocated for held in opens]
        if list(places) == list(range(len(places))):
            return Together(groups, None, None, opened, views)
        with ordinary_tensors():
            order = torch.tensor(places)
            return Together(groups, order, order.argsort(), opened, views)

    @torch.no_grad()
    def append(self, opens: Sequence[Storage], keys: Tensor, values: Tensor) -> bool:
        """Append a valid token to all bands, if their open entries are side by side and have room.

        Args:
            opens: open entries of each band.
            keys: (heads, d).
            values: (heads, d_v).

        Returns:
            False if nothing was done.
        """
        opened = self._opened(opens)
        length = opens[0].length
        if opened is None or length == opened.keys.shape[2]:
            return False
        if self.order is not None:
            keys, values = keys.index_select(0, self.order), values.index_select(0, self.order)
        opened.keys[:, 0, length] = keys
        opened.values[:, 0, length] = values
        opened.weights[:, 0, length] = 1.0
        opened.valid[:, 0, length] = True
        for held in opens:
            held.length = length + 1
        return True

    def _opened(self, opens: Sequence[Storage]) -> Entries | None:
        """Give the open entries of all bands, while they are of one length and where they were put."""
        opened, length = self.opened, opens[0].length
        if opened is None:
            return None
        for held, view in zip(opens, self.views, strict=True):
            if held.allocated is not view or held.length != length:
                return None
        return opened

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

    def _parts(self, opens: Sequence[Storage]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Give open keys and values (heads, n, ...), float32, and log-weights (heads, n), None for 1."""
        opened, weighted = self._opened(opens), any(held.weighting is not WeightSigns.NONE for held in opens)
        every = [held.allocated for held in opens] if opened is None else [opened]
        lengths = [held.length for held in opens]
        return [
            (
                held.keys[:, 0, :n].to(torch.float32),
                held.values[:, 0, :n].to(torch.float32),
                held.weights[:, 0, :n].log().clamp_min_(torch.finfo(torch.float32).min) if weighted else None,
            )
            for held, n in zip(every, lengths, strict=False)
        ]


def _side_by_side(opens: Sequence[Storage]) -> Entries | None:
    """Put open entries of one length side by side in memory, each a view from then on; None if they are unlike."""
    if len({(held.length, held.allocated.keys.shape[2]) for held in opens}) > 1:
        return None
    with ordinary_tensors():
        tensors = zip(*(held.allocated.tensors() for held in opens), strict=True)
        opened = Entries(*(torch.cat(parts) for parts in tensors))
        start = 0
        for held in opens:
            stop = start + held.allocated.keys.shape[0]
            held.allocated = Entries(*(tensor[start:stop] for tensor in opened.tensors()))
            start = stop
    return opened


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
