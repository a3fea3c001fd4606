"""Figures of a cache for people, and why a short text is hardly compressed."""

from __future__ import annotations

from typing import Any

from wildcat_kv.cache.sizes import stored_tokens

MIB = 2**20


def why_so_many(cache: Any) -> str | None:
    """Say in one line why a cache holds far more than its budget's share; None if it does not.

    Args:
        cache: a compressed cache that has read something.
    """
    settings, seen, stored = cache.settings, cache.get_seq_length(), stored_tokens(cache)
    share = 1.0 if settings.share is None else settings.share
    if settings.max_tokens is not None:
        fits = seen and stored >= seen
        return f"Nothing is compressed: all {seen:,} tokens fit into {settings.max_tokens:,}." if fits else None
    if stored < seen * (1 + share) / 2 or share == 1 or not seen:
        return None
    much = "Nothing" if stored >= seen else "Little"
    ends = f"the first {settings.sink} and the last {settings.window} tokens stay exact"
    return f"{much} is compressed: {seen:,} tokens are a short text, of which {ends}."
