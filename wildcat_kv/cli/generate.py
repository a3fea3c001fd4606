"""Answers with a compressed cache, as `wildcat-kv generate` gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Cache

from wildcat_kv.cache.caches import WildCatCache
from wildcat_kv.cache.read_check import with_read_check
from wildcat_kv.cache.sizes import cache_bytes, stored_tokens
from wildcat_kv.cli.figures import MIB, short_text_note
from wildcat_kv.cli.streaming import TextStream, layers_seen, steps
from wildcat_kv.cli.timing import TimedStreamer, Timing
from wildcat_kv.contexts.answering import pad_id
from wildcat_kv.contexts.prompts import encode_prompt
from wildcat_kv.hook.keyword import CACHE


def answer_prompt(
    model: Any, tokenizer: Any, prompt: str, choice: dict[str, Any], max_new_tokens: int, *, chat: bool
) -> None:
    """Print the answer to a prompt as it comes, and its figures.

    The answer goes to stdout, the figures to stderr.

    Args:
        model: a Transformers decoder.
        tokenizer: the model's tokenizer.
        prompt: the text.
        choice: keyword arguments of `WildCatCache`.
        max_new_tokens: most tokens of the answer.
        chat: True to send the prompt as a chat message, if the model has a template.
    """
    ids = encode_prompt(tokenizer, prompt, chat=chat).to(model.device)
    cache = WildCatCache(model.config, **choice)
    with steps() as progress:
        task = progress.add_task(f"reading {ids.shape[1]} tokens", total=None)

        def show(piece: str) -> None:
            if not progress.finished:
                progress.update(task, total=1, completed=1)
                progress.stop()
            print(piece, end="", flush=True)

        with layers_seen(model, progress, task):
            timing = decode(model, tokenizer, cache, ids, max_new_tokens, show)
    print()
    table = Table("tokens seen", "stored", "cache MiB", "first token s", "tokens/s", box=None)
    table.add_row(
        str(cache.get_seq_length()),
        f"{stored_tokens(cache):.0f}",
        f"{cache_bytes(cache) / MIB:.1f}",
        f"{timing.first_token_seconds:.1f}",
        f"{timing.tokens_per_second:.1f}",
    )
    console = Console(stderr=True, highlight=False)
    console.print(table)
    if note := short_text_note(cache, ids.shape[1]):
        console.print(note, soft_wrap=True)


def decode(
    model: Any,
    tokenizer: Any,
    cache: Cache,
    ids: torch.Tensor,
    max_new_tokens: int,
    on_text: Callable[[str], Any],
    stop_strings: list[str] | None = None,
) -> Timing:
    """Decode greedily, and hand new text on as it comes.

    Args:
        model: a Transformers decoder.
        tokenizer: the model's tokenizer.
        cache: any Transformers cache; what it has seen is the beginning of `ids`.
        ids: the prompt, int64 (1, n).
        max_new_tokens: most tokens of the answer.
        on_text: function called with each piece of text.
        stop_strings: texts that end the answer.
    """
    streamer = TimedStreamer(TextStream(tokenizer, on_text))
    _, checked = with_read_check(model, cache, (), {})
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE: cache},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id(tokenizer),
        streamer=streamer,
        stop_strings=stop_strings,
        tokenizer=tokenizer if stop_strings else None,
        **checked,
    )
    return streamer.timing
