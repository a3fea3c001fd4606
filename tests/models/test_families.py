"""A family of each kind, by a tiny random model: exact within its budget and true beyond, or refused.

A test is named after its family: `pytest tests/test_families.py -k "[gemma2]"`.
"""

import inspect
from functools import cache as cached

import pytest
import torch
from transformers import DynamicCache

from tests.families import REGISTRY
from tests.tiny import random_ids, tiny_config, tiny_model
from wildcat_kv import WildCatCache
from wildcat_kv.cache.budget import block_size, kept_tokens
from wildcat_kv.hook.keyword import CACHE, returned_cache

pytestmark = pytest.mark.filterwarnings("ignore:config=Phi3Config. generate.. of this model drops any cache")


def families(refused=False):
    """Parameters of a test."""
    chosen = []
    for name, family in REGISTRY.items():
        marks = [pytest.mark.skipif(family.missing, reason="not in this version of Transformers")]
        if (family.status == "refused") == refused:
            chosen.append(pytest.param(name, marks=marks, id=name))
    return chosen


every_family = pytest.mark.parametrize("family", families())


@cached
def built(family):
    model = tiny_model(family)
    return model, str(model.config._attn_implementation)


def model_of(family, attention=None):
    """The family's model, built once; each call gives it back the attention that caches may have switched."""
    model, own = built(family)
    model.config._attn_implementation = attention or own
    return model


def padded(rows, length, padding, seed=0):
    """Random tokens, and their mask with padding on the left of the first row."""
    ids = random_ids(rows, length, seed)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def longer(mask, steps=1):
    return torch.cat((mask, mask.new_ones(len(mask), steps)), dim=1)


def greedy(model, cache, ids, mask, steps):
    """Logits (rows, steps, vocabulary) of the last token of a prompt and of greedy tokens after it."""
    collected = []
    for _ in range(steps):
        logits = model(ids, **{CACHE: cache}, attention_mask=mask).logits[:, -1:]
        collected.append(logits)
        ids, mask = logits.argmax(-1), longer(mask)
    return torch.cat(collected, dim=1)


def forced(model, cache, ids, mask, tokens):
    """Logits of the last token of a prompt and of given tokens after it; positions are counted without padding."""
    collected, counts = [], "position_ids" in inspect.signature(model.forward).parameters
    for step in range(tokens.shape[1] + 1):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        options = {"position_ids": positions} if counts else {}
        collected.append(model(ids, **{CACHE: cache}, attention_mask=mask, **options).logits[:, -1:])
        ids, mask = tokens[:, step : step + 1], longer(mask)
    return torch.cat(collected, dim=1)


def compressed_layers(cache):
    return [index for index, layer in enumerate(cache.layers) if type(layer).__name__ == "WildCatLayer"]


def assert_kept(cache, seen):
    """A quarter of the tokens, and less than a block that awaits the next fold."""
    for index in compressed_layers(cache):
        assert cache.layers[index].get_seq_length() == seen
        assert 0 <= cache.stored_length(index) - kept_tokens(seen, 0.25) < block_size(cache.settings)


@every_family
def test_within_budget_every_logit_is_the_exact_caches(family):
    ids, mask = padded(2, 60, 13)
    for attention in dict.fromkeys((built(family)[1], "eager")):
        model = model_of(family, attention)
        expected = greedy(model, DynamicCache(config=model.config), ids, mask, 30)
        for budget in ({"ratio": 1.0}, {"max_tokens": 500}):
            cache = WildCatCache(model.config, **budget)
            assert torch.equal(greedy(model, cache, ids, mask, 30), expected), (attention, budget)
            assert {cache.stored_length(index) for index in compressed_layers(cache)} == {89}


@every_family
def test_weighted_attention_does_all_that_the_family_does(family):
    """With weights of one it is the model's own eager attention; only the path is that of a compressed cache."""
    ids, mask = padded(2, 60, 9)
    later = random_ids(2, 9, seed=7)

    def logits(cache, force):
        positions = (longer(mask, 9).cumsum(-1) - 1).clamp_min(0)

        def read(new, seen):
            options = {"position_ids": positions[:, seen.shape[1] - new.shape[1] : seen.shape[1]]} if counts else {}
            return model(new, **{CACHE: cache}, attention_mask=seen, **options).logits

        read(ids, mask)
        if force:
            cache._pass_state.compressed = True
        seen, collected = longer(mask, 6), []
        for new in (later[:, :6], *later[:, 6:].split(1, dim=1)):
            collected.append(read(new, seen))
            seen = longer(seen)
        return torch.cat(collected, dim=1)

    model = model_of(family, "eager")
    counts = "position_ids" in inspect.signature(model.forward).parameters
    expected = logits(DynamicCache(config=model.config), force=False)
    ours = logits(WildCatCache(model.config, max_tokens=200), force=True)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@every_family
