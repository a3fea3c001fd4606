"""The cache under tiny random models: what it stores, what it answers, what it refuses."""

import copy
import gc
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
import transformers as tf
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask

from tests.driver import SCALE, small_cache, tokens
from tests.tiny import FAMILIES, SMALL, random_ids, tiny_model
from wildcat_kv import CompressedCache, WildCatCache, WildCatConfig
from wildcat_kv.cache.budget import block_size, kept_tokens
from wildcat_kv.compressors import Uniform
from wildcat_kv.hook.attention import cached_attention
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.hook.marks import fallback_of, switched_name


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def decode(model, cache, ids, steps, mask=None):
    """Logits (rows, steps, vocabulary) of a prompt's last token and of greedy tokens after it."""
    collected = []
    for _ in range(steps):
        out = model(ids, **{CACHE: cache}, attention_mask=mask)
        collected.append(out.logits[:, -1])
        ids = out.logits[:, -1:].argmax(-1)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=-1)
    return torch.stack(collected, dim=1)


def full_layers(cache):
    return [index for index, layer in enumerate(cache.layers) if type(layer).__name__ == "WildCatLayer"]


# Exactness


@pytest.mark.parametrize("family", FAMILIES)
def test_the_switch_changes_nothing_for_other_caches(family):
    model, ids = tiny_model(family), random_ids(1, 50)
    plain, expected = model(ids).logits, decode(model, DynamicCache(config=model.config), ids, 5)
    WildCatCache(model.config, compressor="wildcat", ratio=0.5)
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(decode(model, DynamicCache(config=model.config), ids, 5), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_itself_is_read_exactly(family, attention):
    model, ids = tiny_model(family, attention), random_ids(1, 200)
    expected = model(ids, **{CACHE: DynamicCache(config=model.config)}).logits
    cache = WildCatCache(model.config, compressor="wildcat", ratio=0.25)
    assert torch.equal(model(ids, **{CACHE: cache}).logits, expected)
    assert all(cache.stored_length(index) == 50 for index in full_layers(cache))


@pytest.mark.parametrize("bits", [None, 4])
def test_up_to_its_floor_a_text_is_answered_as_by_the_exact_cache(llama, bits):
    ids = random_ids(1, 60)
    cache = WildCatCache(llama.config, ratio=0.25, min_tokens=80, bits=bits)
    expected = decode(llama, DynamicCache(config=llama.config), ids, 30)
    found = decode(llama, cache, ids, 30)
    torch.testing.assert_close(found[:, :21], expected[:, :21], rtol=1e-4, atol=1e-4)  # 80 tokens read
    assert cache.layers[0].state.progress.folded_at == 81


def test_sinks_window_and_pivots_are_the_models_own_keys(llama):
    ids = random_ids(1, 400)
    exact = DynamicCache(config=llama.config)
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25, sink=32)
    for kind in (exact, cache):
        llama(ids, **{CACHE: kind})
    for ours, theirs in zip(cache.layers, exact.layers, strict=True):
        assert torch.equal(ours.keys[:, :, :32], theirs.keys[:, :, :32])
        assert torch.equal(ours.values[:, :, :32], theirs.values[:, :, :32])
        assert torch.equal(ours.keys[:, :, -32:], theirs.keys[:, :, -32:])
        assert torch.equal(ours.values[:, :, -32:], theirs.values[:, :, -32:])
        distance = torch.cdist(ours.keys, theirs.keys, compute_mode="donot_use_mm_for_euclid_dist").amin(-1)
        assert distance.max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_cache_stays_near_the_exact_one(family):
    """Smooth keys (small projections) lose little, and far less than by dropping tokens at random."""
    model, ids = tiny_model(family, initializer_range=0.05), random_ids(1, 300)
    later = random_ids(1, 40, seed=8)

    def logits(cache):
        model(ids, **{CACHE: cache})
        return model(later, **{CACHE: cache}).logits

    expected = logits(DynamicCache(config=model.config))
    ours = logits(WildCatCache(model.config, compressor="wildcat", ratio=0.5))
    random = logits(CompressedCache(model.config, compressor=Uniform(), ratio=0.5))
    error, floor = (ours - expected).norm() / expected.norm(), (random - expected).norm() / expected.norm()
    assert error < 0.2 and error < floor / 2


