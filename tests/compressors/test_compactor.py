"""Compactor and its leverage scores: what one head of a definition cannot say."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compressors.blocks import HEADS, ROTATION, D, Size, assert_best, half, heads, kept_entries, make, sizes
from tests.compressors.definitions import by_volume
from wildcat_kv.compressors import AdaKV, Compactor, Leverage
from wildcat_kv.compressors.leverage import leverage_scores

SINK, CHUNK, BLENDING = 1, 4, 0.7
METHOD = Compactor(blending=BLENDING, chunk=CHUNK, sink=SINK)


def given_in_chunks(head):
    """What each new token gets from the queries of its chunk, earlier and later ones; old ones have theirs."""
    got = [float(number) for number in head.state[:, 1]]
    first = max(head.n - min(head.m, head.exact), SINK)
    for start in range(first, head.n, CHUNK):
        chunk = range(start, min(start + CHUNK, head.n))
        for entry in chunk:
            got[entry] = 0.0
        for queries in head.queries:
            for asking in chunk:
                scores = {entry: float(queries[head.m - (head.n - asking)] @ head.k[entry]) for entry in chunk}
                terms = {entry: math.exp(score - max(scores.values())) for entry, score in scores.items()}
                for entry in chunk:
                    got[entry] += terms[entry] / sum(terms.values()) / len(head.queries)
    return got


def standard(scores, counted):
    """Standard scores of all heads of a row together; `counted` are (head, entry) pairs."""
    numbers = torch.tensor([scores[h][entry] for h, entry in counted]).double()
    deviation = float(numbers.std(correction=0))
    return [[(score - float(numbers.mean())) / max(deviation, 1e-6) for score in head] for head in scores]


def by_compactor(row):
    """The scores of all heads of one row."""
    counted = [(h, e) for h, head in enumerate(row) for e in range(SINK, head.n) if head.valid[e]]
    attention = []
    for head in row:
        got = given_in_chunks(head)
        weighted = [got[e] * float(head.v[e].norm()) if head.valid[e] else 0.0 for e in range(head.n)]
        near = [[weighted[o] for o in (e - 1, e, e + 1) if SINK <= o < head.n] for e in range(head.n)]
        attention.append([sum(numbers) / 3 for numbers in near])
    volume = [by_volume(head, SINK, torch.eye(D).double()) for head in row]
    if not counted:
        return volume
    parts = standard(attention, counted), standard(volume, counted)
    return [
        [math.inf if e < SINK else parts[0][h][e] + BLENDING * parts[1][h][e] for e in range(head.n)]
        for h, head in enumerate(row)
    ]


@settings(max_examples=25)
@given(size=sizes(), rows=st.integers(1, 2), seed=st.integers(0, 1000))
def test_compactor_adds_the_standard_scores_of_leverage_and_attention_in_chunks(size, rows, seed):
    block = make(size, seed, rows=rows, state=2)
    found = METHOD.compress(replace(block, carried_state=METHOD.remember(block)), half(block))
    row_of = {}
    for b, _, head in heads(block):
        row_of.setdefault(b, []).append(head)
    for b, row in row_of.items():
        for h, scores in enumerate(by_compactor(row)):
            assert_best(block, found, b, h, scores, half(block))


def test_heads_compete_by_compactors_scores_as_in_the_authors_code():
    block, method = make(Size(slots=3, recent=20, queried=20), 4, state=2, padding=False), AdaKV(METHOD, safeguard=0.0)
    found = method.compress(replace(block, carried_state=method.remember(block)), 7)
    row = [head for _, _, head in heads(block)]
    scores = by_compactor(row)
    pairs = [(scores[h][entry], h, entry) for h, head in enumerate(row) for entry in head.items]
    best = sorted(pairs, reverse=True)[: 7 * HEADS]
    for h in range(HEADS):
        assert kept_entries(block, found, 0, h) == sorted(entry for _, head, entry in best if head == h)
    assert not torch.equal(*found.coreset.valid[0].sum(-1))


def test_a_token_keeps_its_position_and_what_its_own_chunk_gave_it():
    block = make(Size(recent=20, queried=20), rows=2, state=2)
    block = replace(block, carried_state=METHOD.remember(block))
    found = METHOD.compress(block, 6)
    later = make(Size(slots=6, recent=8, queried=5), rows=2, state=2, padding=False)
    slots = slice(2, 8)
    keys, state = later.keys.clone(), later.carried_state.clone()
    keys[:, :, slots], state[:, :, slots] = found.coreset.keys, found.carried_state
    later = replace(later, keys=keys, carried_state=state, seen=25)
    again = METHOD.remember(later)
    assert torch.equal(again[:, :, slots], found.carried_state)
    assert again[0, 0, 8:, 0].tolist() == list(range(17, 25))  # the newest, by their number
    assert torch.equal(again[:, :, 8:11, 1], state[:, :, 8:11, 1])  # were asked about before


def test_the_leverage_of_a_key_does_not_depend_on_where_it_stands():
    block = make(Size(sink=0, recent=14, window=0), state=1)
    method = Leverage(sink=0)
    flat, here = ROTATION.back(block.keys, torch.arange(14).unsqueeze(0)), torch.tensor([[1000]])
    moved = replace(block, keys=ROTATION.forward(block.keys, here), seen=block.seen + 1000)
    torch.testing.assert_close(method.score(moved), method.score(block), rtol=1e-3, atol=1e-4)
    expected = leverage_scores(flat, block.valid, D, 0)
    torch.testing.assert_close(method.score(block), expected, rtol=1e-3, atol=1e-4)


@given(st.integers(2, 40), st.integers(1, 8), st.floats(0.01, 100), st.integers(0, 99))
def test_leverage_is_a_share_of_each_direction(n, rank, length, seed):
    """It sums up to the rank, and long keys of the same shape have the same."""
    keys = torch.randn(1, 1, n, 8, generator=torch.Generator().manual_seed(seed))
    keys[..., rank:] = 0
    valid = torch.ones(1, 1, n, dtype=torch.bool)
    scores = leverage_scores(100 * length * keys, valid, 8, 0)
    assert scores.min() >= 0 and scores.max() <= 1 + 1e-5
    assert float(scores.sum()) <= min(rank, n - 1) + 1e-3
    if length > 1:
        assert float(scores.sum()) > min(rank, n - 1) - 0.05


def test_a_projection_to_many_channels_changes_little():
    keys = torch.randn(1, HEADS, 4000, 128, generator=torch.Generator().manual_seed(1))
    keys[:, :, 7] += 30 * torch.randn(128, generator=torch.Generator().manual_seed(2))
    valid = torch.ones(keys.shape[:3], dtype=torch.bool)
    sums = {sketch: leverage_scores(keys, valid, sketch, 3) for sketch in (16, 64, 128)}
    for sketch, scores in sums.items():
        assert scores.argmax(-1).tolist() == [[7, 7]] and abs(float(scores[0, 0].sum()) - sketch) < 0.1
    assert not torch.equal(sums[16], leverage_scores(keys, valid, 16, 4))


@pytest.mark.parametrize("method", [Compactor(), Leverage(), Compactor(sink=0, chunk=1)])
def test_a_text_no_longer_than_the_sinks_is_compressed(method):
    block = make(Size(sink=2, recent=5, window=1), state=method.state_size)
    block = replace(block, carried_state=method.remember(block))
    coreset = method.compress(block, 2).coreset
    assert coreset.valid.all() and torch.isfinite(coreset.values).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blending": -0.1}, r"blending=-0\.1 must be at least 0"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"sketch": 0}, "sketch=0 must be at least 1"),
        ({"sink": -1}, "sink=-1 must be at least 0"),
    ],
)
def test_parameters_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Compactor(**fields)
