"""The temperature tau of COMPRESSKV.

It scales keys before the kernel, z = x sqrt(b) / tau. Small tau spreads the keys, large tau lets every pivot stand for
more of them. `reference.temperature` says what is computed.

Source: arXiv 2602.10056 for "theory", the choice of tau in COMPRESSKV; the authors' code for "released", a constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wildcat_kv.coreset.choices import Temperature

_RELEASED = 3.94582
_RHO_0 = 3.19160  # sqrt(1 + exp(W0(2 / e^2) + 2))


def constant_temperature(rule: Temperature) -> float | None:
    """Give tau^2 where it depends on no key, else None.

    R_Q is at its default.
    """
    return _RELEASED if rule == "released" else None


def squared_temperature(
    key_norm: Tensor, query_norm: Tensor | None, tokens: Tensor, scale: float, rule: Temperature
) -> Tensor:
    """Compute tau^2 of every bin; always finite and positive.

    Args:
        key_norm: float32 (...), R_K, the largest norm of a recentred key.
        query_norm: float32 (...), R_Q, a bound on the queries' norms; R_K when None.
        tokens: integer (...), n, the number of valid tokens of the bin.
        scale: b, the factor of the attention scores, positive.
        rule: choice of tau, "released" or "theory".

    Returns:
        float32 (...); 1 where there is nothing to scale (R_K = 0, R_Q = 0 or n < 2).
    """
    key_norm = key_norm.to(torch.float32)
    query_norm = key_norm if query_norm is None else query_norm.to(torch.float32)
    log_ratio = key_norm.log() - query_norm.log()
    if rule == "released":
        log_tau2 = math.log(_RELEASED) + log_ratio
    else:
        log_n = tokens.to(torch.float32).log()
        log_s = torch.logaddexp(
            log_n.log() - math.log(scale) - key_norm.log() - query_norm.log(),
            torch.full_like(key_norm, math.log(2.0)),
        )
        log_tau2 = log_ratio + log_s - math.log(2.0) - log_lambert_w(log_s - math.log(2.0 * _RHO_0))
    usable = (key_norm > 0) & (query_norm > 0) & (tokens >= 2)
    # Half of float32's exponent range: the square root and its inverse stay finite with room to spare.
    return torch.where(usable, log_tau2, 0.0).nan_to_num(0.0).clamp(-60.0, 60.0).exp()


def log_lambert_w(log_x: Tensor) -> Tensor:
    """Compute log W0(x) from log x, for x > 0.

    It neither overflows nor underflows. Solves w + log w = log x for u = log w by Newton's method on f(u) = e^u + u -
    log x, which is convex and increasing: from the right of the root it falls monotonically to it.

    Example:
        >>> log_lambert_w(torch.tensor(1.0)).exp()  # W0(e) = 1
        tensor(1.)
    """
    u = torch.where(log_x > 1.0, log_x.clamp_min(1.0).log(), log_x)  # f(u) >= 0 at both
    for _ in range(12):
        u = u - (u.exp() + u - log_x) / (u.exp() + 1.0)
    return u
