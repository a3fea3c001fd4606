"""Taking tokens back: bit for bit as if they had never been read, or refused with everything as it was."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.driver import METHODS, assert_same, read, small_cache, state, tokens
from tests.tiny import random_ids, tiny_model
from wildcat_kv import WildCatCache
from wildcat_kv.cache.budget import block_size
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.models import default_model

BUDGETS = [{"ratio": 0.25}, {"ratio": 0.5}, {"max_tokens": 24}, {"max_tokens": 60}, {"ratio": 1.0}]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def padded(rows, length, seed):
    """A mask with padding before and, now and then, within the rows."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) > 0.15
    mask[0, : int(torch.randint(0, 30, (1,), generator=generator))] = False
    return mask


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=max(10, settings().max_examples // 4))
@given(
    st.sampled_from(BUDGETS),
    st.integers(1, 60),
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=8),
    st.booleans(),
    st.integers(0, 99),
)
def test_crop_leaves_what_would_be_there_without_the_tokens(method, budget, prompt, steps, masked, seed):
    """Candidates are read and some are taken back, against reading the accepted ones alone."""
    keys, values = tokens(2, 300, seed)
    mask = padded(2, 300, seed) if masked else None
    cache, other, plain = (small_cache(method=method, **budget) for _ in range(3))
    cache.activate_past_recording()
    other.activate_past_recording()
    at = 0
    for count, rejected in [(prompt, 0), *steps]:
        rejected = min(rejected, count - 1)
        # What is rejected later has other keys and values than what is accepted in its place.
        noise = keys.clone(), values.clone()
        for part in noise:
            part[..., at + count - rejected : at + count, :] *= 7
        read(cache, *noise, at, count, mask)
        cache.crop(-rejected)
        read(other, keys, values, at, count - rejected, mask)
        other.crop(0)
        at += count - rejected
        assert cache.get_seq_length() == at
        assert_same(state(cache), state(other))
        # Recording only delays folds: without it the same is there.
        read(plain, keys, values, at - (count - rejected), count - rejected, mask)
        assert_same(state(cache), state(plain))
    later = [read(kind, keys, values, at, 3, mask) for kind in (cache, other)]
    assert all(torch.equal(*pair) if pair[0] is not None else pair[1] is None for pair in zip(*later, strict=True))


@given(st.sampled_from(BUDGETS), st.integers(1, 40), st.integers(1, 8), st.integers(0, 99))
def test_several_forward_passes_are_taken_back_at_once(budget, prompt, drafts, seed):
    """An assistant reads its draft a token at a time and crops once; the window's length can be taken back."""
    keys, values = tokens(1, 200, seed)
    cache, other = small_cache(**budget), small_cache(**budget)
    at = 0
    for kind in (cache, other):
        kind.activate_past_recording()
        read(kind, keys, values, 0, prompt)
        kind.crop(0)
    at = prompt
    for _ in range(6):
        for step in range(drafts):
            read(cache, keys, values * 3, at + step, 1)
        cache.crop(-drafts)
        assert_same(state(cache), state(other))
        for kind in (cache, other):
            read(kind, keys, values, at, 1)
            kind.crop(0)
        at += 1
        assert_same(state(cache), state(other))


@pytest.mark.parametrize("budget", BUDGETS[:4])
def test_a_cache_stays_bounded_while_it_records(budget):
    keys, values = tokens(1, 200)
    cache = small_cache(**budget)
    cache.activate_past_recording()
    read(cache, keys, values, 0, 40)
    settings = cache.settings
    for at in range(40, 200):
        read(cache, keys, values, at, 1)
        kept = settings.max_tokens or (settings.ratio * (at + 1) + 1)
        assert cache.stored_length() <= max(40, kept) + settings.window + block_size(settings) + 1
        cache.layers[0].check_crop(-settings.window)  # the window can be taken back at any time
    cache.crop(0)
    assert cache.stored_length() <= (settings.max_tokens or settings.ratio * 200 + block_size(settings))


def test_without_recording_tokens_since_the_last_fold_can_be_taken_back():
    keys, values = tokens(1, 200)
    cache, other = small_cache(ratio=0.25), small_cache(ratio=0.25)
    for kind in (cache, other):
        read(kind, keys, values, 0, 100)
    for at in range(100, 110):
        read(cache, keys, values, at, 1)
    for at in range(100, 104):
        read(other, keys, values, at, 1)
    cache.crop(-6)
    assert_same(state(cache), state(other))
    for at in range(104, 150):
        for kind in (cache, other):
            read(kind, keys, values, at, 1)
        assert_same(state(cache), state(other))


def test_padding_that_is_taken_back_delays_no_fold():
    """Columns of padding put a fold off; without them it is due earlier."""
    keys, values = tokens(1, 100)
    mask = torch.ones(1, 100, dtype=torch.bool)
    padding = mask.clone()
    padding[:, 41:70] = False
    cache, other = small_cache(ratio=0.25), small_cache(ratio=0.25)
    for kind in (cache, other):
        read(kind, keys, values, 0, 40, mask)
    read(cache, keys, values, 40, 30, padding)
    cache.crop(-30)
    for at in range(40, 60):
        for kind in (cache, other):
            read(kind, keys, values, at, 1)  # without a mask the columns that are free again count as shown
        assert_same(state(cache), state(other))


