"""Measure how Query WildCat shares its slots out on some texts: the profile of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.cache.caches import CompressedCache
from wildcat_kv.compressors.query_wildcat import FittedScorer, Profile, QueryWildCat
from wildcat_kv.compressors.query_wildcat.method import Chosen
from wildcat_kv.compressors.query_wildcat.model_match import fingerprint
from wildcat_kv.compressors.query_wildcat.profile import Point
from wildcat_kv.compressors.query_wildcat.survey import Survey
from wildcat_kv.contexts.reading import read
from wildcat_kv.data.haystack import build_context
from wildcat_kv.models.support import cache_layers, decoder_config

RATIOS = (0.03125, 0.0625, 0.125, 0.25, 0.5)
# Exact ends of the texts, as they are best with this method.
_SINK, _WINDOW = 4, 32
_DIGITS = 3
# Below this a part of the budget is a handful of slots.
_SHORTEST = 256


@dataclass(frozen=True)
class _Recorder(QueryWildCat):
    """Query WildCat that notes how it would deal at some ratios.

    Attributes:
        ratios: shares of the items to keep.
        found: shares of each text, float32 (ratios, 2, pairs): both parts, each layer's heads one after another.
    """

    ratios: tuple[float, ...] = ()
    found: list[Tensor] = field(default_factory=list, compare=False)

    @override
    def deal(self, surveys: Sequence[Survey], rank: int) -> list[Chosen]:
        items = surveys[0].attention.shape[-1]
        dealt = [self._shares(surveys, max(1, int(ratio * items))) for ratio in self.ratios]
        self.found.append(torch.stack(dealt))
        return super().deal(surveys, rank)

    def _shares(self, surveys: Sequence[Survey], rank: int) -> Tensor:
        """Divide the items that each head keeps by those that it would keep by equal shares."""
        parts = []
        for chosen in self.choose(surveys, rank):
            counts = torch.cat([layer.sum(-1).flatten().to("cpu", torch.float32) for layer in chosen])
            parts.append(counts / counts.mean().clamp_min(1))
        return torch.stack(parts)


def measure_profile(
    model: Any,
    texts: Sequence[Tensor],
    *,
    name: str,
    description: str,
    ratios: Sequence[float] = RATIOS,
    method: QueryWildCat | None = None,
) -> Profile:
    """Measure the shares of a model's layers and heads over some texts.

    Args:
        model: a Transformers decoder.
        texts: token ids, int64 (1, n) each.
        name: name of the model, for the reader of the profile.
        description: description of the texts.
        ratios: shares of the tokens to keep; several, since sharp layers are full sooner.
        method: parameters of the method, its scorer among them; its own `profile` must be None.

    Raises:
        ValueError: no text, one that is too short, a ratio outside (0, 1], or a model that cannot be compressed.
    """
    method = QueryWildCat() if method is None else method
    ratios = sorted(set(ratios))
    if not texts or min(text.shape[1] for text in texts) < _SHORTEST:
        raise ValueError(f"texts: give at least one, each of at least {_SHORTEST} tokens")
    if not ratios or not 0 < ratios[0] <= ratios[-1] <= 1:
        raise ValueError(f"ratios={ratios} must be shares of the tokens, in (0, 1]")
    decoder = decoder_config(model.config)
    layers = len(cache_layers(decoder)[1])
    own = {each.name: getattr(method, each.name) for each in fields(QueryWildCat)}
    recorder = _Recorder(**own, ratios=tuple(ratios))
    for text in texts:
        cache = CompressedCache(model.config, compressor=recorder, ratio=0.0625, sink=_SINK, window=_WINDOW)
        read(model, cache, text)
    return Profile(
        version=1,
        model=name,
        match=fingerprint(decoder),
        texts=description,
        tokens=sum(text.shape[1] for text in texts),
        scorer=method.scorer.digest if isinstance(method.scorer, FittedScorer) else None,
        points=_points(recorder, layers),
    )


def _points(recorder: _Recorder, layers: int) -> tuple[Point, ...]:
    """Average what a recorder found over the texts, at each of its ratios."""
    mean = torch.stack(recorder.found).mean(0).unflatten(-1, (layers, -1))
    if recorder.share == "layers":
        mean = mean.mean(-1, keepdim=True)
    return tuple(
        Point(ratio=ratio, attended=_rounded(first), recalled=_rounded(second))
        for ratio, (first, second) in zip(recorder.ratios, mean, strict=True)
    )


def _rounded(shares: Tensor) -> tuple[tuple[float, ...], ...]:
    """Turn shares (layers, heads) into numbers for a file."""
    return tuple(tuple(round(share, _DIGITS) for share in layer) for layer in shares.tolist())


def essay_texts(tokenizer: Any, count: int, tokens: int, seed: int = 0) -> list[Tensor]:
    """Cut texts for a profile from the half of the essays that is for choosing.

    Args:
        tokenizer: tokenizer of the model.
        count: number of texts.
        tokens: tokens of each.
        seed: seed of the first text; the next has the next one.

    Returns:
        Token ids, int64 (1, tokens) each, or a little shorter.
    """
    texts = [build_context(tokenizer, tokens, [], seed=seed + number, half="develop") for number in range(count)]
    return [tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids for text in texts]
