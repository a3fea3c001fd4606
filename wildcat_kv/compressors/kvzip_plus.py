"""KVzip+: KVzip's scores times what a value adds to what the model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.kvzip import SINK, KVzip, reconstruction_scores
from wildcat_kv.compressors.output_norms import output_norms
from wildcat_kv.compressors.repetition import Repetition


@dataclass(frozen=True)
class KVzipPlus(KVzip):
    """Keep what changes the model's stream most as it repeats the context.

    As KVzip, but each probability is multiplied with ||W_O v||, of the token that is attended to, and divided by ||h||,
    of the token that attends. A token's score is the largest product over the queries and heads of a group. Norms are
    Euclidean, and h is the hidden state that the attention module reads.

    Needs what KVzip needs, and the weights of the model's output projections.

    Attributes:
        layerwise: give every layer the same number of slots.

    Source: Jégou and Jeblick, arXiv 2601.07891, section 3; the scores of Kim et al., arXiv 2505.23416.
    """

    paper: ClassVar[str] = "arXiv 2601.07891"
    needs_output_projection: ClassVar[bool] = True

    @override
    def reread(self, repetition: Repetition) -> Tensor:
        assert repetition.output_projection is not None and repetition.input_norms is not None
        values = repetition.values[:, :, repetition.start : repetition.stop]
        norms = output_norms(values, repetition.output_projection, order=2)
        factors = (repetition.input_norms, norms)
        return reconstruction_scores(repetition, sink=SINK, factors=factors).unsqueeze(-1)
