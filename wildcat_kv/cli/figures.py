"""Remarks on a cache for people: what a budget means for a short text."""

from __future__ import annotations

from typing import Any

from wildcat_kv.cache.budget import exact_ends, share_budget

MIB = 2**20
_SHARES = {1.0: "all", 0.5: "half of the", 0.25: "a quarter of the"}


def size_of(nbytes: int) -> str:
    """Write a number of bytes in GiB, or in MiB below one."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / MIB:.1f} MiB"


def kept_in_words(settings: Any) -> str:
    """Say how many tokens a cache keeps, and in how many bits."""
    if settings.max_tokens is not None:
        kept = f"at most {settings.max_tokens:,} tokens"
    elif settings.ratio == "auto":
        kept = f"what a tolerance of {settings.tolerance} needs"
    else:
        share = _SHARES.get(settings.ratio, f"{settings.ratio:.3g} of the")
        kept = f"{share} tokens"
    return kept if settings.bits is None else f"{kept}, {settings.bits} bits"


def short_text_note(cache: Any, tokens: int) -> str | None:
    """Say how a short text is compressed otherwise than its settings say.

    It is one line; None for a longer text.

    Args:
        cache: a compressed cache.
        tokens: length of the text that it read at once, in tokens.
    """
    settings = cache.settings
    if settings.max_tokens is not None:
        fits = tokens <= settings.max_tokens and settings.bits is None
        return f"Nothing is compressed: all {tokens:,} tokens fit into {settings.max_tokens:,}." if fits else None
    if settings.ratio in ("auto", 1):
        return None
    if tokens <= settings.min_tokens:
        return f"Nothing is compressed: min_tokens={settings.min_tokens:,}, and the text has {tokens:,} tokens."
    budget = share_budget(tokens, settings)
    sink, window = exact_ends(budget, settings)
    if (sink, window) == (settings.sink, settings.window):
        return None
    return (
        f"A short text: {budget} of {tokens} tokens are kept, and of the {settings.sink} first and {settings.window} "
        f"last ones that should stay exact only {sink} and {window} do. Raise the ratio to keep more."
    )
