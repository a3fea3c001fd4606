"""The scores of the papers, written out naively: loops, float64, one head of one row. A row a method."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from tests.compressors.blocks import Head, rotation_matrix
from wildcat_kv.compressors import (
    CUR,
    H2O,
    TOVA,
    AdaKV,
    AttentionMatching,
    BalanceKV,
    Compressor,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    KVzip,
    LagKV,
    PyramidKV,
    QueryWildCat,
    RereadingWildCat,
    SnapKV,
    StreamingLLM,
    Uniform,
    WildCat,
)


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
    "adakv": Definition(AdaKV(SnapKV(window=3, kernel=3)), queries=True),
    "kvzip": Definition(KVzip(), queries=True),
    "attention_matching": Definition(AttentionMatching(queries=4), queries=True),
    "query_wildcat": Definition(QueryWildCat(bin_rank=3, queries=6, ahead=5), queries=True),
    "rereading_wildcat": Definition(RereadingWildCat(bin_rank=3, queries=6, ahead=5), queries=True),
}
