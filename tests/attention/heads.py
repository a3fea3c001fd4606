"""Random queries, keys and values, and every method with settings that make it approximate small ones."""

import torch

from wildcat_kv.attention import (
    BalanceKV,
    Exact,
    HyperAttention,
    KDEformer,
    NearWildCat,
    Performer,
    Reformer,
    ScatterBrain,
    Stratified,
    Thinformer,
    Uniform,
    WildCatAttention,
)

SCALE = 0.3

METHODS = {
    "exact": Exact(),
    "wildcat": WildCatAttention(rank=30, bins=3),
    "near_wildcat": NearWildCat(rank=24, bins=4, dims=5, residual=0.5),
    "uniform": Uniform(rank=20),
    "stratified": Stratified(rank=20),
    "thinformer": Thinformer(g=1),
    "balancekv": BalanceKV(rank=20, block=16),
    "performer": Performer(features=40),
    "scatterbrain": ScatterBrain(band=9, features=20),
    "reformer": Reformer(chunk=8, rounds=3),
    "kdeformer": KDEformer(block=12, samples=9, planes=3),
    "hyperattention": HyperAttention(block=12, samples=9, planes=3, exact_below=0),
}


def heads(q=70, n=70, d=6, d_v=5, *, heads=4, kv_heads=2, batch=(2,), dtype=torch.float64, seed=0):
    """Make queries, keys and values whose mean is not 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        normal(*batch, heads, q, d) + 0.3,
        normal(*batch, kv_heads, n, d) + 0.5,
        normal(*batch, kv_heads, n, d_v) + 0.5,
    )
