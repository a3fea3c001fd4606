"""WTDATTN: attention over weighted entries.

Slots of a coreset and exact tokens, of weight 1, stand side by side. `reference.wtdattn` says what is computed. There
are two ways. Where no weight is negative, its logarithm joins the scores and one softmax does the rest (`fused`), on
values divided by their weights beforehand (`mass_of`). Negative weights need numerator and denominator apart.

Source: Schröder and Mackey, "WildCat: Near-Linear Attention in Theory and Practice", arXiv 2602.10056.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.fused import by_products, fused, is_fusable, one_query
from wildcat_kv.coreset.parts import SCORES_AT_ONCE, Parts, float32_blocks, unseen, weighted_sum
from wildcat_kv.coreset.tensors import full_precision, has_full_precision

# A denominator this small against the sum of its terms' magnitudes is cancellation, not information.
DENOMINATOR_FLOOR = 1e-6
# A numerator is not divided by a weight smaller than this, which would leave the range of half precision.
LEAST_MASS = 2.0**-7


class WeightSigns(Enum):
    """Knowledge of the signs of some weights.

    It decides how to attend to them.
    """

    NONE = "all are valid and weigh 1"
    POSITIVE = "none that is valid weighs less than the least mass"
    SIGNED = "any weights"

    @staticmethod
    def of(weights: Tensor, valid: Tensor) -> WeightSigns:
        """Look at `weights` and `valid` (...), on the host."""
        if not weights.numel():
            return WeightSigns.NONE
        return WeightSigns.within(*torch.stack(WeightSigns.bounds(weights, valid)).tolist())

    @staticmethod
    def bounds(weights: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Find the least and the largest weight (), for `within`; there must be some.

        What is not valid counts as a weight that is positive, and not 1.
        """
        least, most = torch.where(valid, weights, 2.0).aminmax()
        return least, most

    @staticmethod
    def within(least: float, most: float) -> WeightSigns:
        """Tell the signs of weights within `bounds`."""
        if least == most == 1:
            return WeightSigns.NONE
        return WeightSigns.POSITIVE if least >= LEAST_MASS else WeightSigns.SIGNED

    def join(self, other: WeightSigns) -> WeightSigns:
        """Tell the signs of these weights and others."""
        for signs in (WeightSigns.SIGNED, WeightSigns.POSITIVE):
            if signs in (self, other):
                return signs
        return WeightSigns.NONE


class AttentionOptions(NamedTuple):
    """Arguments of an attention call beside its query, keys, values and weights.

    Attributes:
        scale: b, the factor of the scores.
        valid: bool (..., kv_heads, n), False for padding; None for all True.
        causal: True if the last q entries are the queries' own tokens, each seen from itself on.
        value_range: smallest and largest value seen, each (..., kv_heads, 1, d_v), to clip the output to.
        softcap: c, which makes c * tanh(scores / c) of the scores.
        sink_logits: (heads,), learned logits that join the denominator only (GPT-OSS).
    """

    scale: float
    valid: Tensor | None = None
    causal: bool = False
    value_range: tuple[Tensor, Tensor] | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None


def mass_of(weights: Tensor) -> Tensor:
    """Give the divisor of stored numerators.

    It is the weight, or 1 where the weight is small or negative.

    Args:
        weights: float32 (...), w.

    Returns:
        float32 (...), at least 2^-7.
    """
    return torch.where(weights >= LEAST_MASS, weights, 1.0)


