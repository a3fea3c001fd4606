"""Stretches of essays, cut into what is compressed and what follows."""

from __future__ import annotations

from torch import Tensor

from eval.tasks.base import Setting
from wildcat_kv.haystack import build_context

_SPARE = 20  # tokens to spare when a text is cut, for rounding


def essay(setting: Setting, index: int, length: int) -> tuple[Tensor, str]:
    """The stretch of this number and its text.

    Args:
        setting: of the run.
        index: of the sample.
        length: tokens.

    Returns:
        Token ids int64 (1, length), and the text that they were cut from.
    """
    text = build_context(setting.tokenizer, length + _SPARE, [], seed=setting.seed * 100_003 + index)
    return setting.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :length], text
