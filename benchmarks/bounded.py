"""A long generation under a constant budget: what is stored, and how fast, as it goes on.

python -m benchmarks.bounded --max-tokens 256 --new-tokens 2000
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from wildcat_kv import WildCatCache
from wildcat_kv.haystack import build_context
from wildcat_kv.models import load_model


@torch.no_grad()
def main(
    max_tokens: Annotated[int, typer.Option(help="most tokens to store in a layer")] = 256,
    new_tokens: Annotated[int, typer.Option(help="tokens to generate", min=4)] = 2000,
    prompt_tokens: Annotated[int, typer.Option(help="tokens of essays to start from", min=1)] = 1000,
    model: Annotated[
        str | None, typer.Option(help="hub id, folder or GGUF file; the default model if left out")
    ] = None,
) -> None:
    """Generate by sampling, token after token, and look at every layer after each."""
    loaded, tokenizer = load_model(model)
    text = build_context(tokenizer, prompt_tokens, [], seed=0)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(loaded.device)
    cache = WildCatCache(loaded.config, max_tokens=max_tokens)
    generator = torch.Generator(loaded.device).manual_seed(0)
    quarter = new_tokens // 4
    table = Table(title=f"{cache.settings.max_tokens} tokens at most, {ids.shape[1]} read, {new_tokens} generated")
    for column in ("new tokens", "most stored in a layer", "cache, MiB", "tokens per second"):
        table.add_column(column, justify="right")
    stored, start = 0, time.perf_counter()
    for step in track(range(1, new_tokens + 1), description="generating", console=Console(stderr=True)):
        logits = loaded(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        ids = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        stored = max(stored, *(cache.stored_length(layer) for layer in range(len(cache.layers))))
        if step % quarter == 0:
            seconds = time.perf_counter() - start
            speed = f"{quarter / seconds:.1f}"
            table.add_row(str(step), str(stored), f"{cache.memory_bytes() / 2**20:.1f}", speed)
            stored, start = 0, time.perf_counter()
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
