"""Fit of slots to what queries got from all items.

It also estimates the error that is left.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from wildcat_kv.compressors.fitting import solve_ridge
from wildcat_kv.compressors.query_wildcat.survey import NEGLIGIBLE, Asked
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.tensors import saturate_

_TINY = 1e-20
# Attention takes less than this share of a query's mass for none.
_LEAST_MASS = 1e-6


def fit_slots(coreset: Coreset, asked: Asked, ridge: float) -> Coreset:
    """Numerators and weights nearer to what some reference queries got from all items.

    Least squares, drawn to what they are: with E (q, r) of entries e^(b q.k_s) over the query's total and the residual
    R of [output, mass], the change is E^T (E E^T + ridge * mean(diag(E E^T)))^-1 R.
    """
    held = torch.cat((coreset.values.to(torch.float32), coreset.weights.unsqueeze(-1)), dim=-1)
    terms = _terms(coreset, asked)
    rest = asked.items - torch.matmul(terms, held)
    gram = torch.matmul(terms, terms.mT)
    level = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).div_(max(1, gram.shape[-1]))
    change = torch.matmul(terms.mT, solve_ridge(gram, rest, level.mul_(ridge).clamp_min_(_TINY)))
    held = torch.addcmul(held, change, coreset.valid.unsqueeze(-1).to(held.dtype))
    return replace(coreset, values=saturate_(held[..., :-1].clone(), coreset.values.dtype), weights=held[..., -1])


def estimate_error(coreset: Coreset, judges: Asked, group: int) -> Tensor:
    """Estimate ||o' - o|| / ||o|| over the judges, float32 (rows, query_heads)."""
    held = torch.cat((coreset.values.to(torch.float32), coreset.weights.unsqueeze(-1)), dim=-1)
    instead = torch.matmul(_terms(coreset, judges), held) - judges.items
    whole = judges.items[..., :-1] + judges.others
    mass = 1 + instead[..., -1:]
    # Attention gives 0 where the mass is not positive.
    found = torch.where(mass > _LEAST_MASS, (whole + instead[..., :-1]) / mass.clamp_min(_LEAST_MASS), 0.0)
    difference, whole = (tensor.unflatten(2, (group, -1)).flatten(3).norm(dim=-1) for tensor in (found - whole, whole))
    return (difference / whole.clamp_min(_TINY)).flatten(1)


def _terms(coreset: Coreset, asked: Asked) -> Tensor:
    """e^(b q.k_s) over each query's total, (rows, heads, q, r); 0 for padding."""
    scores = torch.matmul(asked.queries, coreset.keys.to(torch.float32).mT).sub_(asked.log_total.unsqueeze(-1))
    there = coreset.valid.unsqueeze(2)
    # Before the exponential: a padding slot's key of zeros can overflow it.
    return scores.masked_fill_(~there, -torch.inf).clamp_min_(NEGLIGIBLE).exp_().mul_(there)
