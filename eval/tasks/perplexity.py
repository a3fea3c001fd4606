"""Perplexity of long documents that are compressed while they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field
from typing_extensions import override

from eval.cells import Cell
from eval.tasks.asking import Clock, held_by
from eval.tasks.base import Lengths, Measure, Metric, Outcome, Sample, Setting
from eval.tasks.essays import EssayTask, Stretch
from wildcat_kv.contexts.reading import token_losses


class Perplexity(EssayTask):
    """Negative log-likelihood of a long document, read in chunks over a compressing cache.

    Args:
        lengths: tokens of the documents.
        chunk: tokens read at once. With 1, every token goes through the path of generation: long decoding under a
            constant budget, but with words that are known to be right.
        skip: number of first tokens that are not counted.
        repeats: texts of each length; the run's limit may lower it.
        limit: most texts of each length, instead of the run's limit.
    """

    task: Literal["perplexity", "decoding"] = "perplexity"
    lengths: Lengths = Field([2000])
    chunk: int = Field(64, ge=1)
    skip: int = Field(256, ge=0)

    @property
    def name(self) -> str:
        """The task's name: decoding, where tokens come one by one."""
        return "decoding" if self.chunk == 1 else "perplexity"

    @property
    @override
    def streams(self) -> bool:
        return True

    @property
    def metrics(self) -> dict[str, Metric]:
        """The logarithm of the perplexity, and of the last quarter's, where the budget has long been short."""
        return {"nll": Metric(False, "nats a token", 3), "nll_end": Metric(False, "nats a token", 3)}

    def samples(self, setting: Setting) -> list[Sample]:
        """Make the texts of every length."""
        if min(self.lengths) <= self.skip + 4:
            raise ValueError(f"task={self.name!r}: lengths={min(self.lengths)} must exceed skip={self.skip} by 5")
        return [_Document(**fields, chunk=self.chunk, skip=self.skip) for fields in self.stretches(setting)]


@dataclass(frozen=True, kw_only=True)
class _Document(Stretch):
    chunk: int
    skip: int

    def open(self, model: Any, tokenizer: Any) -> Measure:
        ids = self.ids.to(model.device)

        def measure(cell: Cell) -> Outcome:
            clock, cache = Clock(), cell.empty(model.config)
            with clock("read", model.device):
                losses = token_losses(model, cache, ids, chunk=self.chunk)[self.skip :]
            return Outcome(
                scores={"nll": float(losses.mean()), "nll_end": float(losses[-max(1, len(losses) // 4) :].mean())},
                seen_tokens=cache.get_seq_length(),
                seconds=clock,
                **held_by(cache, cell),
            )

        return measure
