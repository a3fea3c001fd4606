"""Models switched on and off: what `generate()` does then, and that nothing of it stays."""

import copy
import functools
import inspect
import io
import pickle
from types import MethodType

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.families import REGISTRY
from tests.tiny import FAMILIES, random_ids, tiny_config, tiny_model
from wildcat_kv import CompressedCache, WildCatCache, WildCatConfig, disable, enable, patch_config
from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.hook.keyword import CACHE, returned_cache
from wildcat_kv.hook.marks import fallback_of

SETTINGS = {"ratio": 0.25, "sink": 4, "window": 4, "bin_rank": 4}
GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
IDS = random_ids(1, 100)


@pytest.fixture
def llama():
    return tiny_model("llama")


def llava():
    """A language model and a vision tower under one config."""
    torch.manual_seed(1)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tf.CLIPVisionConfig(**small, image_size=28, patch_size=14)
    config = tf.LlavaConfig(text_config=tiny_config("llama"), vision_config=vision, image_token_index=119)
    return tf.LlavaForConditionalGeneration(config).eval()


def build(family):
    if family == "llava":
        return llava()
    if REGISTRY[family].missing:
        pytest.skip(f"no {family} in this version of Transformers")
    return tiny_model(family)


def explicit(model, ids=IDS, **options):
    """With a cache made by hand; on a copy, so that the model's own attention is not switched."""
    model = copy.deepcopy(model)
    return model.generate(ids, **{CACHE: WildCatCache(model.config, **SETTINGS)}, **{**GREEDY, **options})


def exact(model, ids=IDS, **options):
    return model.generate(ids, **{**GREEDY, **options})


