"""Needles in essays: likelihood of the right answer, by the text's length and the needle's depth."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from eval.cells import Cell
from eval.tasks.asking import Asked, Clock, Prompt
from eval.tasks.base import Lengths, Measure, Metric, Outcome, Sample, Setting, Task
from wildcat_kv.contexts.prompts import encode_question
from wildcat_kv.data.haystack import build_context, make_needles


class Needle(Task):
    """One of several needles is asked for; its depth is swept, the others lie anywhere.

    Args:
        lengths: tokens of the essays.
        depths: depths of the needle that is asked for, from 0, the beginning of the text, to 1, its end.
        needles: needles in one text, 1 to 8.
        repeats: texts of each length and depth; the run's limit may lower it.
        limit: most texts of each length and depth, instead of the run's limit.
    """

    task: Literal["needle"] = "needle"
    lengths: Lengths = Field([1000, 2000, 4000])
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.1, 0.3, 0.5, 0.7, 0.9], min_length=1)
    needles: int = Field(1, ge=1, le=8)
    repeats: int = Field(2, ge=1)

    @property
    def name(self) -> str:
        """The task's name, with the number of needles where there are several."""
        return "needle" if self.needles == 1 else f"needle_{self.needles}"

    @property
    def metrics(self) -> dict[str, Metric]:
        """The likelihood of the digits ranks what exact match no longer can."""
        return {"nll": Metric(False, "nats a digit"), "exact_match": Metric(True, "share")}

    def samples(self, setting: Setting) -> list[Sample]:
        """Make the texts of every length and depth, `repeats` of each; the limit counts these."""
        repeats = min(self.repeats, self.count(setting, self.repeats))
        places = [(length, depth) for length in self.lengths for depth in self.depths]
        return [
            self._sample(setting, index, *place)
            for index, place in enumerate(place for place in places for _ in range(repeats))
        ]

    def _sample(self, setting: Setting, index: int, length: int, depth: float) -> Sample:
        seed = setting.seed_of(index)
        needles = make_needles(self.needles, seed)
        others = random.Random(seed)
        depths = [depth, *(others.random() for _ in needles[1:])]
        text = build_context(setting.tokenizer, length, needles, seed=seed, depths=depths, half=setting.half)
        asked = needles[0]
        lead = asked.sentence.removesuffix(f"{asked.value}.")
        context, question = encode_question(setting.tokenizer, text, asked.question, lead)
        answer = setting.tokenizer(asked.value, return_tensors="pt", add_special_tokens=False).input_ids[0]
        return _NeedleSample(
            index=index,
            facets={"length": length, "depth": depth},
            prompt=f"{text}\n\n{asked.question}\n{lead}",
            tokens=context.shape[1] + question.shape[1] + len(answer),
            asked=Prompt.of(context[0], question[0], setting.protocol),
            answer=answer,
            reference=asked.value,
        )


@dataclass(frozen=True, kw_only=True)
class _NeedleSample(Sample):
    asked: Prompt
    answer: Tensor
    reference: str

    def open(self, model: Any, tokenizer: Any) -> Measure:
        asked = Asked(model, tokenizer, self.asked)

        def measure(cell: Cell) -> Outcome:
            clock = Clock()
            cache, held = asked.compress(cell, clock)
            with clock("answer", model.device):
                [likelihood] = asked.likelihoods(cache, [self.answer])
            return Outcome(
                scores={"nll": -likelihood.total / likelihood.tokens, "exact_match": float(likelihood.greedy)},
                seen_tokens=asked.seen_tokens,
                **held,
                reference=self.reference,
                seconds=clock,
            )

        return measure
