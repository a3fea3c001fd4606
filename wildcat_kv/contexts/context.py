"""A context read once and exactly, to be compressed in any way.

Any method and any budget will do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.compressors import Compressor, Everything
from wildcat_kv.compressors.registry import AUTO, reads_twice
from wildcat_kv.compressors.repetition import Repetition
from wildcat_kv.config import WildCatConfig
from wildcat_kv.contexts.prompts import repeat_request
from wildcat_kv.contexts.reading import read
from wildcat_kv.models.attention_module import AttentionModule, watched_inputs
from wildcat_kv.models.support import check_prompt

# Tokens that are repeated at once; as in KVzip's paper, arXiv 2505.23416.
_CHUNK = 2048
# Tokens of the chunk before, at the end of the request to repeat the next one.
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
        self._reread: tuple[Compressor, list[_Reread]] | None = None  # once it was asked for
        self._next = read(model, self._exact, input_ids, attention_mask)[:, -1]

    @property
    def exact(self) -> CompressedCache:
        """The cache that holds all of it. Clone it to go on from it."""
        return self._exact

    @property
    def next_logits(self) -> Tensor:
        """The logits after the context, read exactly: float32 (rows, vocabulary)."""
        return self._next

    def compress(
        self,
        settings: WildCatConfig | None = None,
        *,
        compressor: str | Compressor = AUTO,
        tokenizer: Any = None,
        **fields: Any,
    ) -> CompressedCache:
        """Compress a copy of the context; this one stays as it is.

        The cache is the same, bit for bit, as a new one that the model reads the context into.

        Args:
            settings: budget and exact ends; or give its fields by name.
            compressor: method; one that reads the context a second time, such as "kvzip", has the model do so.
            tokenizer: tokenizer of the model; needed by such a method alone.
            **fields: fields of `WildCatConfig`.

        Raises:
            ValueError: errors of `CompressedCache`; or a method that reads twice without a tokenizer, or with padding.
        """
        again: list[_Reread] = []
        if (twice := reads_twice(compressor)) is not None:
            _check(self.model, self.attention_mask, settings, compressor, tokenizer, fields)
            compressor, again = twice, self._reread_by(twice, tokenizer)
        cache = CompressedCache(self.model.config, settings, compressor=compressor, **fields)
        if cache.compressor.needs_output_projection:
            self._introduce(cache)
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
            if again and layer.state.compressor.state_size:
                found = again[layer.state.place]
                layer.state.carry(found.state)
                queries = queries if found.queries is None else found.queries
            assert queries is not None
            layer.after_attention(queries, state.progress.scale)
        cache.go_on_from(self._exact)
        return cache

    def reread(self, compressor: Compressor, tokenizer: Any) -> list[Tensor]:
        """Let the model repeat the context, once for a method that reads it twice.

        Args:
            compressor: method, whose `reread` looks on.
            tokenizer: tokenizer of the model.

        Returns:
            Carried state of each layer that can be compressed, float32 (rows, heads, n, state_size).
        """
        return [found.state for found in self._reread_by(compressor, tokenizer)]

    def _reread_by(self, compressor: Compressor, tokenizer: Any) -> list[_Reread]:
        """Give what a second reading has each layer carry, and learn from."""
        if self._reread is None or self._reread[0] != compressor:
            self._reread = compressor, self._repeat(compressor, tokenizer)
        return self._reread[1]

    def _introduce(self, cache: CompressedCache) -> None:
        """Let the layers of an empty cache meet their attention modules."""
        for layer, met in zip(_compressed_layers(cache), self._met_by(cache.compressor), strict=True):
            layer.state.model.attention, layer.needs_module = met, False

    def _met_by(self, compressor: Compressor) -> list[AttentionModule]:
        """Find the attention modules: let an empty cache read one token."""
        cache = CompressedCache(self.model.config, compressor=compressor, ratio=1.0)
        read(self.model, cache, self.input_ids[:, :1])
        found = [layer.state.model.attention for layer in _compressed_layers(cache)]
        return [attention for attention in found if attention is not None]

    def _repeat(self, compressor: Compressor, tokenizer: Any) -> list[_Reread]:
        """Read the context again, chunk by chunk."""
        n, parts = self.input_ids.shape[1], []
        met = self._met_by(compressor) if compressor.needs_output_projection else []
        for start in range(0, n, _CHUNK):
            stop = min(start + _CHUNK, n)
            request, answer = (
                ids.to(self.input_ids.device).expand(self.input_ids.shape[0], -1)
                for ids in repeat_request(tokenizer, first=start == 0)
            )
            lead = self.input_ids[:, max(0, start - _LEAD) : start]
            again = torch.cat((request, lead, answer, self.input_ids[:, start:stop]), dim=1)
            fork = self._exact.clone()  # not every layer could take the tokens back
            with watched_inputs(met) as norms:
                read(self.model, fork, torch.cat((self.input_ids, again), dim=1))
            seen = [_repetition(layer, again.shape[1], start, stop) for layer in _compressed_layers(fork)]
            if met:
                weights = [attention.output_projection() for attention in met]
                seen = [
                    replace(each, output_projection=weight, input_norms=norm)
                    for each, weight, norm in zip(seen, weights, norms, strict=True)
                ]
            parts.append([_Reread.of(compressor, repetition) for repetition in seen])
        return [_Reread.joined(each) for each in zip(*parts, strict=True)]


@dataclass(frozen=True)
class _Reread:
    """Hold what one layer learns from a second reading.

    Attributes:
        state: carried state of the tokens, float32 (rows, heads, n, state_size).
        queries: queries of the repeated tokens (rows, query_heads, n, d); None for a method that learns from others.
    """

    state: Tensor
    queries: Tensor | None

    @classmethod
    def of(cls, compressor: Compressor, repetition: Repetition) -> Self:
        return cls(
            compressor.reread(repetition),
            repetition.repeated.clone() if compressor.learns_from_repetition else None,
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Join the parts of a text."""
        queries = [part.queries for part in parts if part.queries is not None]
        return cls(torch.cat([part.state for part in parts], 2), torch.cat(queries, 2) if queries else None)


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
        raise ValueError(
            f"tokenizer=None: compressor={compressor!r} asks the model to repeat what it read; pass its tokenizer"
        )
    if again and attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            f"attention_mask hides tokens, and compressor={compressor!r} repeats all; give the rows one by one"
        )


def _compressed_layers(cache: CompressedCache) -> list[WildCatLayer]:
    """List the layers that can be compressed."""
    return [layer for layer in cache.layers if isinstance(layer, WildCatLayer)]


def _repetition(layer: WildCatLayer, again: int, start: int, stop: int) -> Repetition:
    """Collect what a layer shows, whose last `again` tokens have just repeated [start, stop)."""
    state = layer.state
    assert state.storage is not None and state.log is not None
    queries, entries = state.log.recent(), state.storage.entries
    assert queries is not None
    return Repetition(
        queries=queries[:, :, -again:],
        keys=entries.keys,
        values=entries.values,
        start=start,
        stop=stop,
        scale=state.progress.scale,
    )
