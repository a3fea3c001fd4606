"""Needles in essays, asked for after the context was compressed: how likely is the right answer still?"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from wildcat_kv.haystack import build_context, make_needles
from wildcat_kv.prompts import encode_question

NEEDLES = 4
LENGTHS = (1200, 1500)  # tokens of the context


@dataclass(frozen=True)
class NeedleSample:
    """A stretch of essays with needles in it, as token ids int64 (1, n).

    Attributes:
        context: all that comes before a question.
        asked: for each needle the question up to the answer, and the answer.
    """

    context: Tensor
    asked: list[tuple[Tensor, Tensor]]


def needle_sample(tokenizer: Any, seed: int) -> NeedleSample:
    """The sample of this seed: the same for every method."""
    needles = make_needles(NEEDLES, seed)
    text = build_context(tokenizer, random.Random(seed).randint(*LENGTHS), needles, seed=seed)
    asked = []
    for needle in needles:
        lead = needle.sentence.removesuffix(f"{needle.value}.")
        context, question = encode_question(tokenizer, text, needle.question, lead)
        asked.append((question, tokenizer(needle.value, return_tensors="pt", add_special_tokens=False).input_ids))
    return NeedleSample(context, asked)


@torch.no_grad()
def needle_loss(model: Any, cache: Cache, question: Tensor, answer: Tensor) -> float:
    """Mean negative log-likelihood of the answer's tokens after the question, in nats; the cache reads both."""
    ids = torch.cat((question, answer), dim=-1).to(model.device)
    predicted = model(ids, past_key_values=cache).logits[0, question.shape[-1] - 1 : -1]
    return float(torch.nn.functional.cross_entropy(predicted.float(), answer[0].to(model.device)))
