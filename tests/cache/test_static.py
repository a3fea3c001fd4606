"""Static caches: what compiled steps give, where the memory is, and what the host knows of them."""

import dataclasses
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import CompileConfig

from tests.driver import METHODS, SCALE, assert_same, state, tokens
from tests.tiny import random_ids, tiny_config, tiny_model
from wildcat_kv import CompressedCache, WildCatCache, WildCatConfig, compile_decoding, compressors
from wildcat_kv.hook.keyword import CACHE

BUDGET = {"max_tokens": 30, "sink": 2, "window": 6, "bin_rank": 4}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _no_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def model():
    return tiny_model("llama", num_hidden_layers=2)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def read(model, cache, ids, mask=None):
    """Read `ids`; the tokens that come next."""
    return model(ids, **{CACHE: cache}, attention_mask=mask).logits[:, -1:].argmax(-1)


def decode(step, token, count):
    """The logits of `count` steps, each of the token that the step before it found most likely."""
    logits = []
    for _ in range(count):
        logits.append(step(token))
        token = logits[-1].argmax(-1)
    return torch.cat(logits, 1)


def eagerly(model, cache):
    return lambda token: model(token, **{CACHE: cache}).logits


def compiled(model, cache, backend="eager"):
    return compile_decoding(model, cache, backend=backend)


def ordinary(model, ids, count, budget=BUDGET):
    """What a cache that is not static gives."""
    cache = WildCatCache(model.config, compressor="wildcat", **budget)
    return decode(eagerly(model, cache), read(model, cache, ids), count), cache


def static_cache(model, **changes):
    return WildCatCache(model.config, compressor="wildcat", static=True, **{**BUDGET, **changes})


def addresses(cache):
    return [tensor.data_ptr() for layer in cache.layers for tensor in layer.state.storage.allocated.tensors()]


# Compiled steps


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_compiled_steps_give_what_an_ordinary_cache_gives(family):
    model, ids = tiny_model(family, num_hidden_layers=2), random_ids(2, 33)
    expected, other = ordinary(model, ids, 60)
    cache = static_cache(model)
    token, step = read(model, cache, ids), compiled(model, cache)
    at = addresses(cache)
    logits = decode(step, token, 60)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert graphs() == 1 and not torch._dynamo.utils.counters["graph_break"]
    assert cache.get_seq_length() == other.get_seq_length() == 93
    assert cache.stored_length() == other.stored_length() <= 30
    assert addresses(cache) == at and cache.layers[0].state.storage.allocated.keys.shape[2] == 31
    assert cache.layers[0].state.progress.folded_at > 33  # it has folded while decoding


@pytest.mark.parametrize("length", [10, 30, 31, 32, 45, 90])
def test_memory_is_as_large_as_the_budget_after_a_prompt_of_any_length(model, length):
    cache = static_cache(model)
    read(model, cache, random_ids(1, length))
    assert all(layer.state.storage.allocated.keys.shape[2] == 31 for layer in cache.layers)


def test_weights_of_any_sign_take_one_graph_more(model):
    """The two ways to attend are two graphs, compiled once each."""

    @dataclasses.dataclass(frozen=True)
    class Signed(compressors.Compressor):
        def compress(self, block, rank):
            coreset = compressors.Uniform().compress(block, rank).coreset
            sign = -1.0 if block.seen % 2 else 1.0
            weights = torch.where(torch.arange(coreset.weights.shape[-1]) == 0, 0.05 * sign, coreset.weights)
            return compressors.Compressed(dataclasses.replace(coreset, weights=weights))

    ids = random_ids(1, 40)
    caches = [CompressedCache(model.config, compressor=Signed(), static=static, **BUDGET) for static in (False, True)]
    expected = decode(eagerly(model, caches[0]), read(model, caches[0], ids), 60)
    token = read(model, caches[1], ids)
    torch.testing.assert_close(decode(compiled(model, caches[1]), token, 60), expected, **CLOSE)
    assert graphs() == 2


def test_every_text_and_every_cache_use_the_same_graph(model):
    ids = random_ids(1, 33)
    expected, _ = ordinary(model, ids, 5)
    first = static_cache(model)
    for cache in (first, first, static_cache(model), first.clone()):
        cache.reset()
        token = read(model, cache, ids)
        torch.testing.assert_close(decode(compiled(model, cache), token, 5), expected, **CLOSE)
    assert graphs() == 1


