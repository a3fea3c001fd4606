"""Scores and bytes, the same on both sides; needs torch alone."""

from __future__ import annotations

from collections.abc import Mapping
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


def compression_ratio(share: float | None, bits: int | None, without: Mapping[int | None, int]) -> float:
    """Choose the share of the tokens to drop, so that what is kept has a share of the exact cache's bytes.

    Args:
        share: share of the bytes, None to drop nothing.
        bits: bits of a stored number; None for the model's dtype.
        without: bytes of all tokens, by bits; those of the exact cache under None.

    Raises:
        ValueError: all tokens take no more bytes than that.
    """
    if share is None:
        return 0.0
    ratio = 1 - share * without[None] / without[bits]
    if ratio <= 0:
        raise ValueError(f"share={share:.3f}: all tokens in bits={bits} take no more bytes than that; give fewer")
    return ratio


def check_ids(encoded: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Refuse a text that the two sides encode differently.

    Args:
        encoded: tokens by kvpress, `context_ids` and a list `questions_ids`, int64 (1, n) each.
        text: text with its questions, as `texts.py` describes them.

    Raises:
        ValueError: names the text.
    """
    wanted = [text["context_ids"], *(asked["question_ids"] for asked in text["questions"])]
    found = [ids[0].tolist() for ids in (encoded["context_ids"], *encoded["questions_ids"])]
    if found != wanted:
        raise ValueError(f"task={text['task']!r}, sample {text['sample']}: kvpress encodes the prompt differently")
