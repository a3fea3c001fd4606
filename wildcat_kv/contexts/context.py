"""A context read once and exactly, to be compressed by any method to any budget."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.compressors import Compressor, Everything, KVzip
from wildcat_kv.compressors.kvzip import reconstruction_scores
from wildcat_kv.config import WildCatConfig
from wildcat_kv.contexts.prompts import repeat_request
from wildcat_kv.contexts.reading import read
from wildcat_kv.models.support import check_prompt

# As in the paper: tokens that are repeated at once, and first tokens that are seen besides.
_CHUNK = 2048
_SINK = 4
# Of the chunk before, at the end of the request to repeat the next one.
_LEAD = 8


class Context:
    """A text that a model has read, with all its keys, values and queries.

    Reading is the expensive part, and the same for all methods: read once, `compress` often.

    Args:
        model: a Transformers decoder.
        input_ids: int64 (rows, n).
        attention_mask: (rows, n), 0 for padding.

    Raises:
        ValueError: input_ids that are no (rows, n), or a model that cannot be compressed.

    Example:
        context = Context(model, input_ids)
        caches = {name: context.compress(compressor=name, ratio=0.25) for name in ("wildcat", "snapkv")}
    """

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
            shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise ValueError(f"input_ids={shape} must be token ids of shape (rows, n), with n at least 1")
        check_prompt(model)
        self.model = model
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self._exact = CompressedCache(model.config, compressor=Everything(queries=True), ratio=1.0)
        self._repeated: Tensor | None = None  # KVzip's scores, once they were asked for
        self._next = read(model, self._exact, input_ids, attention_mask)[:, -1]

    @property
    def exact(self) -> CompressedCache:
        """The cache that holds all of it. Clone it to go on from it."""
        return self._exact

    @property
    def next_logits(self) -> Tensor:
        """What the model expects after the context, read exactly: float32 (rows, vocabulary)."""
        return self._next

    def compress(
        self,
        settings: WildCatConfig | None = None,
        *,
        compressor: str | Compressor = "wildcat",
        tokenizer: Any = None,
        **fields: Any,
    ) -> CompressedCache:
        """A cache that has read the context and compressed it; this one stays as it is.

        The same, bit for bit, as a new cache that the model reads the context into.

        Args:
            settings: the budget and the exact ends; or give its fields by name.
            compressor: the method; "kvzip", or a `KVzip` without scores, reads the context a second time.
            tokenizer: of the model; needed by "kvzip" alone.
            **fields: of `WildCatConfig`.

        Raises:
            ValueError: as `CompressedCache`; or "kvzip" without a tokenizer, or with padding.
        """
        twice = reads_twice(compressor)
        if twice is not None:
            _check(self.model, self.attention_mask, settings, compressor, tokenizer, fields)
            compressor = replace(twice, scores=self.repetition_scores(tokenizer))
        cache = CompressedCache(self.model.config, settings, compressor=compressor, **fields)
        mask = None if self.attention_mask is None else self.attention_mask.bool()
        announced = False
        for index, source in enumerate(self._exact.layers):
            layer = cache.layers[index]
            if not isinstance(layer, WildCatLayer):
                cache.layers[index] = copy.deepcopy(source)
                continue
            state = source.state
            assert state.storage is not None and state.log is not None
            if not announced:
                layer.announce(self.input_ids.shape[0], self.input_ids.shape[1], mask)
                announced = True
            cache.update(*state.storage.view(), index)
            queries = state.log.recent()
            assert queries is not None
            layer.after_attention(queries, state.progress.scale)
        cache.go_on_from(self._exact)
        if twice is not None:
            cache.replace_compressor(twice)  # the scores are of this context alone, and large
        return cache

    def repetition_scores(self, tokenizer: Any) -> Tensor:
        """KVzip's scores of the context, which is read a second time, once: float32 (layers, rows, heads, n)."""
        if self._repeated is None:
            self._repeated = self._reconstruct(tokenizer)
        return self._repeated

    def _reconstruct(self, tokenizer: Any) -> Tensor:
        """KVzip's scores, float32 (layers, rows, heads, n): the context is read again, chunk by chunk."""
        n, parts = self.input_ids.shape[1], []
        for start in range(0, n, _CHUNK):
            stop = min(start + _CHUNK, n)
            request, answer = (
                ids.to(self.input_ids.device).expand(self.input_ids.shape[0], -1)
                for ids in repeat_request(tokenizer, first=start == 0)
            )
            lead = self.input_ids[:, max(0, start - _LEAD) : start]
            again = torch.cat((request, lead, answer, self.input_ids[:, start:stop]), dim=1)
            fork = self._exact.clone()  # not every layer could take the tokens back
            read(self.model, fork, torch.cat((self.input_ids, again), dim=1))
            layers = [layer for layer in fork.layers if isinstance(layer, WildCatLayer)]
            parts.append(torch.stack([_attended(layer, again.shape[1], start, stop) for layer in layers]))
        return torch.cat(parts, dim=-1)


def reads_twice(compressor: str | Compressor) -> KVzip | None:
    """KVzip without the scores of a context, None for every other method."""
    if compressor == "kvzip":
        return KVzip()
    return compressor if isinstance(compressor, KVzip) and compressor.scores is None else None


def _check(
    model: Any,
    attention_mask: Tensor | None,
    settings: WildCatConfig | None,
    compressor: str | Compressor,
    tokenizer: Any,
    fields: dict[str, Any],
) -> None:
    """Refuse what cannot be compressed, before anything is read."""
    again = reads_twice(compressor)
    CompressedCache(model.config, settings, compressor=again or compressor, **fields)
    if again and tokenizer is None:
        raise ValueError("tokenizer=None: compressor='kvzip' asks the model to repeat what it read; pass its tokenizer")
    if again and attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention_mask hides tokens, and compressor='kvzip' repeats all; give the rows one by one")


def _attended(layer: WildCatLayer, again: int, start: int, stop: int) -> Tensor:
    """KVzip's scores of one layer for [start, stop), which its last `again` tokens have just repeated."""
    state = layer.state
    assert state.storage is not None and state.log is not None
    queries, keys = state.log.recent(), state.storage.entries.keys
    assert queries is not None
    return reconstruction_scores(
        queries[:, :, -again:], keys, sink=_SINK, start=start, stop=stop, scale=state.progress.scale
    )
