"""Methods that choose tokens, against their definitions: loops, float64, one row and one head at a time."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compressors.blocks import (
    DV,
    GROUP,
    HEADS,
    ROTATION,
    SCALE,
    D,
    Head,
    Size,
    assert_best,
    half,
    heads,
    kept_entries,
    make,
    rotation_matrix,
    sizes,
)
from tests.compressors.definitions import DEFINITIONS, by_last_query
from wildcat_kv.compressors import (
    H2O,
    RKV,
    TOVA,
    ExpectedAttention,
    KVBlock,
    LagKV,
    PyramidKV,
    Scorer,
    SnapKV,
    TriAttention,
    Uniform,
)
from wildcat_kv.compressors.pyramidkv import pyramid
from wildcat_kv.compressors.rotation import Rotation

ROWS = st.integers(1, 3)


@pytest.mark.parametrize("name", [name for name, row in DEFINITIONS.items() if row.scores is not None])
@settings(max_examples=15)
@given(size=sizes(), rows=ROWS, seed=st.integers(0, 1000))
def test_the_best_items_by_definition_are_kept_as_they_are(name, size, rows, seed):
    method, definition, _ = DEFINITIONS[name]
    # A padding slot inside a partition of LagKV has no value to be compared with.
    block = make(size, seed, rows=rows, padding=name != "lagkv", state=method.state_size)
    found = method.compress(block, half(block))
    for b, h, head in heads(block):
        assert_best(block, found, b, h, definition(head), half(block))
    assert torch.equal(found.coreset.weights, found.coreset.valid.float())


@settings(max_examples=15)
@given(size=sizes(), rows=ROWS, seed=st.integers(0, 1000))
def test_tova_keeps_what_the_newest_query_attends_to_over_all_heads(size, rows, seed):
    block = make(size, seed, rows=rows)
    found = TOVA().compress(block, half(block))
    for b in range(rows):
        scores = by_last_query([Head(block, b, h) for h in range(HEADS)])
        for h in range(HEADS):
            assert_best(block, found, b, h, scores, half(block))
            if not size.window:
                assert size.held - 1 in kept_entries(block, found, b, h)


def test_expected_attention_is_the_expectation_over_gaussian_queries():
    block = make(Size(queried=14), 3)
    method = ExpectedAttention(future=1, sink=0, value_norm=False)
    generator = torch.Generator().manual_seed(0)
    for h in range(HEADS):
        head = Head(block, 0, h)
        expected = torch.zeros(head.n, dtype=torch.float64)
        turned = rotation_matrix(head.seen)
        for queries in head.queries:
            flat = torch.stack([torch.linalg.solve(rotation_matrix(head.seen - 14 + i), queries[i]) for i in range(14)])
            root = torch.linalg.cholesky(torch.cov(flat.T, correction=0))
            drawn = flat.mean(0) + torch.randn(400_000, D, generator=generator, dtype=torch.float64) @ root.T
            # Short keys: the mean of e^(score) is far from being decided by a few draws.
            mean = (SCALE * drawn @ (head.k @ turned).T * 0.3).exp().mean(0)
            expected += mean / mean.sum() / GROUP
        scaled = replace(block, keys=block.keys * 0.3)
        ours = method.score(scaled)[0, h].double()
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=1e-3)


def test_a_rotation_taken_back_is_undone_though_it_stretches():
    vectors, positions = torch.randn(2, 3, 4, D), torch.tensor([[0, 5, 9, 100], [3, 2, 1, 0]])
    rotated = torch.zeros_like(vectors)
    for b in range(2):
        for i in range(4):
            rotated[b, :, i] = vectors[b, :, i] @ rotation_matrix(int(positions[b, i])).float().T
    torch.testing.assert_close(ROTATION.back(rotated, positions), vectors)


@pytest.mark.parametrize("turning", [D, D - 2])
def test_radii_are_the_lengths_in_the_planes_of_a_rotation(turning):
    """Of channels that do not turn, their sizes; no position changes any."""

    def angles(positions):
        cos, sin = (part[..., :turning] for part in ROTATION._angles(positions))
        return cos, sin

    rotation = Rotation(angles, ROTATION._turn)
    vectors = torch.randn(2, 3, 4, D)
    planes = vectors[..., :turning].unflatten(-1, (2, turning // 2)).norm(dim=-2) / 2**0.5
    expected = torch.cat((planes, planes, vectors[..., turning:].abs()), -1)
    torch.testing.assert_close(rotation.radii(vectors), expected)
    if turning == D:
        far = rotation.forward(vectors, torch.tensor([[900], [31]]))
        torch.testing.assert_close(rotation.radii(far), expected)
    assert torch.equal(Rotation(None, None).radii(vectors), vectors.abs())


# TriAttention and R-KV


def test_triattention_is_what_the_centre_gives_a_key_where_all_queries_are_alike():
    """Queries that differ by their rotation alone do not stray: the series is the attention to come."""
    block = make(Size(recent=20, queried=20))
    one = block.queries[:, :, :1]
    steps = torch.stack([torch.tensor([step]) for step in range(20)])
    turned = torch.cat([ROTATION.forward(one, step.unsqueeze(0)) for step in steps], dim=2)
    scores = TriAttention(future=1).score(replace(block, queries=turned))
    next_but_one = ROTATION.forward(one, torch.tensor([[21]])).unflatten(1, (HEADS, GROUP))
    given = (next_but_one @ block.keys.unsqueeze(2).mT).squeeze(3)
    given = (given - given.mean(-1, keepdim=True)) / given.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(scores, given.amax(2), rtol=1e-3, atol=1e-3)


def test_rkv_drops_all_copies_of_a_key_but_the_newest():
    block = make(Size(sink=0, recent=24, window=8))
    keys, copies = block.keys.clone(), [1, 5, 9, 13]
    others = [entry for entry in range(24) if entry not in copies]
    keys[:, :, others[::2]] = -keys[:, :, others[1::2]]  # they cancel, so that on average none is like the others
    keys[..., 0] = 0
    keys[:, :, copies] = torch.eye(D)[0]
    block = replace(block, keys=keys)
    found = RKV(importance=0.0).compress(block, 13)
    for b, h, _ in heads(block):
        left = found.coreset.values[b, h]
        assert [entry for entry in copies if (left == block.values[b, h, entry]).all(-1).any()] == [13]


def test_rkv_counts_in_steps_what_it_counts_at_once(monkeypatch):
    block = make(Size(slots=5, recent=20), rows=2)
    whole = RKV().score(block)
    monkeypatch.setattr("wildcat_kv.compressors.rkv._COSINES_AT_ONCE", 300)
    torch.testing.assert_close(RKV().score(block), whole)


def test_a_scorer_of_ones_own_takes_ten_lines():
    class Loudest(Scorer):
        def score(self, block):
            return block.values.abs().amax(-1).half()

    for size in (Size(slots=4), Size(recent=9), Size(sink=0, recent=17, window=1)):
        block = make(size, 8, rows=2)
        found = Loudest().compress(block, half(block))
        for b, h, head in heads(block):
            scores = [float(value.abs().max().half()) for value in head.v]
            kept = kept_entries(block, found, b, h)
            there = (entry for entry in head.items if head.valid[entry])
            order = sorted(there, key=lambda entry: (-scores[entry], entry))
            assert kept == sorted(order[: half(block)])


# Uniform


def test_uniform_draws_anew_for_heads_rows_layers_and_seeds_and_the_same_again():
    block = make(Size(recent=40, window=2), rows=2, padding=False)

    def kept(block, seed=0):
        found = Uniform(seed=seed).compress(block, 12)
        rows = [[kept_entries(block, found, b, h) for h in range(HEADS)] for b in range(2)]
        assert rows[0] == rows[1]  # the noise is of what the rows have read, so that equal rows stay equal
        return rows[0]

    first = kept(block)
    assert kept(block) == first and all(len(entries) == 12 for entries in first)
    unlike = [replace(block, seen=block.seen + 1), replace(block, layer_index=2)]
    others = [*first, *kept(unlike[0]), *kept(unlike[1]), *kept(block, seed=1)]
    assert len({tuple(entries) for entries in others}) == 4 * HEADS


def test_uniform_keeps_every_item_equally_often():
    draws, kept = 1500, torch.zeros(8, dtype=torch.int64)
    block = make(Size(sink=0, recent=8, window=0))
    for seen in range(draws):
        coreset = Uniform().compress(replace(block, seen=seen), 2).coreset
        kept += (coreset.keys.unsqueeze(3) == block.keys[:, :, None]).all(-1).sum((0, 1, 2))
    assert kept.sum() == 2 * HEADS * draws
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
    method = PyramidKV(window=3, kernel=3, beta=4)
    for layer, (size, rank) in itertools.product(range(4), ((Size(recent=40), 10), (Size(slots=5, recent=30), 9))):
        block = make(replace(size, whole=False), 2, rows=2, layer_index=layer, sharing=range(4))
        found = method.compress(block, rank)
        slots = pyramid(rank, block.items, 4, 4)[layer]
        assert list(found.columns) == [slots] * 2 and found.coreset.valid.shape[-1] == slots
        same = SnapKV(window=3, kernel=3).compress(block, slots)
        assert torch.equal(found.coreset.keys, same.coreset.keys)


def test_the_last_layers_of_a_pyramid_may_keep_nothing():
    block = make(Size(recent=30), layer_index=9, sharing=range(10))
    found = PyramidKV(window=3, beta=20).compress(block, 4)
    assert found.columns == [0] and found.coreset.keys.shape == (1, HEADS, 0, D)


def test_a_pyramid_keeps_its_shape_when_slots_are_compressed_again():
    """Layers then differ in how many items they have; their slots still add up."""
    first, slots = pyramid(20, 60, 4, 20), []
    for layer, count in enumerate(first):
        row = Size(sink=0, slots=count, recent=15, window=0)
        block = replace(make(row, layer_index=layer, sharing=range(4), padding=False), seen=75)
        slots += PyramidKV(window=3).compress(block, 20).columns
    assert slots == first


# SnapKV


def test_snapkv_goes_by_attention_even_where_all_items_are_in_its_window():
    """As while text is generated: a fold then takes fewer tokens than are observed."""
    block = make(Size(sink=2, recent=20, window=6, queried=20), 3)
    first = block.keys.shape[2] - 20
    for place in (1, 6, 12):
        keys = block.keys.clone()
        keys[:, :, first + place] = 0
        keys[:, :, first + place, 0] = 20
        queries = block.queries.clone()
        queries[..., 0] = 5
        coreset = SnapKV(window=20).compress(replace(block, keys=keys, queries=queries), 4).coreset
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
    state, slots, read, method = torch.zeros(1, HEADS, 0, 2), 0, 0, H2O(recent=0.5)
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
        new = torch.cat((state, torch.zeros(1, HEADS, chunk, 2)), dim=2)
        # The newest two stay exact, so that some tokens of a fold are exact at the next as well.
        exact = columns - slots
        block = KVBlock(
            keys=keys[:, place, index],
            values=values[:, place, index],
            valid=torch.ones(1, HEADS, columns, dtype=torch.bool),
            items=columns - 2,
            window=2,
            exact=exact,
            seen=read,
            scale=SCALE,
            layer_index=0,
            sharing=range(1),
            weights=torch.ones(1, HEADS, columns),
            queries=queries[:, :, read - chunk : read],
            carried_state=new,
        )
        block = replace(block, carried_state=method.remember(block))
        for h in range(HEADS):
            expected = torch.tensor([[gathered[h][entry], visible[h][entry]] for entry in held[h]])
            torch.testing.assert_close(block.carried_state[0, h], expected, rtol=1e-5, atol=1e-6)
        rank = min(6, columns - 3)
        found = method.compress(block, rank)
        for h in range(HEADS):
            kept = kept_entries(block, found, 0, h)
            recent = list(range(columns - 2 - rank // 2, columns - 2))
            assert kept[-len(recent) :] == recent
            heavy = sorted(range(columns - 2 - rank // 2), key=lambda entry: -gathered[h][held[h][entry]])
            assert sorted(kept[: -len(recent)]) == sorted(heavy[: rank - rank // 2])
            held[h] = [held[h][entry] for entry in (*kept, columns - 2, columns - 1)]
        state, slots = torch.cat((found.carried_state, block.carried_state[:, :, -2:]), dim=2), rank


def test_h2o_on_average_divides_by_the_queries_that_could_see_a_token():
    block = make(Size(sink=0, recent=10, window=1, queried=10), state=2)
    block = replace(block, carried_state=torch.zeros_like(block.carried_state))
    method = H2O(recent=0, average=True)
    block = replace(block, carried_state=method.remember(block))
    found = method.compress(block, 4)
    for b, h, head in heads(block):
        scores = [0.0] * 10
        for back in range(1, 11):
            for g in range(GROUP):
                for entry, probability in enumerate(head.probabilities(g, back)):
                    scores[entry] += probability / GROUP / (10 - entry)
        assert_best(block, found, b, h, scores, 4)


# LagKV


def test_lagkv_keeps_the_same_share_of_every_partition_and_all_of_the_last():
    block = make(Size(sink=0, recent=2 + 5 * 8 + 3, window=0))
    found = LagKV(sink=2, lag=8).compress(block, 2 + 4 * 3 + 8 + 3)
    for _, h, _ in heads(block):
        kept = kept_entries(block, found, 0, h)
        assert {0, 1, *range(34, 45)} <= set(kept)
        for p in range(4):
            assert sum(2 + 8 * p <= entry < 10 + 8 * p for entry in kept) == 3
