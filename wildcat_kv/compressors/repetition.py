"""Facts about a part of a text that the model has just repeated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Repetition:
    """A part of a text, and what one layer does while the model repeats it.

    The newest q tokens ask the model to repeat tokens [start, stop) of the text, and repeat them.

    Attributes:
        queries: (rows, query_heads, q, d), those of the newest tokens.
        keys: (rows, heads, n + q, d), those of the text and of the newest tokens.
        values: (rows, heads, n + q, d_v), those of the same tokens.
        start: first token of the part.
        stop: token after its last one.
        scale: b, the factor of the attention scores.
        output_projection: weights as in `KVBlock`; None where the method did not ask.
        input_norms: float32 (rows, q), norms of what the attention module reads of the newest tokens; None where the
            method did not ask for the output projection.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    start: int
    stop: int
    scale: float
    output_projection: Tensor | None = None
    input_norms: Tensor | None = None

    @property
    def repeated(self) -> Tensor:
        """Queries of the repeated tokens alone, (rows, query_heads, stop - start, d)."""
        return self.queries[:, :, self.queries.shape[2] - (self.stop - self.start) :]
