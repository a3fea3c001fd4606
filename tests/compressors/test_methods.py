"""Every method against its definition, written out naively: loops, float64, one row and one head at a time."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wildcat_kv import weighted_attention
from wildcat_kv.compressors import (
    CUR,
    H2O,
    TOVA,
    AdaKV,
    AttentionMatching,
    BalanceKV,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    KVBlock,
    KVzip,
    LagKV,
    PyramidKV,
    QueryWildCat,
    Scorer,
    SnapKV,
    StreamingLLM,
    Uniform,
)
from wildcat_kv.compressors.kvzip import reconstruction_scores
from wildcat_kv.compressors.pyramidkv import pyramid
from wildcat_kv.compressors.rotation import Rotation

HEADS, GROUP, D, DV, SCALE = 2, 2, 6, 5, 0.4


# Blocks


@dataclass(frozen=True)
class Size:
    """One row: sinks, slots, exact tokens, and of these what stays; `whole`: old slots are compressed again."""

    sink: int = 2
    slots: int = 0
    recent: int = 12
    window: int = 3
    whole: bool = True
    queried: int = 5

    @property
    def held(self):
        return self.sink + self.slots + self.recent

    @property
    def head(self):
        return self.sink + (0 if self.whole else self.slots)

    @property
    def length(self):
        return self.held - self.head - self.window


@st.composite
def sizes(draw, rows=(1, 3), slots=5):
    """Rows with at least two items and one query."""
    found = []
    for _ in range(draw(st.integers(*rows))):
        recent = draw(st.integers(2, 16))
        size = Size(
            sink=draw(st.integers(0, 2)),
            slots=draw(st.integers(0, slots)),
            recent=recent,
            window=draw(st.integers(0, recent - 2)),
            whole=draw(st.booleans()),
            queried=draw(st.integers(1, 12)),
        )
        found.append(replace(size, queried=min(size.queried, size.held)))
    return found


def make(rows, seed=0, *, padding=True, powers=False, dtype=torch.float32, group=GROUP, memory=0, **fields):
    """A block of `rows`, right-aligned; what is before them is noise, and some old slots are padding."""
    generator = torch.Generator().manual_seed(seed)
    n, m = max(row.held for row in rows) + 1, max(row.queried for row in rows) + 1

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    keys, values = 1.5 * normal(len(rows), HEADS, n, D), normal(len(rows), HEADS, n, DV)
    valid = torch.ones(len(rows), HEADS, n, dtype=torch.bool)
    weights = torch.ones(len(rows), HEADS, n)
    for b, row in enumerate(rows):
        keys[b, :, : n - row.held] *= 50
        old = slice(n - row.held + row.sink, n - row.recent)
        if padding and row.slots > 1:
            valid[b, :, old] = torch.rand(HEADS, row.slots, generator=generator) < 0.7
            valid[b, :, n - row.recent - 1] = True
        if powers:
            chosen = 2.0 ** torch.randint(0, 3, (row.slots,), generator=generator)
            weights[b, :, old] = chosen
            values[b, :, old] *= chosen.unsqueeze(-1)
    keys[~valid], values[~valid], weights[~valid] = 0, 0, 0
    given_fields = {
        "layer_index": 1,
        "sharing": range(3),
        "weights": weights,
        "queries": (1.5 * normal(len(rows), HEADS * group, m, D)).to(dtype),
        "queried": [row.queried for row in rows],
        "memory": normal(len(rows), HEADS, n, memory).abs(),
        "rotation": ROTATION,
        **fields,
    }
    return KVBlock(
        keys=keys.to(dtype),
        values=values.to(dtype),
        valid=valid,
        held=[row.held for row in rows],
        lengths=[row.length for row in rows],
        window=[row.window for row in rows],
        exact=[row.recent + (row.sink if not row.slots else 0) for row in rows],
        seen=[row.held + 3 * row.slots + b for b, row in enumerate(rows)],
        scale=SCALE,
        value_bound=torch.full((len(rows), HEADS), 9.0),
        **given_fields,
    )


def alone(block, b):
    """Row b as it is without the others."""
    n, m, held = block.keys.shape[2], block.queries.shape[2], block.held[b]
    columns = {name: getattr(block, name)[b : b + 1, :, n - held :] for name in ("keys", "values", "valid", "memory")}
    numbers = {name: [getattr(block, name)[b]] for name in ("held", "lengths", "window", "exact", "seen", "queried")}
    return replace(
        block,
        **columns,
        **numbers,
        weights=None if block.weights is None else block.weights[b : b + 1, :, n - held :],
        queries=block.queries[b : b + 1, :, m - block.queried[b] :],
        value_bound=block.value_bound[b : b + 1],
    )


def half(block):
    return [max(1, length // 2) for length in block.lengths]


class Head:
    """One head of one row, in float64: what the definitions are written in."""

    def __init__(self, block, b, h):
        n, held = block.keys.shape[2], block.held[b]
        self.n, self.exact, self.seen, self.scale = held, block.exact[b], block.seen[b], block.scale
        self.k = block.keys[b, h, n - held :].double()
        self.v = block.values[b, h, n - held :].double()
        self.valid = block.valid[b, h, n - held :].tolist()
        group, m = block.queries.shape[1] // HEADS, block.queries.shape[2]
        self.queries = block.queries[b, h * group : (h + 1) * group, m - block.queried[b] :].double()
        self.m = block.queried[b]
        self.first = held - block.window[b] - block.lengths[b]
        self.items = range(self.first, held - block.window[b])

    def probabilities(self, query_head, back):
        """What the query `back` places from the end, 1 the newest, gives each entry."""
        query, scores = self.queries[query_head, self.m - back], []
        for entry in range(self.n):
            age = self.n - entry
            later = age < back and age <= self.exact
            hidden = later or not self.valid[entry]
            scores.append(-math.inf if hidden else self.scale * float(query @ self.k[entry]))
        top = max(scores)
        terms = [math.exp(score - top) for score in scores]
        return [term / sum(terms) for term in terms]


def heads(block):
    for b in range(len(block.held)):
        for h in range(HEADS):
            yield b, h, Head(block, b, h)


def kept_entries(block, coreset, b, h):
    """Which entries of the row the slots of a coreset are; they must be there as they were."""
    head, found = Head(block, b, h), []
    assert not coreset.keys[b, h][~coreset.valid[b, h]].any() and not coreset.values[b, h][~coreset.valid[b, h]].any()
    for key, value in zip(coreset.keys[b, h].double(), coreset.values[b, h].double(), strict=True):
        for entry in range(head.n):
            if head.valid[entry] and torch.equal(key, head.k[entry]) and torch.equal(value, head.v[entry]):
                found.append(entry)
    assert len(found) == coreset.valid[b, h].sum() and found == sorted(set(found))
    assert set(found) <= set(head.items)
    return found


def assert_best(block, coreset, b, h, scores, rank):
    """The `rank` best items are kept, or all that are valid; what ties to float32 may be either."""
    head = Head(block, b, h)
    kept = kept_entries(block, coreset, b, h)
    candidates = [entry for entry in head.items if head.valid[entry]]
    assert len(kept) == min(rank, len(candidates))
    dropped = [scores[entry] for entry in candidates if entry not in kept]
    if kept and dropped:
        worst, best = min(scores[entry] for entry in kept), max(dropped)
        assert worst >= best or worst >= best - 1e-5 * abs(best)  # both may be infinite


# Rotations


FREQUENCIES = torch.tensor([1.0, 0.3, 0.05])


def _angles(positions):
    angle = positions.unsqueeze(-1) * FREQUENCIES
    return torch.cat((angle, angle), -1).cos() * 1.1, torch.cat((angle, angle), -1).sin() * 1.1


def _turn(vectors, cos, sin):
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


ROTATION = Rotation(_angles, _turn)


def rotation_matrix(position):
    """What stands behind ROTATION, as a matrix; it stretches by 1.1."""
    matrix = torch.zeros(D, D, dtype=torch.float64)
    for i, frequency in enumerate(FREQUENCIES.double().tolist()):
        cos, sin, j = 1.1 * math.cos(position * frequency), 1.1 * math.sin(position * frequency), i + D // 2
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = cos, -sin, sin, cos
    return matrix


# Scores, from the papers


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


DEFINITIONS = {
    "streaming_llm": (StreamingLLM(sink=2), lambda head: by_place(head, 2)),
    "knorm": (KNorm(), by_norm),
    "keydiff": (KeyDiff(), by_direction),
    "snapkv": (SnapKV(window=4, kernel=3), lambda head: by_observation(head, 4, 3)),
    "snapkv, no smoothing": (SnapKV(window=2, kernel=1), lambda head: by_observation(head, 2, 1)),
    "cur": (CUR(sink=1, window=4), lambda head: by_leverage(head, 1, 4)),
    "lagkv": (LagKV(sink=1, lag=3), lambda head: by_range_of_the_next(head, 1, 3)),
    "expected_attention": (ExpectedAttention(future=3, sink=1), lambda head: by_queries_to_come(head, 3, 1)),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@settings(max_examples=15)
@given(rows=sizes(), seed=st.integers(0, 1000))
def test_the_best_items_by_definition_are_kept_as_they_are(name, rows, seed):
    method, definition = DEFINITIONS[name]
    # A padding slot inside a partition of LagKV has no value to be compared with.
    block = make(rows, seed, padding=name != "lagkv")
    coreset = method.compress(block, half(block))
    for b, h, head in heads(block):
        assert_best(block, coreset, b, h, definition(head), half(block)[b])
    assert torch.equal(coreset.weights, coreset.valid.float())


@settings(max_examples=15)
@given(rows=sizes(), seed=st.integers(0, 1000))
def test_tova_keeps_what_the_newest_query_attends_to_over_all_heads(rows, seed):
    block = make(rows, seed)
    coreset = TOVA().compress(block, half(block))
    for b, row in enumerate(rows):
        scores = by_last_query([Head(block, b, h) for h in range(HEADS)])
        for h in range(HEADS):
            assert_best(block, coreset, b, h, scores, half(block)[b])
            if not row.window:
                assert row.held - 1 in kept_entries(block, coreset, b, h)


def test_expected_attention_is_the_expectation_over_gaussian_queries():
    block = make([Size(queried=14)], 3)
    method = ExpectedAttention(future=1, sink=0, value_norm=False)
    ours = method.score(alone(block, 0))[0].double()
    generator = torch.Generator().manual_seed(0)
    for h in range(HEADS):
        head, expected = Head(block, 0, h), torch.zeros(block.held[0], dtype=torch.float64)
        turned = rotation_matrix(head.seen)
        for queries in head.queries:
            flat = torch.stack([torch.linalg.solve(rotation_matrix(head.seen - 14 + i), queries[i]) for i in range(14)])
            root = torch.linalg.cholesky(torch.cov(flat.T, correction=0))
            drawn = flat.mean(0) + torch.randn(400_000, D, generator=generator, dtype=torch.float64) @ root.T
            # Short keys: the mean of e^(score) is far from being decided by a few draws.
            mean = (SCALE * drawn @ (head.k @ turned).T * 0.3).exp().mean(0)
            expected += mean / mean.sum() / GROUP
        scaled = replace(alone(block, 0), keys=alone(block, 0).keys * 0.3)
        ours = method.score(scaled)[0, h].double()
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=1e-3)


def test_a_rotation_taken_back_is_undone_though_it_stretches():
    vectors, positions = torch.randn(2, 3, 4, D), torch.tensor([[0, 5, 9, 100], [3, 2, 1, 0]])
    rotated = torch.zeros_like(vectors)
    for b in range(2):
        for i in range(4):
            rotated[b, :, i] = vectors[b, :, i] @ rotation_matrix(int(positions[b, i])).float().T
    torch.testing.assert_close(ROTATION.back(rotated, positions), vectors)


# What holds for all of them


METHODS = {
    "uniform": Uniform(seed=4),
    "tova": TOVA(),
    "h2o": H2O(),
    "h2o, average": H2O(recent=0, average=True),
    "pyramidkv": PyramidKV(window=3, kernel=3, beta=4),
    "adakv": AdaKV(SnapKV(window=3, kernel=3)),
    "balancekv": BalanceKV(block=4),
    "attention_matching": AttentionMatching(queries=4),
    "query_wildcat": QueryWildCat(bin_rank=3, queries=6, ahead=5),
    **{name: method for name, (method, _) in DEFINITIONS.items()},
}


def run(method, block, budget):
    """What a fold does: bring the memory up to date, then compress."""
    if method.memory:
        block = replace(block, memory=method.remember(block))
    return method.compress(block, budget)


def block_for(name, rows, seed=0, **fields):
    exact = {"padding": False, "powers": True} if name == "balancekv" else {}
    return make(rows, seed, memory=METHODS[name].memory, **exact, **fields)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=12)
@given(rows=sizes(rows=(2, 4)), seed=st.integers(0, 1000))
def test_a_row_beside_others_gives_what_it_gives_alone(name, rows, seed):
    method, block = METHODS[name], block_for(name, rows, seed)
    together = run(method, block, half(block))
    for b in range(len(rows)):
        single = alone(block, b)
        by_itself = run(method, single, half(single))
        width = by_itself.valid.shape[-1]
        columns = (together.columns or half(block))[b]
        assert columns == (by_itself.columns or half(single))[0] == width
        first = together.valid.shape[-1] - width
        assert not together.valid[b, :, :first].any() and not together.weights[b, :, :first].any()
        for field in ("keys", "values", "weights", "valid", "memory"):
            ours, theirs = getattr(together, field), getattr(by_itself, field)
            if field == "memory" and theirs is None:  # it remembers nothing
                assert ours is None
                continue
            torch.testing.assert_close(ours[b : b + 1, :, first:], theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_blocks_give_finite_slots_in_their_dtype(name, dtype):
    rows = [Size(slots=4), Size(slots=3, recent=9, whole=False), Size(sink=0, recent=20, window=0)]
    block = block_for(name, rows, dtype=dtype)
    coreset = run(METHODS[name], block, half(block))
    assert coreset.keys.dtype == coreset.values.dtype == dtype and coreset.weights.dtype == torch.float32
    for tensor in (coreset.keys, coreset.values, coreset.weights):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_row_that_is_not_to_be_compressed_holds_up_no_other(name):
    resting = Size(sink=2, recent=6, window=6)
    rows = [Size(slots=3), resting, Size(recent=20)]
    block = block_for(name, rows)
    assert block.lengths[1] == 0
    budget = [4, 0, 5]
    coreset = run(METHODS[name], block, budget)
    for tensor in (coreset.keys, coreset.values, coreset.weights):
        assert torch.isfinite(tensor).all()
    assert not coreset.valid[1].any()
    if coreset.columns is not None:
        assert coreset.columns[1] == 0
    single = run(METHODS[name], alone(block, 2), [5])
    width = single.valid.shape[-1]
    assert torch.equal(coreset.keys[2:, :, coreset.keys.shape[2] - width :], single.keys)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [2, 3])
def test_of_two_or_three_items_one_is_left(name, length):
    block = block_for(name, [Size(sink=1, recent=length, window=0, queried=1)] * 2)
    coreset = run(METHODS[name], block, [1, 1])
    columns = coreset.columns or [1, 1]
    assert torch.isfinite(coreset.values).all() and columns == [coreset.valid.shape[-1]] * 2
    if name not in ("pyramidkv", "adakv"):
        assert coreset.valid.sum(-1).eq(1).all()


@pytest.mark.parametrize("name", METHODS)
def test_padding_slots_are_never_kept(name):
    if name == "balancekv":
        pytest.skip("its slots are padding in all heads or in none")
    rows = [Size(sink=0, slots=8, recent=6, window=2), Size(sink=1, slots=6, recent=9, window=4)]
    block = block_for(name, rows)
    assert not block.valid.all()
    coreset = run(METHODS[name], block, [11, 10])  # more than there are
    for b in range(2):
        for h in range(HEADS):
            start = block.keys.shape[2] - rows[b].held + rows[b].head
            stop = block.keys.shape[2] - rows[b].window
            there = {tuple(key.tolist()) for key in block.keys[b, h, start:stop][block.valid[b, h, start:stop]]}
            slots = coreset.keys[b, h][coreset.valid[b, h]]
            assert {tuple(key.tolist()) for key in slots} <= there and len(slots) <= len(there)
    assert torch.equal(coreset.weights != 0, coreset.valid)


def test_a_scorer_of_ones_own_takes_ten_lines():
    class Loudest(Scorer):
        def score(self, block):
            assert block.held == [block.keys.shape[2]] * len(block.keys)
            return block.values.abs().amax(-1).half()

    block = make([Size(slots=4), Size(recent=9), Size(sink=0, recent=17, window=1)], 8)
    coreset = Loudest().compress(block, half(block))
    for b, h, head in heads(block):
        scores = [float(value.abs().max().half()) for value in head.v]
        kept = kept_entries(block, coreset, b, h)
        order = sorted((entry for entry in head.items if head.valid[entry]), key=lambda entry: (-scores[entry], entry))
        assert kept == sorted(order[: half(block)[b]])


# Uniform


def test_uniform_draws_anew_for_heads_rows_layers_and_seeds_and_the_same_again():
    block = make([Size(recent=40, window=2)] * 2, padding=False)
    block = replace(block, seen=[42, 43])

    def kept(block, seed=0):
        coreset = Uniform(seed=seed).compress(block, [12, 12])
        return [kept_entries(block, coreset, b, h) for b in range(2) for h in range(HEADS)]

    first = kept(block)
    assert kept(block) == first and all(len(entries) == 12 for entries in first)
    others = [*first, *kept(replace(block, layer_index=2)), *kept(block, seed=1)]
    assert len({tuple(entries) for entries in others}) == 12
    # The noise is of what the row has read, so that equal rows stay equal.
    equal = kept(replace(block, seen=[42, 42]))
    assert equal[:2] == equal[2:]


def test_uniform_keeps_every_item_equally_often():
    rows = 1500
    block = make([Size(sink=0, recent=8, window=0)] * rows)
    coreset = Uniform().compress(replace(block, seen=list(range(rows))), [2] * rows)
    kept = (coreset.keys.unsqueeze(3) == block.keys[:, :, None, 1:]).all(-1).sum((0, 1, 2))
    assert kept.sum() == 2 * HEADS * rows
    assert (kept - 750).abs().max() < 5 * math.sqrt(750)


# PyramidKV


@given(st.integers(0, 300), st.integers(0, 1000), st.integers(1, 40), st.integers(1, 30))
def test_a_pyramid_falls_linearly_and_adds_up_exactly(rank, more, layers, beta):
    length = rank + more
    slots = pyramid(rank, length, layers, beta)
    assert sum(slots) == rank * layers and len(slots) == layers
    assert all(0 <= count <= length for count in slots)
    if layers > 1:
        highest = min(2 * rank - rank / beta, length)
        for layer, count in enumerate(slots):
            assert abs(count - (highest - 2 * (highest - rank) * layer / (layers - 1))) < 1 + 1e-9


def test_pyramidkv_is_snapkv_with_other_budgets():
    rows = [Size(recent=40), Size(slots=5, recent=30)]
    method = PyramidKV(window=3, kernel=3, beta=4)
    for layer in range(4):
        block = make(rows, 2, layer_index=layer, sharing=range(4))
        coreset = method.compress(block, [10, 9])
        slots = [pyramid(rank, row.length, 4, 4)[layer] for rank, row in zip([10, 9], rows, strict=True)]
        assert list(coreset.columns) == slots and coreset.valid.shape[-1] == max(slots)
        same = SnapKV(window=3, kernel=3).compress(block, slots)
        assert torch.equal(coreset.keys, same.keys)


def test_the_last_layers_of_a_pyramid_may_keep_nothing():
    block = make([Size(recent=30)], layer_index=9, sharing=range(10))
    coreset = PyramidKV(window=3, beta=20).compress(block, [4])
    assert coreset.columns == [0] and coreset.keys.shape == (1, HEADS, 0, D)


def test_a_pyramid_keeps_its_shape_when_slots_are_compressed_again():
    """Layers then differ in how many items they have; their slots still add up."""
    first, slots = pyramid(20, 60, 4, 20), []
    for layer, count in enumerate(first):
        row = Size(sink=0, slots=count, recent=15, window=0)
        block = replace(make([row], layer_index=layer, sharing=range(4), padding=False), seen=[75])
        slots += PyramidKV(window=3).compress(block, [20]).columns
    assert slots == first


# SnapKV


def test_snapkv_goes_by_attention_even_where_all_items_are_in_its_window():
    """As while text is generated: a fold then takes fewer tokens than are observed."""
    block = make([Size(sink=2, recent=20, window=6, queried=20)], 3)
    first = block.keys.shape[2] - 20
    for place in (1, 6, 12):
        keys = block.keys.clone()
        keys[:, :, first + place] = 0
        keys[:, :, first + place, 0] = 20
        queries = block.queries.clone()
        queries[..., 0] = 5
        coreset = SnapKV(window=20).compress(replace(block, keys=keys, queries=queries), [4])
        assert (coreset.keys == keys[:, :, first + place, None]).all(-1).any(-1).all(), place


# H2O


def test_h2o_gathers_over_folds_what_every_query_gave_when_it_was_read():
    """Tokens come in chunks; after each some are dropped, and the queries to come see them no more."""
    generator = torch.Generator().manual_seed(5)
    total, chunks = 30, [12, 1, 9, 8]
    keys, values = (torch.randn(1, HEADS, total, channels, generator=generator) for channels in (D, DV))
    queries = torch.randn(1, HEADS * GROUP, total, D, generator=generator)
    held = [[] for _ in range(HEADS)]
    gathered = [[0.0] * total for _ in range(HEADS)]
    visible = [[0] * total for _ in range(HEADS)]
    memory, slots, read, method = torch.zeros(1, HEADS, 0, 2), 0, 0, H2O(recent=0.5)
    for chunk in chunks:
        read += chunk
        for h in range(HEADS):
            held[h] += range(read - chunk, read)
            for token in range(read - chunk, read):
                seen = [entry for entry in held[h] if entry <= token]
                for entry in seen:
                    visible[h][entry] += 1
                for g in range(GROUP):
                    query = queries[0, h * GROUP + g, token].double()
                    scores = torch.stack([SCALE * query @ keys[0, h, entry].double() for entry in seen]).softmax(0)
                    for entry, score in zip(seen, scores.tolist(), strict=True):
                        gathered[h][entry] += score / GROUP
        columns = len(held[0])
        index = torch.tensor(held)
        place = torch.arange(HEADS)[:, None]
        new = torch.cat((memory, torch.zeros(1, HEADS, chunk, 2)), dim=2)
        # The newest two stay exact, so that some tokens of a fold are exact at the next as well.
        exact = columns - slots
        block = KVBlock(
            keys=keys[:, place, index],
            values=values[:, place, index],
            valid=torch.ones(1, HEADS, columns, dtype=torch.bool),
            held=[columns],
            lengths=[columns - 2],
            window=[2],
            exact=[exact],
            seen=[read],
            scale=SCALE,
            layer_index=0,
            sharing=range(1),
            weights=torch.ones(1, HEADS, columns),
            queries=queries[:, :, read - chunk : read],
            queried=[chunk],
            memory=new,
        )
        block = replace(block, memory=method.remember(block))
        for h in range(HEADS):
            expected = torch.tensor([[gathered[h][entry], visible[h][entry]] for entry in held[h]])
            torch.testing.assert_close(block.memory[0, h], expected, rtol=1e-5, atol=1e-6)
        rank = min(6, columns - 3)
        coreset = method.compress(block, [rank])
        for h in range(HEADS):
            kept = kept_entries(block, coreset, 0, h)
            recent = list(range(columns - 2 - rank // 2, columns - 2))
            assert kept[-len(recent) :] == recent
            heavy = sorted(range(columns - 2 - rank // 2), key=lambda entry: -gathered[h][held[h][entry]])
            assert sorted(kept[: -len(recent)]) == sorted(heavy[: rank - rank // 2])
            held[h] = [held[h][entry] for entry in (*kept, columns - 2, columns - 1)]
        memory, slots = torch.cat((coreset.memory, block.memory[:, :, -2:]), dim=2), rank


def test_h2o_on_average_divides_by_the_queries_that_could_see_a_token():
    block = make([Size(sink=0, recent=10, window=1, queried=10)], memory=2)
    block = replace(block, memory=torch.zeros_like(block.memory))
    method = H2O(recent=0, average=True)
    block = replace(block, memory=method.remember(block))
    coreset = method.compress(block, [4])
    for b, h, head in heads(block):
        scores = [0.0] * 10
        for back in range(1, 11):
            for g in range(GROUP):
                for entry, probability in enumerate(head.probabilities(g, back)):
                    scores[entry] += probability / GROUP / (10 - entry)
        assert_best(block, coreset, b, h, scores, 4)


# LagKV


def test_lagkv_keeps_the_same_share_of_every_partition_and_all_of_the_last():
    block = make([Size(sink=0, recent=2 + 5 * 8 + 3, window=0)])
    coreset = LagKV(sink=2, lag=8).compress(block, [2 + 4 * 3 + 8 + 3])
    for _, h, _ in heads(block):
        kept = kept_entries(block, coreset, 0, h)
        assert {0, 1, *range(34, 45)} <= set(kept)
        for p in range(4):
            assert sum(2 + 8 * p <= entry < 10 + 8 * p for entry in kept) == 3


# AdaKV


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5, 1.0])
@settings(max_examples=15)
@given(rows=sizes(), seed=st.integers(0, 1000))
def test_adakv_shares_the_slots_of_all_heads_by_score(safeguard, rows, seed):
    block = make(rows, seed)
    method = AdaKV(SnapKV(window=2, kernel=3), safeguard=safeguard)
    budget = half(block)
    coreset = method.compress(block, budget)
    for b, rank in enumerate(budget):
        all_heads = [Head(block, b, h) for h in range(HEADS)]
        safe = max(1, int(rank * safeguard)) if safeguard else 0
        kept, rest = [], []
        for h, head in enumerate(all_heads):
            scores = by_observation(head, 2, 3)
            order = [(scores[entry], h, entry) for entry in head.items if head.valid[entry]]
            order.sort(key=lambda item: (-item[0], item[2]))
            kept += order[:safe]
            rest += order[safe:]
        rest.sort(key=lambda item: (-item[0], item[1], item[2]))
        taken = kept + rest[: max(0, HEADS * rank - len(kept))]
        expected = [sorted(entry for _, at, entry in taken if at == h) for h in range(HEADS)]
        found = [kept_entries(block, coreset, b, h) for h in range(HEADS)]
        assert sum(map(len, found)) == len(taken)
        assert coreset.columns[b] == max(map(len, found))
        gaps = sorted({score for score, _, _ in (*kept, *rest)})
        # Of an observation window, all of which comes first, it is not said which first.
        if math.inf not in gaps and all(second - first > 1e-5 for first, second in itertools.pairwise(gaps)):
            assert found == expected


def test_adakv_needs_what_its_scorer_needs():
    method = AdaKV(H2O(average=True))
    assert method.memory == 2 and method.observation == H2O().observation and method.decodes
    assert AdaKV(ExpectedAttention()).needs_rotation and not AdaKV(KNorm()).needs_queries


# BalanceKV


def totals(block, coreset, query):
    """Denominator and numerator of what a query sees of a coreset, or of all items, float64."""
    if coreset is None:
        keys, values, weights = (block.items(tensor) for tensor in (block.keys, block.values, block.weights))
    else:
        keys, values, weights = coreset.keys, coreset.values, coreset.weights
    terms = (SCALE * keys.double() @ query.double().unsqueeze(-1)).squeeze(-1).exp()
    return torch.cat(((terms * weights).sum(-1, keepdim=True), (terms.unsqueeze(-1) * values).sum(-2)), dim=-1)


@settings(max_examples=25)
@given(rows=sizes(slots=6), seed=st.integers(0, 1000), share=st.floats(0.3, 0.95))
def test_balancekv_weights_are_powers_of_two_and_add_up(rows, seed, share):
    rows = [replace(row, recent=row.recent + 24) for row in rows]
    block = make(rows, seed, padding=False, powers=True)
    budget = [max(10, int(share * length)) for length in block.lengths]
    coreset = BalanceKV(block=8, seed=seed).compress(block, budget)
    for b, h, head in heads(block):
        weights = coreset.weights[b, h][coreset.valid[b, h]]
        assert len(weights) == budget[b]
        assert torch.equal(weights.log2(), weights.log2().round())
        first = block.keys.shape[2] - head.n
        old = block.weights[b, h, first:]
        assert weights.sum() == old[head.items.start : head.items.stop].sum()
        slot_keys = coreset.keys[b, h][coreset.valid[b, h]]
        places = [next(i for i in head.items if torch.equal(head.k[i], key.double())) for key in slot_keys]
        assert places == sorted(set(places))
        for place, weight, value in zip(places, weights, coreset.values[b, h][coreset.valid[b, h]], strict=True):
            torch.testing.assert_close(value.double(), head.v[place] * float(weight / old[place]))


def test_balancekv_halves_more_evenly_than_chance():
    """Halved, the sums that queries see are nearer to those of all tokens than of a random half, doubled."""
    generator = torch.Generator().manual_seed(2)
    block = make([Size(sink=0, recent=256, window=0)], 1, padding=False)
    block = replace(block, keys=block.keys * 0.5, values=block.values * 0.3 + 1.0)
    query = torch.randn(1, HEADS, 1, D, generator=generator) * 0.5
    exact = totals(block, None, query)
    errors = {}
    for name, method in (("balancekv", BalanceKV(gamma=4.0, block=64)), ("coin", BalanceKV(gamma=0.0, block=64))):
        found = [
            totals(block, replace(method, seed=seed).compress(block, [128]), query) / exact - 1 for seed in range(60)
        ]
        errors[name] = torch.stack(found).square().mean().sqrt()
    found = []
    for seed in range(60):
        coreset = Uniform(seed=seed).compress(block, [128])
        found.append(2 * totals(block, coreset, query) / exact - 1)
    errors["uniform"] = torch.stack(found).square().mean().sqrt()
    assert errors["balancekv"] < 0.8 * errors["uniform"]
    assert errors["balancekv"] < 0.8 * errors["coin"]


def test_balancekv_is_right_on_average():
    block = make([Size(sink=0, recent=64, window=0)], 1, padding=False)
    block = replace(block, keys=block.keys * 0.3)
    query = torch.randn(1, HEADS, 1, D, generator=torch.Generator().manual_seed(2)) * 0.5
    exact = totals(block, None, query)
    found = torch.stack(
        [totals(block, BalanceKV(block=16, seed=seed).compress(block, [32]), query) for seed in range(400)]
    )
    deviation = (found.mean(0) - exact) / (found.std(0) / 20 + 1e-9)
    assert deviation.abs().max() < 4.5


def test_balancekv_prefers_no_token_for_its_place():
    block = make([Size(sink=0, recent=64, window=0)], 1, padding=False)
    kept = torch.zeros(64)
    for seed in range(300):
        keys = BalanceKV(block=16, seed=seed).compress(block, [32]).keys
        kept += (keys.unsqueeze(3) == block.keys[:, :, None, 1:]).all(-1).sum((0, 1, 2))
    quarters = kept.view(4, 16).mean(-1) / (300 * HEADS)
    assert (quarters - 0.5).abs().max() < 0.03


def test_balancekv_again_and_again_keeps_the_mass():
    method, block = BalanceKV(block=8), make([Size(sink=0, recent=100, window=0)], padding=False)
    coreset, mass = method.compress(block, [40]), 100
    for step in range(1, 6):
        new = make([Size(sink=0, recent=23, window=0)], step, padding=False)
        joined = {
            name: torch.cat((getattr(coreset, name), getattr(new, name)[:, :, -23:]), dim=2)
            for name in ("keys", "values", "weights", "valid")
        }
        block = replace(new, **joined, held=[63], lengths=[63], exact=[23], seen=[100 + 23 * step], memory=None)
        coreset, mass = method.compress(block, [40]), mass + 23
        assert coreset.weights.sum(-1).eq(mass).all() and coreset.valid.all()


# Attention Matching


def reference(block, b, h, queries=None):
    """Scaled queries of a key head, and what they see of the items: terms e^(score), values and weights."""
    head = Head(block, b, h)
    flat = head.queries.flatten(0, 1) * head.scale
    start = block.keys.shape[2] - head.n
    picked = [entry for entry in head.items if head.valid[entry]]
    weights = block.weights[b, h, start:].double()[picked]
    return flat, (flat @ head.k[picked].T), head.v[picked], weights, picked


def test_attention_matching_picks_the_keys_with_the_highest_root_mean_square_attention():
    rows = [Size(queried=12), Size(slots=5, recent=10, queried=7), Size(sink=0, recent=20, window=0, queried=3)]
    block = make(rows, 4)
    coreset = AttentionMatching().compress(block, half(block))
    for b, h, head in heads(block):
        flat, scores, _, _, picked = reference(block, b, h)
        attention = scores.softmax(-1)
        importance = {entry: float(attention[:, i].square().mean().sqrt()) for i, entry in enumerate(picked)}
        assert len(flat) == GROUP * rows[b].queried
        keys = coreset.keys[b, h][coreset.valid[b, h]].double()
        kept = [entry for entry in head.items if any(torch.equal(head.k[entry], key) for key in keys)]
        best = sorted(picked, key=lambda entry: -importance[entry])[: half(block)[b]]
        assert kept == sorted(best)


def test_attention_matching_takes_queries_spread_over_all_of_a_rows():
    block = make([Size(queried=12), Size(recent=20, queried=7)], 4)
    few = AttentionMatching(queries=4)
    coreset = few.compress(block, half(block))
    m = block.queries.shape[2]
    for b, count in enumerate(block.queried):
        spread = sorted(m - 1 - step * count // 4 for step in range(4))
        chosen = replace(alone(block, b), queries=block.queries[b : b + 1, :, spread], queried=[4])
        expected = AttentionMatching().compress(chosen, [half(block)[b]])
        width = expected.keys.shape[2]
        torch.testing.assert_close(coreset.keys[b : b + 1, :, -width:], expected.keys)
        torch.testing.assert_close(coreset.weights[b : b + 1, :, -width:], expected.weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bound", [1.5, 20.0])
def test_fitted_weights_are_nearly_the_best_within_bounds_for_the_mass_that_queries_see(bound):
    block = make([Size(recent=40, queried=30)], 6)
    coreset = AttentionMatching(max_weight=bound).compress(block, [12])
    assert coreset.weights.ge(1 / bound - 1e-6).all() and coreset.weights.le(bound + 1e-5).all()
    for _, h, _ in heads(block):
        flat, scores, _, _, _ = reference(block, 0, h)
        shares = (flat @ coreset.keys[0, h].double().T).exp() / scores.exp().sum(-1, keepdim=True)
        fitted = (shares @ coreset.weights[0, h].double() - 1).square().mean()
        best = scipy.optimize.lsq_linear(shares.numpy(), torch.ones(len(shares)).numpy(), bounds=(1 / bound, bound))
        assert fitted <= 1.5 * 2 * best.cost / len(shares)  # two steps of a gradient are not all the way
        assert fitted < 0.8 * (shares.sum(-1) - 1).square().mean()


def test_fitted_values_bring_the_output_nearer():
    block = make([Size(recent=40, queried=30)], 6)
    coreset = AttentionMatching().compress(block, [12])
    for _, h, head in heads(block):
        flat, scores, values, _, picked = reference(block, 0, h)
        exact = scores.softmax(-1) @ values
        ours = (flat @ coreset.keys[0, h].double().T).exp()
        weights = coreset.weights[0, h].double()
        denominator = (ours @ weights).unsqueeze(-1)
        own = torch.stack([head.v[next(i for i in picked if torch.equal(head.k[i], key.double()))]
                           for key in coreset.keys[0, h]])  # fmt: skip
        plain = ours @ (weights.unsqueeze(-1) * own) / denominator
        fitted = ours @ coreset.values[0, h].double() / denominator
        dropped = (ours @ own) / ours.sum(-1, keepdim=True)
        assert (fitted - exact).square().mean() < 0.5 * (plain - exact).square().mean()
        assert (fitted - exact).square().mean() < 0.5 * (dropped - exact).square().mean()


@pytest.mark.parametrize("queried", [1, 3, 30])
def test_with_as_many_slots_as_items_nothing_changes(queried):
    block = make([Size(slots=4, recent=14, queried=min(queried, 18))], 7, padding=False, powers=True)
    rank = block.lengths[0]
    coreset = AttentionMatching().compress(block, [rank])
    query = torch.randn(1, HEADS * GROUP, 5, D)
    items = [block.items(tensor) for tensor in (block.keys, block.values, block.weights)]
    exact = weighted_attention(query, *items, scale=SCALE)
    ours = weighted_attention(query, coreset.keys, coreset.values, coreset.weights, scale=SCALE)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)


# KVzip


@pytest.mark.parametrize(("start", "stop", "sink"), [(0, 7, 4), (5, 12, 4), (2, 12, 4), (5, 12, 0)])
def test_reconstruction_scores_are_the_largest_probabilities(start, stop, sink, monkeypatch):
    monkeypatch.setattr("wildcat_kv.compressors.kvzip._QUERIES_AT_ONCE", 4)
    n, again = 12, 10
    keys, queries = torch.randn(2, HEADS, n + again, D), torch.randn(2, HEADS * GROUP, again, D)
    found = reconstruction_scores(queries, keys, sink=sink, start=start, stop=stop, scale=SCALE)
    for b in range(2):
        for h in range(HEADS):
            best = [0.0] * (stop - start)
            for g in range(GROUP):
                for i in range(again):
                    seen = [*range(min(sink, start)), *range(start, stop), *range(n, n + i + 1)]
                    query = queries[b, h * GROUP + g, i].double()
                    scores = [math.exp(SCALE * float(query @ keys[b, h, entry].double())) for entry in seen]
                    for entry, score in zip(seen, scores, strict=True):
                        if start <= entry < stop:
                            best[entry - start] = max(best[entry - start], score / sum(scores))
            torch.testing.assert_close(found[b, h], torch.tensor(best), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layerwise", [False, True])
def test_kvzip_lets_layers_and_heads_compete_for_all_slots(layerwise):
    layers, row = 4, Size(sink=2, recent=20, window=3)
    blocks = [make([row] * 2, layer, layer_index=layer, sharing=range(layers), weights=None) for layer in range(layers)]
    blocks = [replace(block, **{name: getattr(block, name)[:, :, 1:] for name in ("keys", "values", "valid", "memory")})
              for block in blocks]  # fmt: skip
    scores = torch.rand(layers, 2, HEADS, row.held) * torch.tensor([4.0, 3.0, 2.0, 1.0]).view(-1, 1, 1, 1)
    method, budget = KVzip(scores, layerwise=layerwise), [6, 9]
    coresets = [method.compress(block, budget) for block in blocks]
    for b, rank in enumerate(budget):
        found = {
            (layer, h, entry)
            for layer, coreset in enumerate(coresets)
            for h in range(HEADS)
            for entry in kept_entries(blocks[layer], coreset, b, h)
        }
        assert len(found) == layers * HEADS * rank
        items = range(row.head, row.held - row.window)
        every = [(layer, h, entry) for layer in range(layers) for h in range(HEADS) for entry in items]
        every.sort(key=lambda at: -float(scores[at[0], b, at[1], at[2]]))
        if layerwise:
            expected = {at for layer in range(layers) for at in [at for at in every if at[0] == layer][: HEADS * rank]}
        else:
            expected = set(every[: layers * HEADS * rank])
        assert found == expected
        for layer, coreset in enumerate(coresets):
            assert coreset.columns[b] == max(sum(at[:2] == (layer, h) for at in found) for h in range(HEADS))


def test_kvzip_scores_of_another_context_are_refused():
    block = make([Size()])
    with pytest.raises(ValueError, match="the scores are of another context"):
        KVzip(torch.rand(1, 1, HEADS, 3)).compress(block, [4])
    with pytest.raises(ValueError, match="compress_context"):
        KVzip().compress(block, [4])
