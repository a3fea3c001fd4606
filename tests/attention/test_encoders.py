"""Encoders of every family attend by a method, and decoders do not."""

import pytest
import torch
import transformers

from tests.attention.encoders import FAMILIES, IMAGE, SIZES, Family, text
from wildcat_kv import WildCatCache
from wildcat_kv.attention import Exact, Uniform, use
from wildcat_kv.hook.keyword import CACHE

IMPLEMENTATIONS = ["sdpa", "eager"]


def outputs(model, inputs):
    """All states that a model gives, in one list of tensors."""
    found = model(**inputs)
    return [value for value in found.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_attention_changes_nothing(name, implementation):
    family = FAMILIES[name]
    model = family.build(implementation)
    for padded in (False, True) if family.masks else (False,):
        inputs = family.inputs(padded)
        before = outputs(model, inputs)
        real = inputs["attention_mask"].bool() if family.masks else ...
        with use(model, Exact()) as layers:
            inside = outputs(model, inputs)
        assert len(layers) == family.layers and not any("decoder" in layer for layer in layers)
        assert before
        for one, other in zip(before, inside, strict=True):
            if other.shape[:2] != (2, 30):
                real = ...
            torch.testing.assert_close(other[real], one[real], rtol=5e-4, atol=5e-4)
        for one, other in zip(before, outputs(model, inputs), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_method_is_used(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.inputs(False)
    before = outputs(model, inputs)[0]
    with use(model, Uniform(rank=3)):
        inside = outputs(model, inputs)[0]
    assert not torch.allclose(before, inside, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.masks])
def test_a_padded_row_is_what_it_is_alone(name, implementation):
    family = FAMILIES[name]
    model, inputs = family.build(implementation), family.inputs(True)
    short = {key: value[1:, :18] for key, value in inputs.items()}
    if family.model == "BartModel":
        model = model.encoder
    with use(model, Uniform(rank=6)):
        together, alone = outputs(model, inputs)[0][1:, :18], outputs(model, short)[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_decoder_writes_the_same_and_keeps_its_cache():
    """Whisper's encoder and decoder share one config."""
    family = FAMILIES["whisper"]
    speech = Family("WhisperForConditionalGeneration", family.config, family.fields, family.inputs).build()
    features = family.inputs(False)["input_features"]
    options = {"max_new_tokens": 8, "do_sample": False}
    before = speech.generate(features, **options)
    with use(speech, Exact()):
        assert torch.equal(speech.generate(features, **options), before)
    states = speech.model.encoder(features)
    with use(speech, Uniform(rank=2)):
        inside = speech.model.encoder(features)
        assert not torch.allclose(inside.last_hidden_state, states.last_hidden_state)
        given = {"encoder_outputs": states, "decoder_input_ids": torch.tensor([[1, 5], [1, 9]])}
        logits = speech(**given).logits
    assert torch.equal(logits, speech(**given).logits)  # the decoder is exact


def test_a_window_stays_exact_and_is_refused_by_name():
    model = FAMILIES["modernbert"].build()
    with use(model, Exact()) as layers:
        assert layers == ("layers.0.attn", "layers.3.attn")
    with (
        pytest.raises(ValueError, match=r"'layers.1.attn' attends within a window of 5, which no method"),
        use(model, Exact(), layers=["layers.1.attn"]),
    ):
        pass


def tiny(model, config, **fields):
    return Family(model, config, {**SIZES, "vocab_size": 60, **fields}, text).build("eager")


def test_a_layer_that_does_not_say_whether_it_is_causal_is_taken_for_causal():
    """Transformers' own attention functions do the same where no mask is given."""
    model = FAMILIES["vit"].build()
    del model.layers[0].attention.is_causal
    with use(model, Exact()) as layers:
        assert layers == ("layers.1.attention",)


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize(
    ("model", "config", "fields", "message"),
    [
        ("T5EncoderModel", "T5Config", T5, "'encoder.block.0.layer.0.SelfAttention' adds a position bias"),
        ("LlamaModel", "LlamaConfig", {}, "'layers.0.self_attn' is causal: compress its cache instead"),
        ("MPNetModel", "MPNetConfig", {}, "none dispatches through Transformers' AttentionInterface"),
    ],
)
def test_a_model_that_cannot_be_followed_is_refused(model, config, fields, message):
    made = tiny(model, config, **fields)
    with (
        pytest.raises(ValueError, match=f"model={model} has no attention layer to replace: {message}"),
        use(made, Exact()),
    ):
        pass


def test_a_causal_text_tower_is_refused_in_the_call_and_its_vision_tower_works():
    towers = {name: {**SIZES, "vocab_size": 60} for name in ("text_config", "vision_config")}
    towers["vision_config"] |= {"image_size": 32, "patch_size": 4}
    config = transformers.CLIPConfig(projection_dim=16, **towers)
    model = transformers.CLIPModel(config).eval()
    inputs = {**text(False), **FAMILIES["clip_vision"].inputs(False)}
    before = model(**inputs).logits_per_image
    with (
        pytest.raises(ValueError, match=r"'text_model\S+' is causal in this call, which Exact cannot"),
        use(model, Exact()),
    ):
        model(**inputs)
    assert torch.equal(model(**inputs).logits_per_image, before)
    with use(model.vision_model, Exact()):
        torch.testing.assert_close(model(**inputs).logits_per_image, before, rtol=1e-4, atol=1e-4)


def test_a_vision_tower_attends_by_a_method_while_the_decoder_has_its_own_cache():
    text_config = {**SIZES, "model_type": "llama", "vocab_size": 100, "pad_token_id": 0}
    vision_config = {**IMAGE, "model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_id=99)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.cat((torch.full((1, 64), 99), torch.arange(3, 23).unsqueeze(0)), dim=1)
    inputs = {"input_ids": ids, **{name: pixels[:1] for name, pixels in FAMILIES["clip_vision"].inputs(False).items()}}

    def written():
        cache = WildCatCache(model.config, max_tokens=32, bin_rank=4, sink=2, window=8)
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return torch.stack(model.generate(**inputs, **options, **{CACHE: cache}).logits)

    before = written()
    with use(model, Exact()) as layers:
        assert len(layers) == 2 and all("vision_tower" in layer for layer in layers)
        torch.testing.assert_close(written(), before, rtol=1e-3, atol=1e-3)
    with use(model, Uniform(rank=2)):
        assert not torch.equal(written(), before)
    assert torch.equal(written(), before)
