"""A context read once and exactly, to be compressed in any way.

Any method and any budget will do.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.compressors import Compressor, Everything
from wildcat_kv.compressors.registry import AUTO, find
from wildcat_kv.config import WildCatConfig
from wildcat_kv.contexts.prompts import repeat_request
from wildcat_kv.contexts.reading import read
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
        self._reread: tuple[Compressor, list[Tensor]] | None = None  # once it was asked for
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
        states: list[Tensor] = []
        if (twice := reads_twice(compressor)) is not None:
            _check(self.model, self.attention_mask, settings, compressor, tokenizer, fields)
            compressor, states = twice, self.reread(twice, tokenizer)
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
            if states and layer.state.compressor.state_size:
                layer.state.carry(states[layer.state.place])
            queries = state.log.recent()
            assert queries is not None
            layer.after_attention(queries, state.progress.scale)
        cache.go_on_from(self._exact)
        return cache

    def _introduce(self, cache: CompressedCache) -> None:
        """Let an empty cache meet the attention modules: a twin of it reads one token."""
        twin = cache.clone()
        read(self.model, twin, self.input_ids[:, :1])
        for layer, met in zip(cache.layers, twin.layers, strict=True):
            if isinstance(layer, WildCatLayer):
                layer.state.model, layer.needs_module = met.state.model, False

    def reread(self, compressor: Compressor, tokenizer: Any) -> list[Tensor]:
        """Let the model repeat the context, once for a method that reads it twice.

        Args:
            compressor: method, whose `reread` looks on.
            tokenizer: tokenizer of the model.

        Returns:
            Carried state of each layer that can be compressed, float32 (rows, heads, n, state_size).
        """
        if self._reread is None or self._reread[0] != compressor:
            self._reread = compressor, self._repeat(compressor, tokenizer)
        return self._reread[1]

    def _repeat(self, compressor: Compressor, tokenizer: Any) -> list[Tensor]:
        """Read the context again, chunk by chunk."""
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
            parts.append([_seen_by(compressor, layer, again.shape[1], start, stop) for layer in layers])
        return [torch.cat(states, dim=2) for states in zip(*parts, strict=True)]


def reads_twice(compressor: str | Compressor) -> Compressor | None:
    """Build the method, if it reads a text twice; None otherwise.

    Raises:
        ValueError: it is an installed package's that cannot be loaded.
    """
    if isinstance(compressor, str):
        kind = find(compressor)
        return kind() if kind is not None and kind.reads_twice else None
    return compressor if isinstance(compressor, Compressor) and compressor.reads_twice else None


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


def _seen_by(compressor: Compressor, layer: WildCatLayer, again: int, start: int, stop: int) -> Tensor:
    """Give the carried state of [start, stop) in one layer.

    The layer's last `again` tokens have just repeated that part.
    """
    state = layer.state
    assert state.storage is not None and state.log is not None
    queries, keys = state.log.recent(), state.storage.entries.keys
    assert queries is not None
    return compressor.reread(queries[:, :, -again:], keys, start=start, stop=stop, scale=state.progress.scale)
