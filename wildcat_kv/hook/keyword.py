"""Names of a cache in calls of Transformers: its keyword is `cache` from 5.24 on, `past_key_values` before."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import GenerationMixin

OLD = "past_key_values"
# Read from the library, not from its version: a release candidate may have either.
CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else OLD
# The arguments of `generate()` in their order, as far as they are read here.
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
    """Find an argument of a call of `generate()`, by name or position; None if it is not given.

    Args:
        name: one of `generate()`'s first arguments, "streamer" at the latest.
        args: of the call, in their order.
        kwargs: of the call, by name.
    """
    place = _ORDER.index(name)
    return kwargs.get(name, args[place] if len(args) > place else None)


def given_cache(arguments: dict[str, Any]) -> Any:
    """Find the cache among the arguments of a call, under either name; None if none is given.

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
    """Find the cache in what a model or `generate()` returns; None if there is none."""
    return getattr(output, CACHE, None)
