"""The keyword by which Transformers takes a cache: `cache` from 5.24 on, `past_key_values` before."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin

OLD = "past_key_values"
# Read from the library, not from its version: a release candidate may have either.
CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else OLD


def given_cache(arguments: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, under either name; None where none is given.

    Args:
        arguments: keyword arguments of `forward` or `generate`. Left as they are.

    Raises:
        ValueError: two caches under two names.
    """
    found = [arguments[name] for name in dict.fromkeys((CACHE, OLD)) if arguments.get(name) is not None]
    if len(found) > 1 and found[0] is not found[1]:
        raise ValueError(f"{CACHE} and {OLD} name two caches; pass one, as {CACHE}=...")
    return found[0] if found else None


def returned_cache(output: Any) -> Any:
    """The cache in what a model or `generate()` returns; None where there is none."""
    return getattr(output, CACHE, None)
