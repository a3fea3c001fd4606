"""Answers piece by piece, from a generation in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextIteratorStreamer


def streamed(ask: Callable[..., str], tokenizer: Any, question: str, options: dict[str, Any]) -> Iterator[str]:
    """Run `ask(question, **options)` in a thread and yield its pieces."""
    abandoned, failures = _Abandoned(), []
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def answer() -> None:
        try:
            criteria = [*(options.pop("stopping_criteria", None) or ()), abandoned]
            ask(question, streamer=streamer, stopping_criteria=criteria, **options)
        except _LeftError:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            streamer.end()

    def pieces() -> Iterator[str]:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            abandoned.event.set()
            thread.join()
        if failures:
            raise failures[0]

    return pieces()


class _LeftError(Exception):
    """Nobody listens any more."""


class _Abandoned(StoppingCriteria):
    """Stop a generation that nobody listens to, as if it had failed."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if self.event.is_set():
            raise _LeftError
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
