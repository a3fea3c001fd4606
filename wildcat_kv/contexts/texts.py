"""Texts on their way into caches: from files, in parts that fit the positions, in chunks that fit the memory."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.config import WildCatConfig
from wildcat_kv.contexts.reading import read
from wildcat_kv.models.support import decoder_config
from wildcat_kv.recipes.recipe import Recipe

# Positions kept free for questions and answers, and at most this part of all.
_RESERVE = 1024
_RESERVE_PART = 4
# Fewer tokens at once are not tried where memory runs out.
_LEAST_CHUNK = 256


def parts_of(model: Any, head: Tensor, body: Tensor, reserve: int | None) -> list[Tensor]:
    """The text as one prompt, or as several of equal length that fit the positions.

    Args:
        model: a Transformers decoder.
        head: int64 (1, h), the template's beginning, which every part has.
        body: int64 (1, n), the text.
        reserve: positions to keep free, in tokens; by default 1,024, or a quarter of all if that is less.

    Returns:
        int64 (1, m) each.

    Raises:
        ValueError: nothing is left for a text.
    """
    positions = getattr(decoder_config(model.config), "max_position_embeddings", None)
    if positions is None:
        return [torch.cat((head, body), dim=1)]
    reserve = min(_RESERVE, positions // _RESERVE_PART) if reserve is None else reserve
    room = positions - reserve - head.shape[1]
    if room < 1:
        raise ValueError(
            f"reserve={reserve} leaves no room for a text: the model has {positions} positions, and its template takes "
            f"{head.shape[1]}; lower reserve"
        )
    count = -(-body.shape[1] // room)
    return [torch.cat((head, piece), dim=1) for piece in body.tensor_split(count, dim=1)]


def share_of(settings: WildCatConfig, parts: int) -> WildCatConfig:
    """The settings of each of several parts: a limit is dealt out equally, a ratio is everybody's.

    Raises:
        ValueError: the limit is too small for so many.
    """
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
    """A cache that has read a part, `chunk` tokens at a time, or fewer where memory runs out.

    Args:
        model: a Transformers decoder.
        recipe: of the cache.
        ids: int64 (1, n).
        chunk: tokens to read at once; None for all.
    """
    n = ids.shape[1]
    chunk = min(chunk or n, n)
    while True:
        cache = CompressedCache(model.config, recipe.settings, compressor=recipe.compressor)
        try:
            for start in range(0, n, chunk):
                read(model, cache, ids[:, : start + chunk])
            return cache
        except torch.OutOfMemoryError:
            if chunk <= _LEAST_CHUNK:
                raise
        del cache
        chunk = max(_LEAST_CHUNK, chunk // 2)
        warnings.warn(
            f"memory ran out; reading {chunk} tokens at once, each chunk with those before it compressed (pass "
            "chunk_tokens to begin there)",
            stacklevel=3,
        )


def text_from(text_or_file: str | os.PathLike[str]) -> str:
    """The text that was given, or that is in the file that was.

    Raises:
        TypeError: neither a text nor a path.
        ValueError: it is empty, a file that cannot be read, or a file's name that is no path.
    """
    if isinstance(text_or_file, os.PathLike):
        try:
            text = Path(text_or_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"text_or_file={str(text_or_file)!r} cannot be read as UTF-8 text: {error}") from None
    elif isinstance(text_or_file, str):
        text = text_or_file
        if os.path.isfile(text):  # noqa: PTH113  # a Path of a long text would raise
            raise ValueError(f"text_or_file={text!r} is the name of a file; pass Path({text!r}) to read it")
    else:
        raise TypeError(f"text_or_file={text_or_file!r} must be a text, or the Path of a file")
    if not text.strip():
        shown = repr(str(text_or_file)) if isinstance(text_or_file, os.PathLike) else repr(text[:20])
        raise ValueError(f"text_or_file={shown} is empty; there is nothing to compress")
    return text
