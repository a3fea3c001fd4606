"""Masks of models that also take images: text is causal whatever its token types, and an image is read in one pass."""

import pytest
import torch
import transformers as tf
from transformers import DynamicCache
from transformers.masking_utils import and_masks, blockwise_overlay, causal_mask_function, create_causal_mask, or_masks

from tests.driver import METHODS, assert_same, state
from tests.tiny import SMALL, random_ids, tiny_model
from wildcat_kv import CompressedCache, WildCatCache, enable
from wildcat_kv.hook import pattern as patterns
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.hook.pattern import Pattern, pattern_of

IMAGE = 150
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {**SMALL, "vocab_size": 160}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
BUDGET = {"ratio": 0.25, "sink": 2, "window": 8, "bin_rank": 4}


def gemma3():
    config = tf.Gemma3Config(
        text_config={**TEXT, **SLIDING, "query_pre_attn_scalar": 30},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_index=152,
        eoi_token_index=153,
    )
    return tf.Gemma3ForConditionalGeneration(config)


def gemma4():
    text = {
        **TEXT,
        **SLIDING,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 160,
        "use_bidirectional_attention": "vision",
    }
    vision = {**VISION, "head_dim": 16, "num_key_value_heads": 2, "pooling_kernel_size": 2}
    config = tf.Gemma4Config(
        text_config=text,
        vision_config={**vision, "default_output_length": 4, "position_embedding_size": 16},
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=155,
        boi_token_id=152,
        eoi_token_id=153,
    )
    return tf.Gemma4ForConditionalGeneration(config)


def paligemma():
    config = tf.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"},
        vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 64},
        image_token_id=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


# How to build a model, the name of its token types, and the tokens of the image.
MODELS = {
    "gemma3": (gemma3, "token_type_ids", 4),
    "gemma4": (gemma4, "mm_token_type_ids", 4),
    "paligemma": (paligemma, "token_type_ids", 16),
}


def build(name):
    torch.manual_seed(1)
    return MODELS[name][0]().eval()


def pixels(name):
    generator = torch.Generator().manual_seed(5)
    if name == "gemma4":
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1).view(1, 16, 2)
        return {"pixel_values": torch.rand(1, 16, 588, generator=generator), "image_position_ids": places}
    return {"pixel_values": torch.randn(1, 3, 56, 56, generator=generator)}


def text_inputs(name, length=100):
    ids = random_ids(1, length)
    return {"input_ids": ids, MODELS[name][1]: torch.zeros_like(ids)}


def image_inputs(name):
    """An image after some text; first of all for PaliGemma, where nothing comes before it."""
    ids = torch.cat((random_ids(1, 40, 1), torch.full((1, MODELS[name][2]), IMAGE), random_ids(1, 60, 2)), dim=1)
    types = (ids == IMAGE).long()
    if name == "paligemma":
        ids = ids.roll(-40, dims=1)
        types = torch.zeros_like(ids)
    return {"input_ids": ids, MODELS[name][1]: types, **pixels(name)}


