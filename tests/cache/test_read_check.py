"""A way in whose cache is not read raises, whatever the reason: broken here on purpose, one way after the other."""

import threading

import pytest
import torch
import transformers as tf

from tests.tiny import random_ids, tiny_config, tiny_model
from tests.words import tokenizer, words
from wildcat_kv import Context, WildCatCache, compress_context, enable, patch_config, wildcat_generate
from wildcat_kv.cli.generate import decode
from wildcat_kv.contexts.prompts import encode_context, encode_follow_up
from wildcat_kv.contexts.reading import generate, loglikelihood, token_losses
from wildcat_kv.hook.keyword import CACHE, OLD, given_cache, returned_cache
from wildcat_kv.integrations.hub_folder import write_folder

SETTINGS = {"ratio": 0.25, "sink": 4, "window": 4, "bin_rank": 4}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
IDS = random_ids(1, 100)
NOT_READ = "its cache should have seen .* tokens and has seen 0"


class Dropping(tf.LlamaForCausalLM):
    """Takes a cache and does without it."""

    def forward(self, input_ids=None, **options):
        options.pop(CACHE, None)
        return super().forward(input_ids, **{**options, "use_cache": False})


class Renamed(tf.LlamaForCausalLM):
    """Calls its cache by a name of a version to come, and takes any other name for something else."""

    def forward(self, input_ids=None, memory=None, **options):
        options.pop(CACHE, None)
        return super().forward(input_ids, **{CACHE: memory}, **{**options, "use_cache": memory is not None})


def by_enable(model, folder):
    with enable(model, **SETTINGS):
        return model.generate(IDS, **GREEDY)


def by_enable_with_positional_arguments(model, folder):
    with enable(model, **SETTINGS):
        return model.generate(IDS, tf.GenerationConfig(**GREEDY), None, None)


def by_function(model, folder):
    return model.generate(IDS, custom_generate=wildcat_generate, **SETTINGS, **GREEDY)


def by_folder(model, folder):
    write_folder(folder / "recipe")
    return model.generate(IDS, custom_generate=str(folder / "recipe"), trust_remote_code=True, **SETTINGS, **GREEDY)


def by_context(model, folder):
    return compress_context(model, tokenizer(), words(90), **SETTINGS).ask("w5 w6", max_new_tokens=4)


def by_reading_once(model, folder):
    return Context(model, IDS).compress(**SETTINGS)


def by_command(model, folder):
    cache = WildCatCache(model.config, **SETTINGS)
    return decode(model, tokenizer(), cache, IDS, 4, lambda token: None)


def by_harness(model, folder):
    return generate(model, tokenizer(), WildCatCache(model.config, **SETTINGS), IDS, max_new_tokens=4)


def by_likelihood(model, folder):
    return loglikelihood(model, WildCatCache(model.config, **SETTINGS), IDS, None, [torch.tensor([5, 6])])


def by_rolling_likelihood(model, folder):
    return token_losses(model, WildCatCache(model.config, **SETTINGS), IDS, chunk=20)


WAYS = [way for name, way in list(globals().items()) if name.startswith("by_")]


@pytest.fixture(autouse=True)
def _modules(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.setattr("sys.path", [*__import__("sys").path])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("model", [Dropping, Renamed])
def test_a_cache_that_is_not_read_is_an_error(way, model, tmp_path):
    broken = model(tiny_config("llama")).eval()
    with pytest.raises(RuntimeError, match=NOT_READ) as error:
        way(broken, tmp_path)
    assert model.__name__ in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_sound_model_is_read_without_a_warning(way, tmp_path):
    assert way(tiny_model("llama"), tmp_path) is not None


def by_section(model, folder):
    patch_config(model.config, **SETTINGS)
    with enable(model):
        return model.generate(IDS, **GREEDY)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(
    "way",
    [by_enable, by_enable_with_positional_arguments, by_section, by_function, by_folder],
    ids=lambda way: way.__name__,
)
def test_every_way_writes_what_the_explicit_cache_writes(way, tmp_path):
    model = tiny_model("llama")
    expected = model.generate(IDS, **{CACHE: WildCatCache(model.config, **SETTINGS)}, **GREEDY)
    assert torch.equal(way(tiny_model("llama"), tmp_path), expected)
    assert not torch.equal(tiny_model("llama").generate(IDS, **GREEDY), expected), "compressed, or this tells nothing"


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_context_answers_what_the_explicit_cache_writes():
    model, words_only = tiny_model("llama"), tokenizer()
    context = compress_context(model, words_only, words(90), **SETTINGS)
    head, body = encode_context(words_only, words(90))
    read = torch.cat((head, body), dim=1)
    cache = WildCatCache(model.config, **SETTINGS)
    model(read, **{CACHE: cache})
    ids = torch.cat((read, encode_follow_up(words_only, "w5 w6")), dim=1)
    tokens = model.generate(ids, **{CACHE: cache}, max_new_tokens=8, do_sample=False, eos_token_id=3)[0, ids.shape[1] :]
    assert context.ask("w5 w6", max_new_tokens=8) == words_only.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}, {"prefill_chunk_size": 30}], ids=str)
