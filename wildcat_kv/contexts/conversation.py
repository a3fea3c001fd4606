"""Questions about a text, each with those before it in mind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.contexts.held_text import HeldText, checked
from wildcat_kv.contexts.prompts import encode_follow_up
from wildcat_kv.contexts.reading import generate_tokens, text_of


class Conversation:
    """A conversation about a compressed context, which stays as it is.

    Attributes:
        context: context that it is about.
    """

    def __init__(self, context: HeldText) -> None:
        self.context = context
        self._ids = context.ids
        self._begun = False
        self._cache: CompressedCache | None = None

    @property
    def cache(self) -> CompressedCache:
        """Cache with the context and the conversation so far."""
        return self.context.cache if self._cache is None else self._cache

    def ask(self, question: str, *, max_new_tokens: int | None = None, **options: Any) -> str:
        """Answer a question, and remember both.

        A generation that fails, is interrupted, or whose stream is closed early leaves nothing behind.

        Args:
            question: text that is not empty.
            max_new_tokens: most tokens of the answer; by default those of a given `generation_config`, or 256.
            **options: options of `generate()`, such as a `streamer`; greedy decoding by default; one beam.

        Raises:
            ValueError: errors of `CompressedContext.ask`.
        """
        context = self.context
        options["num_beams"] = 1
        plan = context.answer_options(max_new_tokens, options)
        turn = encode_follow_up(context.tokenizer, checked(question), first=not self._begun).to(self._ids)
        ids = torch.cat((self._ids, turn), dim=1)
        cache, self._cache = self._cache or context.cache.clone(), None  # until it is known to be whole
        length = plan.config.max_new_tokens
        (tokens,) = generate_tokens(context.model, context.tokenizer, cache, ids, max_new_tokens=length, **options)
        self._cache, self._begun = cache, True
        self._ids = torch.cat((ids, torch.tensor([tokens], dtype=ids.dtype, device=ids.device)), dim=1)
        return text_of(context.tokenizer, tokens)

    def stream(self, question: str, *, max_new_tokens: int | None = None, **options: Any) -> Iterator[str]:
        """Answer a question piece by piece, and remember both; see `CompressedContext.stream`."""
        return self.context.pieces(self.ask, question, max_new_tokens, options)
