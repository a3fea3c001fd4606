"""COMPRESSKV: keys and values into a weighted coreset, bin by bin. Pure tensors, knows no model.

Source: Schröder and Mackey, "WildCat: Near-Linear Attention in Theory and Practice", arXiv 2602.10056.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from wildcat_kv.coreset.binned import BLOCKED_RANK, BinwiseFold, Draws, position_order, take_all
from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.rpnys import Weights
from wildcat_kv.coreset.rpnys_blocked import BLOCK
from wildcat_kv.coreset.temperature import Temperature
from wildcat_kv.coreset.tensors import full_precision, take_columns


@dataclass(frozen=True)
class Coreset:
    """Weighted keys and values that stand for more tokens than they are.

    Attributes:
        keys: (..., r, d), K_S: the pivots' keys as they came, in the order of their positions.
        values: (..., r, d_v), numerators U = W V in the dtype of the values.
        weights: float32 (..., r), w = W 1; may be negative.
        valid: bool (..., r), False for padding slots: key, value and weight are zero there.
    """

    keys: Tensor
    values: Tensor
    weights: Tensor
    valid: Tensor


def compress_kv(
    keys: Tensor,
    values: Tensor,
    *,
    rank: int,
    scale: float | None = None,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    query_norm: float | Tensor | None = None,
    temperature: Temperature = "released",
    weighting: Weights = "nystrom",
    value_bound: Tensor | None = None,
    bins: int = 1,
    noise: Tensor | None = None,
) -> Coreset:
    """Compress n keys and values into `rank` weighted ones.

    Computed in float32 whatever the dtype of the inputs, without gradients.

    Args:
        keys: (..., n, d), floating point.
        values: (..., n, d_v); with `weights`, the numerators U of earlier slots.
        rank: slots to fill, at least `bins`. A bin with no more tokens than slots is stored unchanged.
        scale: b, the factor of the attention scores, positive; d^-1/2 by default.
        weights: (..., n), the weights w of points that are coreset slots already, 1 for exact tokens.
        valid: bool (..., n), False for points that take part in nothing, though they keep their place in
            the bins; all by default.
        query_norm: R_Q, a bound on the norms of the queries to come, a number or (...); by default the
            largest norm of a recentred key in the bin.
        temperature: "released" or "theory", see `temperature.py`.
        weighting: "nystrom" for signed weights, "clipped" for their non-negative part.
        value_bound: (...), s^2, the sum over channels of the largest squared value seen; with `weights`,
            slots with a U that is large against it are drawn more often.
        bins: bins of consecutive tokens, each compressed on its own.
        noise: (..., s, n), standard Gumbel noise, s at least the largest rank of a bin: draws pivots one at a
            time. By default from torch's global generator, and large ranks in blocks; the law is the same.

    Returns:
        A Coreset of `rank` slots.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit; names the argument and its value.

    Source: COMPRESSKV of arXiv 2602.10056.

    Example:
        >>> keys, values = torch.randn(2, 8, 100, 64), torch.randn(2, 8, 100, 64)
        >>> compress_kv(keys, values, rank=24, bins=2).values.shape
        torch.Size([2, 8, 24, 64])
    """
    _check(keys, values, weights, valid, query_norm, scale, rank, bins, temperature, weighting)
    batch, (n, d) = keys.shape[:-2], keys.shape[-2:]
    layout = BinLayout.build(n, [n], [rank], [bins], keys.device)
    draws: Draws = _Drawn(layout, keys.device)
    if noise is not None:
        if noise.shape[:-2] != batch or noise.shape[-1] != n or noise.shape[-2] < layout.bin_rank:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; it must be {(*batch, layout.bin_rank, n)}, "
                "one row for every step of a bin"
            )
        steps = noise[..., : layout.bin_rank, :].reshape(1, -1, layout.bin_rank, n)
        draws = _Given(layout.gather(steps.mT, dtype=torch.float32).mT)
    if valid is not None:  # what takes part in nothing may be NaN
        valid = valid.expand(*batch, n)
        keys, values = (tensor.masked_fill(~valid.unsqueeze(-1), 0.0) for tensor in (keys, values))
    if query_norm is not None:
        query_norm = torch.as_tensor(query_norm, dtype=torch.float32, device=keys.device).expand(batch).reshape(1, -1)
    coreset, _ = compress_bins(
        keys.reshape(1, -1, n, d),
        values.reshape(1, -1, n, values.shape[-1]),
        layout,
        draws,
        blocked=noise is None and layout.bin_rank >= BLOCKED_RANK,
        scale=d**-0.5 if scale is None else scale,
        weights=None if weights is None else weights.expand(*batch, n).reshape(1, -1, n),
        valid=None if valid is None else valid.reshape(1, -1, n),
        query_norm=query_norm,
        value_bound=None if value_bound is None else value_bound.expand(batch).reshape(1, -1),
        temperature=temperature,
        weighting=weighting,
    )
    return Coreset(
        keys=coreset.keys.reshape(*batch, rank, d),
        values=coreset.values.reshape(*batch, rank, -1),
        weights=coreset.weights.reshape(*batch, rank),
        valid=coreset.valid.reshape(*batch, rank),
    )


@torch.no_grad()
def compress_bins(
    keys: Tensor,
    values: Tensor,
    layout: BinLayout,
    draws: Draws,
    *,
    blocked: bool,
    scale: float,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    query_norm: Tensor | None = None,
    value_bound: Tensor | None = None,
    temperature: Temperature = "released",
    weighting: Weights = "nystrom",
) -> tuple[Coreset, Tensor]:
    """`compress_kv` for rows of a batch that may differ in length, rank and number of bins.

    Args:
        keys: (rows, heads, n, d), finite, also where they take part in nothing.
        values: (rows, heads, n, d_v), likewise.
        layout: of the rows' bins.
        draws: the randomness.
        blocked: whether pivots are drawn in blocks, see `accelerated.py`; else one at a time.
        scale: as in `compress_kv`; so are the arguments below.
        weights: float32 (rows, heads, n).
        valid: bool (rows, heads, n).
        query_norm: float32 (rows, heads).
        value_bound: float32 (rows, heads).
        temperature: rule for tau.
        weighting: signed or clipped.

    Returns:
        A Coreset of (rows, heads, c, ...), c the largest rank of a row; and int64 (rows, heads, c), the place of the
        key that each slot has, arbitrary for padding slots.
    """
    weights = None if weights is None else weights.to(torch.float32)
    fold = BinwiseFold(
        keys, values, layout, draws, blocked, scale, weights, valid, query_norm, value_bound, temperature, weighting
    )
    if layout.lossless:
        used = fold.used(range(keys.shape[1]), range(layout.bins))
        return take_pivots(keys, values, weights, layout, *take_all(used, layout.bin_rank))
    with full_precision(keys.device):
        slots = fold.slots()

    if slots.computed is None:  # all are
        valid = layout.collect(slots.found) & layout.slot_used.unsqueeze(1)
        source = layout.collect(layout.columns(slots.pivots))
        coreset = Coreset(
            keys=take_columns(keys, source).mul_(valid.unsqueeze(-1).to(keys.dtype)),
            values=layout.collect(slots.values) * valid.unsqueeze(-1).to(values.dtype),
            weights=layout.collect(slots.weights) * valid.to(torch.float32),
            valid=valid,
        )
        return coreset, source
    tokens, source = take_pivots(keys, values, weights, layout, slots.pivots, slots.found)
    computed = layout.collect(slots.computed) & layout.slot_used.unsqueeze(1)
    coreset = replace(
        tokens,
        values=torch.where(computed.unsqueeze(-1), layout.collect(slots.values), tokens.values),
        weights=torch.where(computed, layout.collect(slots.weights), tokens.weights),
    )
    return coreset, source


def token_mass(
    keys: Tensor,
    *,
    rank: int,
    scale: float | None = None,
    temperature: Temperature = "released",
    bins: int = 1,
    noise: Tensor | None = None,
) -> Tensor:
    """How much of each token lives on in the coreset: the column sums of W, a diagnostic.

    1 for pivots; near 0 for tokens that the kernel does not reach (widely spread keys), whose values are
    lost. The median over the tokens says whether the temperature suits the keys.

    Args:
        keys: (..., n, d), with the other arguments as in `compress_kv`.
        rank: slots.
        scale: b.
        temperature: rule for tau.
        bins: bins of consecutive tokens.
        noise: as in `compress_kv`.

    Returns:
        float32 (..., n).

    Example:
        >>> float(token_mass(torch.zeros(10, 4), rank=2).min())  # equal keys stand for each other
        1.0
    """
    # The weights are linear in the inputs, so the identity in place of the values reads off W.
    n = keys.shape[-2]
    identity = torch.eye(n, dtype=torch.float32, device=keys.device).expand(*keys.shape[:-2], n, n)
    return compress_kv(
        keys, identity, rank=rank, scale=scale, temperature=temperature, bins=bins, noise=noise
    ).values.sum(-2)


def take_pivots(
    keys: Tensor,
    values: Tensor,
    weights: Tensor | None,
    layout: BinLayout,
    pivots: Tensor,
    found: Tensor,
) -> tuple[Coreset, Tensor]:
    """A Coreset of pivots as they came: keys, values and weights unchanged, padding slots zero.

    Args:
        keys: (rows, heads, n, d).
        values: (rows, heads, n, d_v).
        weights: float32 (rows, heads, n), or None for 1.
        layout: of the rows' bins.
        pivots: int64 (rows, heads, bins, bin_rank), places within the bins; sorted here by position.
        found: bool, of the same shape, False for slots that stay empty.

    Returns:
        A Coreset of (rows, heads, c, ...), and the places of its keys, int64 (rows, heads, c).
    """
    order = position_order(pivots, found)
    columns = layout.collect(layout.columns(pivots.gather(-1, order)))
    valid = layout.collect(found.gather(-1, order)) & layout.slot_used.unsqueeze(1)

    empty = ~valid
    coreset = Coreset(
        keys=take_columns(keys, columns).masked_fill_(empty.unsqueeze(-1), 0.0),
        values=take_columns(values, columns).masked_fill_(empty.unsqueeze(-1), 0.0),
        weights=valid.to(torch.float32) if weights is None else take_columns(weights, columns).masked_fill_(empty, 0.0),
        valid=valid,
    )
    return coreset, columns


class _Given:
    """Noise that the caller gave, (rows, heads, bins, bin_rank, t)."""

    def __init__(self, noise: Tensor) -> None:
        self._noise = noise

    def gumbel(self, heads: range, bins: range) -> Tensor:
        return self._noise[:, heads.start : heads.stop, bins.start : bins.stop]

    def uniform(self, heads: range, bins: range, turn: int) -> Tensor:
        raise NotImplementedError("noise that is given is for one step after the other")


class _Drawn:
    """Noise from torch's global generator."""

    def __init__(self, layout: BinLayout, device: torch.device) -> None:
        self._layout, self._device = layout, device

    def gumbel(self, heads: range, bins: range) -> Tensor:
        shape = (1, len(heads), len(bins), self._layout.bin_rank, self._layout.longest)
        return torch.empty(shape, dtype=torch.float32, device=self._device).exponential_().log_().neg_()

    def uniform(self, heads: range, bins: range, turn: int) -> Tensor:
        return torch.rand(1, len(heads), len(bins), 3, BLOCK, dtype=torch.float32, device=self._device)