def test_slots_compressed_again_and_again_keep_all_mass():
    """Equal keys lose nothing, however often they are folded: the answer is the mean of all values."""
    config = tf.LlamaConfig(**SMALL)
    cache = WildCatCache(config, compressor="wildcat", max_tokens=80, sink=4, window=4)
    layer, values = cache.layers[0], torch.randn(1, 2, 600, 16)
    for token in range(600):
        layer.announce(1, 1, None)
        held = cache.update(torch.full((1, 2, 1, 16), 0.3), values[:, :, token : token + 1], 0)
        output = layer.attend(torch.randn(1, 4, 1, 16), *held, 0.25, {})
        layer.after_attention(torch.zeros(1, 4, 1, 16), 0.25)
    assert cache.stored_length(0) <= 80
    expected = values.mean(2, keepdim=True).repeat_interleave(2, 1)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)


# Budgets


@given(st.integers(2, 300), st.sampled_from([0.1, 0.25, 0.33, 0.5, 0.9]), st.integers(0, 130))
def test_ratio_is_exact_after_the_prompt_and_within_a_block_later(prompt, ratio, steps):
    model = tiny_model("llama", num_hidden_layers=1)
    cache = WildCatCache(model.config, compressor="wildcat", ratio=ratio)
    model(random_ids(1, prompt), **{CACHE: cache})
    assert cache.stored_length(0) == kept_tokens(prompt, ratio)
    token, seen_exact = random_ids(1, 1), 0
    for step in range(steps):
        model(token, **{CACHE: cache})
        over = cache.stored_length(0) - kept_tokens(prompt + step + 1, ratio)
        assert 0 <= over < block_size(cache.settings)
        seen_exact += over == 0
    assert cache.get_seq_length() == prompt + steps
    assert steps < block_size(cache.settings) or seen_exact


@pytest.mark.parametrize("prompt", [1, 40, 300])
def test_max_tokens_is_never_exceeded(llama, prompt):
    cache = WildCatCache(llama.config, compressor="wildcat", max_tokens=100)
    ids, held = random_ids(1, prompt), set()
    for _ in range(250):
        ids = llama(ids, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        assert all(cache.stored_length(index) <= 100 for index in range(3))
        held.add(cache.memory_bytes())
    columns = max(100 + 1, prompt) + block_size(cache.settings)  # the prompt's own are free room afterwards, at most
    assert max(held) <= 3 * (2 * columns * (2 * 16 * 4 + 5) + 2 * 2 * 16 * 4)
    assert cache.get_seq_length() == prompt + 249


def test_layers_with_a_window_hold_no_more_than_it_after_a_prompt():
    model = tiny_model("gemma3")
    window = model.config.sliding_window
    ids, more = random_ids(1, 200), random_ids(1, 20, seed=1)
    ours, theirs = WildCatCache(model.config, compressor="wildcat", ratio=1.0), DynamicCache(config=model.config)
    for part in (ids, more):
        model(part, **{CACHE: ours})
        model(part, **{CACHE: theirs})
        for layer, other in zip(ours.layers, theirs.layers, strict=True):
            if isinstance(other, DynamicSlidingWindowLayer):
                assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
                assert layer.keys.shape[2] == window - 1
                assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_memory_is_counted_and_falls(llama):
    ids = random_ids(1, 1000)
    exact, cache = (
        WildCatCache(llama.config, compressor="wildcat", ratio=1.0),
        WildCatCache(llama.config, compressor="wildcat", ratio=0.25),
    )
    for kind in (exact, cache):
        llama(ids, **{CACHE: kind})
    tokens = 3 * 2 * 2 * 16 * 4  # bytes of one token's keys and values in all layers
    assert exact.memory_bytes() >= 1000 * tokens
    held = sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in layer.tensors())
    assert 250 * tokens <= held == cache.memory_bytes() < 0.3 * exact.memory_bytes()


