"""Bytes computed from shapes, beside those that real caches hold."""

import warnings

import pytest
import torch
from transformers import DynamicCache

from tests.driver import METHODS
from tests.tiny import random_ids, tiny_model
from wildcat_kv import WildCatCache, preset_names
from wildcat_kv.cache.forecast import cache_size
from wildcat_kv.cache.sizes import cache_bytes
from wildcat_kv.compressors import QueryWildCat
from wildcat_kv.compressors.query_wildcat import Profile
from wildcat_kv.hook.keyword import CACHE


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def computed_and_held(model, tokens, rows=1, **choice):
    """Give the computed size, and the bytes of a cache that has read as many tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exact layers of presets are not known for tiny models
        size = cache_size(model.config, tokens, rows=rows, dtype=model.dtype, **choice)
        cache = WildCatCache(model.config, **choice)
    with torch.no_grad():
        model(random_ids(rows, tokens), **{CACHE: cache})
    return size, cache.memory_bytes()


BUDGETS = [{"ratio": 0.25}, {"ratio": 0.5, "bits": 4}, {"max_tokens": 200}]
FIXED = [name for name, method in METHODS.items() if method.fixed_slots]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("method", FIXED)
def test_it_is_right_to_the_byte_where_the_text_decides_nothing(llama, method, budget):
    size, held = computed_and_held(llama, 321, 2, compressor=METHODS[method], **budget)
    assert (size.nbytes, size.estimated) == (held, False)


@pytest.mark.parametrize("tokens", [1, 2, 40, 1001])
@pytest.mark.parametrize(
    "choice",
    [
        {"ratio": 1.0},
        {"ratio": 1.0, "bits": 2},
        {"ratio": 0.1, "bits": 8, "group": 16, "compressor": "wildcat"},
        {"ratio": 0.25, "bits": 3, "min_tokens": 100, "compressor": "h2o"},
        {"ratio": 0.3, "exact_layers": (1,), "compressor": "tova"},
        {"max_tokens": 100, "bits": 4, "compressor": "wildcat"},
        {"max_bytes": 600_000, "compressor": "snapkv"},
        {"preset": "published"},
    ],
    ids=str,
)
def test_it_is_right_at_every_length_and_in_half_precision(tokens, choice):
    size, held = computed_and_held(tiny_model("llama").to(torch.bfloat16), tokens, **choice)
    assert (size.nbytes, size.estimated) == (held, False)


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "llama4", "mistral", "qwen3"])
def test_layers_with_windows_or_shapes_of_their_own_are_counted(family):
    size, held = computed_and_held(tiny_model(family), 150, 2, compressor="wildcat", ratio=0.25)
    assert (size.nbytes, size.not_counted) == (held, ())


def test_states_that_are_not_counted_are_named():
    model = tiny_model("qwen3_next")
    size, held = computed_and_held(model, 150, compressor="wildcat", ratio=0.25)
    assert size.not_counted == ("layer 0 (LinearAttentionLayer)",) and size.nbytes < held


@pytest.mark.parametrize("budget", [{"ratio": 0.5, "bits": 4}, {"ratio": 0.125, "bits": 4}, {"ratio": 0.25}], ids=str)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in FIXED])
def test_it_is_near_where_heads_share_unequally(llama, method, budget):
    size, held = computed_and_held(llama, 1500, compressor=METHODS[method], **budget)
    near = 0.02 if "bits" in budget else 0.1  # heads that turn out equal are held with more room
    assert size.estimated and size.nbytes == pytest.approx(held, rel=near)


def test_shares_of_a_profile_are_reckoned_with(llama):
    shares = [[0.25, 0.0], [0.05, 0.3], [0.2, 0.2]]
    profile = Profile(
        model="tiny",
        match={"model_type": "llama"},
        texts="none",
        tokens=1,
        points=[{"ratio": 0.25, "attended": shares, "recalled": shares}],
    )
    size, held = computed_and_held(llama, 700, compressor=QueryWildCat(profile=profile), ratio=0.25, bits=4)
    equal, _ = computed_and_held(llama, 700, compressor=QueryWildCat(), ratio=0.25, bits=4)
    assert abs(size.nbytes - held) < abs(equal.nbytes - held) < 0.05 * held


def test_presets_are_near(llama):
    for name in preset_names():
        size, held = computed_and_held(llama, 1200, preset=name)
        assert size.nbytes == (pytest.approx(held, rel=0.02) if size.estimated else held), name


def test_the_exact_cache_is_that_of_transformers(llama):
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(random_ids(2, 77), **{CACHE: cache})
    size = cache_size(llama.config, 77, rows=2, dtype=torch.float32, ratio=0.25)
    assert size.exact_nbytes == cache_bytes(cache)
    assert size.share == size.nbytes / size.exact_nbytes


def test_it_touches_neither_the_config_nor_the_attention(llama):
    before = llama.config.to_dict(), llama.config._attn_implementation
    cache_size(llama.config, 77)
    assert (llama.config.to_dict(), llama.config._attn_implementation) == before


@pytest.mark.parametrize(
    ("tokens", "choice", "message"),
    [
        (0, {}, "tokens=0 must be a positive integer"),
        (9, {"rows": 0}, "rows=0 must be a positive integer"),
        (9, {"ratio": "auto", "tolerance": 0.1}, "ratio='auto': the text decides how much is kept"),
        (9, {"compressor": "snapKV"}, "did you mean 'snapkv'"),
        (9, {"max_bytes": 900}, "max_bytes=900 is too small"),
    ],
)
def test_what_cannot_be_computed_is_refused(llama, tokens, choice, message):
    with pytest.raises(ValueError, match=message):
        cache_size(llama.config, tokens, **choice)
