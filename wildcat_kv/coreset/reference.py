"""WildCat for one head, written as in the paper: read this first.

    WILDCAT      = COMPRESSKV, then WTDATTN
    COMPRESSKV   recentre the keys, scale them by the temperature, RPNYS in every bin
    RPNYS        randomly pivoted Nystrom: pivots S and weights W
    WTDATTN      attention to the weighted coreset, clipped to the range of the values

Plain float64, nothing batched. The other files of this wing compute the same, fast: in float32, for all bins and heads
at once. They are tested against this one. Gumbel noise is an argument, so that both draw the same pivots. Sizes: n
tokens, r slots, m queries.

Source: Schröder and Mackey, "WildCat: Near-Linear Attention in Theory and Practice", arXiv 2602.10056.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

TOLERANCE = 1e-5


def wildcat(
    Q: Tensor, K: Tensor, V: Tensor, r: int, noise: Tensor, *, scale: float, R_Q: float | None = None, B: int = 1
) -> Tensor:
    """Approximate softmax attention: WILDCAT.

    Args:
        Q: queries (m, d).
        K: keys (n, d).
        V: values (n, d_v).
        r: rank, the number of slots.
        noise: standard Gumbel noise (at least the largest rank of a bin, n), one row for every draw of a bin.
        scale: factor of the attention scores, positive.
        R_Q: bound on the norms of the queries; their largest norm by default.
        B: number of bins.

    Returns:
        float64 (m, d_v).

    Example:
        >>> Q, K, V = torch.randn(5, 4), torch.randn(40, 4), torch.randn(40, 3)
        >>> exact = torch.softmax(0.5 * Q @ K.T, dim=-1) @ V
        >>> noise = -torch.empty(40, 40).exponential_().log()
        >>> bool((wildcat(Q, K, V, 35, noise, scale=0.5) - exact).abs().max() < 0.05)
        True
    """
    R_Q = float(Q.norm(dim=-1).max()) if R_Q is None else R_Q
    K_S, V_S, w = compress_kv(K, V, r, noise, scale=scale, R_Q=R_Q, B=B)
    return wtdattn(Q, K_S, V_S, w, V.amin(0), V.amax(0), scale=scale)


def compress_kv(
    K: Tensor,
    V: Tensor,
    r: int,
    noise: Tensor,
    *,
    scale: float,
    R_Q: float | None = None,
    B: int = 1,
    rule: Literal["released", "theory"] = "released",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compress keys and values into a weighted coreset: COMPRESSKV.

    A bin with no more tokens than slots is kept as it is.

    Args:
        K: keys (n, d).
        V: values (n, d_v).
        r: rank, the number of slots, at least B.
        noise: standard Gumbel noise (at least the largest rank of a bin, n).
        scale: factor of the attention scores, positive.
        R_Q: bound on the norms of the queries; the largest norm of a recentred key of the bin by default.
        B: number of bins of consecutive tokens, as equal as can be.
        rule: choice of the temperature, "released" or "theory".

    Returns:
        K_S (r, d), V_S = W V (r, d_v) and w = W 1 (r,), float64, the slots of a bin in the order of their draws.

    Example:
        >>> K_S, V_S, w = compress_kv(torch.zeros(10, 4), torch.arange(10.0)[:, None], 1, torch.zeros(1, 10), scale=0.5)
        >>> V_S.tolist(), w.tolist()  # equal keys: one slot is the sum of all
        ([[45.0]], [10.0])
    """
    K, V = K.double(), V.double()
    X = K - K.mean(0)
    coreset = []
    for bin, slots in zip(torch.arange(len(K)).tensor_split(B), torch.arange(r).tensor_split(B), strict=True):
        Z = X[bin] * scale**0.5 / temperature(X[bin], scale, R_Q, rule)
        S, W = rpnys(kernel(Z), noise[: len(slots), bin])
        if len(bin) <= len(slots):
            S, W = list(range(len(bin))), torch.eye(len(bin), dtype=torch.float64)
        coreset.append((K[bin][S], W @ V[bin], W.sum(-1)))
    K_S, V_S, w = (torch.cat(parts) for parts in zip(*coreset, strict=True))
    return K_S, V_S, w


def rpnys(H: Tensor, noise: Tensor) -> tuple[list[int], Tensor]:
    """Draw pivots and solve for their Nystrom weights: RPNYS.

    A pivot is drawn in proportion to the residual diagonal that the ones before it leave: the point where the log of
    the residual plus Gumbel noise is largest. Draws end once no residual is above 1e-5 of its entry of H.

    Args:
        H: kernel matrix (n, n), positive semidefinite.
        noise: standard Gumbel noise (r, n), a fresh row for every draw. Adding the logarithm of an importance weighs
            the points by it.

    Returns:
        The pivots S, at most r, in the order of their draws, and the Nystrom weights W (len(S), n).

    Example:
        >>> rpnys(torch.eye(3, dtype=torch.float64), torch.tensor([[0.0, 2.0, 1.0], [0.0, 9.0, 1.0]]))[0]
        [1, 2]
    """
    S: list[int] = []
    for gumbel in noise:
        left = residual_diagonal(H, S)
        if not left.any():
            break
        S.append(int((left.log() + gumbel).argmax()))
    return S, nystrom_weights(H, S)


