"""A cache is never read into twice unnoticed, and what is refused leaves it as it was."""

import pytest
import torch

from tests.driver import assert_same, state
from tests.families import REGISTRY
from tests.tiny import random_ids, tiny_model
from wildcat_kv import CompressedCache, WildCatCache
from wildcat_kv.hook.keyword import CACHE

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
IDS = random_ids(1, 120)
TWICE = "would be read twice.*call cache.reset"
# Families that tell attention neither positions nor use_cache, or that read the whole past into a state beside.
FAMILIES = [name for name in ("llama", "gemma3", "gpt_oss", "llama4", "gpt2", "opt") if not REGISTRY[name].missing]


def read(model, ids, method="wildcat", **budget):
    cache = CompressedCache(model.config, compressor=method, **(budget or {"ratio": 0.25}))
    model(ids, **{CACHE: cache})
    return cache


@pytest.mark.parametrize("method", ["wildcat", "snapkv", "query_wildcat", "h2o"])
@pytest.mark.parametrize("budget", [{"ratio": 1.0}, {"ratio": 0.25}, {"max_tokens": 100}], ids=str)
@pytest.mark.parametrize("prompt", [IDS, IDS[:, :60], IDS[:, :100]], ids=["the same", "half", "most"])
def test_a_prompt_that_was_read_is_refused_and_the_cache_goes_on(method, budget, prompt):
    model = tiny_model("llama")
    cache, longer = read(model, IDS, method, **budget), random_ids(1, 130)
    longer[:, :120] = IDS
    before = state(cache)
    with pytest.raises(ValueError, match=r"twice|no new tokens|must have width") as error:
        model.generate(prompt, **{CACHE: cache}, **GREEDY)
    assert "\n" not in str(error.value)
    assert_same(state(cache), before)
    expected = model.generate(longer, **{CACHE: read(model, IDS, method, **budget)}, **GREEDY)
    assert torch.equal(model.generate(longer, **{CACHE: cache}, **GREEDY), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["call", "generation_config"])
def test_generate_without_the_cache_it_is_given_is_refused(family, where):
    model = tiny_model(family)
    expected = model.generate(IDS, **GREEDY)
    if where == "generation_config":
        model.generation_config.use_cache = False
    options = {"use_cache": False} if where == "call" else {}
    with pytest.raises(ValueError, match=r"use_cache=False.*has read 120|twice|must have width"):
        model.generate(IDS, **{CACHE: WildCatCache(model.config, ratio=1.0)}, **options, **GREEDY)
    options = {"use_cache": True}
    cache = WildCatCache(model.config, ratio=1.0)
    assert torch.equal(model.generate(IDS, **{CACHE: cache}, **options, **GREEDY), expected)
    assert cache.get_seq_length() == 127


def test_a_forward_pass_with_use_cache_off_still_reads_once():
    model = tiny_model("llama")
    cache, other = WildCatCache(model.config, compressor="wildcat", ratio=0.25), read(model, IDS)
    model(IDS, **{CACHE: cache}, use_cache=False)
    assert_same(state(cache), state(other))
    more = random_ids(1, 5, seed=3)
    assert torch.equal(model(more, **{CACHE: cache}, use_cache=False).logits, model(more, **{CACHE: other}).logits)


def test_padded_rows_go_on_from_their_own_positions():
    """A row that was all padding begins at 0; one that has read tokens may not."""
    model, ids = tiny_model("llama"), random_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :45] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = WildCatCache(model.config, ratio=0.25)
    for start in (0, 30):
        part = slice(start, start + 30)
        model(ids[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part], **{CACHE: cache})
    wrong = torch.cat((positions[:1, -1:] + 1, positions.new_zeros(1, 1))).expand(2, 4) + torch.arange(4)
    options = {"attention_mask": torch.cat((mask, mask.new_ones(2, 4)), 1), CACHE: cache}
    with pytest.raises(ValueError, match=f"have positions from 0 on.*has read 60 tokens.*{TWICE}"):
        model(random_ids(2, 4, seed=5), position_ids=wrong, **options)
    model(random_ids(2, 4, seed=5), position_ids=wrong + torch.tensor([[0], [60]]), **options)
    assert cache.get_seq_length() == 64


def test_prompt_lookup_over_a_prompt_that_was_read_is_refused():
    model = tiny_model("llama")
    for budget in (1.0, 0.25):
        cache = read(model, IDS, ratio=budget)
        with pytest.raises(ValueError, match=f"{TWICE}|must have width"):
            model.generate(torch.cat((IDS, IDS[:, :3]), 1), **{CACHE: cache}, prompt_lookup_num_tokens=3, **GREEDY)
        assert cache.get_seq_length() == 120
