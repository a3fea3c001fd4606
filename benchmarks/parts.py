"""Measure what reading a text in parts costs, without compression: `python -m benchmarks.parts`, five minutes.

Numbers are planted in essays and asked for one by one. The whole text, two and three parts joined, and the last part
alone are read exactly, so that what differs comes from the parts. The table is in docs/limits.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer

from benchmarks.tables import Table
from wildcat_kv import CompressedContext, WildCatCache, compress_context
from wildcat_kv.contexts.prompts import encode_context, encode_follow_up
from wildcat_kv.contexts.reading import Likelihood, loglikelihood, read
from wildcat_kv.data.haystack import Needle, build_context, make_needles
from wildcat_kv.models import load_model

_DEPTHS = (0.1, 0.3, 0.45, 0.6, 0.75, 0.9)
_PARTS = (1, 2, 3)


def main(
    tokens: Annotated[int, typer.Option(help="Length of a text.")] = 1200,
    texts: Annotated[int, typer.Option(help="Number of texts.", min=2)] = 8,
    model: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file.")] = None,
) -> None:
    """Print the loss in nats a digit for every way of reading."""
    decoder, tokenizer = load_model(model)
    losses: dict[str, list[float]] = {}
    right: dict[str, int] = {}
    with torch.no_grad():
        for seed in range(texts):
            needles = make_needles(len(_DEPTHS), 100 + seed)
            text = build_context(tokenizer, tokens, needles, seed=seed, depths=_DEPTHS, half="develop")
            for name, context in _contexts(decoder, tokenizer, text):
                found = [_ask(context, needle) for needle in needles]
                losses.setdefault(name, []).append(statistics.mean(-one.total / one.tokens for one in found))
                right[name] = right.get(name, 0) + sum(one.greedy for one in found)
    asked = texts * len(_DEPTHS)
    rows = [
        (name, f"{statistics.mean(each):.2f}", f"{statistics.stdev(each):.2f}", f"{right[name]} of {asked}")
        for name, each in losses.items()
    ]
    header = ("what the cache holds", "nats a digit", "deviation over texts", "all digits right")
    print(Table("Texts in parts", f"{texts} texts of {tokens} tokens; less is better.", header, rows).markdown())


def _contexts(model: Any, tokenizer: Any, text: str) -> Iterator[tuple[str, CompressedContext]]:
    """The text read as a whole, in parts, and its last parts alone."""
    head, body = encode_context(tokenizer, text)
    positions = model.config.max_position_embeddings
    for parts in _PARTS:
        reserve = positions - head.shape[1] - -(-body.shape[1] // parts)
        name = "the whole text" if parts == 1 else f"all {parts} parts, joined"
        yield name, compress_context(model, tokenizer, text, ratio=1.0, reserve=reserve)
        if parts > 1:
            ids = torch.cat((head, body.tensor_split(parts, dim=1)[-1]), dim=1)
            cache = WildCatCache(model.config, compressor="wildcat", ratio=1.0)
            read(model, cache, ids)
            yield f"the last of {parts} alone", CompressedContext(model, tokenizer, cache, ids, ids.shape[1])


def _ask(context: CompressedContext, needle: Needle) -> Likelihood:
    """How likely the number is, after the words that introduce it."""
    lead = needle.sentence.removesuffix(f"{needle.value}.")
    question = encode_follow_up(context.tokenizer, needle.question, lead)
    answer = context.tokenizer(needle.value, return_tensors="pt", add_special_tokens=False).input_ids[0]
    ids = torch.cat((context.ids, question), dim=1)
    return loglikelihood(context.model, context.cache.clone(), ids, None, [answer])[0]


if __name__ == "__main__":
    typer.run(main)
