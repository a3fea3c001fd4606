"""Sources of randomness for the pivots of RPNYS.

Noise is keyed by counters, drawn from torch's generator, or given. A bin draws the same noise whatever else is drawn
with it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.noise import fold_key, gumbel_rows, uniform_rows
from wildcat_kv.coreset.rpnys_blocked import BLOCK


class Draws(Protocol):
    """A source of noise for some bins of some heads.

    Attributes:
        key: hash from which a kernel draws the noise by itself, see `noise.fold_key`; None if it cannot.
    """

    @property
    def key(self) -> int | None:
        """See above."""
        ...

    def gumbel(self, heads: range, bins: range) -> Tensor:
        """Draw standard Gumbel noise, one row a step.

        Returns:
            float32 (rows or 1, heads, bins, bin_rank, t), in the layout's order.
        """
        ...

    def uniform(self, heads: range, bins: range, turn: int) -> Tensor:
        """Draw the uniform noise of round `turn` of `accelerated_cholesky`.

        Returns:
            float32 (rows or 1, heads, bins, 3, BLOCK), in (0, 1).
        """
        ...


class KeyedDraws:
    """Noise keyed by the row itself.

    Neither padding nor the rest of the batch changes it.

    Args:
        layout: layout of the bins.
        seed: any integer in [0, 2**63).
        layer: index of the layer.
        seen: tokens that the rows have read.
        rows: number of rows.
        device: device of the noise.
    """

    def __init__(
        self, layout: BinLayout, seed: int, layer: int, seen: int, rows: int, device: torch.device | str = "cpu"
    ) -> None:
        self.key = fold_key(seed, layer, seen)
        self._layout, self._rows, self._device = layout, rows, device

    def gumbel(self, heads: range, bins: range) -> Tensor:
        """Draw Gumbel noise, see `Draws`."""
        steps = torch.arange(self._layout.bin_rank, device=self._device)
        noise = gumbel_rows(self._hashes(heads), self._places(bins), steps, columns=self._layout.longest)
        return noise.expand(self._rows, *noise.shape[1:])

    def uniform(self, heads: range, bins: range, turn: int) -> Tensor:
        """Draw uniform noise, see `Draws`."""
        words = torch.arange(3 * turn, 3 * turn + 3, device=self._device)
        noise = uniform_rows(self._hashes(heads), self._places(bins), words, columns=BLOCK)
        return noise.expand(self._rows, *noise.shape[1:])

    def _hashes(self, heads: range) -> Tensor:
        """Hash the heads on the host, which knows them: int64 (1, heads, 1, 1)."""
        hashes = torch.tensor([fold_key(self.key, head) for head in heads])
        return hashes.view(1, -1, 1, 1).to(self._device, non_blocking=True)

    def _places(self, bins: range) -> Tensor:
        return torch.arange(bins.start, bins.stop, device=self._device).view(-1, 1)


class GlobalDraws:
    """Noise from torch's global generator.

    Args:
        layout: layout of the bins.
        device: device of the noise.
    """

    key = None

    def __init__(self, layout: BinLayout, device: torch.device | str = "cpu") -> None:
        self._layout, self._device = layout, device

    def gumbel(self, heads: range, bins: range) -> Tensor:
        """Draw Gumbel noise, see `Draws`."""
        shape = (1, len(heads), len(bins), self._layout.bin_rank, self._layout.longest)
        return torch.empty(shape, dtype=torch.float32, device=self._device).exponential_().log_().neg_()

    def uniform(self, heads: range, bins: range, turn: int) -> Tensor:
        """Draw uniform noise, see `Draws`."""
        return torch.rand(1, len(heads), len(bins), 3, BLOCK, dtype=torch.float32, device=self._device)


class GivenDraws:
    """Gumbel noise from the caller.

    Args:
        noise: float32 (rows, heads, bins, bin_rank, t).
    """

    key = None

    def __init__(self, noise: Tensor) -> None:
        self._noise = noise

    def gumbel(self, heads: range, bins: range) -> Tensor:
        """Give the noise, see `Draws`."""
        return self._noise[:, heads.start : heads.stop, bins.start : bins.stop]

    def uniform(self, heads: range, bins: range, turn: int) -> Tensor:
        """Refuse: noise that is given has no rounds."""
        raise NotImplementedError("noise that is given is for one step after the other")
