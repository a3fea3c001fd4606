"""Texts into caches, in parts and chunks that fit positions and memory."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.config import WildCatConfig
from wildcat_kv.contexts.reading import read
from wildcat_kv.files import read_text
from wildcat_kv.models.support import decoder_config
from wildcat_kv.recipes.recipe import Recipe

# Positions kept free for questions and answers, and at most this part of all.
_RESERVE = 1024
_RESERVE_PART = 4
# Fewer tokens at once are not tried where memory runs out.
_LEAST_CHUNK = 256


def room_for(model: Any, head: Tensor, reserve: int | None) -> int | None:
    """Return how many tokens of a text fit the positions at once.

    Args:
        model: a Transformers decoder.
        head: beginning of the chat template, int64 (1, h).
        reserve: positions to keep free, in tokens; by default 1,024, or a quarter of all if that is less.

    Returns:
        A positive number; None where the model has no positions to run out of.

    Raises:
        ValueError: nothing is left for a text.
    """
    positions = getattr(decoder_config(model.config), "max_position_embeddings", None)
    if positions is None:
        return None
    reserve = min(_RESERVE, positions // _RESERVE_PART) if reserve is None else reserve
    room = positions - reserve - head.shape[1]
    if room < 1:
        raise ValueError(
            f"reserve={reserve} leaves no room for a text: the model has {positions} positions, and its template takes "
            f"{head.shape[1]}; lower reserve"
        )
    return room


def parts_of(head: Tensor, body: Tensor, room: int | None) -> list[Tensor]:
    """Split a text into prompts of equal length that fit the positions.

    Args:
        head: beginning of the chat template, which every part has, int64 (1, h).
        body: the text, int64 (1, n).
        room: most tokens of a part, see `room_for`; None for any number.

    Returns:
        Prompts int64 (1, m).
    """
    count = 1 if room is None else -(-body.shape[1] // room)
    return [torch.cat((head, piece), dim=1) for piece in body.tensor_split(count, dim=1)]


def warn_of_parts(tokens: int, room: int | None, parts: int) -> None:
    """Warn that a text is longer than the model's positions."""
    warnings.warn(
        f"text_or_file has {tokens} tokens, and the model's positions have room for {room}: it is read in {parts} "
        "parts that do not see each other, and answers get worse; shorten it, lower reserve, or take a model with more "
        "positions",
        stacklevel=4,
    )


def without_floor(settings: WildCatConfig, tokens: int) -> WildCatConfig:
    """Turn a floor into a share, for a text that is read in parts.

    Args:
        settings: settings of the whole text.
        tokens: tokens of all parts. Together they keep the floor, to within half an entry a part.
    """
    if not settings.min_tokens:
        return settings
    assert isinstance(settings.ratio, float)
    return settings.changed(ratio=max(settings.ratio, min(1.0, settings.min_tokens / tokens)), min_tokens=0)


def share_of(settings: WildCatConfig, parts: int) -> WildCatConfig:
    """Return the settings of each part, with its share of a limit.

    Raises:
        ValueError: the limit is too small for so many.
    """
    if parts > 1 and settings.max_bytes is not None:
        return settings.changed(max_bytes=settings.max_bytes // parts)
    if settings.max_tokens is None or parts == 1:
        return settings
    least = settings.sink + settings.window + settings.bin_rank
    if settings.max_tokens // parts < least:
        raise ValueError(
            f"max_tokens={settings.max_tokens} is too small for a text of {parts} parts, each with its own sink and "
            f"window; raise it to {parts * least} or more, or lower sink and window"
        )
    return settings.changed(max_tokens=settings.max_tokens // parts)


def read_part(model: Any, recipe: Recipe, ids: Tensor, chunk: int | None) -> CompressedCache:
    """Read a part into a cache, in smaller chunks where memory lacks.

    Args:
        model: a Transformers decoder.
        recipe: method and settings of the cache.
        ids: tokens of the part, int64 (1, n).
        chunk: tokens to read at once; None for all.

    Raises:
        RuntimeError: memory runs out even with chunks of 256 tokens; whatever the device says of it.
    """
    n = ids.shape[1]
    size = min(chunk or n, n)
    while True:
        cache = CompressedCache(model.config, recipe.settings, compressor=recipe.compressor)
        try:
            for start in range(0, n, size):
                read(model, cache, ids[:, : start + size])
            return cache
        except Exception as error:
            if size <= _LEAST_CHUNK or not should_reduce_batch_size(error):
                raise
        # Not in the handler: the exception holds on to what was being read. And not before the first try, as in
        # accelerate's own loop: to collect garbage takes longer than to read a short text.
        del cache
        clear_device_cache(garbage_collection=True)
        size = max(_LEAST_CHUNK, size // 2)
        warnings.warn(
            f"memory ran out; reading {size} tokens at once, each chunk with those before it compressed (pass "
            "chunk_tokens to begin there)",
            stacklevel=4,
        )


def text_from(text_or_file: str | os.PathLike[str]) -> str:
    """Return the given text, or the text of the given file.

    Raises:
        TypeError: neither a text nor a path.
        ValueError: it is empty, a file that cannot be read, or a file's name that is no path.
    """
    if isinstance(text_or_file, os.PathLike):
        return read_text(Path(text_or_file), "text_or_file")
    if not isinstance(text_or_file, str):
        raise TypeError(f"text_or_file={text_or_file!r:.60} must be a text, or the Path of a file")
    if os.path.isfile(text_or_file):  # noqa: PTH113  # a Path of a long text would raise
        raise ValueError(f"text_or_file={text_or_file!r} is the name of a file; pass Path({text_or_file!r}) to read it")
    if not text_or_file.strip():
        raise ValueError(f"text_or_file={text_or_file[:20]!r} is empty; there is nothing to compress")
    return text_or_file
