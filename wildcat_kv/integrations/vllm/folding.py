"""Weights folded into the channels that keys have, for attention that knows no weights.

A weight multiplies e^(b q.k), so it is an addition of log w to the score. With a direction u for which b q.u = 1 for
all queries q, the key k + u log w has that score. No direction does that for all queries; a ridge solution does
nearly so, as far as queries have a common mean. The numerators stay exact: values are divided by the weight folded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wildcat_kv.coreset.wtdattn import LEAST_MASS
from wildcat_kv.integrations.vllm.entries import HeadEntries

# Scale the ridge by the mean square of the queries' channels.
_RIDGE = 1e-2
# An entry that adds nothing has this score below its own key's.
_EMPTY = -60.0


def direction(queries: Tensor, scale: float) -> Tensor:
    """Find u with b q.u near 1 for all queries.

    Args:
        queries: (m, d).
        scale: factor b of the scores.

    Returns:
        float32 (d,).
    """
    scaled = queries.double() * scale
    moments = scaled.mT @ scaled
    moments.diagonal().add_(_RIDGE * moments.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(moments, scaled.sum(0)).float()


def folded(head: HeadEntries, along: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Fold a head's weights, and pad it to `slots` entries.

    A weight that is negative or tiny is replaced by its size, or by 2^-7.

    Args:
        head: entries.
        along: direction u, float32 (d,).
        slots: entries to make.

    Returns:
        Keys float32 (slots, d), and values float32 (slots, d_v).
    """
    mass = head.weights.abs().clamp_min(LEAST_MASS)
    keys = head.keys.float() + mass.log().unsqueeze(1) * along
    values, more = head.numerators / mass.unsqueeze(1), slots - len(mass)
    empty = (head.keys[-1:].float() + _EMPTY * along).expand(more, -1)
    return torch.cat((keys, empty)), torch.nn.functional.pad(values, (0, 0, 0, more))


def folding_error(head: HeadEntries, keys: Tensor, values: Tensor, queries: Tensor, scale: float) -> float:
    """Measure the relative error of attention to folded entries.

    Args:
        head: entries with their weights.
        keys: folded keys (slots, d).
        values: folded values (slots, d_v).
        queries: (m, d).
        scale: factor b of the scores.

    Returns:
        Root mean square of the error over that of the outputs.
    """
    scores = scale * queries.float() @ head.keys.float().mT
    terms = (scores - scores.amax(-1, keepdim=True)).exp()
    masses = terms @ head.weights
    exact = (terms @ head.numerators) / torch.where(masses > 0, masses, torch.inf).unsqueeze(1)
    found = (scale * queries.float() @ keys.mT).softmax(-1) @ values
    return float((found - exact).square().sum().div(exact.square().sum().clamp_min(1e-30)).sqrt())
