"""`wildcat-kv generate`: one prompt, answered with a compressed cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Cache

from wildcat_kv.cache.caches import WildCatCache
from wildcat_kv.cache.read_check import with_read_check
from wildcat_kv.cache.sizes import cache_bytes, stored_tokens
from wildcat_kv.cli import options
from wildcat_kv.cli.streaming import TextStream, layers_seen, steps
from wildcat_kv.cli.timing import TimedStreamer, Timing
from wildcat_kv.contexts.answering import pad_id
from wildcat_kv.contexts.prompts import encode_prompt
from wildcat_kv.hook.keyword import CACHE


def generate(
    prompt_file: Annotated[Path, typer.Option(help="Text file with the prompt; '-' for standard input.")],
    model: options.ModelOption = None,
    method: options.MethodOption = None,
    ratio: options.RatioOption = None,
    compression_ratio: options.DropOption = None,
    max_tokens: options.MaxTokensOption = None,
    preset: options.PresetOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer.", min=1)] = 128,
    chat: Annotated[bool, typer.Option(help="Send the prompt as a chat message if the model has a template.")] = True,
    dtype: options.DtypeOption = "float32",
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
) -> None:
    """Answer a prompt with a compressed cache; the answer goes to stdout, the accounting to stderr."""
    choice = options.chosen(
        preset, method, ratio=ratio, compression_ratio=compression_ratio, max_tokens=max_tokens, seed=seed
    )
    prompt = options.read_text(prompt_file, "prompt_file")
    loaded, tokenizer = options.load(model, dtype, device)
    ids = encode_prompt(tokenizer, prompt, chat=chat).to(loaded.device)
    cache = WildCatCache(loaded.config, **choice)
    text = TextStream(tokenizer, lambda piece: print(piece, end="", flush=True))
    with steps() as progress:
        read = progress.add_task(f"reading {ids.shape[1]} tokens", total=None)
        with layers_seen(loaded, progress, read):

            def on_token(token: int) -> None:
                progress.stop()
                text.put(token)

            timing = decode(loaded, tokenizer, cache, ids, max_new_tokens, on_token)
    print()
    table = Table("tokens seen", "stored", "cache MiB", "first token s", "tokens/s", box=None)
    table.add_row(
        str(cache.get_seq_length()),
        f"{stored_tokens(cache):.0f}",
        f"{cache_bytes(cache) / 2**20:.1f}",
        f"{timing.first_token_seconds:.1f}",
        f"{timing.tokens_per_second:.1f}",
    )
    Console(stderr=True).print(table)


def decode(
    model: Any,
    tokenizer: Any,
    cache: Cache,
    ids: torch.Tensor,
    max_new_tokens: int,
    on_token: Callable[[int], None],
    stop_strings: list[str] | None = None,
) -> Timing:
    """Greedy decoding, each new token handed to `on_token` as it comes."""
    streamer = TimedStreamer(on_token)
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