def test_a_crop_past_what_is_exact_says_how_to_enlarge_the_window():
    keys, values = tokens(1, 200)
    cache = small_cache(ratio=0.25)
    read(cache, keys, values, 0, 100)
    read(cache, keys, values, 100, 5)
    before = state(cache)
    with pytest.raises(ValueError, match=r"the last 5 tokens can be taken.*activate_past_recording\(\).*window=20"):
        cache.crop(-20)
    with pytest.raises(ValueError, match="tokens_to_remove=3 must be negative"):
        cache.crop(3)
    assert_same(before, state(cache))


def test_more_than_was_read_cannot_be_taken_back():
    cache = small_cache(ratio=0.25)
    with pytest.raises(ValueError, match="tokens_to_remove=-5: the cache has read 0 tokens"):
        cache.crop(-5)


def test_recording_within_the_budget_looks_back_at_nothing():
    """However many forward passes come before a crop."""
    keys, values = tokens(1, 300)
    cache = small_cache(max_tokens=400)
    cache.activate_past_recording()
    for at in range(300):
        read(cache, keys, values, at, 1)
        assert len(cache.layers[0].state.progress.ends) <= cache.settings.window + 2


def test_cropping_nothing_is_nothing():
    cache = small_cache(ratio=0.25)
    cache.crop(0)
    keys, values = tokens(1, 60)
    read(cache, keys, values, 0, 60)
    before = state(cache)
    cache.crop(0)
    assert_same(before, state(cache))


