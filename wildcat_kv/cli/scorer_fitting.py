"""Fit the scorer of a model, and write it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wildcat_kv.contexts.scorer_fitting import fit_scorer, scorer_texts
from wildcat_kv.data.downloads import progress
from wildcat_kv.files import replacing
from wildcat_kv.models.shipped import SMOLLM2


def write_scorer(model: Any, tokenizer: Any, output: Path, source: str | None, texts: int, tokens: int) -> None:
    """Fit a scorer and write it, with a summary to stdout.

    Args:
        model: a Transformers decoder.
        tokenizer: tokenizer of the model.
        output: file to write.
        source: hub id, folder or file of the model; None for the default model.
        texts: number of texts.
        tokens: tokens of each.
    """
    name = SMOLLM2.name if source is None else Path(source).name
    with progress(f"Reading {texts} texts of {tokens} tokens, twice each"):
        found = fit_scorer(
            model,
            tokenizer,
            scorer_texts(tokenizer, texts, tokens),
            name=name,
            description=f"{texts} texts of {tokens} tokens, Paul Graham's essays, half develop, with rare strings",
        )
    with replacing(output) as partial:
        found.save(partial)
    print(f"{output}: {len(found.heads)} layers, {sum(found.heads)} heads, {found.tokens} tokens")
    print(f"Use it: WildCatCache(model.config, compressor=QueryWildCat(scorer={str(output)!r}), ratio=0.25, sink=4)")