def test_a_traced_step_reads_no_subclass_of_str_or_int(monkeypatch):
    """From torch 2.13 on they have a kind of variable of their own; before, tracing fails at them."""
    user_defined = pytest.importorskip("torch._dynamo.variables.user_defined")
    kind = getattr(user_defined, "UserDefinedConstantVariable", None)
    if kind is None:
        pytest.skip("this torch has no such variable")
    met, plain = [], kind.__init__

    def noted(self, value, *args, **kwargs):
        met.append(value)
        plain(self, value, *args, **kwargs)

    monkeypatch.setattr(kind, "__init__", noted)
    model = tiny_model("llama", "sdpa", num_hidden_layers=2)
    cache = static_cache(model)
    token = read(model, cache, random_ids(1, 40))
    decode(compiled(model, cache), token, 2)
    assert met == [] and graphs() == 1

    class Name(str):
        pass

    torch.compile(lambda x, name: x + len(name), backend="eager")(torch.zeros(1), Name("it is noted"))
    assert met == ["it is noted"]


def test_several_turns(model):
    """A further chunk, several tokens at once, between compiled steps; short ones and one longer than the budget."""
    cache, other = static_cache(model), WildCatCache(model.config, compressor="wildcat", **BUDGET)
    step, at = None, None
    for turn, length in enumerate((20, 9, 50, 2, 7)):
        ids = random_ids(2, length, seed=turn)
        token, expected = read(model, cache, ids), read(model, other, ids)
        assert torch.equal(token, expected)
        step, at = step or compiled(model, cache), at or addresses(cache)
        torch.testing.assert_close(decode(step, token, 9), decode(eagerly(model, other), token, 9), **CLOSE)
    assert graphs() == 1 and addresses(cache) == at
    assert cache.get_seq_length() == other.get_seq_length()


def test_compiled_and_other_steps_can_take_turns(model):
    expected, other = ordinary(model, random_ids(2, 33), 40)
    cache = static_cache(model)
    token, found = read(model, cache, random_ids(2, 33)), []
    steps = [compiled(model, cache), eagerly(model, cache), compiled(model, cache)]
    for number in range(40):
        found.append(steps[number % 3](token))
        token = found[-1].argmax(-1)
    torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)
    assert cache.get_seq_length() == other.get_seq_length() and cache.stored_length() == other.stored_length()


def test_steps_work_where_torch_does_not_compile(model):
    expected, other = ordinary(model, random_ids(2, 33), 30)
    cache = static_cache(model)
    token, step = read(model, cache, random_ids(2, 33)), compiled(model, cache)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(decode(step, token, 30), expected, **CLOSE)
    assert cache.get_seq_length() == other.get_seq_length()


def test_a_compiler_that_fails_leaves_the_cache_as_it_was(model):
    expected, other = ordinary(model, random_ids(2, 33), 30)
    cache = static_cache(model)
    token = read(model, cache, random_ids(2, 33))

    def missing(graph, inputs):
        raise OSError("no compiler here")

    with pytest.raises(Exception, match="no compiler here"):
        compiled(model, cache, missing)(token)
    assert cache.get_seq_length() == 33
    torch.testing.assert_close(decode(eagerly(model, cache), token, 30), expected, **CLOSE)
    assert cache.get_seq_length() == other.get_seq_length()


@pytest.mark.parametrize(("prompt", "steps"), [(True, False), (False, True)])
def test_under_inference_mode(model, prompt, steps):
    expected, _ = ordinary(model, random_ids(1, 33), 20)
    cache = static_cache(model)
    with torch.inference_mode(prompt):
        token = read(model, cache, random_ids(1, 33))
    step = compiled(model, cache, "aot_eager")
    with torch.inference_mode(steps):
        first = decode(step, token.clone(), 10)
    with torch.inference_mode(not steps):
        second = decode(step, first[:, -1:].argmax(-1).clone(), 10)
    torch.testing.assert_close(torch.cat((first, second), 1), expected, **CLOSE)


