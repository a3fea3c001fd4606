"""Attention Matching: a few keys with fitted weights and values.

The fit is to what queries get from all keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import Compressed, Compressor, KVBlock
from wildcat_kv.compressors.fitting import solve_ridge, spread_evenly
from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.scorer import best_items, take_items
from wildcat_kv.coreset.tensors import full_precision, saturate_, take_columns

# Against the squared norm of each regressor: with fewer queries than slots, a fit stays near the tokens' own values.
_RIDGE = 1e-4
# Against the largest norm of a regressor, and against 1, the mass of all tokens.
_NEGLIGIBLE = 1e-6
# Of power iteration for the step of the projected gradient; a step that is a little long does no harm.
_POWER_STEPS = 8


@dataclass(frozen=True)
class AttentionMatching(Compressor):
    """Keep the keys that queries attend to most; fit weights and values.

    1. Keys: the highest root-mean-square attention over the queries.
    2. Weights: non-negative least squares, so that the queries see the mass that all tokens had; in
       [1 / max_weight, max_weight].
    3. Values: least squares, so that the queries get the outputs that they had.

    Needs queries: those since the last fold (of the prompt: all of it) and `carried` from before, at most `queries` of
    them, evenly spread; the query heads that share a key head are pooled. The paper's best results take reference
    queries from a model that is asked to repeat the context, as `RereadingMatching` does; these are of the context
    itself, which costs nothing.
    Costs O(q n d) for the scores and O(q r^2) for each fit, q queries, n tokens, r slots.

    Attributes:
        queries: most reference queries of a query head.
        carried: queries kept from one fold to the next.
        iterations: steps of projected gradient, after the clamped least-squares solution; 2 in the authors' code.
        max_weight: bound of the weights and of their inverses; e^3 in the authors' code.

    Source: Zweiger, Fu, Guo and Kim, arXiv 2602.16284, highest-attention keys. Differs: the value fit has a small
    ridge that pulls towards the tokens' own values, where the authors' fit is undetermined with few queries.
    """

    paper: ClassVar[str] = "arXiv 2602.16284"

    queries: int = 512
    carried: int = 256
    iterations: int = 2
    max_weight: float = 20.085536923187668

    def __post_init__(self) -> None:
        for name in ("queries", "carried"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, in queries")
        if self.max_weight < 1:
            raise ValueError(f"max_weight={self.max_weight} must be at least 1")

    @property
    def observation(self) -> Observation:
        """All queries since the last fold, and some from before."""
        return Observation(latest=None, carried=self.carried)

    @override
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        with torch.no_grad(), full_precision(block.keys.device):
            queries, candidate = self._reference(block), block.slice_items(block.valid)
            keys, values = (block.slice_items(tensor).to(torch.float32) for tensor in (block.keys, block.values))
            mass = candidate.to(torch.float32)
            if block.weights is not None:
                mass = block.slice_items(block.weights).clamp_min(0.0).masked_fill(~candidate, 0.0)
            log_total, output, importance = _attention_by_head(queries, keys, values, mass, candidate)

            index, valid = best_items(block, importance, rank)
            kept = take_items(block, index, valid)
            own = kept.coreset
            terms = (torch.matmul(queries, take_columns(keys, index).mT) - log_total.unsqueeze(-1)).exp_()
            terms.masked_fill_(~valid.unsqueeze(2), 0.0)
            mean_mass = mass.sum(-1, keepdim=True) / candidate.sum(-1, keepdim=True).clamp_min(1)
            largest = self.max_weight * mean_mass.clamp_min(1.0)
            weights = self._fit_weights(terms, own.weights, largest).masked_fill_(~valid, 0.0)
            # What a query pays each slot, of what it pays all of them.
            terms.mul_(weights.unsqueeze(2))
            terms.div_(terms.sum(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny))
            mean = own.values.to(torch.float32) / torch.where(own.weights > 0, own.weights, 1.0).unsqueeze(-1)
            fitted = _least_squares(terms, output, mean)
        numerators = saturate_(fitted * weights.unsqueeze(-1), block.values.dtype)
        return replace(kept, coreset=replace(own, values=numerators, weights=weights))

    def _reference(self, block: KVBlock) -> Tensor:
        """Scale the queries of each key head, float32 (rows, heads, q, d)."""
        assert block.queries is not None
        total = block.queries.shape[2]
        taken = min(self.queries, total)
        place = total - 1 - spread_evenly(total, taken, block.queries.device)
        queries = block.queries.index_select(2, place).to(torch.float32)
        queries = queries.unflatten(1, (block.keys.shape[1], -1)) * block.scale
        return queries.flatten(2, 3)

    def _fit_weights(self, terms: Tensor, own: Tensor, largest: Tensor) -> Tensor:
        """Fit weights (rows, heads, r), with which the terms sum to 1.

        The terms are (rows, heads, q, r); the sum is over r, for each query.
        """
        lowest, target = 1 / self.max_weight, terms.new_ones(terms.shape[:-1])
        weights = _least_squares(terms, target.unsqueeze(-1), own.unsqueeze(-1)).squeeze(-1)
        weights = torch.minimum(weights.clamp_min_(lowest), largest)
        gram = terms.mT @ terms
        direction = torch.ones_like(weights).unsqueeze(-1)
        for _ in range(_POWER_STEPS):
            direction = torch.nn.functional.normalize(gram @ direction, dim=-2)
        steepest = torch.linalg.vector_norm(gram @ direction, dim=-2).clamp_min_(torch.finfo(torch.float32).tiny)
        for _ in range(self.iterations):
            residual = torch.matmul(terms, weights.unsqueeze(-1)).squeeze(-1) - target
            weights = weights - torch.matmul(residual.unsqueeze(-2), terms).squeeze(-2) / steepest
            weights = torch.minimum(weights.clamp_min_(lowest), largest)
        return weights


def _attention_by_head(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `_attention` one head of one row at a time.

    Memory is O(q n), and rounding does not depend on the batch.
    """
    found = []
    for row in zip(*(tensor.split(1) for tensor in tensors), strict=True):
        seen = [_attention(*head) for head in zip(*(tensor.split(1, dim=1) for tensor in row), strict=True)]
        found.append([torch.cat(parts, dim=1) for parts in zip(*seen, strict=True)])
    log_total, output, importance = (torch.cat(parts) for parts in zip(*found, strict=True))
    return log_total, output, importance


