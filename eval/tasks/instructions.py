"""Instructions: rules that a model is given before or in a long text, and must keep after it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from eval.cells import Cell
from eval.tasks.asking import Asked, Clock, Prompt
from eval.tasks.base import Lengths, Measure, Metric, Outcome, Sample, Setting, Task
from eval.tasks.rules import Rule, RuleName, make_rules
from wildcat_kv.contexts.prompts import Frame, encode_context, encode_follow_up, encode_parts, messages_for
from wildcat_kv.data.haystack import build_context

Place = Literal["system", "text"]

SYSTEM = "You are a helpful assistant. Keep all rules that you are given."
REMINDER = "Keep all rules."
_ANSWER_TOKENS = 24  # of an answer that is written freely
_CONTEXT = "\ue000context\ue001"  # for private use: in no text


class Instructions(Task):
    """Six rules are given with a long text; after it, six questions show which of them are kept.

    The rules stand in the system prompt, or as notes at random places of the text. The text is read and compressed
    once, and answers all questions.

    Args:
        lengths: tokens of the texts.
        places: places of the rules.
        repeats: texts of each length and place; the run's limit may lower it.
        limit: most texts of each length and place, instead of the run's limit.
    """

    task: Literal["instructions"] = "instructions"
    lengths: Lengths = Field([1500])
    places: list[Place] = Field(list(get_args(Place)), min_length=1)
    repeats: int = Field(8, ge=1)

    @property
    def name(self) -> str:
        """The task's name."""
        return "instructions"

    @property
    def metrics(self) -> dict[str, Metric]:
        """Likelihood of the words that keep the rules, share found, and share kept in answers written freely.

        A small model keeps few rules by itself, with the exact cache too. So for `nll` and `exact_match` the answer
        is begun for it, up to where the rule decides.
        """
        return {
            "nll": Metric(False, "nats a token"),
            "exact_match": Metric(True, "share"),
            "kept": Metric(True, "share of the rules"),
        }

    def samples(self, setting: Setting) -> list[Sample]:
        """Make the texts of every length and place, `repeats` of each; the limit counts these."""
        if setting.protocol != "context-only":
            raise ValueError(
                f"task='instructions': protocol={setting.protocol!r}: six questions are asked of one compressed text; "
                "take the protocol context-only"
            )
        repeats = min(self.repeats, self.count(setting, self.repeats))
        kinds = [(length, place) for length in self.lengths for place in self.places for _ in range(repeats)]
        return [self._sample(setting, index, *kind) for index, kind in enumerate(kinds)]

    def _sample(self, setting: Setting, index: int, length: int, place: Place) -> Sample:
        seed = setting.seed_of(index)
        rules = make_rules(random.Random(seed))
        system = "\n".join([SYSTEM, *(f"- {rule.sentence}" for rule in rules if place == "system")])
        notes = [_Note(f"Note to the assistant: {rule.sentence}") for rule in rules if place == "text"]
        text = build_context(setting.tokenizer, length, notes, seed=seed, half=setting.half)
        context = encode_with_system(setting.tokenizer, system, text)
        asked = {rule.name: _Question.of(setting.tokenizer, context, rule) for rule in rules}
        return _InstructionsSample(
            index=index,
            facets={"length": length, "form": place},
            prompt="\n\n".join([system, text, *(f"{rule.question}\n{rule.lead} {rule.answer}" for rule in rules)]),
            tokens=max(question.tokens for question in asked.values()),
            asked=asked,
        )


@dataclass(frozen=True)
class _Note:
    """A rule to plant in a text."""

    sentence: str


@dataclass(frozen=True)
class _Question:
    """A question about a rule: alone, and with the beginning of an answer and what follows if the rule is kept."""

    rule: Rule
    alone: Prompt
    begun: Prompt
    answer: Tensor

    @classmethod
    def of(cls, tokenizer: Any, context: Tensor, rule: Rule) -> _Question:
        asked = f"{rule.question} {REMINDER}"
        alone, begun = (Prompt(context, encode_follow_up(tokenizer, asked, lead)[0]) for lead in ("", rule.lead))

        def encode(text: str, begins: bool) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        before = f"{asked}{Frame.of(tokenizer).tail}{rule.lead}"
        return cls(rule, alone, begun, torch.tensor(encode_parts(encode, before, f" {rule.answer}")[1]))

    @property
    def tokens(self) -> int:
        return max(len(self.alone) + _ANSWER_TOKENS, len(self.begun) + len(self.answer))


@dataclass(frozen=True, kw_only=True)
class _InstructionsSample(Sample):
    asked: Mapping[RuleName, _Question]

    def open(self, model: Any, tokenizer: Any) -> Measure:
        first = Asked(model, tokenizer, next(iter(self.asked.values())).alone)

        def ask(prompt: Prompt) -> Asked:
            return Asked(model, tokenizer, prompt, first.context)

        def measure(cell: Cell) -> Outcome:
            clock, scores, written = Clock(), dict[str, float](), list[str]()
            cache, held = first.compress(cell, clock)
            with clock("answer", model.device):
                for name, question in self.asked.items():
                    [found] = ask(question.begun).likelihoods(cache.clone(), [question.answer])
                    written.append(ask(question.alone).generate(cache.clone(), _ANSWER_TOKENS, []))
                    scores[f"nll_{name}"] = -found.total / found.tokens
                    scores[f"exact_match_{name}"] = float(found.greedy)
                    scores[f"kept_{name}"] = float(question.rule.kept(written[-1]))
            means = {
                metric: mean(score for name, score in scores.items() if name.startswith(f"{metric}_"))
                for metric in ("nll", "exact_match", "kept")
            }
            return Outcome(
                scores={**means, **scores},
                seen_tokens=first.seen_tokens,
                **held,
                prediction="\n\n".join(written),
                reference="\n\n".join(f"{asked.rule.lead} {asked.rule.answer}" for asked in self.asked.values()),
                seconds=clock,
            )

        return measure


def encode_with_system(tokenizer: Any, system: str, text: str) -> Tensor:
    """Encode a system prompt and a text up to where a question follows.

    A tokenizer whose template takes no system prompt, or that has no template, gets it before the text.

    Args:
        tokenizer: tokenizer of the model.
        system: text of the system prompt.
        text: text of the user's message.

    Returns:
        Token ids int64 (n,).
    """
    head = _head(tokenizer, system)
    if head is None:
        return torch.cat(encode_context(tokenizer, f"{system}\n\n{text}"), dim=1)[0]
    whole = f"{head}{text}{Frame.of(tokenizer).gap}"
    return torch.tensor(tokenizer(whole, add_special_tokens=False)["input_ids"])


def _head(tokenizer: Any, system: str) -> str | None:
    """Write what comes before the user's text; None if the template takes no system prompt."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "system", "content": system}, {"role": "user", "content": _CONTEXT}]
    try:
        written = tokenizer.apply_chat_template(messages_for(tokenizer, messages), tokenize=False)
    except Exception:  # whatever a template raises
        return None
    head = str(written).split(_CONTEXT)[0]
    return head if system in head else None
