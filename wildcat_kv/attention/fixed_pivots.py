"""Nystrom sums as a differentiable function of keys and values, the pivots held fixed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.temperature import squared_temperature
from wildcat_kv.coreset.tokens import KernelOptions

_LARGEST_EXPONENT = 600.0  # float64 ends at e^709


class FixedPivots(NamedTuple):
    """What WildCat chose for some keys: pivots and temperature.

    Attributes:
        layout: bins of the keys.
        places: int64 (rows, heads, bins, r), places of the pivots within their bins; arbitrary where not `found`.
        found: bool (rows, heads, bins, r), False for empty slots.
        root: float64 (rows, heads, bins, 1, 1), sqrt(b) / tau.
        kept: bool (bins,), True for bins that keep every key as a slot.
    """

    layout: BinLayout
    places: Tensor
    found: Tensor
    root: Tensor
    kept: Tensor

    @staticmethod
    @torch.no_grad()
    def of(key: Tensor, layout: BinLayout, source: Tensor, valid: Tensor, options: KernelOptions) -> FixedPivots:
        """Take the choices of `compress_bins`.

        Args:
            key: (rows, heads, n, d).
            layout: bins of the keys.
            source: int64 (rows, heads, rank), places of the slots' keys.
            valid: bool (rows, heads, rank), False for empty slots.
            options: settings of the kernel.
        """
        every = range(layout.bins)
        found = layout.slots.rectangle(valid, every, torch.bool)
        places = layout.slots.rectangle(source, every, torch.int64) - layout.start.unsqueeze(-1)
        places = torch.where(found, places, 0)
        norms = layout.gather(centred(key).norm(dim=-1))
        query_norm = None if options.query_norm is None else options.query_norm.unsqueeze(-1)
        counts = layout.used.sum(-1).expand(norms.shape[:-1])
        tau2 = squared_temperature(norms.amax(-1), query_norm, counts, options.scale, options.temperature)
        root = (options.scale / tau2.double()).sqrt()[..., None, None]
        return FixedPivots(layout, places, found, root, counts[0, 0] <= layout.rank)

    def combine(self, key: Tensor, value: Tensor, mass: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute U = W V and w = W 1 in float64.

        Args:
            key: (rows, heads, n, d).
            value: (rows, heads, n, d_v).
            mass: (rows, heads, n), factors of the keys, in place of 1.

        Returns:
            (rows, heads, bins, r, d_v) and (rows, heads, bins, r), in the dtype of the values.
        """
        mass = torch.ones_like(value[..., 0]) if mass is None else mass
        both = torch.cat((value, torch.ones_like(value[..., :1])), dim=-1) * mass.unsqueeze(-1)
        sums = (self.weights(key) @ self._binned(both.double())).to(value.dtype)
        return sums[..., :-1], sums[..., -1]

    def weights(self, key: Tensor) -> Tensor:
        """Solve H_SS W = H_S, float64 (rows, heads, bins, r, t)."""
        points = self._binned(centred(key)) * self.root
        pivots = points.take_along_dim(self.places.unsqueeze(-1), dim=-2)
        half_square, of_pivots = points.square().sum(-1) / 2, pivots.square().sum(-1) / 2
        gaussian = (pivots @ points.mT - of_pivots.unsqueeze(-1) - half_square.unsqueeze(-2)).exp()
        between = gaussian.take_along_dim(self.places.unsqueeze(-2), dim=-1)
        # A bin that holds no more keys than slots keeps them; equal ones would make its kernel singular.
        kept = self.kept[:, None, None]
        alone = torch.eye(self.places.shape[-1], dtype=points.dtype, device=points.device)
        present = self.found.unsqueeze(-1) & self.found.unsqueeze(-2) & ~kept
        solved = torch.linalg.solve(torch.where(present, between, alone), gaussian)
        exponent = half_square.unsqueeze(-2) - of_pivots.unsqueeze(-1)
        solved = solved * exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp()
        own = torch.nn.functional.one_hot(self.places, points.shape[-2]).to(points.dtype)
        solved = torch.where(kept, own, solved)
        return solved * (self.found.unsqueeze(-1) & self.layout.used.unsqueeze(-2))

    def _binned(self, tokens: Tensor) -> Tensor:
        """Cut tokens (rows, heads, n, c) into bins (rows, heads, bins, t, c), 0 in unused places."""
        layout = self.layout
        places = layout.columns(torch.arange(layout.longest, device=tokens.device).expand(layout.bins, -1))
        return tokens[:, :, places] * layout.used.unsqueeze(-1)


def centred(key: Tensor) -> Tensor:
    """Subtract the mean key of each head, in float64."""
    key = key.double()
    return key - key.mean(2, keepdim=True)
