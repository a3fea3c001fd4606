"""Texts and questions of the comparison, which both sides read."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from eval.tasks.lookup import INSTRUCTION
from eval.tasks.lookup_facts import make_quiz
from eval.tasks.lookup_texts import FormName, compose
from wildcat_kv.contexts.prompts import Frame, encode_context, encode_follow_up, encode_parts
from wildcat_kv.data.haystack import Half, build_context, make_needles

NEEDLES, LOOKUPS = "needles", "lookups"
_PLANTED = 4  # needles in a text, all of them asked for
_HALF: Half = "report"
_FORMS: Sequence[FormName] = get_args(FormName)


@dataclass(frozen=True)
class Question:
    """A question about a text, and the right answer.

    Attributes:
        question: its text.
        lead: beginning of the answer, which is given.
        question_ids: tokens from the question to where the answer goes on.
        answer_ids: tokens of the rest of the answer.
    """

    question: str
    lead: str
    question_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class Text:
    """A text that is compressed before the questions.

    Attributes:
        task: NEEDLES or LOOKUPS.
        sample: number of the text in its task.
        body: the text.
        context: the text as it stands in the chat template, with what separates it from a question.
        context_ids: tokens of the template's beginning and the context.
        questions: questions about it.
    """

    task: str
    sample: int
    body: str
    context: str
    context_ids: list[int]
    questions: Sequence[Question]

    @property
    def prompt_hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of all that is read."""
        read = "\n".join([self.context, *(f"{each.question}\n{each.lead}" for each in self.questions)])
        return hashlib.sha256(read.encode()).hexdigest()[:16]


def make_texts(tokenizer: Any, length: int, needles: int, lookups: int) -> list[Text]:
    """Make the texts, needles and lookups by turns.

    Args:
        tokenizer: tokenizer of the model.
        length: tokens of a text.
        needles: number of essays with four numbers in each.
        lookups: number of texts of six forms with three questions about each.

    Raises:
        DownloadError: the texts are not in the cache and could not be fetched.
    """
    made = [((number + 0.5) / needles, _needles(tokenizer, length, number)) for number in range(needles)]
    made += [((number + 0.5) / lookups, _lookups(tokenizer, length, number)) for number in range(lookups)]
    return [text for _, text in sorted(made, key=lambda place: place[0])]


def _seed(number: int) -> int:
    return 2 * number + 1  # as the evaluation's half "report" has them


def _needles(tokenizer: Any, length: int, number: int) -> Text:
    seed = _seed(number)
    needles, others = make_needles(_PLANTED, seed), random.Random(seed)
    depths = [others.random() for _ in needles]
    body = build_context(tokenizer, length, needles, seed=seed, depths=depths, half=_HALF)
    asked = [(each.question, each.sentence.removesuffix(f"{each.value}."), each.value) for each in needles]
    return _text(tokenizer, NEEDLES, number, body, asked)


def _lookups(tokenizer: Any, length: int, number: int) -> Text:
    form, rng = _FORMS[number % len(_FORMS)], random.Random(_seed(number))
    quiz = make_quiz(form, number // len(_FORMS), rng, _HALF)
    body = compose(tokenizer, form, length, quiz.blocks, rng, _HALF)
    asked = [
        (f"{each.text} {INSTRUCTION}", each.lead, f" {each.answer}")
        for each in quiz.questions
        if each.answer is not None
    ]
    return _text(tokenizer, LOOKUPS, number, body, asked)


def _text(tokenizer: Any, task: str, number: int, body: str, asked: Sequence[tuple[str, str, str]]) -> Text:
    """Encode a text and its questions, with lead and answer each."""
    frame = Frame.of(tokenizer)
    context = torch.cat(encode_context(tokenizer, body), dim=1)[0].tolist()

    def encode(text: str, begins: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    questions = [
        Question(
            question,
            lead,
            encode_follow_up(tokenizer, question, lead)[0].tolist(),
            encode_parts(encode, f"{question}{frame.tail}{lead}", answer)[1],
        )
        for question, lead, answer in asked
    ]
    return Text(task, number, body, f"{body}{frame.gap}", context, questions)
