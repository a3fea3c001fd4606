"""A diagnostic: how much of each token lives on in its coreset."""

import torch

from wildcat_kv import compress_kv


def token_mass(keys, **options):
    """Column sums of W (..., n) for keys (..., n, d): 1 for pivots, near 0 for tokens whose values are lost.

    The weights are linear in the values, so the identity in place of the values reads off W.
    """
    n = keys.shape[-2]
    identity = torch.eye(n, dtype=torch.float32, device=keys.device).expand(*keys.shape[:-2], n, n)
    return compress_kv(keys, identity, **options).values.sum(-2)
