"""A profile in a model's config: written with the method, kept by later patches, refused where it does not fit."""

import json

import pytest
import transformers as tf

from tests.tiny import SMALL
from wildcat_kv import WildCatCache, patch_config
from wildcat_kv.compressors import QueryWildCat, SnapKV
from wildcat_kv.compressors.query_wildcat import load_profile
from wildcat_kv.compressors.query_wildcat.model_match import fingerprint
from wildcat_kv.integrations.model_folder import patch_folder
from wildcat_kv.recipes.recipe import Recipe, read_section

SHIPPED = "smollm2-135m"


@pytest.fixture
def config():
    return tf.LlamaConfig(**SMALL)


@pytest.fixture
def profile(config):
    shares = [[0.5, 1.0], [1.5, 1.0], [0.0, 2.0]]
    points = [{"ratio": 0.25, "attended": shares, "recalled": shares}]
    match = {**fingerprint(config), "sliding_window": None}
    return load_profile({"version": 1, "model": "tiny", "match": match, "texts": "none", "tokens": 1, "points": points})


def smollm():
    return tf.LlamaConfig(**load_profile(SHIPPED).match)


def test_a_profile_goes_with_the_config(config, profile, tmp_path):
    patch_config(config, compressor=QueryWildCat(profile=profile), ratio=0.25, sink=4)
    config.save_pretrained(tmp_path)
    again = tf.AutoConfig.from_pretrained(tmp_path)
    for each in (config, again):
        cache = WildCatCache(each)
        assert cache.compressor == QueryWildCat(profile=profile)
        assert cache.settings.ratio == 0.25 and cache.settings.sink == 4
    assert json.loads(json.dumps(config.wildcat_kv)) == config.wildcat_kv


def test_a_profile_of_the_package_is_written_by_its_name():
    config = smollm()
    patch_config(config, compressor=QueryWildCat(profile=SHIPPED), preset="adaptive")
    assert config.wildcat_kv["profile"] == SHIPPED and config.wildcat_kv["compressor"] == "query_wildcat"
    assert WildCatCache(config).compressor.profile == load_profile(SHIPPED)


def test_later_patches_keep_it_and_another_method_drops_it(config, profile):
    patch_config(config, compressor=QueryWildCat(profile=profile), ratio=0.25)
    patch_config(config, ratio=0.5, seed=7)
    assert Recipe.choose(config).compressor == QueryWildCat(profile=profile, seed=7)
    assert Recipe.choose(config, compressor="snapkv").compressor == "snapkv"
    patch_config(config, compressor="snapkv")
    assert read_section(config).profile is None and "profile" not in config.wildcat_kv


def test_a_folder_keeps_it_too(config, profile, tmp_path):
    config.save_pretrained(tmp_path)
    patch_folder(tmp_path, compressor=QueryWildCat(profile=profile), ratio=0.25)
    assert WildCatCache(tf.AutoConfig.from_pretrained(tmp_path)).compressor.profile == profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "smollm2"}, "profile='smollm2': no such profile"),
        ({"profile": {"version": 1}}, "profile: model: missing"),
        ({"compressor": "snapkv"}, "profile with compressor='snapkv': only query_wildcat has one"),
    ],
)
def test_a_section_with_a_wrong_profile_is_refused(config, profile, change, message):
    patch_config(config, compressor=QueryWildCat(profile=profile), ratio=0.25)
    config.wildcat_kv = {**config.wildcat_kv, **change}
    with pytest.raises(ValueError, match=message) as error:
        WildCatCache(config)
    assert "config.wildcat_kv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("compressor", [SnapKV(), QueryWildCat(queries=5), QueryWildCat(queries=5, profile=SHIPPED)])
def test_other_objects_are_no_part_of_a_config(compressor):
    config = smollm()
    with pytest.raises(ValueError, match="a config holds names"):
        patch_config(config, compressor=compressor, ratio=0.25)
    assert not hasattr(config, "wildcat_kv")


def test_a_profile_of_another_model_is_not_written(config):
    with pytest.raises(ValueError, match="is of a model with num_hidden_layers=30"):
        patch_config(config, compressor=QueryWildCat(profile=SHIPPED), ratio=0.25)
    assert not hasattr(config, "wildcat_kv")
