"""Parts of a text read apart and joined: attention to all of them, and a cache that goes on."""

import pytest
import torch
import transformers as tf

from tests.driver import EVEN, METHODS, read, small_cache, tokens
from tests.tiny import random_ids, tiny_model
from tests.words import tokenizer
from wildcat_kv import CompressedCache, Context, WildCatCache, WildCatConfig
from wildcat_kv.cache.joining import join_caches
from wildcat_kv.hook.keyword import CACHE

SETTINGS = {"sink": 4, "window": 4, "bin_rank": 4}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def parts(model, lengths, compressor="wildcat", **settings):
    caches = []
    for number, length in enumerate(lengths):
        cache = CompressedCache(model.config, compressor=METHODS[compressor], **{**SETTINGS, **settings})
        model(random_ids(1, length, seed=number), **{CACHE: cache})
        caches.append(cache)
    return caches


def test_what_comes_next_sees_all_parts_at_the_positions_after_the_last(llama):
    """Nothing compressed: the same as exact keys of both parts, side by side."""
    first, last = random_ids(1, 50, seed=0), random_ids(1, 60, seed=1)
    joined = join_caches(parts(llama, (50, 60), ratio=1.0))
    assert joined.get_seq_length() == 60 and joined.stored_length() == 110
    caches = [tf.DynamicCache(config=llama.config) for _ in range(2)]
    for ids, cache in zip((first, last), caches, strict=True):
        llama(ids, **{CACHE: cache})
    both = tf.DynamicCache(config=llama.config)
    for index in range(3):
        pairs = [(cache.layers[index].keys, cache.layers[index].values) for cache in caches]
        both.update(*(torch.cat(tensors, dim=2) for tensors in zip(*pairs, strict=True)), index)
    question = random_ids(1, 7, seed=2)
    positions = torch.arange(60, 67)[None]
    expected = llama(question, **{CACHE: both}, position_ids=positions).logits
    torch.testing.assert_close(llama(question, **{CACHE: joined}).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_it_holds_what_its_parts_held_and_goes_on_like_the_last(llama, method):
    caches = parts(llama, (100, 101, 101), compressor=method, ratio=0.25)
    held = [sum(entries_of(cache, index) for cache in caches) for index in range(3)]
    joined = join_caches(caches)
    assert [entries_of(joined, index) for index in range(3)] == held
    grown = [cache.stored_length(0) for cache in (joined, caches[-1])]
    for cache in (joined, caches[-1]):
        llama.generate(random_ids(1, 130), **{CACHE: cache}, max_new_tokens=60, min_new_tokens=60)
    grown = [cache.stored_length(0) - before for cache, before in zip((joined, caches[-1]), grown, strict=True)]
    if method in EVEN:  # others share by what they have read
        assert grown[0] == grown[1]
    assert joined.get_seq_length() == caches[-1].get_seq_length()


def entries_of(cache, layer):
    return int(cache.layers[layer].state.entries.valid.sum())


@pytest.mark.parametrize("method", ["wildcat", "snapkv", "h2o"])
@pytest.mark.parametrize("length", [30, 90])
def test_max_tokens_bounds_the_whole(llama, method, length):
    caches = parts(llama, [length] * 3, compressor=method, max_tokens=40)
    settings = caches[0].settings.model_copy(update={"max_tokens": 120})
    joined = join_caches(caches, settings)
    assert joined.stored_length() <= 120 and joined.settings.max_tokens == 120
    llama.generate(random_ids(1, length + 20), **{CACHE: joined}, max_new_tokens=150, min_new_tokens=150)
    assert joined.stored_length() <= 120


def test_one_part_is_itself(llama):
    (cache,) = parts(llama, (100,), ratio=0.25)
    joined, ids = join_caches([cache]), random_ids(1, 9)
    assert torch.equal(llama(ids, **{CACHE: joined}).logits, llama(ids, **{CACHE: cache}).logits)


def test_it_is_saved_copied_and_repeated_like_any_other(llama, tmp_path):
    joined = join_caches(parts(llama, (80, 81), ratio=0.25, exact_layers=[0]))
    joined.save(tmp_path / "joined.safetensors")
    again, ids = CompressedCache.load(tmp_path / "joined.safetensors", llama.config), random_ids(1, 9)
    copies = joined.clone()
    copies.batch_repeat_interleave(2)
    expected = llama(ids, **{CACHE: joined}).logits
    assert torch.equal(llama(ids, **{CACHE: again.clone()}).logits, expected)
    torch.testing.assert_close(llama(ids.repeat(2, 1), **{CACHE: copies}).logits, expected.repeat(2, 1, 1))


def test_the_parts_stay_as_they_are(llama):
    caches = parts(llama, (80, 81), ratio=0.25)
    before = [cache.layers[1].keys.clone() for cache in caches]
    llama(random_ids(1, 20), **{CACHE: join_caches(caches)})
    assert all(torch.equal(cache.layers[1].keys, keys) for cache, keys in zip(caches, before, strict=True))


def test_window_layers_go_on_from_the_last_part():
    gemma = tiny_model("gemma3")
    caches = parts(gemma, (70, 71), ratio=0.25)
    joined = join_caches(caches)
    windows = [index for index, layer in enumerate(joined.layers) if getattr(layer, "is_sliding", False)]
    assert all(torch.equal(joined.layers[index].keys, caches[-1].layers[index].keys) for index in windows)
    assert gemma(random_ids(1, 9), **{CACHE: joined}).logits.isfinite().all()


def test_values_of_every_part_bound_the_output():
    (keys, values), (more_keys, more_values) = tokens(1, 40), tokens(1, 40, seed=1)
    caches = [small_cache(ratio=0.5) for _ in range(2)]
    read(caches[0], keys, values * 9, 0, 40)
    read(caches[1], more_keys, more_values, 0, 40)
    box = join_caches(caches).layers[0].state.value_range
    assert torch.equal(box.highest, torch.maximum(*(cache.layers[0].state.value_range.highest for cache in caches)))


def test_what_does_not_fit_is_refused(llama):
    (cache,) = parts(llama, (40,), ratio=0.25)
    (other,) = parts(llama, (40,), compressor="snapkv", ratio=0.25)
    (stranger,) = parts(tiny_model("qwen2"), (40,), ratio=0.25)
    padded = CompressedCache(llama.config, compressor=METHODS["wildcat"], ratio=0.25)
    llama(random_ids(1, 40), attention_mask=(torch.arange(40) > 3).long()[None], **{CACHE: padded})
    hybrid = tiny_model("qwen3_next")
    for caches, message in (
        ([], "nothing to join"),
        ([WildCatCache(llama.config, ratio=0.25), cache], r"caches\[0\] has read nothing"),
        ([other, cache], r"caches\[0\] compresses by SnapKV"),
        ([stranger, cache], r"caches\[0\] is of another model: model_type"),
        ([padded, cache], r"caches\[0\] holds padding"),
        (parts(hybrid, (40, 40), ratio=0.25), r"caches\[0\] has layers whose states cannot be joined"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            join_caches(caches)
        assert "\n" not in str(error.value)


def test_settings_that_break_a_promise_are_refused(llama):
    exact, plain = parts(llama, (40, 41), ratio=0.25, exact_layers=[0]), parts(llama, (40, 41), ratio=0.25)
    for caches, settings, message in (
        ([exact[0], plain[1]], None, r"caches\[0\] leaves layers \[0\] exact, and the last one \[\]"),
        (exact, WildCatConfig(max_tokens=200), r"settings.exact_layers=\[\]: the cache leaves layers \[0\] exact"),
        (
            plain,
            WildCatConfig(ratio=0.25, exact_layers=[1]),
            r"exact_layers=\[1\]: the cache leaves layers \[\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            join_caches(caches, settings)
    zipped = Context(llama, random_ids(1, 60)).compress(compressor="kvzip", tokenizer=tokenizer(), ratio=0.25)
    with pytest.raises(ValueError, match="max_tokens=200: KVzip compresses the prompt alone"):
        join_caches([zipped], WildCatConfig(max_tokens=200))
    same = join_caches(exact, WildCatConfig(ratio=0.5, exact_layers=[-3]))
    assert same.exact_layers == {0} and same.settings.ratio == 0.5


def test_a_floor_is_not_joined(llama):
    caches = parts(llama, (40, 90), ratio=0.25, min_tokens=50)
    with pytest.raises(ValueError, match=r"settings.min_tokens=50: .* pass settings=.*changed\(min_tokens=0\)"):
        join_caches(caches)
    joined = join_caches(caches, caches[-1].settings.changed(min_tokens=0))
    assert joined.stored_length() == 40 + 50
    assert join_caches(caches[:1]).settings.min_tokens == 50  # a cache by itself goes on as it is


def test_what_is_no_cache_is_said(llama):
    caches = parts(llama, (40, 41), ratio=0.25)
    assert join_caches(iter(caches)).get_seq_length() == 41
    with pytest.raises(TypeError, match="DynamicCache is no compressed cache"):
        join_caches([tf.DynamicCache(), caches[0]])
    with pytest.raises(TypeError, match="is no WildCatConfig"):
        join_caches(caches, {"ratio": 0.5})
