"""AdaKV and KVzip: heads, and layers, that share slots unequally."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compressors.blocks import GROUP, HEADS, SCALE, D, Head, Size, half, kept_entries, make, sizes
from tests.compressors.definitions import by_observation
from wildcat_kv.compressors import H2O, AdaKV, ExpectedAttention, KNorm, KVzip, Repetition, SnapKV
from wildcat_kv.compressors.kvzip import reconstruction_scores

# AdaKV


@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.5, 1.0])
@settings(max_examples=15)
@given(size=sizes(), rows=st.integers(1, 3), seed=st.integers(0, 1000))
def test_adakv_shares_the_slots_of_all_heads_by_score(safeguard, size, rows, seed):
    block = make(size, seed, rows=rows)
    method = AdaKV(SnapKV(window=2, kernel=3), safeguard=safeguard)
    rank = half(block)
    found = method.compress(block, rank)
    for b in range(rows):
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
        ours = [kept_entries(block, found, b, h) for h in range(HEADS)]
        assert sum(map(len, ours)) == len(taken)
        assert found.columns[b] == max(map(len, ours))
        gaps = sorted({score for score, _, _ in (*kept, *rest)})
        # Of an observation window, all of which comes first, it is not said which first.
        if math.inf not in gaps and all(second - first > 1e-5 for first, second in itertools.pairwise(gaps)):
            assert ours == expected


def test_adakv_needs_what_its_scorer_needs():
    method = AdaKV(H2O(average=True))
    assert method.state_size == 2 and method.observation == H2O().observation and method.decodes
    assert AdaKV(ExpectedAttention()).needs_rotation and not AdaKV(KNorm()).needs_queries


# KVzip


@pytest.mark.parametrize(("start", "stop", "sink"), [(0, 7, 4), (5, 12, 4), (2, 12, 4), (5, 12, 0)])
def test_reconstruction_scores_are_the_largest_probabilities(start, stop, sink, monkeypatch):
    monkeypatch.setattr("wildcat_kv.compressors.kvzip._QUERIES_AT_ONCE", 4)
    n, again = 12, 10
    keys, queries = torch.randn(2, HEADS, n + again, D), torch.randn(2, HEADS * GROUP, again, D)
    found = reconstruction_scores(Repetition(queries, keys, keys, start, stop, SCALE), sink=sink)
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
    layers, size, rank = 4, Size(sink=2, recent=20, window=3), 6
    scores = torch.rand(layers, 2, HEADS, size.held) * torch.tensor([4.0, 3.0, 2.0, 1.0]).view(-1, 1, 1, 1)
    blocks = [
        make(size, layer, rows=2, layer_index=layer, sharing=range(layers), weights=None, carried_state=state)
        for layer, state in enumerate(scores.unsqueeze(-1))
    ]
    method = KVzip(layerwise=layerwise)
    shares = method.deal([method.survey(block) for block in blocks], rank)
    found = [method.compress_share(block, rank, share) for block, share in zip(blocks, shares, strict=True)]
    for b in range(2):
        kept = {
            (layer, h, entry)
            for layer, (block, each) in enumerate(zip(blocks, found, strict=True))
            for h in range(HEADS)
            for entry in kept_entries(block, each, b, h)
        }
        assert len(kept) == layers * HEADS * rank
        items = range(size.head, size.held - size.window)
        every = [(layer, h, entry) for layer in range(layers) for h in range(HEADS) for entry in items]
        every.sort(key=lambda at: -float(scores[at[0], b, at[1], at[2]]))
        if layerwise:
            expected = {at for layer in range(layers) for at in [at for at in every if at[0] == layer][: HEADS * rank]}
        else:
            expected = set(every[: layers * HEADS * rank])
        assert kept == expected
        for layer, each in enumerate(found):
            assert each.columns[b] == max(sum(at[:2] == (layer, h) for at in kept) for h in range(HEADS))


def test_kvzip_without_the_scores_of_a_second_reading_is_refused():
    with pytest.raises(ValueError, match=r"KVzip has no scores; .*compress_context"):
        KVzip().compress(make(Size(), carried_state=torch.zeros(1, HEADS, Size().held, 1)), 4)


def test_a_method_that_reads_once_looks_at_no_second_reading():
    with pytest.raises(NotImplementedError, match="KNorm reads a text once"):
        KNorm().reread(Repetition(*torch.ones(3, 1, 1, 2, 1), start=0, stop=1, scale=1.0))