def _check(
    keys: Tensor,
    values: Tensor,
    weights: Tensor | None,
    valid: Tensor | None,
    query_norm: float | Tensor | None,
    scale: float | None,
    rank: int,
    bins: int,
    temperature: str,
    weighting: str,
) -> None:
    """Refuse what does not fit, before any work."""
    for name, tensor in (("keys", keys), ("values", values)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be float16, bfloat16, float32 or float64")
        if tensor.dim() < 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (..., tokens, channels)")
    if keys.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"values has shape {tuple(values.shape)} and keys {tuple(keys.shape)}; "
            "all but the last dimension must agree"
        )
    for name, extra in (("weights", weights), ("valid", valid)):
        if extra is not None and extra.shape[-1:] != keys.shape[-2:-1]:
            raise ValueError(
                f"{name} has shape {tuple(extra.shape)}; its last dimension must be {keys.shape[-2]} tokens"
            )
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid has dtype {valid.dtype}; it must be bool, True for points that take part")
    for name, chosen, rules in (("temperature", temperature, Temperature), ("weighting", weighting, Weights)):
        if chosen not in get_args(rules):
            raise ValueError(f"{name}={chosen!r} must be one of {', '.join(map(repr, get_args(rules)))}")
    if query_norm is not None and not bool((torch.as_tensor(query_norm) > 0).all()):
        raise ValueError(f"query_norm={query_norm} must be positive, a bound on the norms of the queries")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale={scale} must be positive and finite, for example d ** -0.5")
    if not 1 <= bins <= min(rank, keys.shape[-2]):
        raise ValueError(
            f"bins={bins} with rank={rank} and {keys.shape[-2]} tokens: every bin takes at least one slot and one "
            "token; lower bins, or raise rank"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        finite = torch.isfinite(tensor) if valid is None else torch.isfinite(tensor) | ~valid.unsqueeze(-1)
        if not bool(finite.all()):
            raise ValueError(f"{name} holds NaN or infinity; give finite ones, and mark padding with valid")
