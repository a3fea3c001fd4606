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
def needle_loss(model: Any, cache: Cache, asked: list[tuple[Tensor, Tensor]]) -> float:
    """Mean negative log-likelihood of the answers' tokens, each answer after its question alone, in nats a token.

    Args:
        model: that has read the context.
        cache: with the context in one row; used up.
        asked: questions and answers, int64 (1, n).
    """
    texts = [torch.cat(pair, dim=-1)[0] for pair in asked]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(model.device)  # nothing sees what comes after it
    cache.batch_repeat_interleave(len(asked))
    logits = model(ids, past_key_values=cache).logits.float()
    losses = []
    for row, (question, answer) in enumerate(asked):
        start = question.shape[-1] - 1
        predicted = logits[row, start : start + answer.shape[-1]]
        losses.append(torch.nn.functional.cross_entropy(predicted, answer[0].to(model.device)))
    return float(torch.stack(losses).mean())
