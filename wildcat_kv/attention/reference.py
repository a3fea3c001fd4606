"""All attention methods for one head, written as in their papers: read this first.

Plain float64, nothing batched. What a method draws is an argument, so that the fast version and this one can be
compared number by number. WILDCAT itself is `coreset.reference.wildcat`.

Sizes: m queries Q (m, d), n keys K (n, d) and values V (n, d_v); b is the factor of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def softmax_attention(Q: Tensor, K: Tensor, V: Tensor, b: float) -> Tensor:
    """Attend exactly: sum_l e^(b q.k_l) v_l / sum_l e^(b q.k_l), (m, d_v)."""
    return torch.softmax(b * Q.double() @ K.double().T, dim=-1) @ V.double()


def sampled_attention(Q: Tensor, K: Tensor, V: Tensor, b: float, index: Tensor, weights: Tensor) -> Tensor:
    """Attend to some keys, each counted as often as its weight says (Uniform, Stratified).

    Args:
        Q: queries.
        K: keys.
        V: values.
        b: factor of the scores.
        index: int64 (r,), places of the keys.
        weights: (r,), their weights.
    """
    A = weights.double() * (b * Q.double() @ K[index].double().T).exp()
    return A @ V[index].double() / A.sum(-1, keepdim=True)


def performer(Q: Tensor, K: Tensor, V: Tensor, b: float, W: Tensor) -> Tensor:
    """Attend through positive random features: f(Q) f(K)^T in place of e^(b Q K^T).

    Args:
        Q: queries.
        K: keys.
        V: values.
        b: factor of the scores.
        W: directions (m, d).
    """
    A = features(Q, W, b) @ features(K, W, b).T
    return A @ V.double() / A.sum(-1, keepdim=True)


def features(X: Tensor, W: Tensor, b: float) -> Tensor:
    """Compute f(x)_j = e^(sqrt(b) w_j.x - b |x|^2 / 2) / sqrt(m)."""
    X, W = math.sqrt(b) * X.double(), W.double()
    return (X @ W.T - X.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(W))


def scatterbrain(Q: Tensor, K: Tensor, V: Tensor, b: float, W: Tensor, band: int) -> Tensor:
    """Attend through features, and exactly where |i - j| < band / 2; query i stands at key i modulo n."""
    A = features(Q, W, b) @ features(K, W, b).T
    places = torch.arange(len(Q)) % len(K)
    inside = 2 * (places[:, None] - torch.arange(len(K))).abs() < band
    A = torch.where(inside, (b * Q.double() @ K.double().T).exp(), A)
    return A @ V.double() / A.sum(-1, keepdim=True)


def reformer(Q: Tensor, K: Tensor, V: Tensor, b: float, rotations: Sequence[Tensor], chunk: int) -> Tensor:
    """Attend within chunks of sorted tokens and the chunk before, in rounds.

    Args:
        Q: queries.
        K: keys.
        V: values.
        b: factor of the scores.
        rotations: directions (buckets / 2, d) of each round.
        chunk: keys of a chunk, at most.
    """
    A = torch.zeros(len(Q), len(K), dtype=torch.float64)
    for R in rotations:
        of_query, of_key = (nearest_axis(X, R) for X in (Q, K - K.mean(0)))
        A += visible(of_query, of_key, chunk, before=True)
    A = A * (b * Q.double() @ K.double().T).exp()
    return A @ V.double() / A.sum(-1, keepdim=True)


def nearest_axis(X: Tensor, R: Tensor) -> Tensor:
    """Hash points by the largest of [R x, -R x]."""
    return torch.cat((X.double() @ R.double().T, -X.double() @ R.double().T), dim=-1).argmax(-1)


def visible(of_query: Tensor, of_key: Tensor, block: int, *, before: bool = False) -> Tensor:
    """Mark the keys in the block of each query, where both are sorted by their hashes.

    Args:
        of_query: hashes (m,).
        of_key: hashes (n,).
        block: keys of a block, at most.
        before: True to mark the keys of the block before, too.

    Returns:
        float64 (m, n).
    """
    blocks = -(-len(of_key) // block)
    found = torch.zeros(len(of_query), len(of_key), dtype=torch.float64)
    queries, keys = (hashes.argsort(stable=True).tensor_split(blocks) for hashes in (of_query, of_key))
    for number, own in enumerate(queries):
        for key_block in {number, (number - 1) % blocks if before else number}:
            found[own[:, None], keys[key_block]] = 1.0
    return found


def sides_of_planes(X: Tensor, normals: Tensor) -> Tensor:
    """Hash points by their sides of planes; hashes that follow each other differ in one side.

    Args:
        X: points (n, d).
        normals: (planes, d).

    Returns:
        int64 (n,): the number whose Gray code the sides are.
    """
    codes = {place ^ place >> 1: place for place in range(2 ** len(normals))}
    sides = (X.double() @ normals.double().T > 0).tolist()
    return torch.tensor([codes[sum(side << bit for bit, side in enumerate(point))] for point in sides])


def sorted_sampling(
    Q: Tensor, K: Tensor, V: Tensor, b: float, normals: Tensor, block: int, index: Tensor, weights: Tensor
) -> Tensor:
    """Attend exactly within sorted blocks, and to samples of the other keys (HyperAttention, KDEformer).

    Args:
        Q: queries.
        K: keys.
        V: values.
        b: factor of the scores.
        normals: normals of the planes (planes, d).
        block: keys of a block, at most.
        index: int64 (s,), the sampled keys.
        weights: (s,), what a sample stands for.
    """
    seen = visible(sides_of_planes(Q, normals), sides_of_planes(K, normals), block)
    counts = torch.zeros(len(K), dtype=torch.float64).index_add(0, index, weights.double())
    A = torch.where(seen > 0, 1.0, counts) * (b * Q.double() @ K.double().T).exp()
    return A @ V.double() / A.sum(-1, keepdim=True)


def sampling_law(V: Tensor) -> Tensor:
    """Give each key the probability |[v, 1]| / ||[V, 1]|| + 1 / n, up to a factor (KDEformer)."""
    extended = torch.cat((V.double(), torch.ones(len(V), 1, dtype=torch.float64)), dim=-1)
    law = extended.norm(dim=-1) / torch.linalg.matrix_norm(extended, ord=2) + 1 / len(V)
    return law / law.sum()


def thin(K: Tensor, V: Tensor, b: float, g: int, noise: Sequence[Tensor]) -> Tensor:
    """Choose 2^g sqrt(n) keys by kernel thinning (Thinformer): KH-Compress.

    Args:
        K: keys, of which the largest power of 4 is used, evenly spaced.
        V: values.
        b: factor of the scores.
        g: oversampling.
        noise: for each round, numbers in (0, 1) for each bucket (buckets, size / 2 + 1).

    Returns:
        int64, places of the keys.
    """
    n, power = len(K), 0
    while 4 ** (power + 1) <= n:
        power += 1
    size, rounds = 4 ** (g + 1), power - g
    delta = 0.5 * size**2 / (4 ** (g + 1) * rounds * 4**power)
    X, V = math.sqrt(b) * K.double(), V.double()
    H = (X @ X.T - X.square().sum(-1).max()).exp() * (V @ V.T + V.square().sum(-1).max())
    left = torch.arange(4**power) * n // 4**power
    for numbers in noise:
        buckets = left.split(size)
        left = torch.cat([halve(H, *pair, delta) for pair in zip(buckets, numbers, strict=True)])
    return left


def halve(H: Tensor, bucket: Tensor, noise: Tensor, delta: float) -> Tensor:
    """Keep one of each two points of a bucket, by a walk that balances the kernel H (n, n)."""
    first, second = bucket[::2], bucket[1::2]
    D = H[first][:, first] - H[first][:, second] - H[second][:, first] + H[second][:, second]
    log_term = 0.5 + math.log(2 * len(bucket) / delta)
    signs: list[float] = []
    for i in range(len(first)):
        psi = sum(sign * float(D[j, i]) for j, sign in enumerate(signs))
        largest = float(D.diagonal()[: i + 1].clamp_min(0).sqrt().max())
        bound = float(D[i, i].clamp_min(0).sqrt()) * largest * log_term
        signs.append(-1.0 if bound * (2 * float(noise[i]) - 1) <= psi else 1.0)
    swapped = (torch.tensor(signs) < 0) ^ bool(noise[-1] < 0.5)
    return torch.where(swapped, second, first)


def balance(K: Tensor, V: Tensor, b: float, gamma: float, walk: Tensor, ties: Tensor) -> Tensor:
    """Keep half of the keys of a block, so that those kept balance those dropped (BalanceKV).

    Args:
        K: keys of the block.
        V: values.
        b: factor of the scores.
        gamma: strength of the push.
        walk: numbers in (0, 1), one a step.
        ties: numbers in (0, 1), which say who changes over where the sides are not equal.

    Returns:
        int64 (ceil(n / 2),), places in the block.
    """
    X = math.sqrt(b) * (K.double() - K.double().mean(0))
    H = (X @ X.T).clamp_max(80.0).exp() * (V.double() @ V.double().T)
    signs = torch.zeros(len(K), dtype=torch.float64)
    for step in range(len(K)):
        signs[step] = 1.0 if walk[step] < 0.5 - gamma * float(H[step] @ signs) else -1.0
    return (signs + ties).argsort(descending=True)[: (len(K) + 1) // 2].sort().values


def balanced_metric(Q: Tensor, K: Tensor, b: float) -> Tensor:
    """Find M with equal diagonal second moments of z = M^T x and u = b M^-1 q, times tau^-2 and tau^2.

    Returns:
        (d, d), the directions in falling order of what z has in them; columns are unique up to their signs.
    """
    X = K.double() - K.double().mean(0)
    S_q, S_k = Q.double().T @ Q.double() / len(Q), X.T @ X / len(X)
    moments, vectors = torch.linalg.eig(S_k @ S_q)  # = P diag(l) P^-1, and M is P^-T up to lengths
    moments, vectors = moments.real, torch.linalg.inv(vectors.real).T
    order = moments.argsort(descending=True)
    moments, M = moments[order], vectors[:, order]
    # z has second moments M^T S_k M, and must have sqrt(l) b / tau^2.
    lengths = (moments.sqrt() * b / 3.94582 / (M.T @ S_k @ M).diagonal()).sqrt()
    return M * lengths


def near_wildcat(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    b: float,
    slots: Sequence[tuple[Tensor, Tensor, Tensor]],
    bins: Sequence[Tensor],
    near: int,
) -> Tensor:
    """Attend with one block of queries: exactly to the bins nearby, to the slots of all others.

    Four queries say which bins are near: those with the largest share of attention, as the slots have it.

    Args:
        Q: queries of the block.
        K: keys.
        V: values.
        b: factor of the scores.
        slots: for each bin the places of its slots' keys (s,), their sums U (s, d_v) and weights w (s,).
        bins: for each bin the places of its keys.
        near: number of near bins.
    """
    asked = Q[[len(Q) * i // 4 + len(Q) // 8 for i in range(4)]].double()
    mass = torch.stack([(b * asked @ K[p].double().T).exp() @ w.double().clamp_min(0) for p, _, w in slots])
    nearest = set((mass / mass.sum(0)).sum(1).argsort(descending=True)[:near].tolist())
    numerator, denominator = torch.zeros(len(Q), V.shape[1], dtype=torch.float64), torch.zeros(len(Q), 1)
    for number, (places, U, w) in enumerate(slots):
        if number in nearest:
            places = bins[number]
            U, w = V[places], torch.ones(len(places))
        A = (b * Q.double() @ K[places].double().T).exp()
        numerator, denominator = numerator + A @ U.double(), denominator + A @ w.double()[:, None]
    return (numerator / denominator).clamp(V.double().amin(0), V.double().amax(0))


def residual_slots(
    H: Tensor, V: Tensor, S: Sequence[int], samples: Sequence[int], probabilities: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum values over pivots and samples, unbiased over the draw of the samples.

    A sample stands for what the pivots miss, 1 / (count p) times; the pivots lose what they have of it.

    Args:
        H: kernel matrix (n, n).
        V: values (n, d_v).
        S: pivots.
        samples: sampled points.
        probabilities: (n,), p of a draw.

    Returns:
        U (|S| + |samples|, d_v) and w (|S| + |samples|,).
    """
    extended = torch.cat((V.double(), torch.ones(len(V), 1, dtype=torch.float64)), dim=-1)
    pivots, drawn = list(S), list(samples)
    W = torch.linalg.solve(H[pivots][:, pivots], H[pivots])
    shares = 1 / (len(drawn) * probabilities[drawn])
    own = shares[:, None] * extended[drawn]
    sums = torch.cat((W @ extended - W[:, drawn] @ own, own))
    return sums[:, :-1], sums[:, -1]
