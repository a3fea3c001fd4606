"""A metric for keys in which queries and keys are balanced."""

from __future__ import annotations

import torch
from torch import Tensor

from wildcat_kv.coreset.temperature import constant_temperature

# Rows that are enough for second moments.
_ROWS = 1024
# Second moments are positive in every direction by at least this share of the largest.
_RIDGE = 1e-6
_FLATTEST = 1e-10


@torch.no_grad()
def balanced_metric(query: Tensor, key: Tensor, scale: float, dims: int | None = None) -> Tensor:
    """Find M, which makes z = M^T k of keys and u = b M^-1 q of queries equally large in every direction.

    A pivot stands for keys that are near in z. With a number tau in place of M all directions count alike. With this
    one those count less in which queries do not vary, and z and u have the same diagonal second moments, up to tau^2.
    With S_q = L L^T and L^T S_k L = Q diag(l) Q^T it is L Q diag(l)^(-1/4) sqrt(b / tau^2), S_k of recentred keys and
    S_q of queries as they are.

    Args:
        query: (rows, heads, m, d).
        key: (rows, heads, n, d).
        scale: b.
        dims: number of directions to keep, those in which z is largest; all by default.

    Returns:
        float64 (rows, heads, d, dims).
    """
    query, key = (tensor[:, :, :: -(-tensor.shape[2] // _ROWS)].double() for tensor in (query, key))
    key = key - key.mean(2, keepdim=True)
    of_query, of_key = (tensor.mT @ tensor / tensor.shape[2] for tensor in (query, key))
    level = of_query.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    level = torch.where(level > 0, level, 1.0)  # no query at all: any metric will do
    lower = torch.linalg.cholesky(of_query + _RIDGE * level * torch.eye(key.shape[-1], device=key.device))
    moments, directions = torch.linalg.eigh(lower.mT @ of_key @ lower)
    largest = moments[..., -1:]
    moments = torch.where(largest > 0, moments.clamp_min(largest * _FLATTEST), 1.0)
    factor = constant_temperature("released")
    assert factor is not None
    metric = lower @ directions * (moments.unsqueeze(-2) ** -0.25 * (scale / factor) ** 0.5)
    return metric.flip(-1)[..., :dims]
