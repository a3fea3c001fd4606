"""What a cache is made of, and what a model's config says of it."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf

from tests.integrations.test_enable import llava
from tests.tiny import random_ids, tiny_config, tiny_model
from wildcat_kv import CompressedCache, WildCatCache, WildCatConfig, enable, load_preset, patch_config
from wildcat_kv.cache.blueprint import Blueprint
from wildcat_kv.compressors import SnapKV, resolve
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.recipes.recipe import Recipe, read_section

SETTINGS = {"ratio": 0.25, "sink": 4, "window": 4, "bin_rank": 4}
GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
IDS = random_ids(1, 100)


@pytest.fixture
def config():
    return tiny_config("llama")


def as_it_is(config):
    return copy.deepcopy(vars(config)), config.to_dict()


def generated(model, **cache):
    return model.generate(IDS, **GREEDY, **cache)


# Written by one process, read by another.

READER = """
import json, sys, warnings
warnings.simplefilter("error")
import torch, transformers as tf
import wildcat_kv
torch.set_num_threads(1)
outputs = {}
for folder in sys.argv[1:]:
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.load(folder + "/ids.pt")
    wildcat_kv.enable(model)
    outputs[folder] = model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)[0].tolist()
    tf.AutoConfig.from_pretrained(folder)
    tf.GenerationConfig.from_model_config(model.config)
