"""Rotary positions, to be undone and done again at other positions. Pure tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Rotation:
    """The rotation of queries and keys by their positions, in one layer.

    Args:
        angles: takes positions int64 (rows, n) to cosines and sines (rows, n, r); None for a layer without positions.
        turn: takes vectors (rows, heads, n, r), cosines and sines to rotated vectors.
        grids: True if tokens of images have positions in time, height and width.
    """

    def __init__(
        self,
        angles: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
        turn: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
        grids: bool = False,
    ) -> None:
        self._angles = angles
        self._turn = turn
        self.grids = grids

    @property
    def rotates(self) -> bool:
        """Tell whether positions change anything."""
        return self._angles is not None

    def back(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Undo the rotation of vectors (rows, heads, n, d).

        They stand at positions int64 (rows, n).
        """
        return self.undoing(positions)(vectors)

    def undoing(self, positions: Tensor) -> Callable[[Tensor], Tensor]:
        """Make the function that undoes the rotation of vectors at positions int64 (rows, n), as `back` does."""
        if self._angles is None:
            return lambda vectors: vectors
        cos, sin = self._angles(positions)
        # Scaled rotations stretch as well: cosine and sine square up to the square of the factor.
        stretch = cos[..., :1].square() + sin[..., :1].square()
        cos, sin = cos / stretch, sin / -stretch
        return lambda vectors: self._part(vectors, cos, sin)

    def forward(self, vectors: Tensor, by: Tensor) -> Tensor:
        """Rotate vectors (rows, heads, n, d) on from where they stand.

        They move by int64 (rows, n) or (rows, 1) positions.
        """
        return self.forwarding(by)(vectors)

    def forwarding(self, by: Tensor) -> Callable[[Tensor], Tensor]:
        """Make the function that rotates vectors on by int64 (rows, n) or (rows, 1) positions, as `forward` does."""
        if self._angles is None:
            return lambda vectors: vectors
        cos, sin = self._angles(by)
        # Scaled rotations have stretched the vectors already.
        stretch = (cos[..., :1].square() + sin[..., :1].square()).sqrt_()
        cos, sin = cos / stretch, sin / stretch
        return lambda vectors: self._part(vectors, *(angle.expand(-1, vectors.shape[2], -1) for angle in (cos, sin)))

    def average(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Rotate each vector to all positions, and average it over them.

        The vectors are (rows, heads, n, d), the positions int64 (rows, m).
        """
        if self._angles is None:
            return vectors
        cos, sin = (angle.mean(1, keepdim=True).expand(-1, vectors.shape[2], -1) for angle in self._angles(positions))
        return self._part(vectors, cos, sin)

    def radii(self, vectors: Tensor) -> Tensor:
        """Measure vectors (rows, heads, n, d) in the planes that rotations turn.

        Rotations do not change it. Each channel has the length in its plane over the square root of 2, so that the
        product of two such results is the sum over planes of the products of lengths. A channel that does not
        turn has its size.
        """
        if self._angles is None:
            return vectors.abs()
        assert self._turn is not None
        cos, _ = self._angles(torch.zeros(vectors.shape[0], 1, dtype=torch.int64, device=vectors.device))
        cos = cos.expand(-1, vectors.shape[2], -1)
        channels = cos.shape[-1]
        rotated = vectors[..., :channels]
        quarter = self._turn(rotated, torch.zeros_like(cos), torch.ones_like(cos))
        lengths = ((rotated.square() + quarter.square()) / 2).sqrt()
        return lengths if channels == vectors.shape[-1] else torch.cat((lengths, vectors[..., channels:].abs()), -1)

    def _part(self, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the channels that are rotated, and leave the others."""
        assert self._turn is not None
        channels = cos.shape[-1]
        turned = self._turn(vectors[..., :channels], cos, sin)
        return turned if channels == vectors.shape[-1] else torch.cat((turned, vectors[..., channels:]), dim=-1)