def configs(config):
    """A config and all within it."""
    inner = [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    return [config, *(each for part in inner for each in configs(part))]


def everything(model):
    """What must be the same before and after."""
    attention = [config._attn_implementation for config in configs(model.config)]
    return {
        "attributes": {name: id(value) for name, value in vars(model).items()},
        "config": model.config.to_dict(),
        "config's attributes": sorted(vars(model.config)),
        "attention": [(type(name), name) for name in attention],
        "generation": model.generation_config.to_dict(),
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# Nothing stays.


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gpt_oss", "qwen3_next", "llava"])
def test_a_disabled_model_is_what_it_was(family):
    model = build(family)
    output, before, parameters = exact(model), everything(model), weights(model)
    handle = enable(model, **SETTINGS)
    compressed = returned_cache(exact(model, return_dict_in_generate=True))
    handle.disable()
    assert everything(model) == before
    assert same_weights(parameters, model.state_dict())
    assert torch.equal(exact(model), output)
    assert type(compressed) is CompressedCache and compressed.stored_length() < 60


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_its_attention_is_the_one_it_had(attention):
    model = tiny_model("llama", attention=attention)
    with enable(model, **SETTINGS):
        exact(model)
        assert fallback_of(model.config._attn_implementation) == attention
    assert model.config._attn_implementation == attention and type(model.config._attn_implementation) is str


def test_only_the_decoder_is_switched():
    model = llava()
    with enable(model, **SETTINGS):
        exact(model)
        config = model.config
        names = [part._attn_implementation for part in (config, config.text_config, config.vision_config)]
    assert names[1] == "wildcat+sdpa" and names[1] not in (names[0], names[2])


def test_an_attention_chosen_meanwhile_stays(llama):
    for read_between in (False, True):
        with enable(llama, **SETTINGS):
            exact(llama)
            llama.set_attn_implementation("eager")
            if read_between:
                exact(llama)
        assert llama.config._attn_implementation == "eager" and type(llama.config._attn_implementation) is str
        llama.set_attn_implementation("sdpa")


def test_a_switch_made_before_it_stays(llama):
    cache = WildCatCache(llama.config, **SETTINGS)
    with enable(llama, **SETTINGS):
        exact(llama)
    assert fallback_of(llama.config._attn_implementation) == "sdpa"
    llama(IDS, **{CACHE: cache})
    assert cache.get_seq_length() == 100


def test_an_error_in_the_block_passes_and_disables(llama):
    before = everything(llama)
    with pytest.raises(RuntimeError, match="of the caller"), enable(llama, **SETTINGS):
        exact(llama)
        raise RuntimeError("of the caller")
    assert everything(llama) == before


def test_a_generate_that_fails_leaves_it_enabled(llama):
    with enable(llama, **SETTINGS):
        with pytest.raises(ValueError, match="not_an_argument"):
            llama.generate(IDS, not_an_argument=1)
        assert torch.equal(exact(llama), explicit(llama))


def test_the_handle_tells_and_disables_once(llama):
    handle = enable(llama, compressor="snapkv", **SETTINGS)
    assert handle.model is llama and handle.recipe.settings == WildCatConfig(**SETTINGS)
    assert "enabled" in repr(handle) and "snapkv" in repr(handle) and "ratio=0.25" in repr(handle)
    handle.disable()
    handle.disable()
    assert "disabled" in repr(handle)
    again = enable(llama, ratio=0.5)
    handle.disable()  # of another time
    assert "enabled" in repr(again)
    again.disable()


def test_a_generate_of_its_own_is_used_and_given_back(llama):
    seen = []

    def own(model, *args, **kwargs):
        seen.append(kwargs.get(CACHE))
        return type(model).generate(model, *args, **kwargs)

    llama.generate = MethodType(own, llama)
    before = everything(llama)
    with enable(llama, **SETTINGS):
        assert torch.equal(exact(llama), explicit(llama))
    assert everything(llama) == before
    exact(llama)
    assert type(seen[0]) is CompressedCache and seen[-1] is None


def test_what_others_put_around_its_generate_stays(llama):
    output = exact(llama)
    handle = enable(llama, **SETTINGS)
    llama.generate = around = functools.partial(llama.generate, repetition_penalty=1.0)
    handle.disable()
    assert vars(llama)["generate"] is around
    assert torch.equal(exact(llama), output)


def test_the_signature_is_that_of_generate(llama):
    before = inspect.signature(llama.generate)
    with enable(llama, **SETTINGS):
        assert inspect.signature(llama.generate) == before


# What it does.


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "llava"])
def test_generate_is_as_with_a_cache_made_by_hand(family):
    model = build(family)
    expected = explicit(model)
    with enable(model, **SETTINGS):
        assert torch.equal(exact(model), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.5},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 4},
        {"assistant_early_exit": 1},
        {"prefill_chunk_size": 32},
        {"generation_config": tf.GenerationConfig(**GREEDY, num_beams=2)},
    ],
    ids=lambda options: "_".join(options),
)
def test_every_way_to_decode_is_as_with_a_cache_made_by_hand(llama, options):
    ids = IDS[:, :25].repeat(1, 4)
    options = options if "generation_config" in options else {**GREEDY, **options}
    torch.manual_seed(5)
    by_hand = copy.deepcopy(llama)
    expected = by_hand.generate(ids, **{CACHE: WildCatCache(by_hand.config, **SETTINGS)}, **options)
    with enable(llama, **SETTINGS):
        torch.manual_seed(5)
        assert torch.equal(llama.generate(ids, **options), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_a_padded_batch_is_as_with_a_cache_made_by_hand(llama, options):
    ids, mask = random_ids(3, 90), torch.ones(3, 90, dtype=torch.long)
    for row, padding in enumerate((0, 20, 50)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    expected = explicit(llama, ids, attention_mask=mask, **options)
    with enable(llama, **SETTINGS):
        assert torch.equal(exact(llama, ids, attention_mask=mask, **options), expected)


def test_every_call_has_a_cache_of_its_own_that_has_compressed(llama):
    with enable(llama, **SETTINGS):
        first, second = (exact(llama, return_dict_in_generate=True) for _ in range(2))
        longer = exact(llama, random_ids(2, 130, seed=1), return_dict_in_generate=True)
    assert torch.equal(first.sequences, second.sequences)
    assert returned_cache(first) is not returned_cache(second)
    for output, length in ((first, 109), (second, 109), (longer, 139)):
        cache = returned_cache(output)
        assert type(cache) is CompressedCache and cache.settings == WildCatConfig(**SETTINGS)
        assert cache.get_seq_length() == length and cache.stored_length() < 60


def test_inputs_may_be_given_by_any_name(llama):
    expected, embeds = explicit(llama), llama.get_input_embeddings()(IDS)
    config = tf.GenerationConfig(**GREEDY)
    with enable(llama, **SETTINGS):
        assert torch.equal(llama.generate(input_ids=IDS, **GREEDY), expected)
        assert torch.equal(llama.generate(inputs=IDS, **GREEDY), expected)
        assert torch.equal(llama.generate(IDS, config), expected)
        assert torch.equal(llama.generate(inputs_embeds=embeds, **GREEDY), expected[:, 100:])


def test_tokens_are_streamed(llama):
    class Streamer:
        def put(self, ids):
            seen.extend(ids.flatten().tolist())

        def end(self):
            pass

    seen, expected = [], explicit(llama)
    with enable(llama, **SETTINGS):
        llama.generate(IDS, streamer=Streamer(), **GREEDY)
    assert seen == expected[0].tolist()


@pytest.mark.parametrize("compressor", ["snapkv", "uniform"])
def test_another_method_is_used(llama, compressor):
    with enable(llama, compressor=compressor, **SETTINGS):
        output = exact(llama, return_dict_in_generate=True)
    by_hand = CompressedCache(llama.config, compressor=compressor, **SETTINGS)
    assert type(returned_cache(output).compressor) is type(by_hand.compressor)
    assert torch.equal(llama.generate(IDS, **{CACHE: by_hand}, **GREEDY), output.sequences)


def test_settings_may_be_an_object(llama):
    expected = explicit(llama)
    with enable(llama, WildCatConfig(**SETTINGS)):
        assert torch.equal(exact(llama), expected)


def test_without_settings_those_of_the_default_preset_are_used(llama):
    with enable(llama) as handle:
        cache = returned_cache(exact(llama, random_ids(1, 400), return_dict_in_generate=True))
    assert handle.recipe.settings == cache.settings == WildCatConfig(ratio=0.5, bits=4, sink=4, window=32)
    assert stored_tokens(cache) < 260


def test_fields_are_laid_over_what_the_config_says(llama):
    patch_config(llama.config, compressor="uniform", sink=5, ratio=0.5)
    assert enable(llama, max_tokens=100).recipe.settings == WildCatConfig(max_tokens=100, sink=5)
    disable(llama)
    with enable(llama, preset="published") as handle:
        assert (handle.recipe.compressor, handle.recipe.settings.sink) == ("wildcat", 32)


# What the caller says wins.


def test_a_cache_of_the_callers_wins(llama):
    output = exact(llama)
    with enable(llama, **SETTINGS):
        mine = tf.DynamicCache(config=llama.config)
        assert torch.equal(exact(llama, **{CACHE: mine}), output)
        assert mine.get_seq_length() == 109 and mine.layers[0].keys.shape[-2] == 109
        half = WildCatCache(llama.config, ratio=0.5)
        exact(llama, **{CACHE: half})
        assert half.get_seq_length() == 109


@pytest.mark.parametrize("name", ["dynamic", "static"])
@pytest.mark.parametrize("within", [False, True])
def test_a_cache_implementation_of_the_callers_wins(llama, name, within):
    output, choice = exact(llama), {"cache_implementation": name, "return_dict_in_generate": True}
    options = {"generation_config": tf.GenerationConfig(**GREEDY, **choice)} if within else {**GREEDY, **choice}
    with enable(llama, **SETTINGS):
        found = llama.generate(IDS, **options)
    assert not isinstance(returned_cache(found), CompressedCache) and torch.equal(found.sequences, output)


@pytest.mark.parametrize("where", ["argument", "generation_config", "model.generation_config"])
def test_a_caller_may_want_no_cache(llama, where):
    output, options = exact(llama), dict(GREEDY)
    if where == "argument":
        options["use_cache"] = False
    elif where == "generation_config":
        options = {"generation_config": tf.GenerationConfig(**GREEDY, use_cache=False)}
    with enable(llama, **SETTINGS):
        if where == "model.generation_config":
            llama.generation_config.use_cache = False
        compressing = explicit(llama, use_cache=True)
        assert torch.equal(llama.generate(IDS, **options), output)
        assert not torch.equal(compressing, output)


@pytest.mark.parametrize("no_opinion", [{"use_cache": True}, {CACHE: None}, {"custom_generate": None}])
def test_a_caller_without_a_choice_gets_a_compressed_cache(llama, no_opinion):
    expected = explicit(llama)
    with enable(llama, **SETTINGS):
        assert torch.equal(exact(llama, **no_opinion), expected)


def test_custom_generate_of_the_callers_wins(llama):
    def recipe(model, input_ids, **options):
        return type(options[CACHE])

    with enable(llama, **SETTINGS):
        assert llama.generate(IDS, custom_generate=recipe, **GREEDY) is tf.DynamicCache


def test_an_enabled_assistant_guesses_with_an_exact_cache(llama):
    assistant = tiny_model("llama", num_hidden_layers=2)
    output = exact(llama)
    with enable(assistant, **SETTINGS):
        assert torch.equal(exact(llama, assistant_model=assistant), output)
        with enable(llama, **SETTINGS):
            assert exact(llama, assistant_model=assistant).shape == output.shape


# Wrappers.


def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(120)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")


def test_pipelines_compress(llama):
    prompts = [" ".join(f"w{token}" for token in random_ids(1, length, seed=length)[0]) for length in (90, 60)]
    pipe = tf.pipeline("text-generation", model=llama, tokenizer=tokenizer(), device="cpu")
    options = {"return_tensors": True, "batch_size": 2, **GREEDY}
    plain = [texts[0]["generated_token_ids"] for texts in pipe(prompts, **options)]
    inputs = tokenizer()(prompts, padding=True, return_tensors="pt")
    expected = explicit(llama, inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with enable(llama, **SETTINGS):
        found = [texts[0]["generated_token_ids"] for texts in pipe(prompts, **options)]
    again = [texts[0]["generated_token_ids"] for texts in pipe(prompts, **options)]
    assert [list(row)[-10:] for row in found] == expected[:, -10:].tolist()
    assert [list(row) for row in plain] == [list(row) for row in again]
    assert [list(row) for row in plain] != [list(row) for row in found]


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


@pytest.mark.parametrize("order", ["adapter first", "adapter after", "through the wrapper"])
def test_adapters_go_with_it(order):
    model, plain = tiny_model("llama"), tiny_model("llama")
    expected, without = explicit(lora(plain).eval()), explicit(tiny_model("llama"))
    assert not torch.equal(expected, without)
    if order == "adapter first":
        adapted = lora(model).eval()
        enable(model, **SETTINGS)
    elif order == "adapter after":
        enable(model, **SETTINGS)
        adapted = lora(model).eval()
    else:
        adapted = lora(model).eval()
        assert enable(adapted, **SETTINGS).model is model
    assert torch.equal(adapted.generate(input_ids=IDS, **GREEDY), expected)
    assert torch.equal(adapted.generate(IDS, **GREEDY), expected)
    with adapted.disable_adapter():
        assert torch.equal(adapted.generate(IDS, **GREEDY), without)
    disable(adapted)
    assert "generate" not in vars(model) and type(model.config._attn_implementation) is str


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_learned_prompts_are_refused(kind):
    peft = pytest.importorskip("peft")
    prompt = getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = tiny_model("llama")
    enable(model, **SETTINGS)
    after = peft.get_peft_model(model, prompt)
    with pytest.raises(ValueError, match=r"prompt learning of PEFT.*LoRA"):
        after.generate(input_ids=IDS, **GREEDY)
    disable(after)
    assert after.generate(input_ids=IDS, **GREEDY).shape == (1, 110)
    with pytest.raises(ValueError, match="model=PeftModelForCausalLM: prompt learning of PEFT"):
        enable(after, **SETTINGS)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("first", [False, True])
def test_models_dispatched_by_accelerate_compress(llama, first):
    accelerate = pytest.importorskip("accelerate")
    expected = explicit(llama)
    if first:
        enable(llama, **SETTINGS)
    dispatched = accelerate.dispatch_model(llama, device_map={"": "cpu"}, force_hooks=True)
    if not first:
        enable(dispatched, **SETTINGS)
    assert hasattr(llama, "_hf_hook")
    assert torch.equal(exact(dispatched), expected)
    disable(dispatched)
    assert not torch.equal(exact(dispatched), expected)


def test_models_offloaded_by_accelerate_compress(llama):
    accelerate = pytest.importorskip("accelerate")
    expected = explicit(llama)
    offloaded = accelerate.cpu_offload(llama, execution_device=torch.device("cpu"))
    with enable(offloaded, **SETTINGS):
        assert torch.equal(exact(offloaded), expected)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), torch.nn.DataParallel])
