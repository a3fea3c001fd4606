"""Layers left uncompressed beside compressed ones."""

import pytest
import torch
import transformers as tf

from tests.driver import METHODS, small_cache
from tests.tiny import random_ids, tiny_model
from tests.words import tokenizer
from wildcat_kv import CompressedCache, Context, WildCatCache
from wildcat_kv.hook.keyword import CACHE

SETTINGS = {"ratio": 0.25, "sink": 4, "window": 4, "bin_rank": 4}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("exact", [[0], [1], [0, -1]])
@pytest.mark.parametrize("method", ["wildcat", "h2o", "snapkv"])
def test_they_hold_every_token_and_the_others_their_budget(llama, exact, method):
    cache = CompressedCache(llama.config, compressor=METHODS[method], exact_layers=exact, **SETTINGS)
    llama.generate(random_ids(1, 200), **{CACHE: cache}, max_new_tokens=40, min_new_tokens=40)
    left = {index % 3 for index in exact}
    for index in range(3):
        assert cache.stored_length(index) == 239 if index in left else cache.stored_length(index) < 80
    assert cache.stored_length() < 80


@pytest.mark.parametrize("method", ["kvzip", "pyramidkv", "query_wildcat"])
@pytest.mark.parametrize("exact", [[2], [0, -1]])
def test_methods_that_share_between_layers_keep_to_the_budget_of_the_others(method, exact):
    model = tiny_model("llama", num_hidden_layers=6)
    settings = {"ratio": 0.25, "sink": 4, "window": 4, "exact_layers": exact}
    cache = Context(model, random_ids(1, 400)).compress(compressor=method, tokenizer=tokenizer(), **settings)
    held = [layer.state.storage.entries.valid.sum(-1).double().mean().item() for layer in cache.layers]
    left = {index % 6 for index in exact}
    assert all(held[index] == 400 for index in left)
    assert sum(held[index] for index in range(6) if index not in left) == (6 - len(left)) * 100


def test_their_keys_and_values_are_those_of_an_exact_cache(llama):
    ids = random_ids(2, 120)
    cache, exact = (
        WildCatCache(llama.config, compressor="wildcat", exact_layers=[0], **SETTINGS),
        tf.DynamicCache(config=llama.config),
    )
    for part in ids.split(60, dim=1):
        llama(part, **{CACHE: cache})
        llama(part, **{CACHE: exact})
    assert torch.equal(cache.layers[0].keys, exact.layers[0].keys)
    assert torch.equal(cache.layers[0].values, exact.layers[0].values)


def test_the_other_layers_are_as_without(llama):
    """After one pass: the first fold sees what was read exactly."""
    ids = random_ids(1, 120)
    some, all_ = (
        WildCatCache(llama.config, compressor="wildcat", exact_layers=exact, **SETTINGS) for exact in ([0], [])
    )
    llama(ids, **{CACHE: some})
    llama(ids, **{CACHE: all_})
    for index in (1, 2):
        assert torch.equal(some.layers[index].keys, all_.layers[index].keys)


def test_a_padded_row_is_as_alone(llama):
    ids, length = random_ids(1, 100), 130
    padded = torch.nn.functional.pad(ids, (length - 100, 0))
    mask = (torch.arange(length) >= length - 100).long()[None]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    caches = [WildCatCache(llama.config, compressor="wildcat", exact_layers=[0], **SETTINGS) for _ in range(2)]
    alone = llama.generate(ids, **{CACHE: caches[0]}, **options)
    beside = llama.generate(padded, attention_mask=mask, **{CACHE: caches[1]}, **options)
    assert torch.equal(alone[:, 100:], beside[:, length:])


def test_tokens_can_be_taken_back(llama):
    """After a crop the cache is as if they had never been read."""
    ids = random_ids(1, 160)
    caches = [WildCatCache(llama.config, compressor="wildcat", exact_layers=[0], **SETTINGS) for _ in range(2)]
    for cache in caches:
        cache.activate_past_recording()
        llama(ids[:, :120], **{CACHE: cache})
        cache.crop(0)
    llama(ids[:, 120:140], **{CACHE: caches[0]})
    caches[0].crop(-20)
    outputs = [llama(ids[:, 140:], **{CACHE: cache}).logits for cache in caches]
    assert torch.equal(*outputs) and caches[0].stored_length(0) == 140


@pytest.mark.parametrize("method", ["wildcat", "h2o", "snapkv", "query_wildcat"])
def test_they_are_saved_and_loaded(llama, tmp_path, method):
    ids = random_ids(1, 150)
    cache = CompressedCache(llama.config, compressor=METHODS[method], exact_layers=[0, 2], **SETTINGS)
    llama(ids[:, :120], **{CACHE: cache})
    cache.save(tmp_path / "context.safetensors")
    again = CompressedCache.load(tmp_path / "context.safetensors", llama.config)
    assert again.settings == cache.settings and again.stored_length(0) == 120
    outputs = [llama(ids[:, 120:], **{CACHE: each}).logits for each in (cache, again.clone())]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 0.25, "exact_layers": [3]}, r"exact_layers=\[3\]: layer 3 is none of .*\[0, 1, 2\]"),
        ({"ratio": 0.25, "exact_layers": [-4]}, r"exact_layers=\[-4\]: layer -4 is none"),
        ({"ratio": 0.25, "exact_layers": [0, 1, 2]}, "nothing is left to compress"),
        ({"max_tokens": 100, "exact_layers": [0]}, "exact_layers=.* with max_tokens=100"),
        ({"ratio": 0.25, "exact_layers": 0}, "exact_layers=0"),
        ({"ratio": 0.25, "exact_layers": ["a"]}, r"exact_layers\.0='a': .*list of integers"),
    ],
)
def test_what_cannot_be_is_refused(llama, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        WildCatCache(llama.config, compressor="wildcat", **fields)
    assert "\n" not in str(error.value)


def test_a_window_layer_cannot_be_named():
    with pytest.raises(ValueError, match="none of those that can be compressed"):
        WildCatCache(tiny_model("gemma3").config, compressor="wildcat", ratio=0.25, exact_layers=[0])


def test_the_settings_say_so():
    assert "exact_layers=(1,)" in repr(small_cache(ratio=0.5, exact_layers=[1]))
