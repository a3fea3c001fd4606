"""Lookups: facts in long texts of six forms, asked for in several ways."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from eval.cells import EXACT, Cell
from eval.tasks.asking import Asked, Clock, Prompt
from eval.tasks.base import Lengths, Measure, Metric, Outcome, Sample, Setting, Task
from eval.tasks.lookup_facts import Kind, Question, make_quiz
from eval.tasks.lookup_texts import FormName, compose
from wildcat_kv.contexts.prompts import Frame, encode_context, encode_follow_up, encode_parts
from wildcat_kv.contexts.reading import Likelihood

# After every question, so that a model may say that the text does not have a fact.
INSTRUCTION = "If the text does not say it, answer that it does not."
_DECLINED_TOKENS = 16  # of the exact cache's answer about a fact that is not there


class Lookup(Task):
    """Facts are planted in real texts in the text's own form; four questions are asked of each text.

    Three ask for one of the facts: in the text's words, in other words, and over two facts that must be joined. The
    fourth asks for a fact of the same kind that the text does not have. One compressed text answers all four.

    Args:
        lengths: tokens of the texts.
        forms: forms of the texts.
        repeats: texts of each length and form; the run's limit may lower it.
        limit: most texts of each length and form, instead of the run's limit.
    """

    task: Literal["lookup"] = "lookup"
    lengths: Lengths = Field([1500])
    forms: list[FormName] = Field(list(get_args(FormName)), min_length=1)
    repeats: int = Field(8, ge=1)

    @property
    def name(self) -> str:
        """The task's name."""
        return "lookup"

    @property
    def metrics(self) -> dict[str, Metric]:
        """Likelihood and share found of the facts that are there, likelihood by question, and agreement elsewhere.

        `absent` is the likelihood of what the exact cache answers about a fact that is not there: whether that is a
        refusal or not, a compressed cache should say the same.
        """
        return {
            "nll": Metric(False, "nats a token"),
            "exact_match": Metric(True, "share"),
            "nll_words": Metric(False, "nats a token"),
            "nll_other": Metric(False, "nats a token"),
            "nll_joined": Metric(False, "nats a token"),
            "absent": Metric(False, "nats a token of the exact cache's answer"),
        }

    def samples(self, setting: Setting) -> list[Sample]:
        """Make the texts of every length and form, `repeats` of each; the limit counts these."""
        if setting.protocol != "context-only":
            raise ValueError(
                f"task='lookup': protocol={setting.protocol!r}: four questions are asked of one compressed text; take "
                "the protocol context-only"
            )
        repeats = min(self.repeats, self.count(setting, self.repeats))
        places = [(length, form, repeat) for length in self.lengths for form in self.forms for repeat in range(repeats)]
        return [self._sample(setting, index, *place) for index, place in enumerate(places)]

    def _sample(self, setting: Setting, index: int, length: int, form: FormName, repeat: int) -> Sample:
        rng = random.Random(setting.seed_of(index))
        quiz = make_quiz(form, repeat, rng, setting.half)
        text = compose(setting.tokenizer, form, length, quiz.blocks, rng, setting.half)
        context = torch.cat(encode_context(setting.tokenizer, text), dim=1)[0]
        asked = {question.kind: _encode(setting.tokenizer, context, question) for question in quiz.questions}
        longest = max(len(prompt) + len(answer) for prompt, answer in asked.values())
        return _LookupSample(
            index=index,
            facets={"length": length, "form": form},
            prompt="\n\n".join([text, *(f"{question.text}\n{question.lead}" for question in quiz.questions)]),
            tokens=longest,
            asked=asked,
            reference=quiz.questions[0].answer,
        )


def _encode(tokenizer: Any, context: Tensor, question: Question) -> tuple[Prompt, Tensor]:
    """Encode a question about a context, and the answer; for a fact that is not there, room for one."""
    asked = encode_follow_up(tokenizer, f"{question.text} {INSTRUCTION}", question.lead)[0]
    prompt = Prompt(context, asked)
    if question.answer is None:
        return prompt, asked.new_zeros(_DECLINED_TOKENS)

    def encode(text: str, begins: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before = f"{question.text}{Frame.of(tokenizer).tail}{question.lead}"
    return prompt, torch.tensor(encode_parts(encode, before, f" {question.answer}")[1])


@dataclass(frozen=True, kw_only=True)
class _LookupSample(Sample):
    """One text and the questions about it, each with the tokens of its answer."""

    asked: Mapping[Kind, tuple[Prompt, Tensor]]
    reference: str | None

    def open(self, model: Any, tokenizer: Any) -> Measure:
        (first, _), *_ = self.asked.values()
        context = Asked(model, tokenizer, first).context
        asked = {kind: Asked(model, tokenizer, prompt, context) for kind, (prompt, _) in self.asked.items()}
        answers = {kind: answer for kind, (_, answer) in self.asked.items()}
        written = asked["absent"].write(Cell(EXACT, None).compress(context, tokenizer), _DECLINED_TOKENS)
        answers["absent"] = torch.tensor(written or [tokenizer.eos_token_id])

        def measure(cell: Cell) -> Outcome:
            clock = Clock()
            cache, held = asked["words"].compress(cell, clock)
            with clock("answer", model.device):
                found = {kind: asked[kind].likelihoods(cache.clone(), [answers[kind]])[0] for kind in asked}
            return Outcome(
                scores=_scores(found),
                seen_tokens=asked["words"].seen_tokens,
                **held,
                reference=self.reference,
                seconds=clock,
            )

        return measure


def _scores(found: Mapping[Kind, Likelihood]) -> dict[str, float]:
    """Score the answers: each question's, and their means over the facts that are there."""
    losses: dict[str, float] = {kind: -answer.total / answer.tokens for kind, answer in found.items()}
    absent = losses.pop("absent")
    hits: dict[str, float] = {kind: float(answer.greedy) for kind, answer in found.items() if kind in losses}
    return {
        "nll": mean(losses.values()),
        "exact_match": mean(hits.values()),
        **{f"nll_{kind}": loss for kind, loss in losses.items()},
        **{f"exact_match_{kind}": hit for kind, hit in hits.items()},
        "absent": absent,
    }