def test_the_model_within_a_wrapper_is_enabled(llama, wrap):
    wrapped = wrap(llama)
    expected = explicit(llama)
    assert enable(wrapped, **SETTINGS).model is llama
    assert torch.equal(exact(llama), expected)
    if hasattr(wrapped, "generate"):
        assert torch.equal(exact(wrapped), expected)
    disable(wrapped)
    assert "generate" not in vars(llama)


def compile_itself(model):
    model.compile(backend="eager")


def compile_a_part_in_place(model):
    model.model.layers[1].compile(backend="eager")


def compile_a_part(model):
    model.model = torch.compile(model.model, backend="eager")


def compile_its_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


COMPILED = [compile_itself, compile_a_part_in_place, compile_a_part, compile_its_forward]


@pytest.mark.parametrize("compiled", COMPILED)
def test_compiled_models_are_refused(llama, compiled):
    compiled(llama)
    before = everything(llama)
    with pytest.raises(ValueError, match=r"model=LlamaForCausalLM is compiled.*static=True") as error:
        enable(llama, **SETTINGS)
    assert "\n" not in str(error.value) and everything(llama) == before


@pytest.mark.parametrize("compiled", COMPILED)
def test_models_compiled_later_are_refused_at_the_call(llama, compiled):
    enable(llama, **SETTINGS)
    compiled(llama)
    with pytest.raises(ValueError, match="model=LlamaForCausalLM is compiled"):
        exact(llama)
    assert llama.config._attn_implementation == "sdpa"


