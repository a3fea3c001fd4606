"""Prompts as token ids: with the model's chat template where it has one, split before the question."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MARKER = "\x1dquestion\x1d"


def encode_prompt(tokenizer: Any, text: str, *, chat: bool = True) -> Tensor:
    """Token ids int64 (1, n) of `text`, as one user message unless `chat` is off or there is no template."""
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return _encode(tokenizer, text)
    return _encode(tokenizer, text, add_special_tokens=True)


def encode_question(tokenizer: Any, context: str, question: str, answer: str = "") -> tuple[Tensor, Tensor]:
    """Token ids of a context, and of the question after it, encoded apart so that the split is a token's edge.

    Args:
        tokenizer: of the model.
        context: what is read first.
        question: what is asked about it, in the same user message.
        answer: the beginning of the model's answer, to be continued.

    Returns:
        int64 (1, n) of everything up to the question, and int64 (1, m) of all that follows.
    """
    if tokenizer.chat_template:
        message = [{"role": "user", "content": f"{context}\n\n{_MARKER}"}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, after = prompt.split(_MARKER)
        return _encode(tokenizer, before), _encode(tokenizer, f"{question}{after}{answer}")
    before = _encode(tokenizer, f"{context}\n\n", add_special_tokens=True)
    return before, _encode(tokenizer, f"{question}\n{answer}")


def repeat_request(tokenizer: Any, *, first: bool) -> tuple[Tensor, Tensor]:
    """Token ids that ask the model to repeat a part of the context before them, in the words of KVzip.

    Args:
        tokenizer: of the model.
        first: whether it is the first part; later ones are told by how they begin, which goes in between.

    Returns:
        int64 (1, n) of the request, and int64 (1, m) of what stands between it and the model's answer.

    Source: arXiv 2505.23416.
    """
    part = "" if first else "part of the "
    request = f"\n\nRepeat the {part}previous context exactly{'.' if first else ', starting with'}"
    after = "\n"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": _MARKER}]
        after = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).split(_MARKER)[1]
    return _encode(tokenizer, request), _encode(tokenizer, after)


def _encode(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> Tensor:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens).input_ids
    return ids.to(torch.int64)
