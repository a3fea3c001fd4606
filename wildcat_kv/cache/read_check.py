"""Check that a model reads into the cache it was given.

A model that drops the cache gives wrong answers without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteria

from wildcat_kv.hook.keyword import CACHE, given_argument

# Index of the stopping criteria among the positional arguments of `generate()`.
_CRITERIA = 3
# Options by which `generate()` guesses tokens before the model reads them.
_GUESSING = ("prompt_lookup_num_tokens", "assistant_early_exit")


def check_read(model: Any, cache: Cache, tokens: int) -> None:
    """Refuse to go on from a forward pass that did not reach the cache.

    Args:
        model: model that ran.
        cache: cache that it was given.
        tokens: number of tokens that the cache must have seen by now, padding included.

    Raises:
        RuntimeError: the cache has seen another number.
    """
    if (seen := cache.get_seq_length()) != tokens:
        raise RuntimeError(_fault(model, tokens, seen))


def with_read_check(
    model: Any, cache: Cache, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add a check of the first forward pass to `generate()`'s arguments.

    Args:
        model: model that generates.
        cache: cache that the call is given.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        `args` and `kwargs` with one more stopping criterion. It raises a RuntimeError if the pass did not read into
        the cache.
    """
    check = _ReadCheck(model, cache, guesses=_guesses(model, args, kwargs))
    if len(args) > _CRITERIA:
        return (*args[:_CRITERIA], [*(args[_CRITERIA] or ()), check], *args[_CRITERIA + 1 :]), kwargs
    return args, {**kwargs, "stopping_criteria": [*(kwargs.get("stopping_criteria") or ()), check]}


def _guesses(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell if `generate()` guesses tokens, by an assistant or from the prompt."""
    if given_argument("assistant_model", args, kwargs) is not None:
        return True
    configs = (given_argument("generation_config", args, kwargs), model.generation_config)
    return any(kwargs.get(name) or any(getattr(config, name, None) for config in configs) for name in _GUESSING)


class _ReadCheck(StoppingCriteria):
    """Stopping criterion that checks the cache and never stops.

    Transformers calls it after the first token, in every way to decode and in the same thread. If it guesses tokens,
    it may call once before that, about the first guesses; before 5.24 it does.
    """

    def __init__(self, model: Any, cache: Cache, *, guesses: bool) -> None:
        self._model, self._cache = model, cache
        self._before = cache.get_seq_length()
        self._read = False
        self._guesses = guesses

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if not self._read:
            # The newest token is not read yet. A prompt of embeddings has no ids to count.
            least = max(self._before + 1, input_ids.shape[1] - 1)
            seen = self._cache.get_seq_length()
            if seen < least and not self._guesses:
                raise RuntimeError(_fault(self._model, least, seen))
            self._read, self._guesses = seen >= least, False
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _fault(model: Any, tokens: int, seen: int) -> str:
    name = type(model).__name__
    return (
        f"model={name}: its cache should have seen {tokens} tokens and has seen {seen}. Either its forward() does not "
        f"use the cache that it is given as {CACHE}=...; or it trains with gradient checkpointing, then call "
        "model.eval(); or it adds tokens of its own, as PEFT's learned prompts do; or it drops caches past a length, "
        "as Phi-3 does. Use DynamicCache for it"
    )