def test_memory_comes_back_without_the_garbage_collector(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    decode(llama, cache, random_ids(1, 100), 3)
    held = weakref.ref(cache.layers[0].state.storage)
    gc.collect()
    gc.disable()
    try:
        del cache
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("ratio", [1e-9, 0.01, 1.0])
def test_free_room_is_small_whatever_the_ratio(llama, ratio):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=ratio)
    llama(random_ids(1, 300), **{CACHE: cache})
    columns = cache.layers[0].state.storage.allocated.keys.shape[2]
    assert columns <= kept_tokens(300, ratio) + 64


def test_padding_does_not_add_up_past_max_tokens(llama):
    cache, mask = (
        WildCatCache(llama.config, compressor="wildcat", max_tokens=100),
        torch.zeros(2, 400, dtype=torch.int64),
    )
    mask[:, -60:] = 1
    llama(random_ids(2, 400), **{CACHE: cache}, attention_mask=mask)
    for _ in range(5):
        assert cache.stored_length() <= 100
        new = torch.zeros(2, 30, dtype=torch.int64)
        new[:, -1] = 1
        mask = torch.cat((mask, new), dim=1)
        logits = llama(random_ids(2, 30), **{CACHE: cache}, attention_mask=mask).logits
        assert torch.isfinite(logits[:, -1]).all()


# Batches


@pytest.mark.parametrize("budget", [{"max_tokens": 90}, {"max_tokens": 170}])
def test_a_padded_row_answers_as_it_does_alone(llama, budget):
    model, ids = llama, random_ids(3, 240)
    mask = torch.ones_like(ids)
    mask[0, :150], mask[1, :235] = 0, 0
    steps = 120
    forced = random_ids(3, steps, seed=9)

    def logits(ids, mask):
        cache, collected = WildCatCache(model.config, compressor="wildcat", **budget), []
        for step in range(steps):
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            out = model(ids, **{CACHE: cache}, attention_mask=mask, position_ids=positions)
            collected.append(out.logits[:, -1])
            ids = forced[rows, step : step + 1]
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=-1)
        return torch.stack(collected, dim=1)

    rows = slice(None)
    together = logits(ids, mask)
    for row in range(3):
        rows = slice(row, row + 1)
        alone = logits(ids[rows, mask[row].bool()], torch.ones(1, int(mask[row].sum()), dtype=torch.int64))
        torch.testing.assert_close(together[rows], alone, rtol=2e-3, atol=2e-3)


def test_equal_rows_stay_equal(llama):
    ids = random_ids(1, 200).expand(3, -1)
    logits = decode(llama, WildCatCache(llama.config, compressor="wildcat", ratio=0.25), ids, 60)
    torch.testing.assert_close(logits[1:], logits[:1].expand(2, -1, -1), rtol=1e-4, atol=1e-4)


def test_heads_layers_and_seeds_draw_apart():
    """Equal keys and values in all heads and layers: what differs is the draw."""

    def slots(seed):
        cache = WildCatCache(tf.LlamaConfig(**SMALL), compressor="wildcat", ratio=0.25, seed=seed)
        keys = torch.randn(1, 1, 400, 16, generator=torch.Generator().manual_seed(1)).expand(1, 2, -1, -1)
        cache.layers[0].announce(1, 400, None)
        for layer in range(3):
            cache.update(keys, keys, layer)
            cache.layers[layer].after_attention(keys, 0.25)
        return [cache.layers[layer].keys[0, head] for layer in range(3) for head in range(2)]

    drawn = slots(0)
    assert all(torch.equal(*pair) for pair in zip(drawn, slots(0), strict=True))
    drawn += slots(1)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_a_row_of_padding_alone_harms_no_other(llama):
    ids, mask = random_ids(2, 100), torch.ones(2, 105, dtype=torch.int64)
    mask[0, :100] = 0
    cache, alone = (
        WildCatCache(llama.config, compressor="wildcat", ratio=0.25),
        WildCatCache(llama.config, compressor="wildcat", ratio=0.25),
    )
    llama(ids, **{CACHE: cache}, attention_mask=mask[:, :100])
    llama(ids[1:], **{CACHE: alone})
    logits = llama(ids[:, :5], **{CACHE: cache}, attention_mask=mask).logits
    torch.testing.assert_close(logits[1:], llama(ids[1:, :5], **{CACHE: alone}).logits, rtol=1e-3, atol=1e-3)


