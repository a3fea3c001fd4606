"""This package's caches on the texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import DynamicCache

from eval.kvpress.budgets import OURS, Ours
from eval.kvpress.scoring import score
from eval.kvpress.texts import Question, Text
from eval.plain_caches import copied, held_bytes
from wildcat_kv import compress_context
from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.contexts.reading import read


def measure(model: Any, tokenizer: Any, text: Text) -> Iterator[dict[str, Any]]:
    """Measure every cell on a text, the exact cache first."""
    for cell in OURS:
        started = time.process_time()
        cache, counted = _compressed(model, tokenizer, text, cell)
        seconds = time.process_time() - started
        yield {
            "cell": cell.name,
            "answers": [_score(model, cache, text, question) for question in text.questions],
            "seconds": seconds,
            **counted,
        }


def _compressed(model: Any, tokenizer: Any, text: Text, cell: Ours) -> tuple[Any, Mapping[str, Any]]:
    """Read a text into the cell's cache, as a user does."""
    if cell.fields is None:
        cache = DynamicCache(config=model.config)
        read(model, cache, torch.tensor([text.context_ids]))
        count = held_bytes(cache.layers)
        return cache, {"stored_tokens": cache.get_seq_length(), "memory_bytes": count, "held_bytes": count}
    context = compress_context(model, tokenizer, text.body, **cell.fields)
    count = context.cache.memory_bytes()
    return context.cache, {
        "stored_tokens": stored_tokens(context.cache),
        "memory_bytes": count,
        "held_bytes": count,
    }


def _score(model: Any, cache: Any, text: Text, question: Question) -> dict[str, Any]:
    """Score the right answer over a copy of the cache."""
    answer = torch.tensor(question.answer_ids)
    ids = torch.tensor([[*text.context_ids, *question.question_ids, *question.answer_ids[:-1]]])
    twin = copied(cache) if isinstance(cache, DynamicCache) else cache.clone()
    return score(read(model, twin, ids, last=len(answer))[0], answer)
