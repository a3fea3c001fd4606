"""A fold that is decided and not yet carried out.

Where layers fold together, it waits for the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from wildcat_kv.cache.budget import FoldPlan, Row
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.rows import RowGroup
from wildcat_kv.cache.value_range import ValueRange


@dataclass
class PendingFold:
    """A fold that is decided and not yet carried out.

    Attributes:
        rows: contents of the rows.
        plans: their folds.
        end: column as of which the layer folds.
        entries: entries held then, rows right-aligned; None while they are left to the storage.
        moved: True if these are not the stored ones: rows were moved, or their state brought up to date.
        folded_range: box around the values of the tokens that are exact no longer afterwards.
        value_bound: float32 (rows, heads), as in `KVBlock`; None where no slots are folded again.
        queries: queries (rows, query_heads, m, d) to learn from, right-aligned.
        queried: queries of each row.
        groups: rows that fold, by what they have in common.
        surveys: surveys of the groups, of a method whose layers share a budget.
        forgotten: True if the query log has folded.
        key_sum: sum of the keys that nobody has looked at, float32 (): finite if they are. None if there are none.
        carried_state: what the method remembers of the entries, while these are left to the storage.
    """

    rows: list[Row]
    plans: list[FoldPlan]
    end: int
    entries: Entries | None
    moved: bool
    folded_range: ValueRange
    value_bound: Tensor | None
    queries: Tensor | None
    queried: list[int]
    groups: list[RowGroup]
    surveys: list[Any] = field(default_factory=list)
    forgotten: bool = False
    key_sum: Tensor | None = None
    carried_state: Tensor | None = None

    def release(self, *, banded: bool) -> None:
        """Let go of what is not needed while the fold waits: the queries, and entries that are a copy."""
        self.queries = None
        if banded:
            assert self.entries is not None
            self.carried_state, self.entries = self.entries.carried_state, None
