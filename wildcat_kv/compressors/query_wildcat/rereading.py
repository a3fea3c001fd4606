"""Query WildCat after a second reading of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.kvzip import SINK, reconstruction_scores
from wildcat_kv.compressors.query_wildcat.method import QueryWildCat
from wildcat_kv.compressors.query_wildcat.survey import Survey, survey_block
from wildcat_kv.compressors.repetition import Repetition


@dataclass(frozen=True)
class RereadingWildCat(QueryWildCat):
    """Query WildCat, which has the model repeat the text in place of a guess of it.

    The second part of the budget is for what the model attends to as it repeats the text: the scores of KVzip. It
    needs the model, and reads a text twice: `wildcat_kv.compress_context` does so. What is generated later is
    compressed as by Query WildCat.

    The score of each token is its carried state, which counts until something is compressed.

    Attributes:
        recalled: share of the budget for what is attended to as the text is repeated.

    Source: this project, `docs/method.md`; Kim et al., arXiv 2505.23416, for the scores.
    """

    reads_twice: ClassVar[bool] = True
    state_size: ClassVar[int] = 1

    recalled: float = 0.625

    @override
    def reread(self, repetition: Repetition) -> Tensor:
        return reconstruction_scores(repetition, sink=SINK).unsqueeze(-1)

    @override
    def survey(self, block: KVBlock) -> Survey:
        state = block.carried_state
        if block.exact < block.keys.shape[2]:  # something is compressed already: the text that was read twice
            return super().survey(block)
        if state is None or not bool(state.any()):
            raise ValueError(
                "RereadingWildCat has no scores; call wildcat_kv.compress_context(model, tokenizer, text, "
                "compressor='rereading_wildcat', ...)"
            )
        return survey_block(block, self.questions, state[..., 0])
