"""`compression_ratio=` is taken wherever a ratio is, and never beside one."""

import pytest
import torch

from tests.tiny import random_ids, tiny_model
from tests.words import tokenizer, words
from wildcat_kv import (
    CompressedCache,
    Context,
    WildCatCache,
    WildCatConfig,
    compress_context,
    enable,
    patch_config,
    wildcat_generate,
)
from wildcat_kv.cli import options
from wildcat_kv.hook.keyword import returned_cache
from wildcat_kv.integrations.hub_folder import write_folder
from wildcat_kv.recipes.recipe import Recipe, read_section

IDS = random_ids(1, 100)
ONE = {"max_new_tokens": 1, "return_dict_in_generate": True, "do_sample": False}


def by_enable(model, folder, **budget):
    with enable(model, **budget) as handle:
        return handle.recipe.settings


def by_folder(model, folder, **budget):
    write_folder(folder / "recipe")
    output = model.generate(IDS, custom_generate=str(folder / "recipe"), trust_remote_code=True, **budget, **ONE)
    return returned_cache(output).settings


def by_section(model, folder, **budget):
    patch_config(model.config, **budget)
    return read_section(model.config).settings


def by_function(model, folder, **budget):
    return returned_cache(model.generate(IDS, custom_generate=wildcat_generate, **budget, **ONE)).settings


WAYS = {
    "WildCatCache": lambda model, folder, **budget: WildCatCache(model.config, **budget).settings,
    "CompressedCache": lambda model, folder, **budget: (
        CompressedCache(model.config, compressor="snapkv", **budget).settings
    ),
    "enable": by_enable,
    "function": by_function,
    "folder": by_folder,
    "section": by_section,
    "preset": lambda model, folder, **budget: Recipe.choose(model.config, preset="tiny_memory", **budget).settings,
    "Context": lambda model, folder, **budget: Context(model, IDS).compress(**budget).settings,
    "compress_context": lambda model, folder, **budget: (
        compress_context(model, tokenizer(), words(80), **budget).cache.settings
    ),
}


@pytest.fixture(autouse=True)
def _modules(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.setattr("sys.path", [*__import__("sys").path])


@pytest.mark.parametrize("way", WAYS)
def test_the_share_to_drop_is_taken(way, tmp_path):
    assert WAYS[way](tiny_model("llama"), tmp_path, compression_ratio=0.6).ratio == 0.4


@pytest.mark.parametrize("way", WAYS)
def test_both_are_refused_and_nothing_changes(way, tmp_path):
    model = tiny_model("llama")
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match=r"ratio=0.25 and compression_ratio=0.75: .* pass one of them") as error:
        WAYS[way](model, tmp_path, ratio=0.25, compression_ratio=0.75)
    assert "\n" not in str(error.value)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), expected)
    assert not hasattr(model.config, "wildcat_kv")
    assert model.config._attn_implementation == "sdpa" or way == "Context"  # which has read the text by then


def test_commands_and_evaluations_take_it_too(tmp_path):
    given = options.chosen(None, None, ratio=None, compression_ratio=0.75, seed=None)
    assert WildCatConfig(ratio=0.5).changed(compression_ratio=given["compression_ratio"]).ratio == 0.25
    with pytest.raises(ValueError, match="pass one of them"):
        options.chosen(None, None, ratio=0.5, compression_ratio=0.5)
    assert options.share(None, None) == WildCatConfig(ratio=0.25)
    assert options.share(None, 0.6) == options.share(0.4, None) == WildCatConfig(ratio=0.4)
    with pytest.raises(ValueError, match="pass one of them"):
        options.share(0.25, 0.75)
    config = pytest.importorskip("eval.config", reason="needs the extra eval")
    command = pytest.importorskip("eval.__main__")
    assert command._shares(None, "0.75, 0.9") == command._shares("0.25,0.1", None) == [0.25, 0.1]
    with pytest.raises(ValueError, match=r"ratios='0.5' and compression_ratios='0.5': give one of them"):
        command._shares("0.5", "0.5")
    assert config.RunConfig(tasks=["drift"], methods=["wildcat"], compression_ratios=[0.75, 0.9]).ratios == [0.25, 0.1]
    file = tmp_path / "run.yaml"
    file.write_text("tasks: [drift]\ncompression_ratios: [0.9]\n")
    assert config.read_config(file).ratios == [0.1] and config.read_config(file, ratios=[0.5]).ratios == [0.5]
    with pytest.raises(ValueError, match=r"compression_ratios=\[0.5\] given beside ratios=\[0.5\]; give one"):
        config.RunConfig(tasks=["drift"], ratios=[0.5], compression_ratios=[0.5])
