"""Contexts read into compressed caches, answers and likelihoods over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.compressors.registry import AUTO
from wildcat_kv.config import WildCatConfig
from wildcat_kv.contexts.context import Context
from wildcat_kv.contexts.reading import generate, join, loglikelihood, pad_left, read, token_losses
from wildcat_kv.lm_eval.options import reads_twice

Prompt = tuple[Tensor, Tensor]  # token ids int64 (n,) before the compression and (m,) after it
Pair = tuple[Tensor, Tensor, Tensor]  # the same, and those of a continuation


class Reader:
    """Reads contexts with a model, each into a cache of one method.

    Args:
        model: Transformers model.
        tokenizer: tokenizer of the model, with a token for padding.
        method: name, or "exact".
        settings: settings of the cache; None for the exact cache.

    Raises:
        ValueError: the model cannot be compressed.
    """

    def __init__(self, model: Any, tokenizer: Any, method: str, settings: WildCatConfig | None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._method, self._settings = method, settings
        self._twice = reads_twice(method)
        if self._twice:
            CompressedCache(model.config, settings, compressor="uniform")  # any method checks the model alike
        else:
            self.empty()

    @property
    def method(self) -> str:
        """Name of the method; with "auto" the class that was chosen, and its parameters."""
        if self._method != AUTO:
            return self._method
        return repr(CompressedCache(self._model.config, self._settings).compressor)

    def empty(self) -> Cache:
        """Make an empty cache; not for a method that reads a text twice."""
        if self._settings is None:
            return DynamicCache(config=self._model.config)
        return CompressedCache(self._model.config, self._settings, compressor=self._method)

    def read(self, contexts: Sequence[Tensor]) -> tuple[Cache, Tensor, Tensor | None, Tensor]:
        """Read and compress contexts, int64 (n,) each.

        Returns:
            The cache, token ids (rows, n) padded on the left, their mask, and the logits (rows, vocabulary) after them.
        """
        ids, mask = pad_left(contexts, self._tokenizer.pad_token_id)
        if not self._twice:
            cache = self.empty()
            return cache, ids, mask, read(self._model, cache, ids, mask)[:, -1]
        context = Context(self._model, ids, mask)
        cache = context.compress(self._settings, compressor=self._method, tokenizer=self._tokenizer)
        return cache, ids, mask, context.next_logits

    def generate(self, prompts: Sequence[Prompt], options: dict[str, Any], until: list[str], room: int) -> list[str]:
        """Answer prompts, all with a question or all without.

        Args:
            prompts: token ids of each.
            options: options of `generate()`.
            until: texts that end an answer.
            room: most tokens of an answer.
        """
        contexts, questions = zip(*prompts, strict=True)
        asked = bool(len(questions[0]))
        if asked or self._twice:
            cache, ids, mask, following = self.read(contexts)
        else:
            cache, following = self.empty(), None  # `generate()` reads the prompt itself
            ids, mask = pad_left(contexts, self._tokenizer.pad_token_id)
        if asked:
            ids, mask, following = *self._append(ids, mask, questions), None
        fields = {"max_new_tokens": room, "until": until, "next_logits": following, **options}
        return generate(self._model, self._tokenizer, cache, ids, mask, **fields)

    def likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Score continuations: log-likelihood, and True if greedy decoding writes it.

        A prompt whose continuations stand beside each other is read once.
        """
        prompts: list[Prompt] = []
        rows = []
        for context, question, _ in pairs:
            if not prompts or not all(map(torch.equal, prompts[-1], (context, question))):
                prompts.append((context, question))
            rows.append(len(prompts) - 1)
        contexts, questions = zip(*prompts, strict=True)
        cache, ids, mask, following = self.read(contexts)
        asked = bool(len(questions[0]))
        if asked:
            ids, mask = self._append(ids, mask, questions)
        index = torch.tensor(rows)  # on no device: the layers of a model may lie on several
        cache.batch_select_indices(index)
        mask = None if mask is None else mask[index]
        answers = [answer for _, _, answer in pairs]
        found = loglikelihood(self._model, cache, ids[index], mask, answers, None if asked else following[index])
        return [(likelihood.total, likelihood.greedy) for likelihood in found]

    def losses(self, ids: Tensor, chunk: int) -> Tensor:
        """Compute negative log-likelihoods of all tokens but the first.

        The text is int64 (1, n), and is read `chunk` tokens at once.
        """
        return token_losses(self._model, self.empty(), ids, chunk=chunk)

    def _append(self, ids: Tensor, mask: Tensor | None, more: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Put questions after their contexts."""
        added, added_mask = pad_left(more, self._tokenizer.pad_token_id)
        return torch.cat((ids, added), dim=1), join(mask, added_mask, ids, added)