def test_with_gradients_on(model):
    expected, _ = ordinary(model, random_ids(1, 33), 20)
    cache = static_cache(model)
    with torch.enable_grad():
        token = read(model, cache, random_ids(1, 33))
        torch.testing.assert_close(decode(compiled(model, cache), token, 20), expected, **CLOSE)
    assert not any(tensor.requires_grad for layer in cache.layers for tensor in layer.tensors())


@pytest.mark.parametrize("length", [14, 40])
def test_steps_after_a_prompt_with_a_padded_row(model, length):
    ids = random_ids(2, length)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    other, cache = WildCatCache(model.config, compressor="wildcat", **BUDGET), static_cache(model)
    token = read(model, other, ids, mask)
    assert torch.equal(read(model, cache, ids, mask), token)
    found, step = [], compiled(model, cache)
    for _ in range(40):
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        found.append(step(token))
        torch.testing.assert_close(found[-1], model(token, **{CACHE: other}, attention_mask=mask).logits, **CLOSE)
        token = found[-1].argmax(-1)


# generate()


def generate(model, cache, ids, mask=None, compile_steps=False, **options):
    if compile_steps:
        options["compile_config"] = CompileConfig(backend="eager", fullgraph=True, mode=None)
        options["compile_config"]._compile_all_devices = True
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        **{CACHE: cache},
        do_sample=False,
        max_new_tokens=40,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


@pytest.mark.parametrize("length", [14, 40])
@pytest.mark.parametrize("compile_steps", [False, True])
def test_generate_with_a_row_that_is_padded(model, compile_steps, length):
    """A prompt within the budget, and one that is compressed at once."""
    ids = random_ids(2, length)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    expected = generate(model, WildCatCache(model.config, compressor="wildcat", **BUDGET), ids, mask)
    cache = static_cache(model)
    found = generate(model, cache, ids, mask, compile_steps)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)
    assert graphs() == int(compile_steps) and cache.stored_length() <= 30


@pytest.mark.parametrize("compile_steps", [False, True])
def test_beams(model, compile_steps):
    ids = random_ids(2, 33)
    expected = generate(model, WildCatCache(model.config, compressor="wildcat", **BUDGET), ids, num_beams=3)
    found = generate(model, static_cache(model), ids, None, compile_steps, num_beams=3)
    assert torch.equal(found.sequences, expected.sequences)


# What the host knows


def test_the_host_catches_up_whoever_asks(model, tmp_path):
    ids = random_ids(2, 33)
    expected, other = ordinary(model, ids, 20)
    cache = static_cache(model)
    token, step = read(model, cache, ids), compiled(model, cache)
    logits = decode(step, token, 10)
    assert cache.get_seq_length() == 43 and "43 tokens seen" in repr(cache)
    assert cache.layers[1].keys.shape[2] == cache.layers[1].values.shape[2] == cache.stored_length()
    assert cache.memory_bytes() == cache.clone().memory_bytes()
    cache.save(tmp_path / "context.safetensors")
    loaded = [WildCatCache.load(tmp_path / "context.safetensors", model.config, static=s) for s in (False, True)]
    for one in (cache.clone(), loaded[1], cache):
        further = decode(compiled(model, one), logits[:, -1:].argmax(-1), 10)
        torch.testing.assert_close(torch.cat((logits, further), 1), expected, **CLOSE)
    further = decode(eagerly(model, loaded[0]), logits[:, -1:].argmax(-1), 10)
    torch.testing.assert_close(further, expected[:, 10:], **CLOSE)
    assert cache.stored_length() == other.stored_length() and cache.get_seq_length() == 53


def test_rows_can_be_repeated_and_picked_between_steps(model):
    ids = random_ids(2, 33)
    expected, _ = ordinary(model, ids, 30)
    cache = static_cache(model)
    token, step = read(model, cache, ids), compiled(model, cache)
    first = decode(step, token, 10)
    cache.batch_repeat_interleave(2)
    second = decode(step, first[:, -1:].argmax(-1).repeat_interleave(2, 0), 10)
    torch.testing.assert_close(second[::2], expected[:, 10:20], **CLOSE)
    cache.batch_select_indices([3, 0])
    third = decode(step, second[[3, 0], -1:].argmax(-1), 10)
    torch.testing.assert_close(third, expected[[1, 0], 20:], **CLOSE)


