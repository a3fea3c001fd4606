"""Keyword of the cache in calls of Transformers.

It is `cache` from Transformers 5.24 on, and `past_key_values` before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import GenerationMixin

OLD = "past_key_values"
# The signature decides, not the version: a release candidate may have either.
CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else OLD
# First positional arguments of `generate()`, up to the last one that is read here.
_ORDER = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
)


def given_argument(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Find an argument of a call of `generate()`.

    Args:
        name: name of one of `generate()`'s first arguments, "streamer" at the latest.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        The argument, or None if it is not given.
    """
    place = _ORDER.index(name)
    return kwargs.get(name, args[place] if len(args) > place else None)


def given_cache(arguments: dict[str, Any]) -> Any:
    """Find the cache among the arguments of a call, under either name.

    Args:
        arguments: keyword arguments of `forward` or `generate`; left as they are.

    Returns:
        The cache, or None if none is given.

    Raises:
        ValueError: two caches under two names.
    """
    found = [arguments[name] for name in dict.fromkeys((CACHE, OLD)) if arguments.get(name) is not None]
    if len(found) > 1 and found[0] is not found[1]:
        raise ValueError(f"{CACHE} and {OLD} name two caches; pass one, as {CACHE}=...")
    return found[0] if found else None


def returned_cache(output: Any) -> Any:
    """Find the cache in the output of a model or `generate()`; None if absent."""
    return getattr(output, CACHE, None)