def test_copies_are_enabled_by_themselves(llama):
    expected, output = explicit(llama), exact(llama)
    handle = enable(llama, **SETTINGS)
    exact(llama)
    twin = copy.deepcopy(llama)
    twin.model.embed_tokens.weight.mul_(-1)  # it must not call the other's generate
    assert not torch.equal(exact(twin), expected)
    twin.model.embed_tokens.weight.mul_(-1)
    handle.disable()
    assert torch.equal(exact(twin), expected) and torch.equal(exact(llama), output)
    disable(twin)
    assert torch.equal(exact(twin), output) and type(twin.config._attn_implementation) is str


def test_pickled_models_are_enabled_by_themselves(llama):
    expected, output = explicit(llama), exact(llama)
    enable(llama, **SETTINGS)
    exact(llama)
    file = io.BytesIO()
    torch.save(llama, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for twin in (saved, pickle.loads(pickle.dumps(llama))):
        assert torch.equal(exact(twin), expected)
        disable(twin)
        assert torch.equal(exact(twin), output) and type(twin.config._attn_implementation) is str
    assert torch.equal(exact(llama), expected)


def test_what_is_saved_of_an_enabled_model_is_plain(llama, tmp_path):
    output = exact(llama)
    with enable(llama, **SETTINGS):
        exact(llama)
        llama.save_pretrained(tmp_path)
    assert "wildcat" not in (tmp_path / "config.json").read_text()
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(exact(again), output)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 2.0}, r"ratio=2.0: .*in \(0, 1\]"),
        ({"rato": 0.5}, "rato=0.5: no such setting; did you mean 'ratio'"),
        ({"ratio": 0.5, "max_tokens": 100}, "both of them given"),
        ({"ratio": 0.5, "exact_layers": [7]}, r"exact_layers=\[7\]: layer 7 is none of"),
        ({"preset": "publishd"}, "preset='publishd': no such preset; did you mean 'published'"),
        ({"preset": "nothing.yaml"}, "preset='nothing.yaml' is no readable YAML file"),
        ({"compressor": "wildct"}, "wildct.*did you mean 'wildcat'"),
        ({"compressor": 3}, "3"),
        ({"settings": {"ratio": 0.5}}, r"settings=\{'ratio': 0.5\} is no WildCatConfig"),
        ({"settings": WildCatConfig(ratio=0.5), "sink": 3}, "sink given beside settings"),
        ({"settings": WildCatConfig(ratio=0.5), "preset": "published"}, "preset given beside settings"),
        ({"compressor": "kvzip", "max_tokens": 100}, "compressor='kvzip' reads the context a second time"),
    ],
    ids=str,
)
def test_wrong_settings_are_named_in_one_line_and_change_nothing(llama, arguments, message):
    before = everything(llama)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        enable(llama, **arguments)
    assert "\n" not in str(error.value) and everything(llama) == before


