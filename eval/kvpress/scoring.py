"""Scores of answers and bytes of caches, the same in both environments; needs torch alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def score(logits: Tensor, answer: Tensor) -> dict[str, Any]:
    """Score the right answer.

    Args:
        logits: logits before each of its tokens, float (m, vocabulary).
        answer: tokens of the answer, int64 (m,).

    Returns:
        `nll`, the loss in nats a token, and `found`, True if greedy decoding writes it.
    """
    logits = logits.float()
    loss = torch.nn.functional.cross_entropy(logits, answer)
    return {"nll": float(loss), "found": bool((logits.argmax(-1) == answer).all())}


def plain_tensors(value: Any) -> list[Tensor]:
    """List the tensors in a value, in its lists, tuples and dicts too; a subclass's inner tensors for itself."""
    if isinstance(value, Tensor):
        if type(value) is Tensor or not hasattr(value, "__tensor_flatten__"):
            return [value]
        names, _ = value.__tensor_flatten__()
        value = [getattr(value, name) for name in names]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in plain_tensors(item)] if isinstance(value, (list, tuple)) else []


def held_bytes(layers: Iterable[Any]) -> int:
    """Count the bytes of all tensors that the layers of a cache hold."""
    return sum(tensor.nbytes for layer in layers for tensor in plain_tensors(list(vars(layer).values())))


def copied(cache: Any) -> Any:
    """Copy one of Transformers' caches; the two share tensors, which no layer writes into."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
