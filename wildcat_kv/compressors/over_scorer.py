"""Methods that go by the scores of another one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import Compressor, KVBlock
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import Scorer
from wildcat_kv.compressors.snapkv import SnapKV


@dataclass(frozen=True)
class OverScorer(Compressor):
    """A method that needs what another method needs, whose scores it takes.

    Attributes:
        scorer: gives the scores.
    """

    keeps_tokens: ClassVar[bool] = True

    scorer: Scorer = field(default_factory=SnapKV)

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer):
            raise ValueError(f"scorer={self.scorer!r} gives no scores; pass a Scorer, for example SnapKV()")

    @property
    def state_size(self) -> int:  # type: ignore[override]
        """Numbers that the scorer keeps of an entry."""
        return self.scorer.state_size

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        """True if the scorer does."""
        return self.scorer.decodes

    @property
    def needs_rotation(self) -> bool:  # type: ignore[override]
        """True if the scorer does."""
        return self.scorer.needs_rotation

    @property
    def needs_output_projection(self) -> bool:  # type: ignore[override]
        """True if the scorer does."""
        return self.scorer.needs_output_projection

    @property
    def observation(self) -> Observation | None:
        """Queries that the scorer wants to see."""
        return self.scorer.observation

    @override
    def remember(self, block: KVBlock) -> Tensor:
        return self.scorer.remember(block)
