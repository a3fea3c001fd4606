"""Options of `generate()` for answers over a cache that holds the text."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from wildcat_kv.hook.keyword import CACHE, OLD

DEFAULT_LENGTH = 256
# Arguments that the caller of generate() sets itself, or that have no use here.
_RESERVED = (
    "inputs",
    "input_ids",
    "attention_mask",
    "position_ids",
    CACHE,
    OLD,
    "tokenizer",
    "until",
    "next_logits",
)
# They would read the whole prompt again, over a cache that holds it.
_READ_AGAIN = ("prompt_lookup_num_tokens", "assistant_early_exit")


@dataclass(frozen=True)
class AnswerOptions:
    """Options of one generation, and the tokens that end an answer.

    Attributes:
        config: options that a `GenerationConfig` has.
        ends: tokens that end an answer.
        others: further arguments of `generate()`.
    """

    config: GenerationConfig
    ends: set[int]
    others: dict[str, Any]

    @property
    def beams(self) -> int:
        """Number of rows of the cache that each prompt needs."""
        return self.config.num_beams or 1

    @staticmethod
    def of(model: Any, tokenizer: Any, max_new_tokens: int | None = None, **options: Any) -> AnswerOptions:
        """Merge what was given into the model's own options; greedy by default.

        Args:
            model: a Transformers decoder.
            tokenizer: tokenizer of the model.
            max_new_tokens: most tokens of an answer; by default the given config's, or 256.
            **options: options of `generate()`, such as a `generation_config`.

        Raises:
            ValueError: an option that cannot be followed here; names it, its value and why.
        """
        given: GenerationConfig | None = options.pop("generation_config", None)
        if own := next((name for name in _RESERVED if options.get(name) is not None), None):
            raise ValueError(f"{own} cannot be given here: the text and its cache are the context's; leave it out")
        if given is None:
            config = copy.deepcopy(model.generation_config)
            config.do_sample = False
        else:
            config = copy.deepcopy(given)
            config.do_sample = bool(config.do_sample)
        assistant = options.pop("assistant_model", None)
        others = config.update(**{name: value for name, value in options.items() if value is not None})
        _check(config, assistant)
        config.use_cache, config.return_dict_in_generate = True, False
        config.max_length = None
        length = max_new_tokens if max_new_tokens is not None else (given and given.max_new_tokens)
        config.max_new_tokens = _length(DEFAULT_LENGTH if length is None else length)
        ends = _ends(model, tokenizer, given, options)
        config.eos_token_id = sorted(ends) or None
        if not ends:  # a config's None would be filled in from the model's
            others["eos_token_id"] = None
        if config.pad_token_id is None:
            config.pad_token_id = pad_id(tokenizer)
        if config.stop_strings:
            others["tokenizer"] = tokenizer
        return AnswerOptions(config, ends, others)


def pad_id(tokenizer: Any) -> int | None:
    """Return the token to pad with; None if the tokenizer has none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _check(config: GenerationConfig, assistant: Any) -> None:
    """Refuse what a cache that holds the text cannot serve."""
    if again := next((name for name in _READ_AGAIN if getattr(config, name, None)), None):
        assistant, again = None, f"{again}={getattr(config, again)!r}"
    elif assistant is not None:
        again = f"assistant_model={type(assistant).__name__}"
    if again:
        raise ValueError(f"{again} reads the text again, which is compressed and read already; leave it out")
    if config.use_cache is False:
        raise ValueError("use_cache=False, and the text is in a cache; leave it out, or set it to True in the config")
    if config.cache_implementation is not None:
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r}, and the text is in a cache of ours; set it to None "
            "in the generation_config"
        )
    if (config.num_return_sequences or 1) > 1:
        count = config.num_return_sequences
        raise ValueError(f"num_return_sequences={count}: a question has one answer here; ask it {count} times, sampled")


def _length(length: Any) -> int:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"max_new_tokens={length!r} must be a positive integer, the most tokens of an answer")
    return length


def _ends(model: Any, tokenizer: Any, given: GenerationConfig | None, options: dict[str, Any]) -> set[int]:
    """Collect the tokens that end a text, given or the model's own."""
    if "eos_token_id" in options:
        return _several(options["eos_token_id"])
    if given is not None and given.eos_token_id is not None:
        return _several(given.eos_token_id)
    return _several(model.generation_config.eos_token_id) | _several(tokenizer.eos_token_id)


def _several(tokens: Any) -> set[int]:
    return set(tokens if isinstance(tokens, (list, tuple)) else [tokens]) - {None}
