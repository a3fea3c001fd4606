"""A profile of a model for Query WildCat: what each layer gets by it, when, and which models it refuses."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from tests.driver import METHODS, SCALE, assert_row_is_alone, read, tokens
from tests.tiny import SMALL, random_ids, tiny_config, tiny_model
from wildcat_kv import CompressedCache, WildCatCache
from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.compressors import QueryWildCat
from wildcat_kv.compressors.query_wildcat import Profile, load_profile, load_scorer, profile_names, scorer_names
from wildcat_kv.compressors.query_wildcat.model_match import fingerprint
from wildcat_kv.compressors.query_wildcat.profile import apportion
from wildcat_kv.compressors.query_wildcat.sharing import take_counted
from wildcat_kv.contexts.profiling import measure_profile
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.models import default_model_path

SIZES = {"sink": 3, "window": 8, "bin_rank": 4}
OURS = METHODS["query_wildcat"]
BUDGETS = [{"ratio": 0.25}, {"ratio": 0.5}, {"max_tokens": 40}]
# Layers of one share and of one a head.
LAYERS = [[0.5], [1.5], [1.0]]
HEADS = [[0.2, 0.8], [0.6, 2.0], [1.6, 0.8]]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def profile_of(config, attended, recalled=None, ratio=0.25):
    points = [{"ratio": ratio, "attended": attended, "recalled": recalled or attended}]
    return load_profile(
        {"version": 1, "model": "tiny", "match": fingerprint(config), "texts": "none", "tokens": 1, "points": points}
    )


def build(config, profile, **settings):
    return CompressedCache(config, compressor=replace(OURS, profile=profile), **{**SIZES, **settings})


def valid_by_head(cache):
    return [layer.state.entries.valid[0].sum(-1).tolist() for layer in cache.layers]


# How whole slots are dealt out


@given(
    parties=st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0, 7.3]), st.integers(0, 30)), min_size=1, max_size=9),
    slots=st.integers(0, 20),
)
def test_slots_are_dealt_out_to_the_last_and_never_beyond_the_room(parties, slots):
    shares, rooms = map(list, zip(*parties, strict=True))
    counts = apportion(shares, slots, rooms)
    assert sum(counts) == min(slots * len(parties), sum(rooms))
    # Rounding can give a party one more than its part of the sum.
    assert all(0 <= count <= room for count, room in zip(counts, rooms, strict=True))


@given(
    shares=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=9).filter(any), slots=st.integers(0, 50)
)
def test_with_room_for_all_each_gets_its_share_but_for_rounding(shares, slots):
    counts = apportion(shares, slots, [1000] * len(shares))
    exact = [share * slots * len(shares) / sum(shares) for share in shares]
    assert all(abs(count - part) < 1 for count, part in zip(counts, exact, strict=True))


def test_what_full_ones_cannot_take_goes_to_the_others_by_their_shares():
    assert apportion([10.0, 1.0, 2.0, 0.0], 10, [10, 30, 30, 30]) == [10, 10, 20, 0]
    assert apportion([10.0, 0.0, 0.0], 10, [10, 30, 30]) == [10, 10, 10]


@given(
    scores=st.lists(st.sampled_from([-math.inf, 0.0, 0.5, 1.0]), min_size=1, max_size=12),
    counts=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_of_equal_items_the_earlier_is_taken_and_padding_never(scores, counts):
    taken = take_counted(torch.tensor([[scores, scores[::-1]]]), counts)
    for head, (own, count) in enumerate(zip((scores, scores[::-1]), counts, strict=True)):
        best = sorted(range(len(own)), key=lambda item: -own[item])[:count]
        assert taken[0, head].nonzero().flatten().tolist() == sorted(item for item in best if own[item] > -math.inf)


def test_between_two_ratios_shares_are_interpolated():
    config = tf.LlamaConfig(**SMALL)
    low, high = profile_of(config, [[0.0], [1.0], [2.0]]), profile_of(config, [[2.0], [1.0], [0.0]], ratio=0.5)
    both = Profile(**{**dict(low), "points": (*low.points, *high.points)})
    for ratio, expected in ((0.1, (0, 20, 40)), (0.25, (0, 20, 40)), (0.3125, (10, 20, 30)), (0.9, (40, 20, 0))):
        counts = [both.counts(place, [0, 1, 2], ratio, (20, 20), 1000) for place in range(3)]
        assert counts == [([count], [count]) for count in expected]


# In a cache


@pytest.mark.parametrize("shares", [LAYERS, HEADS])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("chunks", [[200], [50, 50, 50, 50], [120, 1, 1, 78]])
def test_layers_together_store_what_equal_layers_would(llama, shares, budget, chunks):
    ids = random_ids(1, 200)
    cache = build(llama.config, profile_of(llama.config, shares), **budget)
    even = CompressedCache(llama.config, compressor="uniform", **SIZES, **budget)
    for part in ids.split(chunks, dim=1):
        llama(part, **{CACHE: cache})
        llama(part, **{CACHE: even})
        assert stored_tokens(cache) == pytest.approx(stored_tokens(even), abs=0.5)


def test_each_head_keeps_what_the_profile_says(llama):
    method = QueryWildCat(bin_rank=4, attended=0.25, recalled=0.5, profile=profile_of(llama.config, HEADS))
    cache = CompressedCache(llama.config, compressor=method, **{**SIZES, "sink": 0, "window": 0}, ratio=0.25)
    llama(random_ids(1, 160), **{CACHE: cache})
    # 40 slots: 10 by equal shares for each part, and WildCat's 10 for all. The shares add up to 6, as the heads do.
    kept = [[round(10 * share) + round(20 * share) + 10 for share in layer] for layer in HEADS]
    assert valid_by_head(cache) == kept


def test_the_budget_is_spent_where_a_head_would_keep_everything(llama):
    """WildCat's part makes as many slots of every head, of items that the head has not kept."""
    cache = build(llama.config, profile_of(llama.config, [[0.05, 1.95]] * 3), ratio=0.7)
    llama(random_ids(1, 200), **{CACHE: cache})
    assert stored_tokens(cache) == pytest.approx(140, abs=0.5)


