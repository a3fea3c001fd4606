"""The method where none is named."""

import pytest
import torch
import transformers as tf

from tests.tiny import random_ids, tiny_config, tiny_model
from wildcat_kv import WildCatCache
from wildcat_kv.cache import automatic
from wildcat_kv.compressors import QueryWildCat, WildCat
from wildcat_kv.compressors.query_wildcat import load_profile
from wildcat_kv.hook.keyword import CACHE


def chosen(config, **settings):
    return WildCatCache(config, **({"ratio": 0.25} | settings)).compressor


@pytest.mark.parametrize("settings", [{}, {"ratio": 0.5, "bits": 4}, {"ratio": None, "max_tokens": 300}], ids=str)
def test_it_is_query_wildcat_where_the_model_rotates(settings):
    assert chosen(tiny_config("llama"), **settings) == QueryWildCat()
    assert chosen(tiny_config("llama"), compressor="auto", seed=3, **settings) == QueryWildCat(seed=3)


def test_a_tolerance_needs_no_profile(monkeypatch):
    monkeypatch.setattr(automatic, "shipped_measures", None)
    assert chosen(tiny_config("llama"), ratio="auto", tolerance=0.1) == QueryWildCat(tolerance=0.1)


def test_a_model_that_was_measured_has_its_profile_and_its_scorer():
    """SmolLM2-135M by the shape of its decoder; one layer less is another model."""
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    }
    config = tf.LlamaConfig(num_hidden_layers=30, **shape)
    assert chosen(config) == QueryWildCat(profile=load_profile("smollm2-135m-with-scorer"), scorer="smollm2-135m")
    assert not chosen(config).waits  # each layer compresses as soon as it was read
    assert chosen(tf.LlamaConfig(num_hidden_layers=29, **shape)) == QueryWildCat()


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (tiny_config("llama"), {"ratio": 1.0}),  # nothing to choose
        (tiny_config("llama"), {"ratio": None, "max_tokens": 200, "static": True}),
        (tf.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, rope_parameters=DYNAMIC), {}),
    ],
    ids=["everything is kept", "fixed shapes", "frequencies by length"],
)
def test_the_published_method_serves_the_others(config, settings):
    assert chosen(config, **settings) == WildCat()


def test_positions_that_are_not_understood_are_left_alone(monkeypatch):
    def refuse(decoder, full):
        raise ValueError("the rotary positions of this family are not understood")

    monkeypatch.setattr(automatic, "rotations_of", refuse)
    assert chosen(tiny_config("llama")) == WildCat()


def test_a_loaded_cache_goes_on_with_the_method_that_was_chosen(tmp_path):
    model = tiny_model("llama")
    cache = WildCatCache(model.config, ratio=0.25)
    with torch.no_grad():
        model(random_ids(1, 200), **{CACHE: cache})
    cache.save(tmp_path / "cache.safetensors")
    for name in (None, "auto"):
        again = WildCatCache.load(tmp_path / "cache.safetensors", model.config, compressor=name)
        assert again.compressor == cache.compressor == QueryWildCat()
