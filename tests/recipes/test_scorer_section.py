"""A fitted scorer in a model's config: written with the method, refused where it does not fit."""

import json

import pytest
import torch
import transformers as tf

from tests.tiny import SMALL
from wildcat_kv import WildCatCache, patch_config
from wildcat_kv.compressors import QueryWildCat
from wildcat_kv.compressors.query_wildcat import FittedScorer, load_scorer
from wildcat_kv.compressors.query_wildcat.model_match import fingerprint

SHIPPED = "smollm2-135m"


@pytest.fixture
def config():
    return tf.LlamaConfig(**SMALL)


@pytest.fixture
def scorer(config):
    return FittedScorer.of([torch.ones(2, 50)] * 3, model="tiny", match=fingerprint(config), texts="none", tokens=1)


def test_a_scorer_goes_with_the_config(config, scorer, tmp_path):
    patch_config(config, compressor=QueryWildCat(scorer=scorer), ratio=0.25, sink=4)
    config.save_pretrained(tmp_path)
    for each in (config, tf.AutoConfig.from_pretrained(tmp_path)):
        assert WildCatCache(each).compressor == QueryWildCat(scorer=scorer)
    assert json.loads(json.dumps(config.wildcat_kv)) == config.wildcat_kv


def test_a_scorer_of_the_package_is_written_by_its_name_beside_a_profile():
    config = tf.LlamaConfig(**load_scorer(SHIPPED).match)
    patch_config(config, compressor=QueryWildCat(scorer=SHIPPED, profile=SHIPPED), ratio=0.25)
    assert config.wildcat_kv["scorer"] == config.wildcat_kv["profile"] == SHIPPED
    assert WildCatCache(config).compressor == QueryWildCat(scorer=SHIPPED, profile=SHIPPED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scorer": "smollm2"}, "scorer='smollm2': no such scorer"),
        ({"scorer": {"version": 1}}, "scorer: model: missing"),
        ({"compressor": "snapkv"}, "scorer with compressor='snapkv': only query_wildcat has one; leave scorer out"),
        ({"compressor": "auto"}, "scorer with compressor='auto'"),
    ],
)
def test_a_section_with_a_wrong_scorer_is_refused(config, scorer, change, message):
    patch_config(config, compressor=QueryWildCat(scorer=scorer), ratio=0.25)
    config.wildcat_kv = {**config.wildcat_kv, **change}
    with pytest.raises(ValueError, match=message) as error:
        WildCatCache(config)
    assert "config.wildcat_kv" in str(error.value) and "\n" not in str(error.value)
