"""A budget in bytes: the whole cache keeps to it, whatever the method, the rows and the length."""

import pytest
import torch

from tests.driver import METHODS
from tests.tiny import random_ids, tiny_model
from wildcat_kv import WildCatCache, WildCatConfig
from wildcat_kv.cache.joining import join_caches
from wildcat_kv.hook.keyword import CACHE

ENDS = {"sink": 4, "window": 8}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def read_on(model, cache, rows, prompt, tokens):
    """Read a prompt and tokens one by one; the most bytes held after a pass."""
    with torch.no_grad():
        model(random_ids(rows, prompt), **{CACHE: cache})
        held = [cache.memory_bytes()]
        for _ in range(tokens):
            model(random_ids(rows, 1), **{CACHE: cache})
            held.append(cache.memory_bytes())
    return max(held)


@pytest.mark.parametrize("method", ["wildcat", "tova", "snapkv", "query_wildcat", "attention_matching"])
@pytest.mark.parametrize(("rows", "prompt"), [(1, 30), (2, 400)])
def test_the_cache_takes_no_more_bytes(llama, method, rows, prompt):
    budget = 500_000 * rows
    cache = WildCatCache(llama.config, compressor=METHODS[method], max_bytes=budget, **ENDS)
    assert read_on(llama, cache, rows, prompt, 500) <= budget
    assert cache.settings.bits == 4 and cache.settings.max_tokens > 200


def test_it_is_a_text_or_a_number():
    assert WildCatConfig(max_bytes="2GiB").max_bytes == 2**31 == WildCatConfig(max_bytes=2**31).max_bytes
    assert WildCatConfig(max_bytes="1.5 MB").max_bytes == 1_500_000


def test_a_text_stays_exact_while_it_fits(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", max_bytes="600KB", **ENDS)
    ids = random_ids(1, 150)
    with torch.no_grad():
        found = llama(ids, **{CACHE: cache}).logits
        assert torch.equal(found, llama(ids).logits)
    assert cache.layers[0].state.storage.allocated.keys.shape[2] >= 150  # nothing is quantised
    with torch.no_grad():
        llama(random_ids(1, 300), **{CACHE: cache})
    assert cache.stored_length() == 450 and cache.memory_bytes() <= 600_000  # all of them, in a few bits


@pytest.mark.parametrize("bits", [8, 3, 2])
def test_the_user_may_choose_the_bits(llama, bits):
    cache = WildCatCache(llama.config, compressor="wildcat", max_bytes=400_000, bits=bits, **ENDS)
    assert read_on(llama, cache, 1, 300, 200) <= 400_000
    assert cache.settings.bits == bits


def test_more_bytes_or_fewer_bits_hold_more_slots(llama):
    held = []
    for fields in ({"max_bytes": 400_000, "bits": 8}, {"max_bytes": 400_000}, {"max_bytes": 800_000}):
        cache = WildCatCache(llama.config, compressor="wildcat", **fields, **ENDS)
        read_on(llama, cache, 1, 20, 1)
        held.append(cache.settings.max_tokens)
    assert held == sorted(held) and held[0] < held[1] < held[2]


def test_a_cache_that_is_reset_settles_anew(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", max_bytes=800_000, **ENDS)
    read_on(llama, cache, 1, 20, 1)
    alone = cache.settings.max_tokens
    cache.reset()
    assert cache.settings.max_bytes == 800_000 and cache.settings.max_tokens is None
    read_on(llama, cache, 2, 20, 1)
    assert cache.settings.max_tokens < alone
    fresh = cache.fresh()
    assert fresh.settings.max_bytes == 800_000


def test_it_is_saved_and_joined(llama, tmp_path):
    parts = [WildCatCache(llama.config, compressor="wildcat", max_bytes=300_000, **ENDS) for _ in range(2)]
    for part in parts:
        read_on(llama, part, 1, 300, 1)
    parts[0].save(tmp_path / "part.safetensors")
    loaded, ids = WildCatCache.load(tmp_path / "part.safetensors", llama.config), random_ids(1, 90)
    with torch.no_grad():
        expected = llama(ids, **{CACHE: parts[0].clone()}).logits
        assert torch.equal(llama(ids, **{CACHE: loaded.clone()}).logits, expected)
    joined = join_caches(parts, WildCatConfig(max_bytes=600_000, **ENDS))
    assert joined.memory_bytes() <= 600_000
    assert read_on(llama, joined, 1, 20, 200) <= 600_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_bytes": "x"}, "max_bytes='x': could not parse"),
        ({"max_bytes": -5}, "max_bytes=-5: "),
        ({"max_bytes": 0}, "max_bytes=0: "),
        ({"max_bytes": "1GiB", "ratio": 0.5}, "ratio=0.5 and max_bytes=1073741824: both of them given"),
        ({"max_bytes": "1GiB", "exact_layers": [0]}, "exact_layers=.* with max_bytes=1073741824: a layer left exact"),
    ],
)
def test_wrong_budgets_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        WildCatConfig(**fields)
    assert "\n" not in str(error.value)


def test_too_few_bytes_are_refused(llama):
    with pytest.raises(ValueError, match=r"max_bytes=5000 is too small: sink=4, window=32 and one bin of 1 rows"):
        WildCatCache(llama.config, compressor="wildcat", max_bytes=5000)
    cache = WildCatCache(llama.config, compressor="wildcat", max_bytes=300_000, **ENDS)
    with pytest.raises(ValueError, match=r"max_bytes=300000 is too small: .* one bin of 16 rows and \d layers take"):
        llama(random_ids(16, 20), **{CACHE: cache})
    cache.reset()
    assert read_on(llama, cache, 1, 20, 1) <= 300_000


def test_windows_are_counted_and_states_are_refused():
    windowed = tiny_model("gemma3")
    cache = WildCatCache(windowed.config, compressor="wildcat", max_bytes=600_000, **ENDS)
    assert read_on(windowed, cache, 1, 300, 100) <= 600_000
    hybrid = tiny_model("qwen3_next")
    with pytest.raises(ValueError, match=r"max_bytes=1000000: layer \d+ \(\w+\) holds states that are not counted"):
        WildCatCache(hybrid.config, compressor="wildcat", max_bytes=1_000_000)
