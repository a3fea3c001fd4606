"""Drift: how far the next-token distribution moves when the text before has been compressed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from wildcat_kv.haystack import build_context

LENGTHS = (1000, 1200)  # tokens of the context
CONTINUATION = 128  # tokens


@dataclass(frozen=True)
class DriftSample:
    """A stretch of essays as token ids int64 (1, n), and how it goes on."""

    context: Tensor
    continuation: Tensor


def drift_sample(tokenizer: Any, seed: int) -> DriftSample:
    """The sample of this seed: the same for every method."""
    length = random.Random(seed).randint(*LENGTHS)
    text = build_context(tokenizer, length + CONTINUATION + 20, [], seed=seed)  # some to spare, for rounding
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return DriftSample(ids[:, :length], ids[:, length : length + CONTINUATION])


@torch.no_grad()
def next_token(model: Any, cache: Cache, sample: DriftSample) -> Tensor:
    """Log-probabilities float32 (CONTINUATION, vocabulary) of what follows each token; the cache reads them."""
    logits = model(sample.continuation.to(model.device), past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1)


def drift(exact: Tensor, compressed: Tensor) -> float:
    """Mean Kullback-Leibler divergence of `compressed` from `exact`, in nats a token."""
    return float(torch.nn.functional.kl_div(compressed, exact, log_target=True, reduction="batchmean"))
