"""Fit the scorer of a model: what a second reading finds, from what the first one sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.query_wildcat import FittedScorer, QueryWildCat, RereadingWildCat
from wildcat_kv.compressors.query_wildcat.fitted_scores import item_features
from wildcat_kv.compressors.query_wildcat.model_match import fingerprint
from wildcat_kv.compressors.query_wildcat.survey import Survey
from wildcat_kv.contexts.context import Context
from wildcat_kv.contexts.prompts import encode_context
from wildcat_kv.coreset.tensors import full_precision
from wildcat_kv.data.rare_strings import rare_text
from wildcat_kv.models.support import cache_layers, decoder_config

# Exact ends of the texts, as they are best with this method.
_SINK, _WINDOW = 4, 32
# Scores below this are all the same: nobody keeps such tokens.
_LEAST_SCORE = 1e-3
# Standard deviations below this are of features that never change.
_LEAST_DEVIATION = 1e-4
# Below this a text has too few tokens behind its ends.
_SHORTEST = 256
# Seed of the first text: far from those of evaluations.
_FIRST_SEED = 700_001


@dataclass(frozen=True)
class _Recorder(QueryWildCat):
    """Query WildCat that notes the features of its items.

    Attributes:
        found: float32 (heads, items, features) by the layer's place.
    """

    found: dict[int, Tensor] = field(default_factory=dict, compare=False)

    @override
    def survey(self, block: KVBlock) -> Survey:
        survey = super().survey(block)
        self.found[block.layer_index] = item_features(block, survey.recall)[0][0]
        return survey


class _Regression:
    """Sums of products for the ridge regressions of a layer's heads, float64."""

    def __init__(self) -> None:
        self._count = 0
        self._moments: Tensor | None = None

    def add(self, features: Tensor, logits: Tensor) -> None:
        """Add samples: features (heads, n, f) and what they are to give (heads, n)."""
        ones = torch.ones_like(logits)
        samples = torch.cat((features, ones[..., None], logits[..., None]), dim=-1).to(torch.float64)
        moments = torch.matmul(samples.mT, samples)
        self._count += logits.shape[1]
        self._moments = moments if self._moments is None else self._moments + moments

    def solve(self, ridge: float) -> Tensor:
        """Solve for the weights, (heads, f + 1), the constant last.

        Args:
            ridge: pull to no weights, where each feature has a variance of 1.
        """
        assert self._moments is not None
        moments = self._moments / self._count
        mean, target = moments[:, :-2, -2], moments[:, -2, -1:]
        covariance = moments[:, :-2, :-2] - mean[:, :, None] * mean[:, None]
        deviation = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().clamp_min(_LEAST_DEVIATION)
        scaled = covariance / deviation[:, :, None] / deviation[:, None]
        scaled.diagonal(dim1=-2, dim2=-1).add_(ridge)
        common = (moments[:, :-2, -1] - mean * target) / deviation
        weights = torch.linalg.solve(scaled, common) / deviation
        return torch.cat((weights, target - (weights * mean).sum(-1, keepdim=True)), dim=-1)


def fit_scorer(
    model: Any, tokenizer: Any, texts: Sequence[Tensor], *, name: str, description: str, ridge: float = 0.01
) -> FittedScorer:
    """Fit the scorer of a model to some texts, each of which it reads twice.

    Args:
        model: a Transformers decoder.
        tokenizer: tokenizer of the model.
        texts: token ids, int64 (1, n) each.
        name: name of the model, for the reader of the scorer.
        description: description of the texts.
        ridge: pull to no weights, where each feature has a variance of 1.

    Raises:
        ValueError: no text, one that is too short, or a model that cannot be compressed.
    """
    if not texts or min(text.shape[1] for text in texts) < _SHORTEST:
        raise ValueError(f"texts: give at least one, each of at least {_SHORTEST} tokens")
    if not ridge > 0:
        raise ValueError(f"ridge={ridge} must be more than 0")
    decoder = decoder_config(model.config)
    layers = [_Regression() for _ in cache_layers(decoder)[1]]
    for text in texts:
        context, recorder = Context(model, text.to(model.device)), _Recorder()
        scores = context.reread(RereadingWildCat(), tokenizer)
        context.compress(compressor=recorder, ratio=0.25, sink=_SINK, window=_WINDOW)
        for place, layer in enumerate(layers):
            wanted = scores[place][0, :, _SINK : text.shape[1] - _WINDOW, 0]
            layer.add(recorder.found[place], wanted.clamp(_LEAST_SCORE, 1 - _LEAST_SCORE).logit())
    with torch.no_grad(), full_precision(model.device):
        weights = [layer.solve(ridge) for layer in layers]
    tokens = sum(text.shape[1] for text in texts)
    return FittedScorer.of(weights, model=name, match=fingerprint(decoder), texts=description, tokens=tokens)


def scorer_texts(tokenizer: Any, count: int, tokens: int) -> list[Tensor]:
    """Make texts to fit a scorer to: essays with rare strings, every second one in the chat template.

    The essays are the half that is for choosing.

    Args:
        tokenizer: tokenizer of the model.
        count: number of texts.
        tokens: tokens of each, without the template.

    Returns:
        Token ids, int64 (1, n) each.
    """
    found = []
    for number in range(count):
        text = rare_text(tokenizer, tokens, seed=_FIRST_SEED + number, half="develop")
        if number % 2:
            found.append(tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids)
        else:
            found.append(torch.cat(encode_context(tokenizer, text), dim=1))
    return found