def test_memory_of_the_last_text_is_given_back(model):
    cache = static_cache(model)
    token = read(model, cache, random_ids(1, 33))
    decode(compiled(model, cache), token, 2)
    cache.reset()
    assert cache.memory_bytes() == 0 and not cache._pass_state.buffers


def test_nan_is_refused_again_and_again_and_nothing_is_overwritten(model):
    cache = static_cache(model)
    token, step = read(model, cache, random_ids(1, 33)), compiled(model, cache)
    decode(step, token, 2)
    layer = cache.layers[1]
    layer.keys[0, 0, -1, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1: NaN or infinity"):
        decode(step, token, 30)
    held = [tensor.clone() for tensor in layer.state.storage.entries.tensors()]
    for _ in range(3):
        with pytest.raises(ValueError, match="layer 1: NaN or infinity"):
            step(token)
    for ours, theirs in zip(layer.state.storage.entries.tensors(), held, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    cache.reset()
    assert torch.isfinite(decode(step, read(model, cache, random_ids(1, 33)), 20)).all()


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5}, r"static=True with ratio=0.5.*give max_tokens"),
        ({"compressor": "snapkv", **BUDGET}, "static=True: SnapKV learns from the queries"),
        ({"compressor": "h2o", **BUDGET}, "static=True: H2O learns from the queries"),
    ],
)
def test_what_has_no_fixed_shapes_is_refused(options, message):
    config = tiny_config("llama")
    before = config._attn_implementation
    with pytest.raises(ValueError, match=message):
        CompressedCache(config, **{"compressor": "uniform", **options}, static=True)
    assert config._attn_implementation == before and type(config._attn_implementation) is type(before)


@pytest.mark.parametrize("family", ["gemma3", "phi3_wide"])
def test_a_model_with_windows_is_refused(family):
    with pytest.raises(ValueError, match="static=True: the model has layers with windows"):
        WildCatCache(tiny_config(family), compressor="wildcat", static=True, **BUDGET)


def test_offloading_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="static=True with offloading=True"):
        WildCatCache(tiny_config("llama"), compressor="wildcat", static=True, offloading=True, **BUDGET)


def test_a_method_that_deals_out_unequally_is_refused_before_the_first_step(model):
    method = compressors.AdaKV(compressors.KeyDiff())
    cache = CompressedCache(model.config, compressor=method, static=True, **BUDGET)
    token = read(model, cache, random_ids(1, 60))
    with pytest.raises(ValueError, match=r"static=True: layer \d holds .* AdaKV deals the budget out unequally"):
        compiled(model, cache)(token)
    assert cache.get_seq_length() == 60


def test_tokens_cannot_be_taken_back(model):
    cache = static_cache(model)
    token = read(model, cache, random_ids(1, 33))
    before = state(cache)
    for refused in (lambda: cache.crop(-1), cache.activate_past_recording):
        with pytest.raises(ValueError, match="static=True: tokens of compiled steps cannot be taken back"):
            refused()
    cache.crop(0)
    assert_same(state(cache), before)
    assert torch.isfinite(eagerly(model, cache)(token)).all()


def test_caches_without_compiled_steps_are_named(model):
    with pytest.raises(ValueError, match=r"WildCatCache.*has no fixed shapes; build it with max_tokens"):
        compile_decoding(model, WildCatCache(model.config, compressor="wildcat", **BUDGET))
    with pytest.raises(ValueError, match=r"WildCatCache.* is empty: read a prompt"):
        compile_decoding(model, static_cache(model))


def test_another_number_of_rows_is_refused(model):
    cache = static_cache(model)
    token = read(model, cache, random_ids(2, 33))
    step = compiled(model, cache)
    step(token)
    with pytest.raises(ValueError, match="the batch has 3 rows and the cache holds 2"):
        step(random_ids(3, 1))
    assert cache.get_seq_length() == 34


# Any order of what can happen, against a cache that is not static