def test_generation_stays_within_its_share(family):
    model, ids = model_of(family), random_ids(1, 200)
    cache = WildCatCache(model.config, ratio=0.25)
    out = model.generate(
        ids, **{CACHE: cache}, max_new_tokens=60, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert returned_cache(out) is cache and out.sequences.shape == (1, 260)
    assert all(torch.isfinite(logits).all() for logits in out.logits)
    assert cache.get_seq_length() == 259 and compressed_layers(cache)
    assert_kept(cache, 259)
    for ours, plain in zip(cache.layers, DynamicCache(config=model.config).layers, strict=True):
        assert type(ours).__name__ == "WildCatLayer" or isinstance(ours, type(plain))


@every_family
def test_a_padded_row_answers_as_it_does_alone(family):
    model = model_of(family)
    ids, mask = padded(2, 150, 90)
    tokens = random_ids(2, 24, seed=9)
    together = forced(model, WildCatCache(model.config, ratio=0.25), ids, mask, tokens)
    for row in range(2):
        one = slice(row, row + 1)
        short = ids[one, mask[row].bool()]
        alone = forced(model, WildCatCache(model.config, ratio=0.25), short, torch.ones_like(short), tokens[one])
        torch.testing.assert_close(together[one], alone, rtol=2e-3, atol=2e-3)


@every_family
def test_beams_are_the_exact_caches_within_budget_and_run_beyond(family):
    model = model_of(family)

    def beams(cache, prompt):
        options = {"num_beams": 2, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        return model.generate(prompt, **{CACHE: cache}, max_new_tokens=20, **options)

    prompts = random_ids(2, 40)
    expected = beams(DynamicCache(config=model.config), prompts)
    ours = beams(WildCatCache(model.config, ratio=1.0), prompts)
    assert torch.equal(ours.sequences, expected.sequences)
    assert torch.equal(ours.sequences_scores, expected.sequences_scores)
    cache = WildCatCache(model.config, ratio=0.25)
    assert beams(cache, random_ids(1, 120)).sequences.shape == (1, 140)
    assert_kept(cache, 139)


@pytest.mark.parametrize("family", families(refused=True))
def test_what_cannot_be_compressed_is_refused_at_once(family):
    config = tiny_config(family)
    before = config._attn_implementation
    with pytest.raises(ValueError, match=REGISTRY[family].refusal) as raised:
        WildCatCache(config, ratio=0.25)
    assert REGISTRY[family].config in str(raised.value)
    assert config._attn_implementation == before


@pytest.mark.parametrize("family", ["phi3_longrope"])
def test_generate_drops_any_cache_where_the_rope_changes(family):
    """Past 64 tokens here. Keys rotated by the old frequencies are of no use; the model makes a cache of its own."""
    rope = {**REGISTRY[family].fields["rope_parameters"], "original_max_position_embeddings": 64}
    model = tiny_model(family, original_max_position_embeddings=64, rope_parameters=rope)
    options = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    for prompt, served in ((40, 64), (100, 0)):
        with pytest.warns(UserWarning, match="drops any cache where a text grows past 64 tokens"):
            cache = WildCatCache(model.config, ratio=0.25)
        out = model.generate(random_ids(1, prompt), **{CACHE: cache}, **options)
        assert out.sequences.shape == (1, prompt + 30)
        assert type(returned_cache(out)) is DynamicCache
        assert cache.get_seq_length() == served
    # What the warning advises: a context that is longer is read first, and then goes on being compressed.
    ids = random_ids(1, 100)
    cache = WildCatCache(model.config, ratio=0.25)
    model(ids[:, :90], **{CACHE: cache})
    out = model.generate(ids, **{CACHE: cache}, **options)
    assert returned_cache(out) is cache and cache.get_seq_length() == 129 and cache.stored_length() < 80