def weighted_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor | None = None,
    *,
    scale: float | None = None,
    valid: Tensor | None = None,
    causal: bool = False,
    value_range: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend to entries that carry weights.

    sum_i e^(b q.k_i) U_i / sum_i e^(b q.k_i) w_i, which is WTDATTN of arXiv 2602.10056.

    Args:
        query: (..., heads, q, d).
        keys: (..., kv_heads, n, d); `heads` is a multiple of `kv_heads`, query heads grouped in order.
        values: (..., kv_heads, n, d_v), numerators U, equal to the values v where the weight is 1.
        weights: float32 (..., kv_heads, n), w, negative ones allowed; 1 by default.
        scale: b, the factor of the scores; d^-1/2 by default.
        valid: bool (..., kv_heads, n), False for padding; all by default.
        causal: True if the last q entries are the queries' own tokens, each seen from itself on.
        value_range: smallest and largest value seen, each (..., kv_heads, 1, d_v), to clip the output to.
        softcap: c, which makes c * tanh(scores / c) of the scores.
        sink_logits: (heads,), learned logits that join the denominator only (GPT-OSS).

    Returns:
        (..., heads, q, d_v) in the query's dtype, accumulated in float32. A denominator that cancels out gives 0,
        then the clip.

    Raises:
        ValueError: heads that do not divide, or shapes that do not fit.

    Example:
        >>> q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
        >>> weighted_attention(q, k, v, weights=torch.ones(1, 2, 5)).shape
        torch.Size([1, 4, 3, 8])
    """
    _check_shapes(query, keys, values, weights, valid)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = AttentionOptions(scale, valid, causal, value_range, softcap, sink_logits)
    return _in_blocks(query, (keys,), (values,), weights, None, options)


def coreset_attention(
    query: Tensor, keys: Tensor, values: Tensor, weights: Tensor, signs: WeightSigns, options: AttentionOptions
) -> Tensor:
    """Compute `weighted_attention` to stored entries, the fastest way.

    Args:
        query: (rows, heads, q, d).
        keys: (rows, kv_heads, n, d).
        values: (rows, kv_heads, n, d_v), numerators over their masses, `mass_of(weights)`.
        weights: float32 (rows, kv_heads, n), 0 where not valid.
        signs: known signs of the weights.
        options: further arguments of the attention call, `valid` among them.

    Returns:
        (rows, heads, q, d_v) in the query's dtype.
    """
    plain = _is_plain(query, signs, options) and query.dtype == keys.dtype == values.dtype
    if not plain or (query.is_cuda and not is_fusable(query, values, causal=options.causal)):
        masses = torch.where(weights >= LEAST_MASS, weights, 1.0)  # `mass_of`, without the call
        return _in_blocks(query, (keys,), (values,), weights, masses, options)
    weighted = signs is not WeightSigns.NONE
    output = fused(query, keys, values, weights, options.scale, weighted=weighted, causal=options.causal)
    box = options.value_range
    if box is None or not weighted:  # an average of values that were seen is in their box
        return output
    return output.view(*values.shape[:2], -1, values.shape[-1]).clamp(*box).view_as(output)


def parted_attention(
    query: Tensor, keys: Parts, values: Parts, weights: Tensor, signs: WeightSigns, options: AttentionOptions
) -> Tensor:
    """Compute `coreset_attention` to entries in several parts, some of them quantised.

    Quantised parts are unpacked a block at a time, so no second copy of them is ever whole.

    Args:
        query: (batch, heads, q, d).
        keys: parts (batch, 1, n_i, d); quantised ones (batch, n_i, d).
        values: parts (batch, 1, n_i, d_v), numerators over their masses, `mass_of(weights)`.
        weights: float32 (batch, 1, n) over all parts, 0 where not valid.
        signs: known signs of the weights.
        options: further arguments of the attention call, `valid` among them.

    Returns:
        (batch, heads, q, d_v) in the query's dtype.
    """
    if query.shape[2] == 1 and _is_plain(query, signs, options) and has_full_precision(query.device):
        weighted = signs is not WeightSigns.NONE
        output = one_query(query, keys, values, weights, options.scale, weighted=weighted)
        return output if options.value_range is None else output.clamp(*options.value_range)
    masses = torch.where(weights >= LEAST_MASS, weights, 1.0)
    return _in_blocks(query, keys, values, weights, masses, options)


def attends_by_products(query: Tensor, options: AttentionOptions) -> bool:
    """Tell if one token's queries (..., 1, d) attend by plain products and one softmax, unless weights are negative."""
    return _is_plain(query, WeightSigns.POSITIVE, options) and by_products(query)


def _is_plain(query: Tensor, signs: WeightSigns, options: AttentionOptions) -> bool:
    """Tell if a softmax of scores and log-weights is all there is to do."""
    return (
        signs is not WeightSigns.SIGNED
        and options.softcap is None
        and options.sink_logits is None
        and not torch.is_autocast_enabled(query.device.type)
    )