def _attention(
    queries: Tensor, keys: Tensor, values: Tensor, mass: Tensor, candidate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what one head's queries get from all items.

    Returns:
        The logarithm of the mass that each query sees (rows, 1, q), its output (rows, 1, q, d_v), and the
        root-mean-square attention to each item (rows, 1, n), up to a factor.
    """
    scores = torch.matmul(queries, keys.mT).masked_fill_(~candidate.unsqueeze(2), -torch.inf)
    largest = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    terms = scores.sub_(largest).exp_()
    total = torch.matmul(terms, mass.unsqueeze(-1)).clamp_min_(torch.finfo(torch.float32).tiny)
    output = torch.matmul(terms, values).div_(total)
    terms.div_(total)
    ones = terms.new_ones(*terms.shape[:2], 1, terms.shape[2])
    importance = torch.matmul(ones, terms.square_()).squeeze(2).sqrt_() * mass
    return (largest + total.log()).squeeze(-1), output, importance


def _least_squares(terms: Tensor, target: Tensor, prior: Tensor) -> Tensor:
    """Solve terms x = target by least squares, near `prior`.

    The terms are (..., q, r), the target is (..., q, k), and x is (..., r, k). x stays near `prior` where the terms
    do not decide it.
    """
    # The normal equations square the condition number: double precision where the device has it.
    precision = torch.float32 if terms.device.type == "mps" else torch.float64
    norms = torch.linalg.vector_norm(terms, dim=-2)
    # What no query pays attention to says nothing, and must not be blown up.
    norms = torch.maximum(norms, _NEGLIGIBLE * norms.amax(-1, keepdim=True)).clamp_min_(_NEGLIGIBLE)
    scaled = (terms / norms.unsqueeze(-2)).to(precision)
    rest = target.to(precision) - terms.to(precision) @ prior.to(precision)
    change = solve_ridge(scaled.mT @ scaled, scaled.mT @ rest, _RIDGE)
    return prior + (change / norms.unsqueeze(-1).to(precision)).to(torch.float32)