class Pairs(RuleBasedStateMachine):
    """A static cache and another one that is told the same. What would be traced runs as it is."""

    @initialize(
        rows=st.integers(1, 3),
        budget=st.sampled_from([{"max_tokens": 18}, {"max_tokens": 40, "window": 2}, {"max_tokens": 33, "sink": 0}]),
        method=st.sampled_from(["wildcat", "streaming_llm", "keydiff", "balancekv"]),
        masked=st.booleans(),
    )
    def build(self, rows, budget, method, masked):
        settings = WildCatConfig(**{"sink": 3, "window": 6, "bin_rank": 4, **budget})
        config, self.masked = tiny_config("llama", num_hidden_layers=2), masked
        if method == "wildcat":
            self.load = WildCatCache.load
            self.caches = [
                WildCatCache(config, settings, compressor="wildcat", static=static) for static in (True, False)
            ]
        else:
            options = {"compressor": METHODS[method]}
            self.load = lambda *args, **more: CompressedCache.load(*args, **options, **more)
            self.caches = [CompressedCache(config, settings, **options, static=static) for static in (True, False)]
        self.config, self.mask = config, torch.zeros(rows, 0, dtype=torch.bool)
        self.seed = 0

    def forward(self, count, traced=False, shown=None):
        self.seed += 1
        rows = self.mask.shape[0]
        keys, values = tokens(rows, count, self.seed)
        new = torch.ones(rows, count, dtype=torch.bool) if shown is None else shown
        self.mask = torch.cat((self.mask, new), 1)
        outputs = []
        for cache in self.caches:
            forward = cache.layers[0].announce(rows, count, self.mask if self.masked else None)
            with patch.object(torch.compiler, "is_compiling", lambda now=traced and cache.static: now):
                for number, layer in enumerate(cache.layers):
                    held = cache.update(keys[number], values[number], number)
                    query = keys[number].repeat_interleave(2, 1) + 0.5
                    seen = None if layer.uses_fallback and not traced else layer.attend(query, *held, SCALE, {})
                    outputs.append(None if forward.uses_fallback else seen)
                    layer.after_attention(query, SCALE)
        half = len(outputs) // 2
        for static, other in zip(outputs[:half], outputs[half:], strict=True):
            if static is not None and other is not None:
                torch.testing.assert_close(static, other, **CLOSE)

    @rule(count=st.integers(2, 40), hidden=st.floats(0, 1))
    def chunk(self, count, hidden):
        shown = None
        if self.masked:
            shown = (
                torch.rand(self.mask.shape[0], count, generator=torch.Generator().manual_seed(self.seed)) >= hidden / 2
            )
        self.forward(count, shown=shown)

    @rule(count=st.integers(1, 12))
    def steps(self, count):
        for _ in range(count):
            self.forward(1)

    @precondition(lambda self: self.mask.shape[1])
    @rule(count=st.integers(1, 25))
    def traced_steps(self, count):
        for _ in range(count):
            self.forward(1, traced=True)

    @precondition(lambda self: self.mask.shape[1])
    @rule(data=st.data())
    def pick_rows(self, data):
        rows = self.mask.shape[0]
        index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3)))
        for cache in self.caches:
            cache.reorder_cache(index)
        self.mask = self.mask[index]

    @rule()
    def clone(self):
        self.caches = [cache.clone() for cache in self.caches]

    @precondition(lambda self: self.mask.shape[1])
    @rule(crosswise=st.booleans())
    def save_and_load(self, crosswise):
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{number}.safetensors" for number in range(2)]
            for cache, path in zip(self.caches, paths, strict=True):
                cache.save(path)
            if crosswise:
                paths.reverse()
            self.caches = [
                self.load(path, self.config, static=static) for path, static in zip(paths, (True, False), strict=True)
            ]

    @rule()
    def reset(self):
        for cache in self.caches:
            cache.reset()
        self.mask = self.mask[:, :0]

    @rule()
    def compare(self):
        static, other = map(state, self.caches)
        assert_same(static, other)
        assert self.caches[0].stored_length() == self.caches[1].stored_length()

    @invariant()
    def the_static_one_stays_within_its_memory(self):
        static, other = self.caches
        assert static.get_seq_length() == other.get_seq_length() == self.mask.shape[1]
        for layer in static.layers:
            if layer.is_initialized:
                assert layer._state.storage.allocated.keys.shape[2] == static.settings.max_tokens + 1


TestPairs = Pairs.TestCase
TestPairs.settings = settings(max_examples=max(60, settings().max_examples), stateful_step_count=20)