def test_all_of_an_unfolded_text_can_be_taken_back(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", max_tokens=200)
    first = llama(random_ids(1, 60), **{CACHE: cache}).logits
    cache.crop(-60)
    assert cache.get_seq_length() == cache.stored_length() == 0
    assert torch.equal(llama(random_ids(1, 60), **{CACHE: cache}).logits, first)
    cache.crop(-60)
    llama(random_ids(3, 10), **{CACHE: cache})  # another batch, even
    assert cache.get_seq_length() == 10


def test_the_value_clip_is_rolled_back():
    keys, values = tokens(1, 120)
    cache = small_cache(ratio=0.25)
    read(cache, keys, values, 0, 100)
    before = [bound.clone() for bound in cache.layers[0].state.value_range.tensors()]
    read(cache, keys, values * 100, 100, 4)
    assert cache.layers[0].state.value_range.highest.max() > 10 * before[1].max()
    cache.crop(-4)
    assert all(torch.equal(*pair) for pair in zip(before, cache.layers[0].state.value_range.tensors(), strict=True))


def test_the_cache_says_that_it_can_be_rolled_back(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    assert cache.is_croppable and not cache.layers[0].record_past
    cache.activate_past_recording()
    assert cache.layers[0].record_past
    cache.reset()
    assert not cache.layers[0].record_past


def test_a_text_that_is_taken_back_whole_leaves_a_hybrid_as_new():
    model = tiny_model("lfm2")
    cache = WildCatCache(model.config, compressor="wildcat", max_tokens=200)
    cache.activate_past_recording()
    model(random_ids(1, 40), **{CACHE: cache})
    cache.crop(-40)
    model(random_ids(1, 5), **{CACHE: cache})
    assert cache.get_seq_length(1) == 5


# generate()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("budget", [{"ratio": 1.0}, {"max_tokens": 400}])
def test_prompt_lookup_within_budget_is_the_exact_caches(family, budget):
    model = tiny_model(family)
    ids = random_ids(1, 20).repeat(1, 4)
    options = {"max_new_tokens": 50, "do_sample": False, "prompt_lookup_num_tokens": 6}
    expected = model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, **options)
    assert torch.equal(
        model.generate(ids, **{CACHE: WildCatCache(model.config, compressor="wildcat", **budget)}, **options), expected
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("budget", [{"ratio": 0.25}, {"max_tokens": 90}])
def test_prompt_lookup_compresses(family, budget):
    model = tiny_model(family)
    ids = random_ids(1, 50).repeat(1, 4)
    cache = WildCatCache(model.config, compressor="wildcat", **budget)
    out = model.generate(
        ids, **{CACHE: cache}, max_new_tokens=120, do_sample=False, prompt_lookup_num_tokens=6, eos_token_id=None
    )
    assert out.shape[1] == 320
    kept = cache.settings.max_tokens or cache.settings.ratio * 320
    layer = next(index for index, layer in enumerate(cache.layers) if hasattr(layer, "announce"))
    assert cache.stored_length(layer) <= kept + block_size(cache.settings)
    assert cache.get_seq_length(layer) in (319, 320)


@pytest.mark.parametrize("budget", [{"ratio": 1.0}, {"ratio": 0.25}, {"max_tokens": 90}])
def test_assisted_decoding(llama, budget):
    """Within budget the exact answer; beyond it, whatever the assistant's cache, one that stays bounded."""
    assistant = tiny_model("llama", num_hidden_layers=1)
    ids = random_ids(1, 120)
    options = {"max_new_tokens": 60, "do_sample": False, "assistant_model": assistant}
    cache = WildCatCache(llama.config, compressor="wildcat", **budget)
    out = llama.generate(ids, **{CACHE: cache}, **options)
    if budget == {"ratio": 1.0}:
        assert torch.equal(out, llama.generate(ids, **{CACHE: DynamicCache(config=llama.config)}, **options))
    assert out.shape[1] == 180
    assert cache.stored_length() <= (cache.settings.max_tokens or cache.settings.ratio * 180 + 48)


@pytest.mark.real
@pytest.mark.parametrize("budget", [{"ratio": 1.0}, {"ratio": 0.25}, {"max_tokens": 128}], ids=str)
def test_prompt_lookup_is_greedy_decoding_until_a_fold_comes_at_another_time(budget):
    """A fold belongs to the end of a forward pass, and prompt lookup has fewer of them: docs/limits.md says so."""
    model, tokenizer = default_model()
    text = "The code word of the day is swordfish. The sun rises in the east. Paris is the capital of France. " * 12
    ids = tokenizer(text, return_tensors="pt").input_ids
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    caches = [WildCatCache(model.config, compressor="wildcat", **budget) for _ in range(2)]
    greedy, lookup = (
        model.generate(ids, **{CACHE: cache}, **options, **more, output_logits=True, return_dict_in_generate=True)
        for cache, more in zip(caches, ({}, {"prompt_lookup_num_tokens": 6}), strict=True)
    )
    until = 64 if budget == {"ratio": 1.0} else block_size(caches[0].settings) - 6
    torch.testing.assert_close(
        torch.stack(greedy.logits[:until]), torch.stack(lookup.logits[:until]), rtol=1e-3, atol=1e-3
    )
    assert torch.equal(greedy.sequences[:, : ids.shape[1] + until], lookup.sequences[:, : ids.shape[1] + until])
    assert abs(caches[0].stored_length() - caches[1].stored_length()) <= block_size(caches[0].settings)


def test_prompt_lookup_over_a_filled_cache_is_refused_where_a_mask_shows_it(llama):
    """It passes the whole prompt again, to be read twice. generate() drops a mask of ones, so padding must be there."""
    ids, mask = random_ids(1, 100), torch.ones(1, 100, dtype=torch.int64)
    mask[:, :3] = 0
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    llama(ids[:, :80], attention_mask=mask[:, :80], **{CACHE: cache})
    with pytest.raises(ValueError, match="attention_mask has width 100"):
        llama.generate(ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=5, prompt_lookup_num_tokens=4)
    assert cache.get_seq_length() == 80


def test_a_step_too_many_is_undone_as_a_deferred_stop_does_it(llama):
    """Recording from the prompt on, a crop(0) after every token, one token taken back at the end."""
    cache, other = (WildCatCache(llama.config, compressor="wildcat", ratio=0.25) for _ in range(2))
    later = random_ids(1, 61, seed=3)
    for kind in (cache, other):
        llama(random_ids(1, 150), **{CACHE: kind})
    cache.activate_past_recording()
    for step in range(60):
        llama(later[:, step : step + 1], **{CACHE: cache})
        cache.crop(0)
        llama(later[:, step : step + 1], **{CACHE: other})
    llama(later[:, 60:], **{CACHE: cache})
    cache.crop(-1)
    for layer in cache.layers:
        layer.record_past = False
    assert_same(state(cache), state(other))


# Layers of other kinds beside ours


def test_layers_that_cannot_go_back_are_named_before_anything_changes():
    model = tiny_model("gemma3")
    cache = WildCatCache(model.config, compressor="wildcat", max_tokens=200)
    model(random_ids(1, 60), **{CACHE: cache})
    with pytest.raises(ValueError, match=r"DynamicSlidingWindowLayer.*activate_past_recording"):
        cache.crop(-5)
    assert all(layer.get_seq_length() == 60 for layer in cache.layers)
    cache.crop(0)


def test_hybrid_caches_roll_back_together():
    model = tiny_model("gemma3")
    cache, other = (WildCatCache(model.config, compressor="wildcat", ratio=0.25) for _ in range(2))
    for kind in (cache, other):
        kind.activate_past_recording()
        model(random_ids(1, 80), **{CACHE: kind})
        kind.crop(0)
    model(random_ids(1, 5, seed=2), **{CACHE: cache})
    cache.crop(-5)
    fork = copy.deepcopy(cache)
    assert_same(state(cache), state(other))
    question = random_ids(1, 7, seed=4)
    logits = [model(question, **{CACHE: kind}).logits for kind in (cache, other, fork)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_layers_decide_alike_while_all_of_a_text_is_taken_back():
    keys, values = tokens(1, 10)
    cache = small_cache(ratio=0.8, sink=1, window=0, bin_rank=1)
    cache.activate_past_recording()
    read(cache, keys, values, 0, 2)
    cache.crop(-2)
    for at in range(6):
        read(cache, keys, values, at, 1)
        first, second = (layer.state.progress for layer in cache.layers)
        assert (first.settled, first.ends, first.fold_from) == (second.settled, second.ends, second.fold_from)