print(json.dumps(outputs))
"""


def test_another_process_obeys_what_was_saved(tmp_path):
    expected = {}
    for family, compressor in (("llama", "wildcat"), ("qwen3", "uniform"), ("gemma3", "snapkv")):
        folder = tmp_path / family
        model = tiny_model(family)
        patch_config(model.config, compressor=compressor, exact_layers=[-1], **SETTINGS)
        model.save_pretrained(folder)
        torch.save(IDS, folder / "ids.pt")
        cache = CompressedCache(model.config, compressor=compressor, exact_layers=[-1], **SETTINGS)
        expected[str(folder)] = generated(model, **{CACHE: cache})[0].tolist()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    reader = subprocess.run(
        [sys.executable, "-c", READER, *expected],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert reader.returncode == 0, reader.stderr
    assert json.loads(reader.stdout) == expected
    assert "wildcat" not in reader.stderr.lower()


def test_the_section_goes_through_save_and_load(config, tmp_path):
    patch_config(config, max_tokens=300, seed=7, compressor="keydiff")
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["wildcat_kv"] == config.wildcat_kv
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = tf.AutoConfig.from_pretrained(tmp_path)
    assert read_section(again) == read_section(config)
    assert Recipe.choose(again) == Recipe(WildCatConfig(max_tokens=300, seed=7), "keydiff")


def test_a_generation_config_does_not_hold_it(config, tmp_path):
    patch_config(config, ratio=0.5)
    generation = tf.GenerationConfig.from_model_config(config)
    assert "wildcat_kv" not in generation.to_dict()
    config.save_pretrained(tmp_path)
    from_file = tf.GenerationConfig.from_pretrained(tmp_path, config_file_name="config.json", _from_model_config=True)
    assert "wildcat_kv" not in from_file.to_dict()


def test_the_section_is_for_people_to_read(config):
    patch_config(config, preset="published", exact_layers=[0])
    section = config.wildcat_kv
    assert section["version"] == 1 and section["preset"] == "published" and section["compressor"] == "wildcat"
    assert section["settings"]["ratio"] == 0.25 and section["settings"]["exact_layers"] == [0]
    assert "max_tokens" not in section["settings"]
    assert json.loads(json.dumps(section)) == section


def test_the_model_itself_is_not_switched(config):
    attention = config._attn_implementation
    patch_config(config, ratio=0.5)
    assert config._attn_implementation == attention


def test_the_config_of_a_vision_model_holds_it(tmp_path):
    model = llava()
    patch_config(model.config, **SETTINGS)
    assert not hasattr(model.config.text_config, "wildcat_kv")
    model.save_pretrained(tmp_path)
    again = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    with enable(again):
        output = generated(again)
    assert torch.equal(output, generated(again, **{CACHE: WildCatCache(again.config, **SETTINGS)}))
    assert not torch.equal(output, generated(again))


# What wins.


def test_arguments_go_over_the_section(config):
    patch_config(config, compressor="uniform", **SETTINGS)
    assert Recipe.choose(config) == Recipe(WildCatConfig(**SETTINGS), "uniform")
    assert Recipe.choose(config, window=9).settings == WildCatConfig(**{**SETTINGS, "window": 9})
    assert Recipe.choose(config, max_tokens=90).settings == WildCatConfig(max_tokens=90, sink=4, window=4, bin_rank=4)
    assert Recipe.choose(config, compressor="snapkv").settings == WildCatConfig(**SETTINGS)
    assert Recipe.choose(config, WildCatConfig(ratio=0.5)) == Recipe(WildCatConfig(ratio=0.5), "auto")


def test_a_preset_replaces_the_section(config):
    patch_config(config, compressor="uniform", **SETTINGS)
    published = load_preset("published")
    for preset in ("published", published):
        chosen = Recipe.choose(config, preset=preset)
        assert (chosen.settings, chosen.compressor) == (published.settings, "wildcat")


def test_max_tokens_replaces_layers_left_exact(config):
    patch_config(config, exact_layers=[0], **SETTINGS)
    assert Recipe.choose(config, max_tokens=90).settings.exact_layers == ()
    assert Recipe.choose(config, ratio=0.5).settings.exact_layers == (0,)


def test_a_second_patch_changes_the_first(config):
    patch_config(config, compressor="uniform", **SETTINGS)
    patch_config(config, ratio=0.5)
    assert Recipe.choose(config) == Recipe(WildCatConfig(**{**SETTINGS, "ratio": 0.5}), "uniform")
    patch_config(config, preset="published")
    assert Recipe.choose(config) == Recipe(WildCatConfig(ratio=0.25, sink=32), "wildcat", "published")
    patch_config(config, WildCatConfig(max_tokens=200))
    assert Recipe.choose(config) == Recipe(WildCatConfig(max_tokens=200), "auto", None)


def test_every_cache_is_a_new_one(config):
    first, second = (WildCatCache(config, **SETTINGS) for _ in range(2))
    assert first is not second and first.layers[0] is not second.layers[0]
    assert first.settings == second.settings == WildCatConfig(**SETTINGS)


def test_checking_does_not_switch(config):
    before, recipe = as_it_is(config), Recipe.choose(config, **SETTINGS)
    Blueprint.of(config, recipe.settings, recipe.compressor)
    assert as_it_is(config) == before


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"ratio": 0.5},
        {"preset": "adaptive"},
        {"preset": "balanced", "ratio": 0.5},
        {"preset": "published", "compressor": "snapkv", "max_tokens": 300},
        {"compressor": "keydiff", "compression_ratio": 0.75},
        {"settings": WildCatConfig(ratio=0.5, sink=4), "compressor": "tova"},
    ],
    ids=str,
)
@pytest.mark.parametrize("patched", [False, True])
def test_a_cache_takes_what_every_other_way_takes(config, choice, patched):
    if patched:
        patch_config(config, preset="adaptive")
    cache = WildCatCache(config, **choice)
    if patched and "preset" not in choice:  # a budget is a choice of its own
        config = tiny_model("llama").config if choice else config
    recipe = Recipe.choose(config, **choice)
    assert cache.settings == recipe.settings
    chosen = "query_wildcat" if recipe.compressor == "auto" else recipe.compressor
    assert cache.compressor == resolve(chosen, recipe.settings)


# What is refused.

GOOD = {"version": 1, "compressor": "wildcat", "settings": {"ratio": 0.5}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {**GOOD, "settings": {"rato": 0.5}},
            r"config\.wildcat_kv\.settings\.rato=0.5: no such setting; did you mean 'ratio'",
        ),
        ({**GOOD, "settings": {"ratio": 2.0}}, r"config\.wildcat_kv\.settings\.ratio=2.0: .*\(0, 1\]"),
        ({**GOOD, "settings": {"ratio": "half"}}, r"config\.wildcat_kv\.settings\.ratio='half'"),
        ({**GOOD, "settings": {"ratio": 0.5, "sink": -1}}, r"config\.wildcat_kv\.settings\.sink=-1"),
        ({**GOOD, "settings": {}}, r"config\.wildcat_kv\.settings\..*neither of them given"),
        ({**GOOD, "settings": [0.5]}, r"config\.wildcat_kv\.settings=\[0.5\]"),
        ({**GOOD, "settings": {1: 2}}, r"config\.wildcat_kv"),
        ({"version": 1}, r"config\.wildcat_kv\.settings: missing"),
        ({"settings": {"ratio": 0.5}}, r"config\.wildcat_kv\.version: missing"),
        ({**GOOD, "version": 2}, r"config\.wildcat_kv\.version=2: this release reads 1; install a newer wildcat_kv"),
        ({**GOOD, "version": 2, "later": True}, r"config\.wildcat_kv\.version=2"),
        ({**GOOD, "version": 0}, r"config\.wildcat_kv\.version=0"),
        ({**GOOD, "version": "1"}, r"config\.wildcat_kv\.version='1'"),
        ({**GOOD, "compressr": "uniform"}, r"config\.wildcat_kv\.compressr='uniform'.*did you mean 'compressor'"),
        ({**GOOD, "compressor": "wildct"}, r"config\.wildcat_kv\.compressor='wildct'.*did you mean 'wildcat'"),
        ({**GOOD, "compressor": None}, r"config\.wildcat_kv\.compressor=None"),
        ({**GOOD, "preset": 3}, r"config\.wildcat_kv\.preset=3"),
        ([GOOD], r"config\.wildcat_kv=\[.*must be a mapping"),
        ("published", r"config\.wildcat_kv='published' must be a mapping"),
    ],
)
def test_a_section_that_does_not_fit_is_named_by_its_path(config, section, message):
    config.wildcat_kv = section
    before = as_it_is(config)
    for use in (read_section, Recipe.choose, lambda config: patch_config(config, seed=3)):
        with pytest.raises(ValueError, match=message) as error:
            use(config)
        assert "\n" not in str(error.value)
    assert as_it_is(config) == before
    patch_config(config, preset="published")  # the way out
    assert read_section(config).settings == WildCatConfig(ratio=0.25, sink=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 3.0}, "ratio=3.0"),
        ({"rato": 0.3}, "rato=0.3: no such setting; did you mean 'ratio'"),
        ({"preset": "publishd"}, "did you mean 'published'"),
        ({"compressor": "wildct"}, "did you mean 'wildcat'"),
        ({"compressor": SnapKV()}, r"compressor=.*SnapKV.*a config holds names.*entry point"),
        ({"exact_layers": [3]}, r"exact_layers=\[3\]: layer 3 is none of"),
        ({"settings": WildCatConfig(ratio=0.5), "window": 3}, "window given beside settings"),
        ({"settings": {"ratio": 0.5}}, "is no WildCatConfig"),
        ({"compressor": "kvzip"}, "compressor='kvzip' reads the context a second time"),
    ],
    ids=str,
)
def test_a_patch_that_does_not_fit_changes_nothing(config, arguments, message):
    before = as_it_is(config)
    with pytest.raises(ValueError, match=message) as error:
        patch_config(config, **arguments)
    assert "\n" not in str(error.value) and as_it_is(config) == before


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (tf.T5Config(), ValueError, "encoder-decoder"),
        (tf.MambaConfig(), ValueError, "config=MambaConfig"),
        (tf.MistralConfig(sliding_window=24), ValueError, "no full-attention layer"),
        (tf.DeepseekV3Config(), ValueError, "latent"),
        ({"model_type": "llama"}, TypeError, "config=dict is no Transformers config"),
        (None, TypeError, "config=NoneType is no Transformers config"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_that_cannot_be_compressed_are_not_patched(config, kind, message):
    before = as_it_is(config) if kind is ValueError else None
    with pytest.raises(kind, match=message) as error:
        patch_config(config, ratio=0.5)
    assert "\n" not in str(error.value)
    assert before is None or as_it_is(config) == before


def test_a_model_in_the_place_of_its_config_is_told_so():
    with pytest.raises(TypeError, match=r"config=LlamaForCausalLM is no Transformers config; pass model.config"):
        patch_config(tiny_model("llama"), ratio=0.5)
