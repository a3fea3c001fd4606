"""A text that a cache holds: the base of contexts, for conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.contexts.answering import AnswerOptions
from wildcat_kv.contexts.streaming import streamed
from wildcat_kv.models.identity import WeightWatch


class HeldText:
    """A text that a model has read into a cache.

    Attributes:
        model: model that has read it.
        tokenizer: tokenizer of the model.
        cache: cache that holds the text.
        tokens: number of tokens of the text, template included.
        ids: tokens whose positions the cache continues, int64 (1, n).
        weights: weights that the model had when it read the text.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: CompressedCache, ids: Tensor, tokens: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.tokens = tokens
        self.ids = ids
        self.weights = WeightWatch(model)

    def check_weights(self) -> None:
        """Refuse a model that has become another since it read the text.

        Raises:
            ValueError: names the parameter that differs.
        """
        if (name := self.weights.difference(self.model)) is not None:
            raise ValueError(
                f"model={type(self.model).__name__} has other weights than when it read the text, {name} differs; set "
                "the adapter that read it, or read the text again"
            )

    def answer_options(self, max_new_tokens: int | None, options: dict[str, Any]) -> AnswerOptions:
        """Check the model and the options of an answer.

        Raises:
            ValueError: another model by now, or an option that cannot be followed.
        """
        self.check_weights()
        return AnswerOptions.of(self.model, self.tokenizer, max_new_tokens, **options)

    def pieces(
        self, ask: Callable[..., str], question: str, max_new_tokens: int | None, options: dict[str, Any]
    ) -> Iterator[str]:
        """Stream the answer of `ask`, once all is checked.

        Raises:
            ValueError: an empty question, or as `answer_options`.
        """
        if options.get("streamer") is not None:
            raise ValueError("streamer cannot be given to stream(), which makes one; call ask(..., streamer=...)")
        self.answer_options(max_new_tokens, options)
        return streamed(ask, self.tokenizer, checked(question), {"max_new_tokens": max_new_tokens, **options})


def checked(question: str) -> str:
    """Return a question that asks something.

    Raises:
        ValueError: it is empty.
    """
    if isinstance(question, (list, tuple)):
        raise ValueError("question is a list; give one text, or call ask_many()")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question={question!r} is empty; ask something")
    return question