def test_a_mask_that_contradicts_what_is_folded_is_refused(llama):
    mask = torch.ones(1, 65, dtype=torch.int64)
    mask[:, :20] = 0
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    llama(random_ids(1, 60), **{CACHE: cache})
    with pytest.raises(ValueError, match=r"shows \[40\] of the first 60 tokens.*\[60\] were"):
        llama(random_ids(1, 5), **{CACHE: cache}, attention_mask=mask)
    assert cache.get_seq_length() == 60


def test_padding_without_its_mask_is_refused_while_attention_is_exact(llama):
    mask = torch.ones(1, 60, dtype=torch.int64)
    mask[:, :20] = 0
    for chunk in (60, 1):  # a column at a time, too
        cache = WildCatCache(llama.config, compressor="wildcat", max_tokens=200)
        for at in range(0, 60, chunk):
            part = random_ids(1, 60)[:, at : at + chunk]
            llama(part, **{CACHE: cache}, attention_mask=mask[:, : at + chunk])
        with pytest.raises(ValueError, match="earlier tokens were padding"):
            llama(random_ids(1, 5), **{CACHE: cache})
        assert cache.get_seq_length() == 60


@pytest.mark.parametrize("budget", [{"ratio": 1.0}, {"max_tokens": 200}, {"max_tokens": 80}])
def test_exact_tokens_may_be_masked_later(llama, budget):
    """The second turn of a chat: what was padded behind a finished answer is hidden from then on."""
    first, second = torch.ones(2, 60, dtype=torch.int64), torch.ones(2, 75, dtype=torch.int64)
    second[0, 40:60] = 0
    logits = []
    for cache in (DynamicCache(config=llama.config), WildCatCache(llama.config, compressor="wildcat", **budget)):
        llama(random_ids(2, 60), attention_mask=first, **{CACHE: cache})
        llama(random_ids(2, 15, seed=2), attention_mask=second, **{CACHE: cache})
        mask = torch.cat((second, second[:, :1]), dim=1)
        logits.append(llama(random_ids(2, 1, seed=4), attention_mask=mask, **{CACHE: cache}).logits)
    assert torch.equal(*logits)
    assert [row.seen for row in cache.layers[0].state.count_rows(76)] == [56, 76]


def test_rows_without_padding_need_no_mask(llama):
    """Once the padded rows are gone, or the padding is taken back, generate() may drop a mask of ones."""
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, :20] = 0
    cache = WildCatCache(llama.config, compressor="wildcat", max_tokens=200)
    llama(random_ids(2, 60), **{CACHE: cache}, attention_mask=mask)
    cache.batch_select_indices([1])
    assert llama.generate(random_ids(1, 65), **{CACHE: cache}, max_new_tokens=3, do_sample=False).shape == (1, 68)
    cache = WildCatCache(llama.config, compressor="wildcat", max_tokens=200)
    llama(random_ids(1, 40), **{CACHE: cache})
    late = torch.ones(1, 50, dtype=torch.int64)
    late[:, 45:] = 0
    llama(random_ids(1, 10), **{CACHE: cache}, attention_mask=late)
    cache.crop(-10)
    llama(random_ids(1, 3), **{CACHE: cache})
    assert cache.get_seq_length() == 43
    cache.reset()
    llama(random_ids(2, 60), **{CACHE: cache}, attention_mask=mask)
    cache.crop(-60)
    for _ in range(2):
        llama(random_ids(1, 3), **{CACHE: cache})
    cache.reset()
    llama(random_ids(2, 60), **{CACHE: cache}, attention_mask=mask)
    cache.reorder_cache(torch.tensor([1]))
    llama(random_ids(1, 3), **{CACHE: cache})
    assert cache.get_seq_length() == 63


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_a_refused_batch_size_changes_nothing(family):
    """Layers of Transformers' come first in some models, and would have read the tokens."""
    model = tiny_model(family)
    cache, other = (WildCatCache(model.config, compressor="wildcat", ratio=0.25) for _ in range(2))
    for kind in (cache, other):
        model(random_ids(1, 100), **{CACHE: kind})
    with pytest.raises(ValueError, match=r"the batch has 2 rows and the cache holds 1.*batch_repeat_interleave\(n\)"):
        model(random_ids(2, 5), **{CACHE: cache})
    logits = [model(random_ids(1, 5), **{CACHE: kind}).logits for kind in (cache, other)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "lfm2"])