def _in_blocks(
    query: Tensor,
    keys: Parts,
    values: Parts,
    weights: Tensor | None,
    masses: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Compute numerator and denominator apart, for a few queries at a time.

    Args:
        query: (..., heads, q, d).
        keys: parts (..., kv_heads, n_i, d).
        values: parts (..., kv_heads, n_i, d_v).
        weights: float32 (..., kv_heads, n), None for 1.
        masses: float32 (..., kv_heads, n), divisors of the values; None if they were not divided.
        options: further arguments of the attention call.
    """
    total = query.shape[-2]
    if weights is None:  # of one part
        [part] = keys
        assert isinstance(part, Tensor)
        summands = torch.ones(*part.shape[:-1], 2, dtype=torch.float32, device=part.device)
    else:  # the two sums of the denominator in one product
        summands = torch.stack((weights, weights.abs()), dim=-1)
    n = summands.shape[-2]
    step = max(1, SCORES_AT_ONCE // max(1, query.shape[:-2].numel() * n))
    if step >= total and not torch.compiler.is_compiling() and has_full_precision(query.device):
        return _attend(query, keys, values, summands, masses, n - total, options)
    # The switches of backends cannot be traced; then what is set for the program holds.
    traced = torch.compiler.is_compiling()
    with torch.autocast(query.device.type, enabled=False) if traced else full_precision(query.device):
        parts = [
            _attend(query[..., start : start + step, :], keys, values, summands, masses, n - total + start, options)
            for start in range(0, total, step)
        ]
    return torch.cat(parts, dim=-2)


def _check_shapes(query: Tensor, keys: Tensor, values: Tensor, weights: Tensor | None, valid: Tensor | None) -> None:
    """Refuse shapes that do not fit together."""
    fit = (
        min(query.dim(), keys.dim()) >= 3
        and query.shape[:-3] == keys.shape[:-3]
        and query.shape[-3] % keys.shape[-3] == 0
        and query.shape[-1] == keys.shape[-1]
        and keys.shape[:-1] == values.shape[:-1]
    )
    if not fit:
        raise ValueError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit: they "
            "must be (..., heads, q, d), (..., kv_heads, n, d), (..., kv_heads, n, d_v), heads a multiple of kv_heads"
        )
    for name, tensor in (("weights", weights), ("valid", valid)):
        if tensor is not None and tensor.shape != keys.shape[:-1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(keys.shape[:-1])}, as keys")


def _attend(
    query: Tensor,
    keys: Parts,
    values: Parts,
    summands: Tensor,
    masses: Tensor | None,
    first_own: int,
    options: AttentionOptions,
) -> Tensor:
    """Attend with one block of queries.

    Args:
        query: (..., heads, q, d).
        keys: parts (..., kv_heads, n_i, d).
        values: parts (..., kv_heads, n_i, d_v).
        summands: float32 (..., kv_heads, n, 2), w and |w|.
        masses: float32 (..., kv_heads, n), divisors of the values; None if they were not divided.
        first_own: entry of the first query's own token.
        options: further arguments of the attention call.
    """
    *batch, heads, length, _ = query.shape
    kv_heads = summands.shape[-3]
    scores = _scores(query, keys, kv_heads, first_own, options)
    # Masked before the maximum: a padding slot must not set the scale. All masked: any finite shift will do.
    largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    sinks = None
    if options.sink_logits is not None:
        sinks = options.sink_logits.to(torch.float32).reshape(*options.sink_logits.shape[:-1], kv_heads, -1, 1)
        sinks = sinks.expand(*batch, -1, -1, length).reshape(*batch, kv_heads, -1, 1)
        largest = torch.maximum(largest, sinks)
    terms = scores.sub_(largest).exp_()
    denominator, magnitude = torch.matmul(terms, summands).split(1, dim=-1)
    if masses is not None:
        terms.mul_(masses.unsqueeze(-2))
    numerator = weighted_sum(terms, float32_blocks(values))
    if sinks is not None:
        extra = (sinks - largest).exp()
        denominator, magnitude = denominator + extra, magnitude + extra
    cancelled = denominator <= DENOMINATOR_FLOOR * magnitude  # false for NaN, which must not be hidden
    output = torch.where(cancelled, 0.0, numerator / denominator).to(query.dtype)
    if options.value_range is not None:
        lowest, highest = options.value_range
        output = output.clamp(lowest.to(query.dtype), highest.to(query.dtype))
    return output.reshape(*batch, heads, length, -1)


def _scores(query: Tensor, keys: Parts, kv_heads: int, first_own: int, options: AttentionOptions) -> Tensor:
    """Compute the scores, -inf where hidden.

    Returns:
        float32 (..., kv_heads, groups * q, n), the query heads of a group side by side.
    """
    *batch, heads, _, d = query.shape
    # Query heads of a group become further queries of their key head: keys are never repeated.
    grouped = (query.to(torch.float32) * options.scale).reshape(*batch, kv_heads, -1, d)
    products = [torch.matmul(grouped, block.mT) for block in float32_blocks(keys)]
    scores = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    if options.softcap is not None:
        scores = (scores / options.softcap).tanh_().mul_(options.softcap)
    if options.valid is not None:
        scores = scores.masked_fill_(~options.valid.unsqueeze(-2), -torch.inf)
    n = scores.shape[-1]
    if options.causal and first_own < n - 1:  # the newest token sees all
        hidden = unseen(n, first_own, query)
        scores = scores.masked_fill_(hidden.repeat(heads // kv_heads, 1), -torch.inf)
    return scores
