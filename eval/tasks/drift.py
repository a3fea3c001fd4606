"""Drift: how far the next-token distribution moves when the text before has been compressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from eval.cells import Cell
from eval.tasks.asking import Clock, held_by
from eval.tasks.base import Measure, Metric, Outcome, Sample, Setting
from eval.tasks.essays import EssayTask, Stretch
from wildcat_kv import Context
from wildcat_kv.contexts.reading import read


class Drift(EssayTask):
    """Kullback-Leibler divergence from the exact cache's distribution, over a continuation in the true words.

    Args:
        lengths: tokens of the beginning, which is compressed.
        repeats: texts of each length; the run's limit may lower it.
        limit: most texts of each length, instead of the run's limit.
        tokens: tokens of the continuation.
    """

    task: Literal["drift"] = "drift"
    tokens: int = Field(128, ge=2)
    repeats: int = Field(20, ge=1)

    @property
    def name(self) -> str:
        """The task's name."""
        return "drift"

    @property
    def metrics(self) -> dict[str, Metric]:
        """Divergence, what the true words cost, and how often the likeliest token stays the same."""
        return {
            "kl": Metric(False, "nats a token", 3),
            "nll": Metric(False, "nats a token", 3),
            "agreement": Metric(True, "share", 3),
        }

    def samples(self, setting: Setting) -> list[Sample]:
        """Make the texts of every length."""
        return [_Drift(**fields) for fields in self.stretches(setting, self.tokens)]


@dataclass(frozen=True, kw_only=True)
class _Drift(Stretch):
    def open(self, model: Any, tokenizer: Any) -> Measure:
        ids, after = self.ids.to(model.device), self.ids.shape[1] - self.length
        context = Context(model, ids[:, : self.length])
        expected = read(model, context.exact.clone(), ids, last=after)[0].log_softmax(-1)

        def measure(cell: Cell) -> Outcome:
            clock = Clock()
            with clock("compress", model.device):
                cache = cell.compress(context, tokenizer)
            held = held_by(cache, cell)
            with clock("answer", model.device):
                found = read(model, cache, ids, last=after)[0].log_softmax(-1)
                scores = _scores(expected, found, ids[0, self.length :])
            return Outcome(scores, seen_tokens=self.length, seconds=clock, **held)

        return measure


def _scores(expected: Tensor, found: Tensor, words: Tensor) -> dict[str, float]:
    """Score log-probabilities (tokens, vocabulary) of what follows each word of a continuation, int64 (tokens,)."""
    kl = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean")
    nll = torch.nn.functional.nll_loss(found[:-1], words[1:])
    agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return {"kl": float(kl), "nll": float(nll), "agreement": float(agreement)}