def test_a_share_of_the_heads_gets_their_average(llama):
    """Under tensor parallelism a process sees its own heads only, and does not know which they are."""
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    keys, values = tokens(1, 200)
    unequal, equal = (build(config, profile_of(config, shares), ratio=0.25) for shares in (HEADS[:2], [[0.5], [1.3]]))
    for cache in (unequal, equal):
        read(cache, keys[:, :, :1], values[:, :, :1], 0, 200)
    for one, other in zip(valid_by_head(unequal), valid_by_head(equal), strict=True):
        assert one == pytest.approx(other, abs=1)  # but for rounding


@pytest.mark.parametrize("share", ["layers", "heads"])
def test_a_measured_profile_deals_as_its_text_did(llama, share):
    ids, method = random_ids(1, 300), replace(OURS, share=share)
    profile = measure_profile(
        llama, [ids], name="tiny", description="random ids", ratios=[0.1, 0.25, 0.5], method=method
    )
    assert profile.tokens == 300 and len(profile.points) == 3
    assert profile.heads == ((1,) * 3 if share == "layers" else (2,) * 3)
    settings = {"sink": 4, "window": 32, "ratio": 0.25}
    online, profiled = (
        CompressedCache(llama.config, compressor=each, **settings)
        for each in (method, replace(method, profile=profile))
    )
    for cache in (online, profiled):
        llama(ids, **{CACHE: cache})
    for first, second in zip(valid_by_head(online), valid_by_head(profiled), strict=True):
        # Shares are rounded to whole slots, once for each part, and the ratio of the items is not quite that of all.
        assert all(abs(a - b) <= 4 for a, b in zip(first, second, strict=True))


def test_a_layer_folds_as_soon_as_it_was_read():
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    keys, values = tokens(1, 200)
    held = []
    for profile in (None, profile_of(config, [[1.0], [1.0]])):
        cache = build(config, profile, ratio=0.25)
        cache.layers[0].announce(1, 200, None)
        cache.update(keys[0], values[0], 0)
        cache.layers[0].after_attention(keys[0].repeat_interleave(2, 1), SCALE)
        held.append(cache.layers[0].stored)
    assert held == [200, 50]


