"""Tokens to compress, the settings of the kernel, and the slots that become of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.choices import Temperature, Weights


@dataclass(frozen=True)
class WeightedTokens:
    """Keys and values to compress, with the weights that they already carry.

    Attributes:
        keys: (rows, heads, n, d), finite, also where they take part in nothing.
        values: (rows, heads, n, d_v), finite; numerators U where there are weights.
        weights: float32 (rows, heads, n), w; None for 1.
        valid: bool (rows, heads, n), False for padding; None for all True.
        value_bound: float32 (rows, heads), s^2: makes slots with a large U more likely pivots; None to leave U out.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor | None = None
    valid: Tensor | None = None
    value_bound: Tensor | None = None


@dataclass(frozen=True)
class KernelOptions:
    """Settings of the kernel and of its solution.

    Attributes:
        scale: b, the factor of the attention scores.
        query_norm: float32 (rows, heads), R_Q; None for R_K.
        temperature: rule for tau, see `temperature.py`.
        weights_rule: "nystrom" for signed weights, "clipped" for their non-negative part.
        blocked: True to draw pivots in blocks, see `rpnys_blocked.py`; False for one at a time.
    """

    scale: float
    query_norm: Tensor | None = None
    temperature: Temperature = "released"
    weights_rule: Weights = "nystrom"
    blocked: bool = False


class Slots(NamedTuple):
    """The slots of some bins, in the order of the pivots' positions.

    Attributes:
        pivots: int64 (rows, heads, bins, r), places within the bins; arbitrary where not `found`.
        found: bool (rows, heads, bins, r), False for padding slots.
        computed: bool (rows, heads, bins, r), False where a slot keeps its token as it is; None for all True.
        values: (rows, heads, bins, r, d_v), U in the dtype of the values; 0 where not `found` and `computed`.
        weights: float32 (rows, heads, bins, r), w; 0 where not `found` and `computed`.
    """

    pivots: Tensor
    found: Tensor
    computed: Tensor | None
    values: Tensor
    weights: Tensor

    @staticmethod
    def join(parts: Sequence[Slots], dim: int) -> Slots:
        """Put parts side by side along `dim`."""
        if len(parts) == 1:
            return parts[0]
        computed = [part.computed for part in parts if part.computed is not None]
        return Slots(
            torch.cat([part.pivots for part in parts], dim=dim),
            torch.cat([part.found for part in parts], dim=dim),
            torch.cat(computed, dim=dim) if computed else None,
            torch.cat([part.values for part in parts], dim=dim),
            torch.cat([part.weights for part in parts], dim=dim),
        )