def test_enabling_twice_is_refused(llama):
    enable(llama, **SETTINGS)
    before = everything(llama)
    with pytest.raises(ValueError, match=r"enabled already, with 'auto' and .*ratio=0.25.*disable\(model\)") as error:
        enable(llama, ratio=0.5)
    assert "\n" not in str(error.value) and everything(llama) == before


class Other(torch.nn.Module):
    def generate(self, ids):
        return ids


@pytest.mark.parametrize(
    "nothing",
    [None, "gpt2", 3, torch.nn.Linear(2, 2), Other(), tf.LlamaConfig(), tf.LlamaModel],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_model_is_refused(nothing):
    message = rf"model={type(nothing).__name__} is no Transformers model with generate\(\)"
    with pytest.raises(TypeError, match=message) as error:
        enable(nothing, ratio=0.5)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"model={type(nothing).__name__} is not enabled"):
        disable(nothing)


def test_disabling_what_is_not_enabled_is_refused(llama):
    before = everything(llama)
    with pytest.raises(ValueError, match="model=LlamaForCausalLM is not enabled") as error:
        disable(llama)
    assert "\n" not in str(error.value) and everything(llama) == before


def unsupported(kind):
    torch.manual_seed(1)
    if kind == "t5":
        config = tf.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
        return tf.T5ForConditionalGeneration(config)
    if kind == "mamba":
        return tf.MambaForCausalLM(tf.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=30))
    return tiny_model("mistral", sliding_window=24)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("t5", "encoder-decoder"), ("mamba", "config=MambaConfig"), ("mistral", "no full-attention layer")],
)
def test_models_without_a_cache_to_compress_are_refused(kind, message):
    model = unsupported(kind).eval()
    before = everything(model)
    with pytest.raises(ValueError, match=message) as error:
        enable(model, **SETTINGS)
    assert "\n" not in str(error.value) and everything(model) == before


def test_a_model_that_asks_for_another_cache_is_refused(llama):
    llama.generation_config.cache_implementation = "static"
    before = everything(llama)
    with pytest.raises(ValueError, match=r"generation_config\.cache_implementation='static'.*set it to None"):
        enable(llama, **SETTINGS)
    assert everything(llama) == before


def test_a_section_that_does_not_fit_is_refused(llama):
    llama.config.wildcat_kv = {"version": 1, "settings": {"rato": 0.5}}
    before = everything(llama)
    with pytest.raises(ValueError, match=r"config\.wildcat_kv\.settings\.rato=0.5"):
        enable(llama)
    assert everything(llama) == before