def residual_diagonal(H: Tensor, S: Sequence[int]) -> Tensor:
    """Compute the diagonal of H - H_S^T H_SS^-1 H_S.

    Returns:
        (n,), 0 where it is at most 1e-5 of H's diagonal.
    """
    residual = H.diagonal() - (H[list(S)] * nystrom_weights(H, S)).sum(0)
    return torch.where(residual > TOLERANCE * H.diagonal(), residual, 0.0)


def nystrom_weights(H: Tensor, S: Sequence[int]) -> Tensor:
    """Solve H_SS W = H_S for the Nystrom weights W (r, n).

    Example:
        >>> nystrom_weights(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), [0])
        tensor([[1.0000, 0.5000]])
    """
    pivots = list(S)
    return torch.linalg.solve(H[pivots][:, pivots], H[pivots])


def kernel(Z: Tensor) -> Tensor:
    """Compute H_ij = exp(<z_i, z_j>) (n, n), up to a factor.

    A common factor of H changes neither the draws nor W. This one keeps the exponential finite.
    """
    inner = Z @ Z.T
    return (inner - inner.max()).exp()


def temperature(X: Tensor, scale: float, R_Q: float | None, rule: Literal["released", "theory"]) -> float:
    """Choose tau for the recentred keys X (n, d) of a bin.

    Args:
        X: recentred keys (n, d).
        scale: b, the factor of the attention scores.
        R_Q: bound on the norms of the queries; R_K, the largest norm of a key, by default.
        rule: "theory" for the paper's formula, "released" for the constant in the authors' code.

    Returns:
        tau, 1 where there is nothing to scale.

    Example:
        >>> round(temperature(torch.eye(4), 0.5, None, "released") ** 2, 5)
        3.94582
    """
    n, R_K = len(X), float(X.norm(dim=-1).max())
    R_Q = R_K if R_Q is None else R_Q
    if n < 2 or not R_K * R_Q:
        return 1.0
    if rule == "released":
        return math.sqrt(3.94582 * R_K / R_Q)
    rho = math.sqrt(1 + math.exp(lambert_w(2 / math.e**2) + 2))
    s = math.log(n) / (scale * R_K * R_Q) + 2
    return math.sqrt(R_K / R_Q * s / (2 * lambert_w(s / (2 * rho))))


def lambert_w(x: float) -> float:
    """Solve w e^w = x > 0 for w, by Newton's method.

    Example:
        >>> round(lambert_w(math.e), 12)
        1.0
    """
    w = math.log1p(x)
    for _ in range(50):
        w -= (w - x * math.exp(-w)) / (1 + w)
    return w


def wtdattn(Q: Tensor, K_S: Tensor, V_S: Tensor, w: Tensor, v_min: Tensor, v_max: Tensor, *, scale: float) -> Tensor:
    """Attend to weighted entries and clip the outputs: WTDATTN.

    Args:
        Q: queries (m, d).
        K_S: keys (r, d).
        V_S: numerators (r, d_v).
        w: weights (r,); may be negative.
        v_min: smallest value of each channel (d_v,).
        v_max: largest value of each channel (d_v,).
        scale: factor of the attention scores.

    Returns:
        float64 (m, d_v). A denominator at or below 1e-6 of its terms' magnitudes gives 0, then the clip.

    Example:
        >>> Q, K_S = torch.zeros(1, 2), torch.zeros(2, 2)
        >>> V_S, w = torch.tensor([[6.0], [1.0]]), torch.tensor([3.0, 1.0])
        >>> wtdattn(Q, K_S, V_S, w, torch.tensor([1.0]), torch.tensor([2.0]), scale=1.0)
        tensor([[1.7500]], dtype=torch.float64)
    """
    scores = scale * Q.double() @ K_S.double().T
    A = (scores - scores.amax(-1, keepdim=True)).exp()  # a factor of a row cancels in the quotient
    numerator, denominator = A @ V_S.double(), (A @ w.double())[:, None]
    sound = denominator > 1e-6 * (A @ w.double().abs())[:, None]
    return torch.where(sound, numerator / denominator, 0.0).clamp(v_min, v_max)


def quantise(x: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, float, float]:
    """Quantise a group of numbers that share a scale: lowest + scale * code.

    Lowest and scale are rounded outwards to 16 bits, so that the codes reach both ends.

    Args:
        x: numbers (n,), within the range of `dtype`.
        bits: bits of a code.
        dtype: float16 for keys, bfloat16 for values.

    Returns:
        Codes (n,), float64, and the scale and the lowest number of the group.

    Source: Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750.

    Example:
        >>> quantise(torch.tensor([-1.0, 0.0, 2.0, 0.4]), 2, torch.float16)
        (tensor([0., 1., 3., 1.], dtype=torch.float64), 1.0, -1.0)
    """
    x, most = x.double(), 2**bits - 1
    lowest = round_to(dtype, float(x.min()), up=False)
    scale = round_to(dtype, (float(x.max()) - lowest) / most, up=True)
    return ((x - lowest) / (scale or 1.0)).round(), scale, lowest


def round_to(dtype: torch.dtype, x: float, *, up: bool) -> float:
    """Round to the next number of a dtype, up or down.

    Example:
        >>> round_to(torch.float16, 2049.0, up=True), round_to(torch.float16, 2049.0, up=False)
        (2050.0, 2048.0)
    """
    near = torch.tensor(x, dtype=torch.float64).to(dtype)
    if (near.double() < x) if up else (near.double() > x):
        near = near.nextafter(near.new_tensor(math.inf if up else -math.inf))
    return float(near)
