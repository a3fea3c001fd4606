"""Slots of bins in any metric: pivots with Nystrom weights, and unbiased samples of what they miss."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.attention.fixed_pivots import FixedPivots
from wildcat_kv.coreset.binned import BLOCKED_RANK
from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.draws import Draws
from wildcat_kv.coreset.pivots import TOLERANCE
from wildcat_kv.coreset.rpnys import Factor, not_drawn, nystrom_sums, pivoted_cholesky
from wildcat_kv.coreset.rpnys_blocked import accelerated_cholesky
from wildcat_kv.coreset.tensors import full_precision


class BinSlots(NamedTuple):
    """Weighted keys of bins.

    Attributes:
        places: int64 (rows, heads, bins, s), the places of their keys.
        sums: (rows, heads, bins, s, d_v), U.
        weights: (rows, heads, bins, s), w; 0 with U = 0 for slots that are empty.
    """

    places: Tensor
    sums: Tensor
    weights: Tensor


def bin_slots(
    points: Tensor, value: Tensor, layout: BinLayout, draws: Draws, samples: int = 0, offset: Tensor | None = None
) -> BinSlots:
    """Choose the slots of all bins, and sum the values over them.

    Args:
        points: (rows, heads, n, c), the scaled keys z.
        value: (rows, heads, n, d_v), float32 or float64.
        layout: bins of the keys, and their pivots.
        draws: noise of the pivots.
        samples: number of sampled keys of each bin.
        offset: uniform noise (heads, bins, 1), which draws them.

    Returns:
        Slots of pivots, then of samples. Numerator and denominator are unbiased where there are samples.
    """
    with torch.no_grad(), full_precision(points.device):
        factor, log_scale = _factorise(points.detach().float(), layout, draws)
        drawn = None if offset is None or not samples else _draw_samples(factor, layout, samples, offset)
    index = layout.columns(factor.pivots)
    mass = None
    if drawn is not None:  # samples take their own part from the pivots
        places, shares = layout.columns(drawn.places), drawn.weights.to(value.dtype)
        mass = torch.ones_like(value[..., 0]).scatter_add(-1, places.flatten(2), -shares.flatten(2))
    needs_gradient = torch.is_grad_enabled() and (points.requires_grad or value.requires_grad)
    if needs_gradient or value.dtype == torch.float64:
        root = torch.ones((), dtype=torch.float64, device=points.device)
        none = torch.zeros(layout.bins, dtype=torch.bool, device=points.device)
        sums, weights = FixedPivots(layout, factor.pivots, factor.valid, root, none).combine(points, value, mass)
    else:
        both = torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)
        both = both if mass is None else both * mass.unsqueeze(-1)
        with full_precision(points.device):
            found = nystrom_sums(factor, layout.gather(both), log_scale=log_scale)
        sums, weights = found[..., :-1], found[..., -1]
    if drawn is not None:
        own = value.unsqueeze(2).take_along_dim(places.flatten(2)[:, :, None, :, None], dim=3).view(*places.shape, -1)
        index = torch.cat((index, places), dim=-1)
        sums = torch.cat((sums, own * shares.unsqueeze(-1)), dim=-2)
        weights = torch.cat((weights, shares), dim=-1)
    return BinSlots(index, sums, weights)


def _factorise(points: Tensor, layout: BinLayout, draws: Draws) -> tuple[Factor, Tensor]:
    """Draw the pivots of all bins.

    Returns:
        The factorisation, and log D^2 (rows, heads, bins, t).
    """
    points = points - points.mean(2, keepdim=True)
    log_scale = layout.gather(points.square().sum(-1))
    binned, used = layout.gather(points), layout.used
    mean = binned.sum(-2, keepdim=True) / used.sum(-1)[:, None, None]
    binned = binned - mean  # the kernel is most precise around a near centre
    heads, bins, rank = range(points.shape[1]), range(layout.bins), layout.bin_rank
    valid = None if layout.tokens.even else used.expand(log_scale.shape)
    ranks = None if layout.slots.even else layout.rank.expand(log_scale.shape[:-1])
    if rank >= BLOCKED_RANK:
        uniforms = partial(draws.uniform, heads, bins)
        return accelerated_cholesky(binned, uniforms, rank, valid=valid, log_scale=log_scale, ranks=ranks), log_scale
    noise = draws.gumbel(heads, bins)
    return pivoted_cholesky(binned, noise, valid=valid, log_scale=log_scale, ranks=ranks), log_scale


class _Drawn(NamedTuple):
    """Sampled keys.

    Attributes:
        places: int64 (rows, heads, bins, s), within the bins.
        weights: float32 (rows, heads, bins, s), the inverse of the expected number of draws.
    """

    places: Tensor
    weights: Tensor


def _draw_samples(factor: Factor, layout: BinLayout, count: int, offset: Tensor) -> _Drawn:
    """Draw keys by the square root of what the pivots leave of G's diagonal.

    Systematic resampling: one uniform number places equally spaced points on the line of the probabilities. No key is
    drawn much more or less often than expected.
    """
    left = 1 - factor.rows.square().sum(-2)
    left = torch.where((left > TOLERANCE) & layout.used, left, 0.0) * not_drawn(factor)
    law = left.sqrt().double()
    total = law.sum(-1, keepdim=True)
    law = law / torch.where(total > 0, total, 1.0)
    line = law.cumsum(-1)
    line = line / torch.where(total > 0, line[..., -1:], 1.0)
    spaced = (torch.arange(count, device=left.device) + offset.double()) / count
    places = torch.searchsorted(line, spaced.expand(*line.shape[:-1], -1).contiguous()).clamp_max(left.shape[-1] - 1)
    expected = count * law.gather(-1, places)
    return _Drawn(places, torch.where(expected > 0, 1 / expected.clamp_min(1e-30), 0.0).float())
