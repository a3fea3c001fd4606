"""Guarantee of WILDCAT: the rank for an error, the bound of a coreset, the measured error.

Three answers to one question, each with its price:

    rank_for_error    before anything is seen; from norms alone, and far too large for the heads of real models
    error_bound       of a coreset at hand; certain, from the residuals of keys and queries
    attention_error   measured against a few exact rows; nearly free, an estimate

The proof, with the notation of `reference.py`. Keys x are recentred over the head, z = x sqrt(b) / tau,
u = q sqrt(b) tau, so that e^(b q.x) = e^<u, z> = <phi(u), phi(z)>. P projects onto the span of phi(z_s), s in S, and
R = H - H_S^T H_SS^-1 H_S is the residual. A is e^(b q.x), D its row sums, O the attention; hats mark the coreset's.

 1. D_i >= n: the x sum to 0, and the exponential is convex. This is what recentring buys.
 2. A_il - A^_il = <(I - P) phi(u_i), (I - P) phi(z_l)>, since W = H_SS^-1 H_S. Its magnitude is at most
    p(u_i) sqrt(R_ll), with p(u)^2 = e^|u|^2 - H_uS H_SS^-1 H_Su, the residual of the query.
 3. O^_i - O_i = sum_l (A^_il - A_il) (v_l - O_i) / D^_i, since sum_l A_il (v_l - O_i) = 0. So the error is at most
    (v_max - v_min) E_i / D^_i with E_i = p(u_i) sum_l sqrt(R_ll), and, clipped, at most v_max - v_min. Bins add their
    E_i. This is `error_bound`.
 4. p(u)^2 <= e^|u|^2, sum_l sqrt(R_ll) <= sqrt(n tr R), D^_i >= n - E_i: with eta = e^(b tau^2 R_Q^2 / 2)
    sqrt(tr R / n) the error is at most (v_max - v_min) min(1, eta / (1 - eta)) <= 4 |V|_max eta.
 5. Let T >= sum_(i > k) lambda_i(H). A pivot takes E[x'] <= x - (x - T)_+^2 / (k x) of the trace x of the residual,
    since the k largest eigenvalues of R have at least x - T in sum. This map of x is increasing and concave: by Jensen,
    and the differential equation that lies above it, E tr R <= 2 T once r >= k (1 + ln(tr H / T)).
 6. The Taylor polynomial of degree s of e^<z, z'> has rank k = C(s + d, d), and leaves a positive semidefinite rest
    with diagonal at most t_s(rho) = sum_(j > s) rho^j / j!, rho = b R_K^2 / tau^2; and tr H <= n e^rho.
 7. Let tau^2 = theta R_K / R_Q and G = b R_Q R_K, so rho = G / theta. With T = n error^2 e^(-G theta) / 32 steps 4 and
    5 give E |O^ - O|_max <= error |V|_max at r >= k (1 + ln(32 / error^2) + G (theta + 1 / theta)), for every s and
    theta with n t_s(G / theta) <= T. B bins need B times that.

Exact arithmetic is assumed. Steps 1 to 4 hold for any invertible matrix in place of tau.

Source: our own proof, in the setting of Schröder and Mackey, "WildCat: Near-Linear Attention in Theory and Practice",
arXiv 2602.10056. Step 5 is after Chen, Epperly, Tropp and Webber, arXiv 2207.06503.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.bins import split_evenly
from wildcat_kv.coreset.choices import Temperature
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.noise import uniform_noise
from wildcat_kv.coreset.temperature import squared_temperature

_CONSTANT = 32.0  # (4 eta)^2 with E tr R <= 2 T
_JITTER = 1e-12  # beside the ones of G: it can only raise a residual
_LARGEST_DEGREE = 10_000


class RankBound(NamedTuple):
    """A rank that suffices for an error, whatever the keys, queries and values are within their norms.

    Attributes:
        rank: r, the number of slots, of all bins together.
        degree: s, the degree of the Taylor polynomial in the proof.
        theta: choice of the temperature, tau^2 = theta R_K / R_Q.
        vacuous: True if there are no more tokens than slots: the bound then says nothing.
    """

    rank: int
    degree: int
    theta: float
    vacuous: bool


class MeasuredError(NamedTuple):
    """Error of an attention output on some of its rows.

    Attributes:
        relative: float32 (...), Frobenius norm of the error over that of the exact rows; 0 where both are 0.
        largest: float32 (...), largest absolute error of the rows.
    """

    relative: Tensor
    largest: Tensor


def rank_for_error(
    n: int,
    dim: int,
    error: float,
    *,
    query_norm: float,
    key_norm: float,
    scale: float | None = None,
    bins: int = 1,
    theta: float | None = None,
) -> RankBound:
    """Find a rank with E |O_r - O|_max <= error |V|_max.

    The heads of real models have b R_Q R_K of 17 to 28 and d = 64. There the rank is far above any n, and `vacuous`;
    measure instead, with `error_bound` or `attention_error`.

    Args:
        n: number of keys.
        dim: d, channels of a key.
        error: target, as a share of the largest magnitude of a value; positive.
        query_norm: R_Q, largest norm of a query.
        key_norm: R_K, largest norm of a key less the mean key.
        scale: b, the factor of the attention scores; d^-1/2 by default.
        bins: number of bins.
        theta: factor of the temperature, 3.94582 for "released"; by default the one with the smallest rank. To compress
            with it, give `compress_kv` a `query_norm` of 3.94582 R_Q / theta.

    Raises:
        ValueError: a number that is not positive and finite, or one so large that no degree up to 10,000 suffices.

    Example:
        >>> rank_for_error(4096, 2, 0.1, query_norm=1.0, key_norm=1.0, scale=1.0)
        RankBound(rank=240, degree=5, theta=1.737222437022..., vacuous=False)
    """
    scale = dim**-0.5 if scale is None else scale
    _check_positive(n=n, dim=dim, error=error, scale=scale, bins=bins, query_norm=query_norm, key_norm=key_norm)
    gamma, log_target = scale * query_norm * key_norm, 2 * math.log(error) - math.log(_CONSTANT)
    best: RankBound | None = None
    for degree in range(_LARGEST_DEGREE):
        terms = math.comb(degree + dim, dim)
        if best is not None and bins * terms * (1 - log_target + 2 * gamma) >= best.rank:
            return best  # no higher degree can do better
        found = _nearest_theta(degree, gamma, log_target, theta)
        if found is not None:
            # Whole numbers: the binomial may be beyond every float.
            factor = math.ceil((1 - log_target + gamma * (found + 1 / found)) * 2**40)
            rank = bins * -(-terms * factor // 2**40)
            best = min(best or RankBound(rank, degree, found, rank >= n), RankBound(rank, degree, found, rank >= n))
    raise ValueError(f"query_norm={query_norm} and key_norm={key_norm} are too large for any rank; lower their product")


def error_bound(
    query: Tensor,
    keys: Tensor,
    coreset: Coreset,
    *,
    scale: float | None = None,
    query_norm: float | Tensor | None = None,
    bins: int = 1,
    temperature: Temperature = "released",
    valid: Tensor | None = None,
) -> Tensor:
    """Bound the error of attention to a coreset, query by query.

    It is certain for Nystrom weights and clipped outputs, up to the rounding of float32. The settings are those that
    `compress_kv` was given. O((n + q) r (r + d) / bins) operations in float64.

    Args:
        query: (..., q, d), the queries to bound the error of.
        keys: (..., n, d), the keys that were compressed.
        coreset: result of `compress_kv` for these keys.
        scale: b, the factor of the attention scores; d^-1/2 by default.
        query_norm: R_Q of the temperature, a number or (...); by default R_K of the bin, as in `compress_kv`.
        bins: number of bins.
        temperature: rule for tau.
        valid: bool (..., n), False for padding; all by default.

    Returns:
        float64 (..., q), between 0 and 1: the largest error of a channel over its range v_max - v_min.

    Example:
        bound = error_bound(q, k, compress_kv(k, v, rank=64, query_norm=q_norm), query_norm=q_norm)
    """
    scale = keys.shape[-1] ** -0.5 if scale is None else scale
    batch, n = keys.shape[:-2], keys.shape[-2]
    valid = keys.new_ones(n, dtype=torch.bool) if valid is None else valid
    part = valid.expand(*batch, n).unsqueeze(-1)
    x = keys.double().masked_fill(~part, 0.0)
    mean = x.sum(-2, keepdim=True) / part.sum(-2, keepdim=True).clamp_min(1)
    if query_norm is not None:
        query_norm = torch.as_tensor(query_norm, dtype=torch.float32, device=keys.device).expand(batch)
    setting = _Setting((x - mean).masked_fill(~part, 0.0), coreset.keys.double() - mean, query.double(), scale)
    excess = [
        setting.log_excess(
            bin, part.squeeze(-1)[..., bin.tokens], coreset.valid[..., bin.slots], query_norm, temperature
        )
        for bin in _bins(n, coreset.keys.shape[-2], bins)
    ]
    if not excess:
        return setting.query.new_zeros(setting.query.shape[:-1])
    return setting.shares(torch.stack(excess).logsumexp(0), coreset)


def attention_error(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    *,
    rows: int = 32,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    seed: int = 0,
) -> MeasuredError:
    """Measure the error of an attention output on a few exact rows.

    One row of each of `rows` equal stretches of the queries. O(rows n d) operations.

    Args:
        query: (..., heads, q, d).
        keys: (..., kv_heads, n, d).
        values: (..., kv_heads, n, d_v).
        output: (..., heads, q, d_v), the output to judge.
        rows: number of exact rows; all if there are no more queries.
        scale: b, the factor of the attention scores; d^-1/2 by default.
        key_padding_mask: bool (..., n) without a dimension of heads, True for padding.
        seed: seed of the choice of rows.

    Returns:
        A MeasuredError of (..., heads).

    Example:
        >>> q, k, v = torch.randn(2, 50, 4), torch.randn(2, 60, 4), torch.randn(2, 60, 3)
        >>> attention_error(q, k, v, torch.nn.functional.scaled_dot_product_attention(q, k, v)).largest.max() < 1e-5
        tensor(True)
    """
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1")
    count, groups = query.shape[-2], query.shape[-3] // keys.shape[-3]
    edges = torch.linspace(0, count, min(rows, count) + 1, dtype=torch.float64)
    inside = uniform_noise(seed, torch.arange(len(edges) - 1)).double()
    chosen = (edges[:-1] + inside * edges.diff()).long().clamp_max(count - 1).to(query.device)
    q, out = query[..., chosen, :].float(), output[..., chosen, :].float()
    k, v = (tensor.float().repeat_interleave(groups, dim=-3) for tensor in (keys, values))
    scores = torch.matmul(q, k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[..., None, None, :], -math.inf)
    exact = torch.matmul(scores.softmax(-1).nan_to_num(0.0), v)  # a row without keys gives 0
    wrong = (out - exact).flatten(-2)
    relative = (wrong.norm(dim=-1) / exact.flatten(-2).norm(dim=-1)).nan_to_num(0.0)
    return MeasuredError(relative, wrong.abs().amax(-1))


def log_taylor_rest(degree: int, rho: float) -> float:
    """Compute log t_s(rho), the log of sum_(j > s) rho^j / j!.

    Example:
        >>> round(math.exp(log_taylor_rest(1, 0.5)), 12) == round(math.exp(0.5) - 1.5, 12)
        True
    """
    j, term, total = degree + 1, 1.0, 0.0
    first = j * math.log(rho) - math.lgamma(j + 1)
    while term > 1e-17 * total or j <= rho:
        total += term
        j += 1
        term *= rho / j
        if total > 1e250:  # far terms of a large rho
            first, term, total = first + math.log(total), term / total, 1.0
    return first + math.log(total)


def _nearest_theta(degree: int, gamma: float, log_target: float, theta: float | None) -> float | None:
    """Find the theta nearest to 1 at which a degree suffices; None if there is none.

    G theta + log t_s(G / theta) is convex in log theta, so these theta are an interval. theta + 1 / theta is least at
    1.
    """

    def missing(log_theta: float) -> float:
        return gamma * math.exp(log_theta) + log_taylor_rest(degree, gamma * math.exp(-log_theta)) - log_target

    if theta is not None:
        return theta if missing(math.log(theta)) <= 0 else None
    if missing(0.0) <= 0:
        return 1.0
    low, high = math.log(1e-6), math.log(degree + 2) + 1.0
    for _ in range(80):  # the theta with the least missing, by thirds
        third = (high - low) / 3
        low, high = (low, high - third) if missing(low + third) < missing(high - third) else (low + third, high)
    if missing(low) > 0:
        return None
    inside, outside = low, 0.0
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if missing(middle) <= 0 else (inside, middle)
    return math.exp(inside)


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name}={number} must be positive and finite")


class _Bin(NamedTuple):
    """Tokens and slots of one bin."""

    tokens: slice
    slots: slice


def _bins(n: int, rank: int, bins: int) -> Iterator[_Bin]:
    """List the bins that are compressed; others have no error."""
    token, slot = 0, 0
    for size, slots in zip(split_evenly(n, bins), split_evenly(rank, bins), strict=True):
        if size > slots:
            yield _Bin(slice(token, token + size), slice(slot, slot + slots))
        token, slot = token + size, slot + slots


class _Setting(NamedTuple):
    """A compressed head and its queries, float64.

    Attributes:
        x: keys less their mean, (..., n, d); 0 for padding.
        slots: the coreset's keys less the same mean, (..., r, d).
        query: (..., q, d).
        scale: b.
    """

    x: Tensor
    slots: Tensor
    query: Tensor
    scale: float

    def log_excess(
        self, bin: _Bin, used: Tensor, found: Tensor, query_norm: Tensor | None, temperature: Temperature
    ) -> Tensor:
        """Compute log E_i of a bin, (..., q); `used` (..., t) marks its tokens, `found` (..., r) its slots."""
        x, slots = self.x[..., bin.tokens, :], self.slots[..., bin.slots, :]
        key_norm = x.norm(dim=-1).amax(-1)
        tau = squared_temperature(key_norm, query_norm, used.sum(-1), self.scale, temperature).double().sqrt()
        root, tau = self.scale**0.5, tau[..., None, None]
        pivots = slots * (root / tau)
        of_keys = _log_residuals(x * (root / tau), pivots, found, are_tokens=True).masked_fill(~used, -math.inf)
        return _log_residuals(self.query * (root * tau), pivots, found) + of_keys.logsumexp(-1, keepdim=True)

    def shares(self, log_excess: Tensor, coreset: Coreset) -> Tensor:
        """Divide E_i by the coreset's denominators D^_i, at most 1: (..., q)."""
        scores = self.scale * torch.matmul(self.query, self.slots.mT)
        scores = scores.masked_fill(~coreset.valid.unsqueeze(-2), -math.inf)
        top = scores.amax(-1, keepdim=True)
        denominator = torch.matmul((scores - top).exp(), coreset.weights.double().unsqueeze(-1)).squeeze(-1)
        share = (log_excess - top.squeeze(-1)).exp() / denominator
        return torch.where(denominator > 0, share, 1.0).clamp_max(1.0).nan_to_num(1.0)


def _log_residuals(points: Tensor, pivots: Tensor, found: Tensor, *, are_tokens: bool = False) -> Tensor:
    """Compute the log of sqrt(e^|z|^2 - H_zS H_SS^-1 H_Sz), float64 (..., t).

    Args:
        points: z, (..., t, d).
        pivots: z_S, (..., r, d).
        found: bool (..., r), False for empty slots.
        are_tokens: True if a point equal to a pivot is that pivot, and leaves no residual.
    """

    def gaussian(a: Tensor, b: Tensor) -> Tensor:
        square = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        return (square / -2).exp()

    present = found.unsqueeze(-2)
    own = torch.where(found.unsqueeze(-1) & present, gaussian(pivots, pivots), 0.0)
    factor = torch.linalg.cholesky(own + torch.diag_embed((~found).double() + _JITTER))
    across = torch.where(present, gaussian(points, pivots), 0.0)
    explained = torch.linalg.solve_triangular(factor, across.mT, upper=False).square().sum(-2)
    residual = (1 - explained).clamp_min(_JITTER)
    if are_tokens:
        residual = residual.masked_fill((across == 1).any(-1), 0.0)
    return points.square().sum(-1) / 2 + residual.log() / 2