def test_a_tolerance_lets_layers_fold_as_soon_as_they_were_read():
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    keys, values = tokens(1, 200)
    cache = CompressedCache(config, compressor=replace(OURS, tolerance=5.0), **SIZES, ratio="auto", tolerance=5.0)
    cache.layers[0].announce(1, 200, None)
    cache.update(keys[0], values[0], 0)
    cache.layers[0].after_attention(keys[0].repeat_interleave(2, 1), SCALE)
    assert cache.layers[0].stored < 50


@pytest.mark.parametrize("shares", [LAYERS[:2], HEADS[:2]])
@pytest.mark.parametrize("budget", [{"ratio": 0.25}, {"max_tokens": 40}])
def test_a_padded_row_is_what_it_is_alone(shares, budget):
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    profile = profile_of(config, shares)
    keys, values = tokens(3, 130)
    mask = torch.ones(3, 130, dtype=torch.bool)
    mask[0, :57] = mask[2, :13] = False
    together = build(config, profile, **budget)
    read(together, keys, values, 0, 130, mask)
    for row, padding in enumerate((57, 0, 13)):
        single = build(config, profile, **budget)
        read(single, keys[:, row : row + 1, :, padding:], values[:, row : row + 1, :, padding:], 0, 130 - padding)
        for ours, theirs in zip(together.layers, single.layers, strict=True):
            assert_row_is_alone(ours.state.entries, row, theirs.state.entries)


def test_layers_left_exact_have_no_part_in_it(llama):
    cache = build(llama.config, profile_of(llama.config, [[0.5], [9.0], [1.5]]), ratio=0.25, exact_layers=[1])
    llama(random_ids(1, 200), **{CACHE: cache})
    first, second = (cache.layers[index].stored for index in (0, 2))
    assert cache.layers[1].stored == 200

    assert first + second == 2 * 50
    assert second > first + 15


def test_a_saved_cache_keeps_its_profile(llama, tmp_path):
    cache = build(llama.config, profile_of(llama.config, HEADS), ratio=0.25)
    llama(random_ids(1, 120), **{CACHE: cache})
    cache.save(tmp_path / "context.safetensors")
    loaded = CompressedCache.load(tmp_path / "context.safetensors", llama.config)
    assert loaded.compressor == cache.compressor and not loaded.compressor.waits
    question = random_ids(1, 40, seed=1)
    again, expected = (llama(question, **{CACHE: each}).logits for each in (loaded, cache))
    torch.testing.assert_close(again, expected)


def test_offloading_is_served_with_a_profile_only(monkeypatch):
    config = tiny_config("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="offloading=True: the layers of QueryWildCat compress together"):
        build(config, None, ratio=0.25, offloading=True)
    seen = []
    monkeypatch.setattr(
        "wildcat_kv.cache.caches.CacheContract.__init__", lambda self, layers, **given: seen.append(given)
    )
    build(config, profile_of(config, LAYERS), ratio=0.25, offloading=True)
    assert seen == [{"offloading": True, "offload_only_non_sliding": False}]


# Refusals, before any work


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, r"profile=Profile\('tiny', 3 layers\) is of a model with hidden_size=64, and this one"),
        (
            {"num_hidden_layers": 4},
            "num_hidden_layers=3, and this one has 4; measure one by `wildcat-kv profile MODEL`",
        ),
        ({"vocab_size": 121}, "vocab_size=120"),
    ],
)
def test_a_profile_of_another_model_is_refused(change, message):
    config = tf.LlamaConfig(**SMALL)
    other = tf.LlamaConfig(**{**SMALL, **change})
    before = other._attn_implementation
    with pytest.raises(ValueError, match=message):
        build(other, profile_of(config, LAYERS), ratio=0.25)
    assert other._attn_implementation == before


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (LAYERS[:2], "has shares of 2 layers, and this model has 3 that can be compressed"),
        ([[1.0, 1.0, 1.0]] * 3, "has shares of 3 heads in a layer, and this model has 2"),
    ],
)
def test_a_profile_of_other_layers_or_heads_is_refused(shares, message):
    config = tf.LlamaConfig(**SMALL)
    with pytest.raises(ValueError, match=message):
        build(config, profile_of(config, shares), ratio=0.25)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("smollm2-135", "profile='smollm2-135': no such profile; did you mean 'smollm2-135m'"),
        ("nowhere.json", "profile='nowhere.json' is no readable file"),
        ({"version": 1}, "profile: model: missing"),
        ({"version": 2}, "profile: version=2"),
    ],
)
def test_what_is_no_profile_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        QueryWildCat(profile=given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields["points"][0]["attended"].pop(), "points: all of them need the same layers and heads"),
        (lambda fields: fields["points"].append(fields["points"][0]), "must rise"),
        (lambda fields: fields["points"][0]["recalled"][0].append(-1.0), r"recalled.*=-1.0"),
        (lambda fields: fields.update(points=[]), "points"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, change, message):
    fields = json.loads(profile_of(tf.LlamaConfig(**SMALL), LAYERS).to_json())
    change(fields)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as error:
        QueryWildCat(profile=path)
    assert "damaged.json" in str(error.value) and "\n" not in str(error.value)


