"""The scores of the papers, written out naively: loops, float64, one head of one row. A row a method."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from tests.compressors.blocks import D, Head, rotation_matrix
from wildcat_kv.compressors import (
    CUR,
    H2O,
    RKV,
    TOVA,
    AdaKV,
    AttentionMatching,
    BalanceKV,
    Compactor,
    Compressor,
    CriticalKV,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    KVzip,
    KVzipPlus,
    LagKV,
    Leverage,
    PyramidKV,
    QueryWildCat,
    RereadingMatching,
    RereadingWildCat,
    SnapKV,
    StreamingLLM,
    TriAttention,
    Uniform,
    WildCat,
)
from wildcat_kv.compressors.leverage import projection


def by_place(head, sink):
    return [math.inf if entry < sink else float(entry) for entry in range(head.n)]


def by_norm(head):
    return [-float(key.norm()) for key in head.k]


def by_direction(head):
    units = [key / key.norm() if head.valid[entry] else key for entry, key in enumerate(head.k)]
    anchor = sum(units) / head.n
    return [-float(unit @ anchor / anchor.norm()) for unit in units]


def by_last_query(all_heads):
    """The same for every head: takes those of the row."""
    group = len(all_heads[0].queries)
    rows = [head.probabilities(g, 1) for head in all_heads for g in range(group)]
    scores = [sum(row[entry] for row in rows) / len(rows) for entry in range(all_heads[0].n)]
    return [*scores[:-1], math.inf]


def by_observation(head, window, kernel):
    window = min(window, head.m, head.n)
    length, group = head.n - window, len(head.queries)
    smooth = [0.0] * length
    for g in range(group):
        seen = [0.0] * length
        for back in range(1, window + 1):
            for entry, probability in enumerate(head.probabilities(g, back)[:length]):
                seen[entry] += probability / window
        for entry in range(length):
            for near in range(entry - kernel // 2, entry + kernel // 2 + 1):
                if 0 <= near < length:
                    smooth[entry] += seen[near] / kernel / group
    return smooth + [math.inf] * window


def by_range_of_the_next(head, sink, lag):
    n = head.n
    partitions = (n - sink) // lag
    if partitions < 2:  # the sinks and the newest
        return [math.inf if entry < sink else float(entry) for entry in range(n)]
    scores = [math.inf] * n
    for p in range(partitions - 1):
        here = range(sink + p * lag, sink + (p + 1) * lag)
        total = [0.0] * lag
        for tensor in (head.k, head.v):
            following = tensor[sink + (p + 1) * lag : sink + (p + 2) * lag]
            lowest, highest = following.min(0).values, following.max(0).values
            spread = [float(((tensor[entry] - lowest) / (highest - lowest)).std()) for entry in here]
            exponentials = [math.exp(value) for value in spread]
            for i, value in enumerate(exponentials):
                total[i] += value / sum(exponentials)
        for i, entry in enumerate(here):
            scores[entry] = sum(other < total[i] for other in total) / lag
    return scores


def by_leverage(head, sink, window):
    scores = []
    for entry in range(head.n):
        near = range(entry // window * window, min(head.n, (entry // window + 1) * window))
        score = 1.0
        for tensor in (head.k, head.v):
            total = sum(float(tensor[other].square().sum()) for other in near if head.valid[other])
            score *= float(tensor[entry].square().sum()) / total if total else 0.0
        scores.append(math.inf if entry < sink else score)
    return scores


def by_queries_to_come(head, future, sink):
    sink_entries = min(sink, head.n - 1)
    scores = [0.0] * head.n
    average = sum(rotation_matrix(head.seen + step) for step in range(future)) / future
    for queries in head.queries:
        flat = []
        for back in range(1, head.m + 1):
            position = head.seen - back
            if position >= sink or head.seen <= sink:
                flat.append(torch.linalg.solve(rotation_matrix(position), queries[head.m - back]))
        mean = sum(flat) / len(flat)
        covariance = sum(torch.outer(query - mean, query - mean) for query in flat) / len(flat)
        mean, covariance = average @ mean, average @ covariance @ average.T
        logs = []
        for entry in range(sink_entries, head.n):
            key = head.scale * head.k[entry]
            logs.append(float(key @ mean + key @ covariance @ key / 2) if head.valid[entry] else -math.inf)
        terms = [math.exp(value - max(logs)) for value in logs]
        for entry, term in enumerate(terms, sink_entries):
            scores[entry] += term / sum(terms) / len(head.queries) * float(head.v[entry].norm())
    return [math.inf] * sink_entries + scores[sink_entries:]


def flat_keys(head):
    """The keys before they were rotated; a slot remembers where it stood."""
    flat = []
    for entry in range(head.n):
        age = head.n - entry
        position = head.seen - age if age <= head.exact else round(float(head.state[entry, 0]))
        flat.append(torch.linalg.solve(rotation_matrix(position), head.k[entry]))
    return flat


def by_volume(head, sink, basis):
    """Leverage scores of the keys times `basis`, with the ridge of the reference library."""
    counted = [entry for entry in range(sink, head.n) if head.valid[entry]]
    scores = [math.inf if entry < sink else 0.0 for entry in range(head.n)]
    if counted:
        flat = flat_keys(head)
        mean = sum(flat[entry] for entry in counted) / len(counted)
        rows = {entry: (flat[entry] - mean) @ basis for entry in counted}
        gram = sum(torch.outer(row, row) for row in rows.values()) + 0.01 * torch.eye(basis.shape[1]).double()
        for entry, row in rows.items():
            scores[entry] = float(row @ torch.linalg.solve(gram, row))
    return scores


def by_redundancy(head, window, kernel, importance, alike):
    window, there = min(window, head.m, head.n), [entry for entry in range(head.n) if head.valid[entry]]
    past = head.n - window
    given = [0.0] * past
    for back in range(1, window + 1):
        scores = {
            entry: max(head.scale * float(queries[head.m - back] @ head.k[entry]) for queries in head.queries)
            for entry in there
            if entry < past
        }
        terms = {entry: math.exp(score - max(scores.values())) for entry, score in scores.items()}
        for entry, term in terms.items():
            given[entry] += term / sum(terms.values()) / window
    cosines = dict.fromkeys(there, 0.0)
    for entry in there:
        likeness = {
            other: float(head.k[entry] @ head.k[other] / head.k[entry].norm() / head.k[other].norm())
            for other in there
            if other != entry
        }
        similar = [other for other, cosine in likeness.items() if cosine > alike]
        for other, cosine in likeness.items():
            if not similar or other != max(similar):
                cosines[other] += cosine / len(there)
    total = sum(math.exp(cosine) for cosine in cosines.values())
    scores = []
    for entry in range(past):
        near = given[max(0, entry - kernel // 2) : entry + kernel // 2 + 1]
        redundancy = math.exp(cosines.get(entry, -math.inf)) / total
        scores.append(importance * max(near) - (1 - importance) * redundancy)
    return scores + [1.0 + entry for entry in range(past, head.n)]


def by_distances(head, future):
    """A trigonometric series in each plane of the rotation, as complex numbers."""
    planes = D // 2
    distances = [2**power for power in range(64) if 2**power <= future]

    def complex_of(vector):
        return [complex(float(vector[plane]), float(vector[plane + planes])) for plane in range(planes)]

    def turn(plane, steps):  # with the stretch of the rotation
        return complex(*(float(number) for number in rotation_matrix(steps)[[plane, plane + planes], plane]))

    keys, best = [complex_of(key) for key in head.k], [-math.inf] * head.n
    there = [entry for entry in range(head.n) if head.valid[entry]]
    for queries in head.queries:
        flat = [complex_of(query) for query in queries]
        for place, query in enumerate(flat):
            for plane in range(planes):
                query[plane] /= turn(plane, head.seen - head.m + place)
        scores = [0.0] * head.n
        for plane in range(planes):
            centre = sum(query[plane] for query in flat) / head.m
            strayed = sum(abs(query[plane]) for query in flat) / head.m - abs(centre)
            for entry in there:
                products = [centre * turn(plane, head.seen + far) * keys[entry][plane].conjugate() for far in distances]
                scores[entry] += sum(product.real for product in products) / len(distances)
                scores[entry] += 1.1 * strayed * abs(keys[entry][plane])
        mean = sum(scores[entry] for entry in there) / len(there)
        deviation = math.sqrt(sum((scores[entry] - mean) ** 2 for entry in there) / len(there))
        for entry in there:
            best[entry] = max(best[entry], (scores[entry] - mean) / max(deviation, 1e-6))
    return best


class Definition(NamedTuple):
    """A method as tests hold it against what its paper says.

    Attributes:
        method: with parameters small enough for the blocks of these tests.
        scores: takes a `Head` to the scores of its entries; None for a method that does more than choose by a head's
            scores: its definition is in a test of its own.
        queries: True if it learns from queries.
    """

    method: Compressor
    scores: Callable[[Head], list[float]] | None = None
    queries: bool = False


# A row a method, in the order of `wildcat_kv.compressors.ours`; variants behind a comma.
DEFINITIONS = {
    "wildcat": Definition(WildCat(bin_rank=3)),
    "streaming_llm": Definition(StreamingLLM(sink=2), lambda head: by_place(head, 2)),
    "snapkv": Definition(SnapKV(window=4, kernel=3), lambda head: by_observation(head, 4, 3), queries=True),
    "snapkv, no smoothing": Definition(
        SnapKV(window=2, kernel=1), lambda head: by_observation(head, 2, 1), queries=True
    ),
    "pyramidkv": Definition(PyramidKV(window=3, kernel=3, beta=4), queries=True),
    "balancekv": Definition(BalanceKV(block=4)),
    "uniform": Definition(Uniform(seed=4)),
    "tova": Definition(TOVA(), queries=True),
    "h2o": Definition(H2O(), queries=True),
    "h2o, average": Definition(H2O(recent=0, average=True), queries=True),
    "knorm": Definition(KNorm(), by_norm),
    "keydiff": Definition(KeyDiff(), by_direction),
    "expected_attention": Definition(
        ExpectedAttention(future=3, sink=1), lambda head: by_queries_to_come(head, 3, 1), queries=True
    ),
    "lagkv": Definition(LagKV(sink=1, lag=3), lambda head: by_range_of_the_next(head, 1, 3)),
    "cur": Definition(CUR(sink=1, window=4), lambda head: by_leverage(head, 1, 4)),
    "leverage": Definition(Leverage(sink=1), lambda head: by_volume(head, 1, torch.eye(D).double())),
    "leverage, projected": Definition(
        Leverage(sketch=3, sink=0, seed=5),
        lambda head: by_volume(head, 0, projection(D, 3, 5, torch.device("cpu")).double()),
    ),
    "compactor": Definition(Compactor(chunk=4, sink=1), queries=True),
    "rkv": Definition(RKV(window=3, kernel=3), lambda head: by_redundancy(head, 3, 3, 0.1, 0.5), queries=True),
    "rkv, importance": Definition(
        RKV(window=2, kernel=1, importance=0.8, alike=0.1),
        lambda head: by_redundancy(head, 2, 1, 0.8, 0.1),
        queries=True,
    ),
    "triattention": Definition(TriAttention(future=5), lambda head: by_distances(head, 5), queries=True),
    "adakv": Definition(AdaKV(SnapKV(window=3, kernel=3)), queries=True),
    "criticalkv": Definition(CriticalKV(SnapKV(window=3, kernel=3)), queries=True),
    "criticalkv, heads compete": Definition(CriticalKV(SnapKV(window=3, kernel=3), safeguard=0.2), queries=True),
    "kvzip": Definition(KVzip(), queries=True),
    "kvzip_plus": Definition(KVzipPlus(), queries=True),
    "attention_matching": Definition(AttentionMatching(queries=4), queries=True),
    "rereading_matching": Definition(RereadingMatching(queries=4), queries=True),
    "query_wildcat": Definition(QueryWildCat(bin_rank=3, queries=6, ahead=5), queries=True),
    "rereading_wildcat": Definition(RereadingWildCat(bin_rank=3, queries=6, ahead=5), queries=True),
}
