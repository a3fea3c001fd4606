"""COMPRESSKV: keys and values into a weighted coreset, bin by bin.

`reference.compress_kv` says what is computed; `binned.py` computes it for all bins at once.

Source: Schröder and Mackey, "WildCat: Near-Linear Attention in Theory and Practice", arXiv 2602.10056.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from wildcat_kv.coreset.binned import BLOCKED_RANK, BinnedCompression, position_order, take_all
from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.draws import Draws, GivenDraws, GlobalDraws
from wildcat_kv.coreset.kernels import device
from wildcat_kv.coreset.rpnys import Weights
from wildcat_kv.coreset.temperature import Temperature
from wildcat_kv.coreset.tensors import full_precision, keep_where_, take_columns
from wildcat_kv.coreset.tokens import KernelOptions, WeightedTokens


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

    Args:
        keys: (..., n, d), floating point.
        values: (..., n, d_v); with `weights`, the numerators U of earlier slots.
        rank: number of slots to fill, at least `bins`. A bin with no more tokens than slots is stored unchanged.
        scale: b, the factor of the attention scores, positive; d^-1/2 by default.
        weights: (..., n), weights w of points that are slots already, 1 for exact tokens.
        valid: bool (..., n), False for points that keep their place in a bin but take part in nothing; all by default.
        query_norm: R_Q, a bound on the norms of the queries to come, a number or (...); by default the largest norm
            of a recentred key in the bin.
        temperature: rule for tau, "released" or "theory", see `temperature.py`.
        weighting: "nystrom" for signed weights, "clipped" for their non-negative part.
        value_bound: (...), s^2, the sum over channels of the largest squared value seen; with `weights`, slots with a
            U that is large against it are drawn more often.
        bins: number of bins of consecutive tokens, each compressed on its own.
        noise: (..., s, n), standard Gumbel noise, s at least the largest rank of a bin: draws pivots one at a time.
            By default from torch's global generator, and large ranks in blocks; the law is the same.

    Returns:
        A Coreset of `rank` slots (COMPRESSKV, arXiv 2602.10056). Computed in float32, without gradients.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit; names the argument and its value.

    Example:
        >>> keys, values = torch.randn(2, 8, 100, 64), torch.randn(2, 8, 100, 64)
        >>> compress_kv(keys, values, rank=24, bins=2).values.shape
        torch.Size([2, 8, 24, 64])
    """
    tokens = WeightedTokens(keys, values, weights, valid, value_bound)
    _check_tokens(tokens, rank, bins)
    options = _options(keys, scale, query_norm, temperature, weighting)
    return _compress_batch(tokens, options, rank, bins, noise)


def _options(
    keys: Tensor, scale: float | None, query_norm: float | Tensor | None, temperature: Temperature, weighting: Weights
) -> KernelOptions:
    """Check `compress_kv`'s settings and fill in their defaults."""
    for name, chosen, rules in (("temperature", temperature, Temperature), ("weighting", weighting, Weights)):
        if chosen not in get_args(rules):
            raise ValueError(f"{name}={chosen!r} must be one of {', '.join(map(repr, get_args(rules)))}")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale={scale} must be positive and finite, for example d ** -0.5")
    norm = None
    if query_norm is not None:
        norm = torch.as_tensor(query_norm, dtype=torch.float32, device=keys.device)
        if not bool((norm > 0).all()):
            raise ValueError(f"query_norm={query_norm} must be positive, a bound on the norms of the queries")
        norm = norm.expand(keys.shape[:-2]).reshape(1, -1)
    return KernelOptions(keys.shape[-1] ** -0.5 if scale is None else scale, norm, temperature, weighting)


def _compress_batch(
    tokens: WeightedTokens, options: KernelOptions, rank: int, bins: int, noise: Tensor | None
) -> Coreset:
    """Compress tokens of any batch shape as heads of one row."""
    keys, values, weights, valid, bound = tokens.keys, tokens.values, tokens.weights, tokens.valid, tokens.value_bound
    batch, (n, d) = keys.shape[:-2], keys.shape[-2:]
    layout = BinLayout.build(n, rank, bins, keys.device)
    if noise is not None:
        draws: Draws = GivenDraws(_noise_of_bins(noise, batch, n, layout))
    else:
        draws = GlobalDraws(layout, keys.device)
        options = replace(options, blocked=layout.bin_rank >= BLOCKED_RANK)
    if valid is not None:  # what takes part in nothing may be NaN
        valid = valid.expand(*batch, n)
        keys, values = (tensor.masked_fill(~valid.unsqueeze(-1), 0.0) for tensor in (keys, values))
    flat = WeightedTokens(
        keys.reshape(1, -1, n, d),
        values.reshape(1, -1, n, values.shape[-1]),
        None if weights is None else weights.to(torch.float32).expand(*batch, n).reshape(1, -1, n),
        None if valid is None else valid.reshape(1, -1, n),
        None if bound is None else bound.expand(batch).reshape(1, -1),
    )
    coreset, _ = compress_bins(flat, layout, draws, options)
    return Coreset(
        keys=coreset.keys.reshape(*batch, rank, d),
        values=coreset.values.reshape(*batch, rank, -1),
        weights=coreset.weights.reshape(*batch, rank),
        valid=coreset.valid.reshape(*batch, rank),
    )