def test_a_number_is_no_profile():
    with pytest.raises(TypeError, match="profile=3 is no profile"):
        QueryWildCat(profile=3)


def test_a_profile_beside_a_tolerance_is_refused():
    with pytest.raises(ValueError, match=r"profile=.* with tolerance=0.1: a tolerance finds"):
        QueryWildCat(profile=profile_of(tf.LlamaConfig(**SMALL), LAYERS), tolerance=0.1)


def test_a_profile_or_a_tolerance_beside_equal_shares_is_refused():
    with pytest.raises(ValueError, match=r"tolerance=0.1 with share='equal': a tolerance gives layers shares of their"):
        QueryWildCat(tolerance=0.1, share="equal")
    with pytest.raises(ValueError, match=r"profile=.* with share='equal': a profile gives layers shares of their own"):
        QueryWildCat(profile=profile_of(tf.LlamaConfig(**SMALL), LAYERS), share="equal")


def test_a_share_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="share='rows' must be one of 'layers', 'heads'"):
        QueryWildCat(share="rows")


# Those that come with the package


def test_profiles_of_the_package_hold_a_share_for_each_head():
    shapes = {name: load_profile(name).heads for name in profile_names()}
    measured = {"smollm2-135m": (3,) * 30, "qwen2.5-coder-0.5b": (2,) * 24}
    with_scorer = {f"{name}-with-scorer": heads for name, heads in measured.items()}
    assert shapes == {**measured, **with_scorer, "gemma3-270m": (1,) * 3}
    assert {load_profile(name).scorer for name in with_scorer} == {load_scorer(name).digest for name in scorer_names()}
    for name in profile_names():
        for point in load_profile(name).points:
            for part in (point.attended, point.recalled):
                shares = [share for layer in part for share in layer]
                assert sum(shares) / len(shares) == pytest.approx(1, abs=0.01)


def test_a_file_is_written_as_it_is_read(tmp_path):
    profile = load_profile("smollm2-135m")
    (tmp_path / "copy.json").write_text(profile.to_json())
    assert load_profile(tmp_path / "copy.json") == profile


@pytest.mark.real
def test_the_default_model_is_served_by_its_profile():
    config = tf.AutoConfig.from_pretrained(default_model_path())
    cache = WildCatCache(config, compressor=QueryWildCat(profile="smollm2-135m"), ratio=0.25, sink=4)
    assert repr(cache).startswith(
        "WildCatCache(QueryWildCat("
    ) and "Profile('SmolLM2-135M-Instruct', 30 layers)" in repr(cache)
    with pytest.raises(ValueError, match="is of a model with model_type='gemma3_text'"):
        WildCatCache(config, compressor=QueryWildCat(profile="gemma3-270m"), ratio=0.25)
