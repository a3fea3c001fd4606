"""Measure the profile of a model, and write it to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wildcat_kv.compressors import QueryWildCat
from wildcat_kv.contexts.profiling import RATIOS, essay_texts, measure_profile
from wildcat_kv.data.downloads import progress
from wildcat_kv.files import replacing
from wildcat_kv.models.shipped import SMOLLM2

# Layers to name in the summary.
_NAMED = 3


def write_profile(
    model: Any,
    tokenizer: Any,
    output: Path,
    source: str | None,
    ratios: Sequence[float] | None,
    method: QueryWildCat,
    texts: int,
    tokens: int,
) -> None:
    """Measure a profile and write it, with a summary to stdout.

    Args:
        model: a Transformers decoder.
        tokenizer: tokenizer of the model.
        output: file to write.
        source: hub id, folder or file of the model; None for the default model.
        ratios: shares of the tokens to keep; None for the usual ones.
        method: parameters of the method: how heads share, and the scorer to measure with.
        texts: number of texts.
        tokens: tokens of each.
    """
    name = SMOLLM2.name if source is None else Path(source).name
    with progress(f"Reading {texts} texts of {tokens} tokens"):
        found = measure_profile(
            model,
            essay_texts(tokenizer, texts, tokens),
            name=name,
            description=f"{texts} texts of {tokens} tokens, Paul Graham's essays, half develop",
            ratios=ratios or RATIOS,
            method=method,
        )
    with replacing(output) as partial:
        partial.write_text(found.to_json(), encoding="utf-8")
    point = found.points[len(found.points) // 2]
    sizes = [sum(layer) / len(layer) for layer in point.recalled]
    most = sorted(range(len(sizes)), key=lambda place: -sizes[place])[:_NAMED]
    named = ", ".join(f"{place} ({sizes[place]:.1f})" for place in most)
    print(f"{output}: {len(sizes)} layers, {len(found.points)} ratios, {found.tokens} tokens")
    print(f"Layers with the largest shares of what a repeated text needs, at ratio {point.ratio}: {named}")
    given = f"profile={str(output)!r}" + ("" if method.scorer is None else ", scorer=...")
    print(f"Use it: WildCatCache(model.config, compressor=QueryWildCat({given}), ratio=0.25, sink=4)")