def _noise_of_bins(noise: Tensor, batch: torch.Size, n: int, layout: BinLayout) -> Tensor:
    """Cut noise (..., s, n) into bins.

    Returns:
        float32 (1, heads, bins, bin_rank, t).
    """
    if noise.shape[:-2] != batch or noise.shape[-1] != n or noise.shape[-2] < layout.bin_rank:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; it must be {(*batch, layout.bin_rank, n)}, "
            "one row for every step of a bin"
        )
    steps = noise[..., : layout.bin_rank, :].reshape(1, -1, layout.bin_rank, n)
    return layout.gather(steps.mT, dtype=torch.float32).mT


@torch.no_grad()
def compress_bins(
    tokens: WeightedTokens, layout: BinLayout, draws: Draws, options: KernelOptions
) -> tuple[Coreset, Tensor]:
    """Compress all bins of all rows and heads at once.

    Args:
        tokens: keys and values to compress, (rows, heads, n, ...).
        layout: bins of the rows.
        draws: source of the randomness.
        options: settings of the kernel.

    Returns:
        A Coreset of (rows, heads, c, ...), c the rank; and int64 (rows, heads, c), the place of the key that each slot
        has, arbitrary for padding slots.
    """
    keys = tokens.keys
    compression = BinnedCompression(tokens, layout, draws, options)
    if layout.lossless:
        used = compression.used(range(keys.shape[1]), range(layout.bins))
        return take_pivots(tokens, layout, *take_all(used, layout.bin_rank))
    if device.serves(tokens, layout, options) and (made := device.compress(tokens, layout, draws, options)):
        return Coreset(made.keys, made.values, made.weights, made.valid), made.source
    with full_precision(keys.device):
        slots = compression.slots()

    if slots.computed is None:  # all are
        valid = layout.collect(slots.found)
        source = layout.collect(layout.columns(slots.pivots))
        coreset = Coreset(
            keys=keep_where_(take_columns(keys, source), valid.unsqueeze(-1)),
            values=layout.collect(slots.values),
            weights=layout.collect(slots.weights),
            valid=valid,
        )
        return coreset, source
    unchanged, source = take_pivots(tokens, layout, slots.pivots, slots.found)
    computed = layout.collect(slots.computed)
    coreset = replace(
        unchanged,
        values=torch.where(computed.unsqueeze(-1), layout.collect(slots.values), unchanged.values),
        weights=torch.where(computed, layout.collect(slots.weights), unchanged.weights),
    )
    return coreset, source


def take_pivots(tokens: WeightedTokens, layout: BinLayout, pivots: Tensor, found: Tensor) -> tuple[Coreset, Tensor]:
    """Make a Coreset of unchanged keys, values and weights of pivots.

    Args:
        tokens: keys and values, (rows, heads, n, ...).
        layout: bins of the rows.
        pivots: int64 (rows, heads, bins, bin_rank), places within the bins, in any order.
        found: bool (rows, heads, bins, bin_rank), False for slots that stay empty.

    Returns:
        A Coreset of (rows, heads, c, ...), the slots in the order of their positions, padding slots zero; and the
        places of its keys, int64 (rows, heads, c).
    """
    order = position_order(pivots, found)
    source = layout.collect(layout.columns(pivots.gather(-1, order)))
    valid = layout.collect(found.gather(-1, order))

    empty, weights = ~valid, tokens.weights
    coreset = Coreset(
        keys=take_columns(tokens.keys, source).masked_fill_(empty.unsqueeze(-1), 0.0),
        values=take_columns(tokens.values, source).masked_fill_(empty.unsqueeze(-1), 0.0),
        weights=valid.to(torch.float32) if weights is None else take_columns(weights, source).masked_fill_(empty, 0.0),
        valid=valid,
    )
    return coreset, source


def _check_tokens(tokens: WeightedTokens, rank: int, bins: int) -> None:
    """Refuse tensors and sizes that do not fit, before any work."""
    keys, values, valid = tokens.keys, tokens.values, tokens.valid
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
    for name, extra in (("weights", tokens.weights), ("valid", valid)):
        if extra is not None and extra.shape[-1:] != keys.shape[-2:-1]:
            raise ValueError(
                f"{name} has shape {tuple(extra.shape)}; its last dimension must be {keys.shape[-2]} tokens"
            )
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"valid has dtype {valid.dtype}; it must be bool, True for points that take part")
    if not 1 <= bins <= min(rank, keys.shape[-2]):
        raise ValueError(
            f"bins={bins} with rank={rank} and {keys.shape[-2]} tokens: every bin takes at least one slot and one "
            "token; lower bins, or raise rank"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        finite = torch.isfinite(tensor) if valid is None else torch.isfinite(tensor) | ~valid.unsqueeze(-1)
        if not bool(finite.all()):
            raise ValueError(f"{name} holds NaN or infinity; give finite ones, and mark padding with valid")