def test_a_forward_pass_that_failed_before_it_read_anything_is_forgotten(family):
    model = tiny_model(family)
    cache = WildCatCache(model.config, compressor="wildcat", ratio=0.25)

    def fail(*args):
        raise KeyboardInterrupt

    for count in (100, 5):
        hook = model.model.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(random_ids(1, count), **{CACHE: cache})
        hook.remove()
        assert torch.isfinite(model(random_ids(1, count), **{CACHE: cache}).logits).all()
    assert cache.layers[2].get_seq_length() == 105


def test_a_mask_with_other_rows_than_the_batch_is_refused(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    with pytest.raises(ValueError, match="attention_mask has 1 rows and the batch 2"):
        llama(random_ids(2, 40), attention_mask=torch.ones(1, 40), **{CACHE: cache})
    assert cache.get_seq_length() == 0


def test_what_is_held_is_tied_to_no_graph(llama):
    for budget in ({"max_tokens": 500}, {"ratio": 0.25}):
        cache = WildCatCache(llama.config, compressor="wildcat", **budget)
        with torch.enable_grad():
            llama(random_ids(1, 60), **{CACHE: cache})
            llama(random_ids(1, 3), **{CACHE: cache})
            fork = cache.clone()
        assert not any(tensor.requires_grad for kind in (cache, fork) for tensor in kind.layers[0].tensors())


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_forward_pass_that_failed_is_noticed(family, broken, tmp_path):
    """Wherever it failed: in a layer of Transformers', or in one of ours."""
    model = tiny_model(family)
    cache = WildCatCache(model.config, compressor="wildcat", ratio=0.25)
    model(random_ids(1, 100), **{CACHE: cache})

    def fail(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[broken].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(random_ids(1, 5), **{CACHE: cache})
    hook.remove()
    for retry in (
        lambda: model(random_ids(1, 5), **{CACHE: cache}),
        lambda: cache.crop(-5),
        lambda: cache.save(tmp_path / "context.safetensors"),
    ):
        with pytest.raises(RuntimeError, match=r"failed half-way.*reset\(\)"):
            retry()
    cache.reset()
    assert torch.isfinite(model(random_ids(1, 60), **{CACHE: cache}).logits).all()


# generate()


def test_generate_is_the_step_by_step_loop(llama):
    ids = random_ids(1, 150)
    logits = decode(llama, WildCatCache(llama.config, compressor="wildcat", ratio=0.25), ids, 60)
    out = llama.generate(
        ids, **{CACHE: WildCatCache(llama.config, compressor="wildcat", ratio=0.25)}, max_new_tokens=60, do_sample=False
    )
    assert torch.equal(out[:, 150:], logits.argmax(-1))


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_generation_modes_agree_with_the_exact_cache_within_budget(llama, options):
    ids = random_ids(2, 40)
    outputs = []
    for cache in (DynamicCache(config=llama.config), WildCatCache(llama.config, compressor="wildcat", ratio=1.0)):
        torch.manual_seed(5)
        outputs.append(llama.generate(ids, **{CACHE: cache}, max_new_tokens=30, **options))
    assert torch.equal(*outputs)
    compressed = llama.generate(
        ids, **{CACHE: WildCatCache(llama.config, compressor="wildcat", max_tokens=80)}, max_new_tokens=60, **options
    )
    assert compressed.shape[1] == 100


@pytest.mark.parametrize("chunk", [7, 64])
def test_a_prompt_in_chunks_stays_within_its_budget(llama, chunk):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    llama.generate(random_ids(1, 300), **{CACHE: cache}, max_new_tokens=2, prefill_chunk_size=chunk, do_sample=False)
    assert cache.get_seq_length() == 301
    assert 0 <= cache.stored_length() - 75 < 48


def test_a_context_first_and_questions_later(llama):
    """Positions continue, the context is not read again, and copies do not disturb each other."""
    ids, question = random_ids(1, 200), random_ids(1, 12, seed=3)
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    llama(ids, **{CACHE: cache})
    assert cache.get_seq_length() == 200 and cache.stored_length() == 50
    fork = copy.deepcopy(cache)
    first = decode(llama, cache, question, 70)
    assert cache.get_seq_length() == 281 and fork.get_seq_length() == 200
    torch.testing.assert_close(decode(llama, fork, question, 70), first)
    full = llama.generate(
        torch.cat((ids, question), 1), **{CACHE: _prefilled(llama, ids)}, max_new_tokens=70, do_sample=False
    )
    assert torch.equal(full[:, 212:], first.argmax(-1))


def _prefilled(model, ids):
    cache = WildCatCache(model.config, compressor="wildcat", ratio=0.25)
    model(ids, **{CACHE: cache})
    return cache


def test_gradients_and_inference_mode_do_not_get_in_the_way(llama):
    ids, later = random_ids(1, 200), random_ids(1, 60, seed=2)
    expected = decode(llama, WildCatCache(llama.config, compressor="wildcat", ratio=0.25), ids, 60)
    with torch.enable_grad():
        torch.testing.assert_close(
            decode(llama, WildCatCache(llama.config, compressor="wildcat", ratio=0.25), ids, 60), expected
        )
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    with torch.inference_mode():
        llama(ids, **{CACHE: cache})
    assert torch.isfinite(llama(later, **{CACHE: cache}).logits).all()
    assert cache.get_seq_length() == 260


# The path of one decoded token


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("budget", [{"ratio": 0.25}, {"max_tokens": 120}])
@pytest.mark.parametrize("method", ["wildcat", "snapkv", "h2o", "expected_attention", "adakv", "pyramidkv"])
def test_one_token_needs_no_host_synchronisation(llama, method, budget, masked):
    """Fake tensors have no data: reading one on the host raises."""
    cache = CompressedCache(llama.config, compressor=method, **budget)
    llama(random_ids(2, 200), **{CACHE: cache}, attention_mask=torch.ones(2, 200, dtype=torch.int64))
    storage = cache.layers[0].state.storage
    before = storage.allocated.keys.shape, storage.length
    with FakeTensorMode(allow_non_fake_inputs=True):
        for step in range(1, 5):
            mask = torch.ones(2, 200 + step, dtype=torch.int64) if masked else None
            llama(torch.zeros(2, 1, dtype=torch.int64), **{CACHE: cache}, attention_mask=mask)
        with pytest.raises(DataDependentOutputException):
            bool(torch.ones(3).any())
    # Nothing was copied as a whole: the same memory took the tokens.
    assert cache.layers[0].state.storage is storage
    assert (storage.allocated.keys.shape, storage.length) == (before[0], before[1] + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_copies_no_layer(dtype):
    """No operation of a decoding step makes a tensor as large as the keys of a layer."""
    model = tiny_model("llama", intermediate_size=64).to(dtype)
    cache = WildCatCache(model.config, compressor="wildcat", ratio=1.0)
    model(random_ids(1, 2000), **{CACHE: cache})
    cache._pass_state.compressed = True
    largest = cache.layers[0].keys.numel()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                memory = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
                view = result.untyped_storage()._cdata in memory
                assert view or result.numel() < largest, function
            return result

    with Watch():
        model(random_ids(1, 1), **{CACHE: cache})


# What is refused


def test_a_copied_config_never_answers_wrongly(llama):
    cache = WildCatCache(copy.deepcopy(tiny_model("llama").config), compressor="wildcat", ratio=0.25)
    model = tiny_model("llama")
    with pytest.raises(RuntimeError, match=r"WildCatCache\(model.config"):
        model(random_ids(1, 50), **{CACHE: cache})
    assert cache.get_seq_length() == 0


def test_another_attention_function_is_refused():
    model = tiny_model("llama")
    cache = WildCatCache(model.config, compressor="wildcat", ratio=0.25)
    model(random_ids(1, 50), **{CACHE: cache})
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="'wildcat' attention"):
        model(random_ids(1, 1), **{CACHE: cache})
    assert cache.get_seq_length() == 50


def test_a_4d_mask_is_refused(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    with pytest.raises(RuntimeError, match="2D attention mask"):
        llama(random_ids(1, 5), **{CACHE: cache}, attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("width", [4, 6])
def test_a_mask_of_the_wrong_width_is_refused(llama, width):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    with pytest.raises(ValueError, match=f"attention_mask has width {width}.*must have width 5"):
        llama(random_ids(1, 5), **{CACHE: cache}, attention_mask=torch.ones(1, width))
    assert cache.get_seq_length() == 0


def test_another_batch_size_is_refused(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    llama(random_ids(1, 60), **{CACHE: cache})
    with pytest.raises(ValueError, match=r"batch_repeat_interleave\(n\)"):
        llama(random_ids(2, 1), **{CACHE: cache})
    assert cache.get_seq_length() == 60


def test_nan_in_keys_names_the_layer():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    cache = WildCatCache(model.config, compressor="wildcat", ratio=0.25)
    with pytest.raises(ValueError, match="layer 1: NaN or infinity in the keys"):
        model(random_ids(1, 60), **{CACHE: cache})
    assert cache.layers[1].get_seq_length() == 0
    model.model.layers[1].self_attn.k_proj.weight[0, 0] = 0.0
    with pytest.raises(RuntimeError, match=r"reset\(\)"):  # layers are out of step
        model(random_ids(1, 60), **{CACHE: cache})
    cache.reset()
    assert torch.isfinite(model(random_ids(1, 60), **{CACHE: cache}).logits).all()


def test_nan_in_a_decoded_key_is_found_at_the_fold():
    model = tiny_model("llama")
    cache = WildCatCache(model.config, compressor="wildcat", ratio=0.5)
    model(random_ids(1, 60), **{CACHE: cache})
    model.model.layers[2].self_attn.k_proj.weight[0, 0] = float("nan")
    assert model(random_ids(1, 1), **{CACHE: cache}).logits.isnan().any()  # not hidden until then
    with pytest.raises(ValueError, match="layer 2: NaN"):
        model(random_ids(1, 40), **{CACHE: cache})  # the fold of many tokens looks at the one as well
    assert cache.layers[2].keys.shape[-2] > 30


def test_mismatched_keys_and_values_are_refused(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=1.0)
    cache.layers[0].announce(1, 3, None)
    with pytest.raises(ValueError, match=r"layer 0: key_states \(1, 2, 3, 16\) and value_states \(1, 2, 4, 16\)"):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 4, 16), 0)
    cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    cache.layers[0].after_attention(torch.zeros(1, 4, 3, 16), 0.25)
    cache.layers[0].announce(1, 3, None)
    with pytest.raises(ValueError, match="other rows, heads, channels or another dtype"):
        cache.update(torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 3, 16), 0)
    assert cache.stored_length(0) == 3


@pytest.mark.parametrize("most", [40, 300])
@pytest.mark.parametrize("method", ["snapkv", "query_wildcat"])
def test_queries_are_not_the_models_memory_once_it_goes_on(method, most):
    """Whether the pass folds or not: the model may write over them, or let go of them."""
    cache = small_cache(layers=1, method=method, max_tokens=most)
    keys, values = tokens(1, 200)
    queries = keys[0].repeat_interleave(2, 1)
    layer = cache.layers[0]
    layer.announce(1, 200, None)
    cache.update(keys[0], values[0], 0)
    layer.after_attention(queries, SCALE)
    log = layer.state.log
    held = [tensor.clone() for tensor in log.tensors()]
    assert held and cache.stored_length(0) <= most
    queries.zero_()
    assert all(map(torch.equal, log.tensors(), held))
    memory = [queries.data_ptr(), queries.data_ptr() + queries.nbytes]
    assert not any(memory[0] <= tensor.untyped_storage().data_ptr() < memory[1] for tensor in log.tensors())


def test_a_model_in_place_of_its_config_is_refused():
    with pytest.raises(TypeError, match=r"pass model\.config"):
        WildCatCache(tiny_model("llama"), compressor="wildcat", ratio=0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": None, "max_tokens": None}, "neither"),
        ({"ratio": 0.25, "max_tokens": 100}, "both"),
        ({"ratio": 2.0}, "ratio=2.0"),
        ({"max_tokens": 10}, "max_tokens=10 is too small"),
        ({"settings": WildCatConfig(ratio=0.25), "seed": 1}, "seed given beside settings"),
        ({"settings": 0.25}, "settings=0.25"),
    ],
)
def test_wrong_settings_leave_the_config_alone(arguments, message):
    config = tiny_model("llama").config
    with pytest.raises(ValueError, match=message):
        WildCatCache(config, compressor="wildcat", **arguments)
    assert config._attn_implementation == "sdpa"


def test_a_prompt_past_the_positions_warns_once():
    model = tiny_model("llama", max_position_embeddings=64)
    cache = WildCatCache(model.config, compressor="wildcat", ratio=0.25)
    with pytest.warns(UserWarning, match="70 tokens long and the model has 64 positions"):
        model(random_ids(1, 70), **{CACHE: cache})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(random_ids(1, 1), **{CACHE: cache})


def test_attention_that_changes_the_values_is_refused(llama):
    """As DiffLlama's does, which is refused by name; others may come."""
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    llama(random_ids(1, 60), **{CACHE: cache})
    cache.layers[0].announce(1, 1, None)
    keys, values = cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    attention = llama.model.layers[0].self_attn
    with pytest.raises(RuntimeError, match="LlamaAttention changes the values"):
        cached_attention(attention, torch.zeros(1, 4, 1, 16), keys, values.clone(), None, scaling=0.25)


def test_keys_that_never_reach_the_attention_are_noticed(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    keys = torch.zeros(1, 2, 5, 16)
    cache.layers[0].announce(1, 5, None)
    cache.update(keys, keys, 0)
    with pytest.raises(RuntimeError, match="layer 0: its keys never reached"):
        cache.update(keys, keys, 1)
    assert cache.get_seq_length(1) == 0


def test_tokens_that_see_those_of_a_later_pass_are_refused(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.5)
    llama(random_ids(1, 4), **{CACHE: cache})
    with pytest.raises(ValueError, match="mask_function shows new tokens to some that the cache has read"):
        create_causal_mask(
            llama.config, torch.zeros(1, 5, 64), None, cache, or_mask_function=lambda *indices: indices[2] >= 0
        )


# The switch


def test_the_switch_survives_a_copy_and_is_not_saved(tmp_path):
    for before in ("eager", "sdpa"):
        model = tiny_model("llama", before)
        WildCatCache(model.config, compressor="wildcat", ratio=0.25)
        assert fallback_of(model.config._attn_implementation) == before
        for kept in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
            assert fallback_of(kept._attn_implementation) == before
        WildCatCache(model.config, compressor="wildcat", ratio=0.5)
        assert fallback_of(model.config._attn_implementation) == before
        model.save_pretrained(tmp_path)
        assert "wildcat" not in (tmp_path / "config.json").read_text()
        assert fallback_of(tf.AutoConfig.from_pretrained(tmp_path)._attn_implementation) is None


@given(st.text(st.characters(codec="utf-8"), min_size=1))
@example("flash_attention_2")
@example("kernels-community/flash-attn3")
def test_a_switched_name_holds_the_fallback_and_nothing_that_transformers_looks_for(fallback):
    name = switched_name(fallback)
    assert fallback_of(name) == fallback
    assert "flash" not in name and "/" not in name and name.startswith("wildcat")
    assert fallback_of(fallback) is None or fallback.startswith("wildcat")


def test_repr_says_what_is_held(llama):
    cache = WildCatCache(llama.config, compressor="wildcat", ratio=0.25)
    llama(random_ids(1, 200), **{CACHE: cache})
    text = repr(cache)
    assert "WildCatCache(WildCat(), ratio=0.25;" in text and "200 tokens seen, 50 stored" in text and "MiB" in text