def test_every_way_to_decode_is_checked(options):
    model = Dropping(tiny_config("llama")).eval()
    with enable(model, **SETTINGS), pytest.raises(RuntimeError, match=NOT_READ):
        model.generate(IDS, **{**GREEDY, **options})


def test_a_model_that_drops_a_cache_past_a_length_does_not_do_it_silently():
    """Phi-3 with two sets of frequencies starts over in an exact cache of its own."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    lengths = {"original_max_position_embeddings": 64}
    model = tiny_model("phi3", rope_parameters={**rope, **lengths}, **lengths)
    with (
        pytest.warns(UserWarning, match="drops any cache"),
        enable(model, **SETTINGS),
        pytest.raises(RuntimeError, match=NOT_READ),
    ):
        model.generate(IDS, **GREEDY)


def test_the_keyword_is_the_librarys():
    assert CACHE in __import__("inspect").signature(tf.LlamaForCausalLM.forward).parameters
    model = tiny_model("llama")
    cache = WildCatCache(model.config, **SETTINGS)
    assert returned_cache(model(IDS, **{CACHE: cache})) is cache and returned_cache(object()) is None
    assert given_cache({OLD: cache}) is given_cache({CACHE: cache}) is given_cache({OLD: cache, CACHE: cache}) is cache
    assert given_cache({}) is given_cache({CACHE: None}) is None


@pytest.mark.skipif(CACHE == OLD, reason="this version of Transformers has one name")
def test_two_caches_under_two_names_are_refused():
    model = tiny_model("llama")
    caches = {CACHE: tf.DynamicCache(config=model.config), OLD: tf.DynamicCache(config=model.config)}
    with pytest.raises(ValueError, match=f"{CACHE} and {OLD} name two caches; pass one"):
        given_cache(caches)
    with enable(model, **SETTINGS), pytest.raises(ValueError, match=f"{CACHE} and {OLD} name two caches; pass one"):
        model.generate(IDS, **caches, **GREEDY)
    assert all(cache.get_seq_length() == 0 for cache in caches.values())


# Streams of calls that fail, or that outlive the block.


def streaming(model, **options):
    """A call of `generate()` in a thread of its own, and its streamer."""
    streamer = tf.TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
    call = {"input_ids": IDS, "streamer": streamer, **GREEDY, **options}
    return threading.Thread(target=model.generate, kwargs=call), streamer


def test_a_streamer_given_by_position_is_ended_too():
    ended = []

    class Streamer:
        def put(self, tokens):
            """Nothing to show."""

        def end(self):
            ended.append(True)

    broken = Dropping(tiny_config("llama")).eval()
    config = tf.GenerationConfig(**GREEDY)
    with enable(broken, **SETTINGS), pytest.raises(RuntimeError, match=NOT_READ):
        broken.generate(IDS, config, None, None, None, None, None, Streamer())
    assert ended == [True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_stream_of_a_call_that_fails_ends():
    broken = Dropping(tiny_config("llama")).eval()
    with enable(broken, **SETTINGS):
        thread, streamer = streaming(broken)
        thread.start()
        assert len("".join(streamer).split()) <= 1
        thread.join()


def test_a_call_that_outlives_the_block_keeps_its_cache_and_its_attention():
    model = tiny_model("llama")
    own = model.config._attn_implementation
    expected = tokenizer().decode(
        model.generate(IDS, **{CACHE: WildCatCache(model.config, **SETTINGS)}, **GREEDY)[0, 100:]
    )
    model = tiny_model("llama")
    begun, proceed = threading.Event(), threading.Event()

    class Waiting(tf.StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            begun.set()
            assert proceed.wait(60)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with enable(model, **SETTINGS):
        thread, streamer = streaming(model, stopping_criteria=tf.StoppingCriteriaList([Waiting()]))
        thread.start()
        assert begun.wait(60)
    assert "generate" not in vars(model)
    proceed.set()
    assert "".join(streamer) == expected
    thread.join()
    assert model.config._attn_implementation == own and type(model.config._attn_implementation) is str
