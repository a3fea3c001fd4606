"""Arithmetic: word problems that are solved step by step while the cache compresses on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from eval.cells import Cell
from eval.tasks.asking import Asked, Clock, Prompt, held_by
from eval.tasks.base import Measure, Metric, Outcome, Sample, Setting, Task
from eval.tasks.word_problems import WordProblem, make_problem
from wildcat_kv.contexts.prompts import Frame, encode_parts, encode_question

_PROBLEM, _SOLUTION = "Problem:", "Solution:"
_SPARE_TOKENS = 16  # for a solution in somewhat other words


class Arithmetic(Task):
    """Worked examples are read and compressed, then a problem is read, and solved in many small steps.

    A solution needs the numbers of the problem, one after the other, while more and more is compressed. It is scored
    twice: the right one, read token by token as it would be generated, and the one that the model writes.

    Args:
        steps: steps of a solution.
        examples: worked examples before the problem.
        repeats: problems; the run's limit may lower it.
        limit: most problems, instead of the run's limit.
    """

    task: Literal["arithmetic"] = "arithmetic"
    steps: int = Field(10, ge=1)
    examples: int = Field(3, ge=1)
    repeats: int = Field(20, ge=1)

    @property
    def name(self) -> str:
        """The task's name."""
        return "arithmetic"

    @property
    def metrics(self) -> dict[str, Metric]:
        """Likelihood of the numbers in the right solution, of those that the problem gives, and share solved."""
        return {
            "nll": Metric(False, "nats a token of a number", 3),
            "nll_given": Metric(False, "nats a token of a number that the problem gives", 3),
            "exact_match": Metric(True, "share"),
        }

    def samples(self, setting: Setting) -> list[Sample]:
        """Make the problems, each with examples of its own."""
        return [self._sample(setting, index) for index in range(min(self.repeats, self.count(setting, self.repeats)))]

    def _sample(self, setting: Setting, index: int) -> Sample:
        rng = random.Random(setting.seed_of(index))
        *examples, problem = (make_problem(rng, self.steps) for _ in range(self.examples + 1))
        text = "\n\n".join(f"{_PROBLEM} {each.question}\n{_SOLUTION} {each.solution}" for each in examples)
        asked = f"{_PROBLEM} {problem.question}"
        context, question = encode_question(setting.tokenizer, text, asked, _SOLUTION)

        def encode(text: str, begins: bool) -> list[int]:
            return list(setting.tokenizer(text, add_special_tokens=False)["input_ids"])

        before = f"{asked}{Frame.of(setting.tokenizer).tail}{_SOLUTION}"
        answer = encode_parts(encode, before, f" {problem.solution}")[1]
        return _ArithmeticSample(
            index=index,
            facets={},
            prompt=f"{text}\n\n{asked}\n{_SOLUTION} {problem.solution}",
            tokens=context.shape[1] + question.shape[1] + len(answer) + _SPARE_TOKENS,
            asked=Prompt.of(context[0], question[0], setting.protocol),
            problem=problem,
            answer=torch.tensor(answer),
        )


@dataclass(frozen=True, kw_only=True)
class _ArithmeticSample(Sample):
    asked: Prompt
    problem: WordProblem
    answer: Tensor

    def open(self, model: Any, tokenizer: Any) -> Measure:
        asked = Asked(model, tokenizer, self.asked)
        numbers = number_of_each(tokenizer, self.answer.tolist())
        counted = torch.tensor([number is not None and not self.problem.days[number] for number in numbers])
        given = torch.tensor([number is not None and self.problem.given[number] for number in numbers])

        def measure(cell: Cell) -> Outcome:
            clock = Clock()
            cache, _ = asked.compress(cell, clock)
            with clock("answer", model.device):
                written = asked.generate(cache.clone(), len(self.answer) + _SPARE_TOKENS, ["\n\n", _PROBLEM])
            losses = asked.losses(cache, self.answer, chunk=1).cpu()
            return Outcome(
                scores={
                    "nll": float(losses[counted].mean()),
                    "nll_given": float(losses[given].mean()),
                    "exact_match": float(self.problem.solved_by(written)),
                },
                # After the right solution, which is as long for all: it is a part of what a cache has to hold.
                seen_tokens=cache.get_seq_length(),
                **held_by(cache, cell),
                prediction=written,
                reference=self.problem.solution,
                seconds=clock,
            )

        return measure


def number_of_each(tokenizer: Any, tokens: Sequence[int]) -> list[int | None]:
    """Find the number that each token is a part of, counted from 0; None for a token without a digit."""
    digits = [any(sign.isdigit() for sign in tokenizer.decode([token])) for token in tokens]
    places, count = list[int | None](), itertools.count()
    for has_digits, group in itertools.groupby(digits):
        number = next(count) if has_digits else None
        places += [number for _ in group]
    return places
