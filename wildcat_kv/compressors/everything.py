"""Keep everything: for exact layers, and for contexts to be compressed later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from wildcat_kv.compressors.base import Compressed, Compressor, KVBlock
from wildcat_kv.compressors.observation import Observation


@dataclass(frozen=True)
class Everything(Compressor):
    """Fold nothing; only with ratio 1.

    Args:
        queries: True to keep all queries as well.
    """

    keeps_tokens: ClassVar[bool] = True

    queries: bool = False

    @property
    def observation(self) -> Observation | None:
        """All queries, if any."""
        return Observation(latest=None, carried=0) if self.queries else None

    def compress(self, block: KVBlock, rank: int) -> Compressed:
        """Never called: nothing is over a budget of everything."""
        raise AssertionError("a ratio of 1 never folds")