def generate(model, inputs, cache=None, steps=12):
    given = {} if cache is None else {CACHE: cache}
    out = model.generate(
        **inputs, **given, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return torch.stack(out.logits, dim=1)


# Text


@pytest.mark.parametrize("name", MODELS)
def test_text_with_token_types_is_read_exactly_at_ratio_1(name):
    model, inputs = build(name), text_inputs(name)
    wanted = generate(model, inputs, DynamicCache(config=model.config.get_text_config()))
    assert torch.equal(generate(model, inputs, WildCatCache(model.config, ratio=1.0)), wanted)


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])  # token types of 0 are no causal text for PaliGemma
@pytest.mark.parametrize("method", ["wildcat", "query_wildcat"])
def test_text_with_token_types_is_compressed_as_without(name, method):
    model, inputs = build(name), text_inputs(name)
    wanted, found = (
        generate(model, given, CompressedCache(model.config, compressor=METHODS[method], **BUDGET))
        for given in ({"input_ids": inputs["input_ids"]}, inputs)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, generate(model, inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_text_with_token_types_goes_on_over_a_compressed_cache(name):
    model, (_, types, _) = build(name), MODELS[name]
    ids, found = random_ids(1, 120), []
    for given in ({}, {types: torch.zeros_like(ids)}):
        cache = WildCatCache(model.config, **BUDGET)
        model(ids[:, :100], **{CACHE: cache}, **{key: value[:, :100] for key, value in given.items()})
        assert cache.stored_length() < 100
        found.append(model(ids[:, 100:], **{CACHE: cache}, **given).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


# Images


@pytest.mark.parametrize("name", MODELS)
def test_an_image_in_one_pass_is_read_exactly_at_ratio_1(name):
    model, inputs = build(name), image_inputs(name)
    wanted = generate(model, inputs, DynamicCache(config=model.config.get_text_config()))
    assert torch.equal(generate(model, inputs, WildCatCache(model.config, ratio=1.0)), wanted)
    if name != "gemma4":  # whose full-attention layers are causal
        causal = {**inputs, MODELS[name][1]: torch.full_like(inputs["input_ids"], int(name == "paligemma"))}
        assert not torch.allclose(wanted[:, 0], generate(model, causal, steps=1)[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["wildcat", "h2o"])
def test_an_image_in_one_pass_is_compressed_after_it(name, method):
    model, inputs = build(name), image_inputs(name)
    wanted = generate(model, inputs, DynamicCache(config=model.config.get_text_config()), steps=1)
    cache = CompressedCache(model.config, compressor=METHODS[method], **BUDGET)
    found = generate(model, inputs, cache)
    assert torch.equal(found[:, 0], wanted[:, 0]) and found.isfinite().all()
    length = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == length + 11
    assert cache.stored_length() < length / 2


@pytest.mark.parametrize("name", MODELS)
def test_an_enabled_model_takes_text_and_images(name):
    model = build(name)
    wanted = [generate(model, inputs(name), steps=1) for inputs in (text_inputs, image_inputs)]
    with enable(model, **BUDGET):
        found = [generate(model, inputs(name)) for inputs in (text_inputs, image_inputs)]
    for ours, exact in zip(found, wanted, strict=True):
        assert torch.equal(ours[:, 0], exact[:, 0])
        assert ours.shape[1] == 12


def test_padding_beside_an_image_changes_nothing():
    model = build("gemma3")
    ids, types = torch.zeros(2, 104, dtype=torch.int64), torch.zeros(2, 104, dtype=torch.int64)
    full, short = image_inputs("gemma3"), random_ids(1, 70, 7)
    ids[0], ids[1, 34:] = full["input_ids"][0], short[0]
    types[0] = full["token_type_ids"][0]
    both = {**full, "input_ids": ids, "token_type_ids": types, "attention_mask": (ids != 0).long()}
    wanted = generate(model, both, DynamicCache(config=model.config.text_config))
    assert torch.equal(generate(model, both, WildCatCache(model.config, ratio=1.0)), wanted)
    found = generate(model, both, WildCatCache(model.config, **BUDGET))
    for row, alone in enumerate((full, {"input_ids": short})):
        single = generate(model, alone, WildCatCache(model.config, **BUDGET))
        torch.testing.assert_close(found[row : row + 1], single, rtol=1e-3, atol=1e-3)


def test_an_image_may_come_in_a_later_pass_while_nothing_is_compressed():
    model, inputs = build("gemma3"), image_inputs("gemma3")
    ids, types = inputs["input_ids"], inputs["token_type_ids"]
    found = []
    for cache in (DynamicCache(config=model.config.text_config), WildCatCache(model.config, ratio=1.0)):
        model(ids[:, :30], **{CACHE: cache})
        found.append(
            model(ids[:, 30:], token_type_ids=types, pixel_values=inputs["pixel_values"], **{CACHE: cache}).logits
        )
    assert torch.equal(*found)


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_an_image_between_two_passes_is_refused_and_nothing_is_changed(ratio):
    model, inputs = build("gemma3"), image_inputs("gemma3")
    ids, types = inputs["input_ids"], inputs["token_type_ids"]
    cache = WildCatCache(model.config, **{**BUDGET, "ratio": ratio})
    model(ids[:, :42].clamp_max(119), **{CACHE: cache}, token_type_ids=types[:, :42])
    before, twin = state(cache), cache.clone()
    with pytest.raises(ValueError, match="an image split between two forward passes"):
        model(ids[:, 42:].clamp_max(119), **{CACHE: cache}, token_type_ids=types)
    assert_same(state(cache), before, ignore=())
    found = [model(random_ids(1, 9, 3), **{CACHE: each}).logits for each in (cache, twin)]
    assert torch.equal(*found)


def test_an_image_after_something_was_compressed_is_refused_and_nothing_is_changed():
    model, inputs = build("gemma3"), image_inputs("gemma3")
    ids, types = inputs["input_ids"].clamp_max(119), inputs["token_type_ids"]
    cache = WildCatCache(model.config, **BUDGET)
    model(ids[:, :38], **{CACHE: cache})
    before, twin = state(cache), cache.clone()
    with pytest.raises(ValueError, match="the cache is compressed already"):
        model(ids[:, 38:], **{CACHE: cache}, token_type_ids=types)
    assert_same(state(cache), before, ignore=())
    found = [model(ids[:, 38:], **{CACHE: each}).logits for each in (cache, twin)]
    assert torch.equal(*found)


# Any mask


def test_packed_texts_are_refused():
    model = tiny_model("llama")
    texts = torch.tensor([[0, 0, 0, 1, 1]])
    for count in (5, 1):  # a single token, too, may be kept from what comes before it
        cache = WildCatCache(model.config, ratio=0.5)
        if count == 1:
            model(random_ids(1, 4), **{CACHE: cache})
        with pytest.raises(ValueError, match="mask_function hides earlier tokens"):
            create_causal_mask(
                model.config,
                torch.zeros(1, count, 64),
                None,
                cache,
                and_mask_function=lambda row, head, query, key: texts[row, query] == texts[row, key],
            )


def visible(total, *spans, window=None):
    """A mask function: causal, but for spans [start, stop) that see all of themselves."""
    blocks = torch.full((2, total), -1)
    for number, (start, stop) in enumerate(spans):
        blocks[1, start:stop] = number
    function = or_masks(causal_mask_function, blockwise_overlay(blocks))
    return function if window is None else and_masks(function, lambda row, head, query, key: key > query - window)


CASES = [
    (0, [], None, Pattern.CAUSAL),
    (30, [], None, Pattern.CAUSAL),
    (30, [], 50, Pattern.CAUSAL),
    (49, [], None, Pattern.CAUSAL),
    (0, [(5, 9)], None, Pattern.WIDER),
    (30, [(31, 33)], None, Pattern.WIDER),
    (30, [(5, 30)], None, Pattern.CAUSAL),  # of an earlier pass
    (30, [(28, 31)], None, Pattern.SPLIT),
    (30, [(28, 31), (40, 44)], None, Pattern.SPLIT),
    (49, [(48, 50)], None, Pattern.SPLIT),
    (0, [], 49, Pattern.NARROWER),
    (49, [], 49, Pattern.NARROWER),
    (30, [(28, 31)], 20, Pattern.NARROWER),
]


@pytest.mark.parametrize("pairs", [2**22, 300])
@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("seen, spans, window, wanted", CASES)
def test_a_mask_is_told_by_what_it_shows(seen, spans, window, wanted, use_vmap, pairs, monkeypatch):
    monkeypatch.setattr(patterns, "_PAIRS_AT_ONCE", pairs)
    function = visible(50, *spans, window=window)
    assert pattern_of(function, 2, seen, 50 - seen, None, use_vmap=use_vmap, device="cpu") is wanted


@pytest.mark.parametrize(
    "seen, spans, window, wanted", [(0, [(5, 9)], None, Pattern.WIDER), (0, [], 49, Pattern.NARROWER)]
)
def test_what_a_mask_says_of_padding_does_not_count(seen, spans, window, wanted):
    valid = torch.ones(2, 50, dtype=torch.bool)
    function = visible(50, *spans, window=window)
    assert pattern_of(function, 2, seen, 50, valid, use_vmap=False, device="cpu") is wanted
    valid[:, :9] = False
    assert pattern_of(function, 2, seen, 50, valid, use_vmap=False, device="cpu") is Pattern.CAUSAL
