"""Questions about a context that is compressed before they are read, or after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import Cache

from eval.baselines import CountedCache
from eval.cells import Cell
from eval.tasks.base import Protocol
from wildcat_kv import CompressedCache, Context
from wildcat_kv.cache.sizes import cache_bytes, layer_tensors, stored_tokens
from wildcat_kv.contexts.answering import AnswerOptions
from wildcat_kv.contexts.reading import Likelihood, generate, generate_tokens, loglikelihood, read


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, in two parts.

    Attributes:
        context: int64 (n,), read before the compression.
        question: int64 (m,), read after it; empty if the compression comes after the whole prompt.
    """

    context: Tensor
    question: Tensor

    @classmethod
    def of(cls, context: Tensor, question: Tensor, protocol: Protocol) -> Prompt:
        """Split a prompt where the protocol puts the compression."""
        if protocol == "context-only":
            return cls(context, question)
        return cls(torch.cat((context, question)), question[:0])

    def __len__(self) -> int:
        return len(self.context) + len(self.question)


class Held(TypedDict):
    """Fields of an `Outcome` that say what a cache holds."""

    stored_tokens: float
    memory_bytes: int


def held_by(cache: Cache, cell: Cell) -> Held:
    """Count the entries and bytes of a cell's cache.

    Of the exact cache the keys and values count alone: a context keeps its queries too, to be compressed later.
    """
    held = exact_bytes(cache) if cell.exact else cache_bytes(cache)
    count = cache.stored_tokens() if isinstance(cache, CountedCache) else stored_tokens(cache)
    return {"stored_tokens": round(count, 4), "memory_bytes": held}


def exact_bytes(cache: Cache) -> int:
    """Count the bytes of the keys and values in a cache that holds all of them, and of its other layers' states."""
    return sum(
        layer.keys.nbytes + layer.values.nbytes
        if hasattr(layer, "state")
        else sum(tensor.nbytes for tensor in layer_tensors(layer))
        for layer in cache.layers
    )


class Clock(dict[str, float]):
    """Seconds by what took them."""

    @contextmanager
    def __call__(self, what: str, device: torch.device) -> Any:
        """Time what is done inside, a GPU's work included."""
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self[what] = round(time.perf_counter() - start, 4)


class Asked:
    """A context that has been read, and the question about it."""

    def __init__(self, model: Any, tokenizer: Any, prompt: Prompt, context: Context | None = None) -> None:
        """Read the context, unless another question has it already.

        Args:
            model: a Transformers decoder.
            tokenizer: tokenizer of the model.
            prompt: context and question.
            context: reading of the same context.
        """
        self._model, self._tokenizer = model, tokenizer
        self._ids = torch.cat((prompt.context, prompt.question))[None].to(model.device)
        self.context = context or Context(model, self._ids[:, : len(prompt.context)])
        self._next = None if len(prompt.question) else self.context.next_logits

    @property
    def seen_tokens(self) -> int:
        """Tokens of the context."""
        return self.context.input_ids.shape[1]

    def compress(self, cell: Cell, clock: Clock) -> tuple[CompressedCache, Held]:
        """Make the cell's cache of the context, and count what it holds."""
        with clock("compress", self._model.device):
            cache = cell.compress(self.context, self._tokenizer)
        return cache, held_by(cache, cell)

    def write(self, cache: CompressedCache, max_new_tokens: int, **options: Any) -> list[int]:
        """Write the tokens of the answer, without an end token; uses the cache up.

        Args:
            cache: cache that holds the context.
            max_new_tokens: most tokens of the answer.
            **options: options of `generate()`; decoding is greedy by default.
        """
        after, never = self._next, options.get("suppress_tokens")
        if after is not None and never:  # the first token is chosen before generate() begins
            after = after.index_fill(-1, torch.tensor(never, device=after.device), -torch.inf)
        return generate_tokens(
            self._model, self._tokenizer, cache, self._ids, max_new_tokens=max_new_tokens, next_logits=after, **options
        )[0]

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        return sorted(AnswerOptions.of(self._model, self._tokenizer).ends)

    def losses(self, cache: CompressedCache, answer: Tensor, *, chunk: int | None = None) -> Tensor:
        """Measure the loss of each token of an answer; uses the cache up.

        Args:
            cache: cache that holds the context.
            answer: tokens of the answer, int64 (m,).
            chunk: tokens of the answer to read at once, all by default. With 1 it is read as it would be generated.

        Returns:
            Negative log-likelihood of each token after the prompt and those before it, in nats, float32 (m,).
        """
        prompt, answer = self._ids.shape[1], answer.to(self._ids)
        text = torch.cat((self._ids, answer[None]), dim=1)[:, :-1]
        first = read(self._model, cache, self._ids)[:, -1] if self._next is None else self._next.float()
        logits = [first]
        for start in range(prompt, text.shape[1], chunk or len(answer)):
            stop = min(start + (chunk or len(answer)), text.shape[1])
            logits.append(read(self._model, cache, text[:, :stop], last=stop - start)[0])
        return torch.nn.functional.cross_entropy(torch.cat(logits), answer, reduction="none")

    def generate(self, cache: CompressedCache, max_new_tokens: int, until: Sequence[str]) -> str:
        """Write the answer; uses the cache up."""
        return generate(
            self._model,
            self._tokenizer,
            cache,
            self._ids,
            max_new_tokens=max_new_tokens,
            until=until,
            next_logits=self._next,
        )[0]

    def likelihoods(self, cache: CompressedCache, answers: Sequence[Tensor]) -> list[Likelihood]:
        """Score several answers; uses the cache up."""
        if len(answers) > 1:
            cache.batch_repeat_interleave(len(answers))
        ids = self._ids.expand(len(answers), -1)
        after = None if self._next is None else self._next.expand(len(answers), -1)
        return loglikelihood(self._model, cache, ids, None, answers, after)
