"""Prompts of lm-eval's tasks as token ids, in two parts.

One part is read before the compression, the other after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from wildcat_kv.contexts.prompts import encode_parts
from wildcat_kv.lm_eval.splits import split_prompt

Protocol = Literal["context-only", "full-prompt"]
Parts = tuple[str, str]


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes prompts in the two parts that a protocol gives them.

    Attributes:
        encode: function from a text, and True if it begins the prompt, to token ids.
        protocol: "context-only" compresses before the question is read, "full-prompt" after.
        device: device of the token ids.
    """

    encode: Callable[[str, bool], list[int]]
    protocol: Protocol
    device: torch.device | str = "cpu"

    def split(self, prompt: str, task: str, document: Mapping[str, Any]) -> Parts:
        """Split a prompt into the texts before and after the compression.

        Args:
            prompt: all that the model reads.
            task: name in lm-eval.
            document: sample as the task has it.

        Raises:
            ValueError: the protocol asks for a context, and the prompt has none.
        """
        return (prompt, "") if self.protocol == "full-prompt" else split_prompt(prompt, task, document)

    def ids(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Encode both parts: int64 (n,) and (m,).

        m is 0 for an empty second part.
        """
        first, second = encode_parts(self._encode, *parts)
        return self._tensor(first), self._tensor(second)

    def answer(self, parts: Parts, text: str) -> Tensor:
        """Encode a continuation, int64 (a,), as it is encoded after the part before it."""
        before = parts[1] or parts[0]
        return self._tensor(self._encode(before + text, False)[len(self._encode(before, False)) :])

    def _encode(self, text: str, begins: bool) -> list[int]:
        return self.encode(text, begins) if text else []

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)


def move_spaces(prompt: str, continuation: str) -> tuple[str, str]:
    """Move the spaces at a prompt's end to the continuation, as lm-eval does."""
    bare = prompt.rstrip()
    return bare, prompt[len(bare) :] + continuation


def loses_middle(task: str) -> bool:
    """Tell whether a task's prompts lose their middle where they are too long."""
    return task.startswith("longbench")


def cut_middle(context: Tensor, question: Tensor, limit: int) -> Tensor:
    """Cut as LongBench does: the first and the last half of the limit stay.

    Args:
        context: int64 (n,).
        question: int64 (m,), read after the context.
        limit: most tokens of both together.

    Returns:
        The shortened context.

    Raises:
        ValueError: the question alone is longer than half the limit.

    Source: THUDM/LongBench, pred.py. There the tokens are decoded and encoded again.
    """
    if len(context) + len(question) <= limit:
        return context
    half = limit // 2
    if len(question) > half:
        raise ValueError(f"the question has {len(question)} tokens, and half of the {limit} that fit is {half}")
    return torch.cat((context[:half], context[len(context) - (half - len(question)) :]))


def cut_start(context: Tensor, question: Tensor, limit: int) -> Tensor:
    """Cut as lm-eval's `hf` does: the context's beginning goes. Arguments as for `cut_middle`."""
    return context[max(0, len(context) + len(question) - limit) :]
