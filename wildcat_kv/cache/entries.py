"""Stored entries of one layer: the tensors side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.tensors import at_least_float32, ordinary_tensors, saturate_, take_columns
from wildcat_kv.coreset.wtdattn import mass_of


@dataclass(frozen=True)
class Entries:
    """Stored entries: coreset slots and exact tokens alike.

    Attributes:
        keys: (rows, heads, n, d).
        values: (rows, heads, n, d_v), the numerators U over the mass of the weights; an exact token's own value.
        weights: float32 (rows, heads, n), 1 for exact tokens, 0 for padding.
        valid: bool (rows, heads, n), False for padding.
        carried_state: float32 (rows, heads, n, m), numbers that the method keeps of an entry from fold to fold; m is 0
            for most methods, and a new token has zeros.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor
    valid: Tensor
    carried_state: Tensor

    @staticmethod
    def of(coreset: Coreset, carried_state: Tensor | None, like: Entries) -> Entries:
        """Turn the slots of a coreset into entries, in the dtypes of `like`."""
        values = coreset.values.to(at_least_float32(coreset.values.dtype)) / mass_of(coreset.weights).unsqueeze(-1)
        if carried_state is None:
            carried_state = like.carried_state.new_zeros(*coreset.valid.shape, like.carried_state.shape[-1])
        return Entries(
            coreset.keys,
            saturate_(values, like.values.dtype),
            torch.where(coreset.valid, coreset.weights, 0.0),
            coreset.valid,
            carried_state,
        )

    def numerators(self) -> Tensor:
        """Return U (rows, heads, n, d_v), in float32, or float64 if the values are."""
        return self.values.to(at_least_float32(self.values.dtype)) * mass_of(self.weights).unsqueeze(-1)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the tensors, in the order of the attributes."""
        return self.keys, self.values, self.weights, self.valid, self.carried_state

    def slice(self, start: int, stop: int) -> Entries:
        """Return a view of the columns [start, stop)."""
        return Entries(*(tensor[:, :, start:stop] for tensor in self.tensors()))

    def columns(self, index: Tensor) -> Entries:
        """Copy the columns at `index`, int64 (rows, k), of each row."""
        return Entries(*(take_columns(tensor, index.unsqueeze(1)) for tensor in self.tensors()))

    def rows(self, index: Tensor) -> Entries:
        """Copy the rows at `index`, int64 (k,)."""
        return Entries(*(tensor.index_select(0, index.to(tensor.device)) for tensor in self.tensors()))

    def with_room(self, columns: int) -> Entries:
        """Copy all columns, with free ones behind them."""
        with ordinary_tensors():
            room = [tensor.new_zeros(*tensor.shape[:2], columns, *tensor.shape[3:]) for tensor in self.tensors()]
            return Entries(*(torch.cat(pair, dim=2) for pair in zip(self.tensors(), room, strict=True)))

    def to(self, device: torch.device, *, numbers_only: bool = False) -> Entries:
        """Move everything to `device`, or keys and values alone: the other tensors are small."""
        with ordinary_tensors():
            moving = self.tensors()[: 2 if numbers_only else 5]
            moved = [tensor.to(device, non_blocking=True) for tensor in moving]
            return Entries(*moved, *self.tensors()[len(moving) :])


def weights_of(parts: Sequence[Entries]) -> tuple[Tensor, Tensor]:
    """Join the weights and the validity of parts side by side, both (rows, heads, n)."""
    return torch.cat([part.weights for part in parts], dim=2), torch.cat([part.valid for part in parts], dim=2)
