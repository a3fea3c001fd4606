"""What every compression method implements, and what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from wildcat_kv.compress import Coreset


@dataclass(frozen=True)
class KVBlock:
    """Tokens of one layer that must be brought down to a budget. Sinks and window are not in it.

    Rows are right-aligned: row b holds its `lengths[b]` entries in the last columns, in the order of their
    positions; columns before them are arbitrary.

    Attributes:
        keys: (rows, heads, n, d), rotated as the model stores them.
        values: (rows, heads, n, d_v); numerators U where an entry is a slot of an earlier coreset.
        valid: bool (rows, heads, n), False for padding slots of an earlier coreset.
        lengths: entries of each row.
        seen: valid tokens that each row has read so far; never the same at two folds of a row.
        scale: b, the factor of the attention scores.
        layer_index: of this layer among the model's.
        layer_count: layers of the model.
        weights: float32 (rows, heads, n), 1 for exact tokens; None where all are exact.
        value_bound: float32 (rows, heads), sum over channels of the largest squared value seen.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    lengths: Sequence[int]
    seen: Sequence[int]
    scale: float
    layer_index: int
    layer_count: int
    weights: Tensor | None = None
    value_bound: Tensor | None = None


@runtime_checkable
class Compressor(Protocol):
    """A compression method. Stateless: all that it knows comes with the block."""

    def compress(self, block: KVBlock, budget: Sequence[int]) -> Coreset:
        """Bring each row of `block` down to `budget[row]` slots, fewer than its entries.

        A row that is not to be compressed now has length and budget 0.

        Returns:
            A Coreset of (rows, heads, max(budget), ...), each row right-aligned, its slots in the order of
            their positions and the columns before them padding slots.
        """
        ...
