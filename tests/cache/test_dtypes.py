"""Dtypes: what `torch.set_default_dtype` says changes nothing, and float64 models are compressed like others."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from tests.coreset.mass import token_mass
from tests.driver import METHODS, SCALE, read, small_cache, tokens
from tests.tiny import FAMILIES, random_ids, tiny_model
from tests.words import tokenizer, words
from wildcat_kv import CompressedCache, WildCatCache, compress_context, compress_kv, weighted_attention
from wildcat_kv.compressors import Scorer
from wildcat_kv.hook.keyword import CACHE

SETTINGS = {"bin_rank": 4, "sink": 2, "window": 4}
# Model and default: each default is wrong for some tensor that a cache makes.
PAIRS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class NoFloat16(TorchDispatchMode):
    """Refuses tensors in float16, the default here, which no input has: they took the default.

    Tensors on the meta device are weights of the model that is probed, which has none to compute with.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            made = isinstance(tensor, torch.Tensor) and not tensor.is_meta
            assert not (made and tensor.dtype == torch.float16), function
        return result


@pytest.fixture
def llama():
    return tiny_model("llama")


def logits(model, cache, ids, steps=8):
    """Logits of a prompt, and of greedy tokens after it."""
    found = []
    for _ in range(steps):
        found.append(model(ids, **{CACHE: cache}).logits[:, -1:])
        ids = found[-1].argmax(-1)
    return torch.cat(found, dim=1)


def compressed(model, method="wildcat", **settings):
    return CompressedCache(model.config, compressor=METHODS[method], **{"ratio": 0.25, **SETTINGS, **settings})


# The default dtype


@pytest.mark.parametrize("method", METHODS)
def test_the_default_dtype_changes_no_logits(llama, method):
    ids = random_ids(1, 60)
    for dtype, default in PAIRS:
        model = llama.to(dtype)
        wanted = logits(model, compressed(model, method), ids)
        with default_dtype(default):
            assert torch.equal(logits(model, compressed(model, method), ids), wanted), (dtype, default)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", *FAMILIES])
def test_the_default_dtype_changes_no_logits_of_other_families(family):
    model, ids = tiny_model(family), random_ids(1, 60)
    wanted = logits(model, compressed(model), ids)
    with default_dtype(torch.bfloat16):
        assert torch.equal(logits(model, compressed(model), ids), wanted)


def test_the_default_dtype_changes_nothing_of_static_caches_and_of_contexts(llama):
    def run():
        cache = WildCatCache(llama.config, max_tokens=30, static=True, **SETTINGS)
        context = compress_context(llama, tokenizer(), words(60), compressor="kvzip", ratio=0.5)
        return logits(llama, cache, random_ids(1, 60), steps=20), context.ask("w7 w8", max_new_tokens=8)

    steps, answer = run()
    with default_dtype(torch.bfloat16):
        again, same = run()
    assert torch.equal(again, steps) and same == answer


@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_of_a_cache_takes_the_default_dtype(method):
    keys, values = tokens(2, 90)
    mask = torch.ones(2, 90, dtype=torch.bool)
    mask[1, :7] = False
    with default_dtype(torch.float16), NoFloat16():
        cache = small_cache(method=method, ratio=0.5)
        read(cache, keys, values, 0, 40, mask)
        for start in range(40, 60):
            read(cache, keys, values, start, 1, mask)
        read(cache, keys, values, 60, 30, mask)


@pytest.mark.parametrize("temperature", ["released", "theory"])
def test_no_tensor_of_the_functions_takes_the_default_dtype(temperature):
    keys, values, bound = torch.randn(2, 300, 8), torch.randn(2, 300, 8), torch.ones(2)
    with default_dtype(torch.float16), NoFloat16():
        few = compress_kv(keys, values, rank=12, bins=3, temperature=temperature)
        compress_kv(keys, values, rank=80, temperature=temperature)
        compress_kv(few.keys, few.values, rank=6, weights=few.weights, valid=few.valid, value_bound=bound)
        token_mass(keys, rank=12, temperature=temperature)
        weighted_attention(keys[:, None, :5], keys[:, None], values[:, None])


# Models in float64


@pytest.mark.parametrize("family", ["gemma2", *FAMILIES])
def test_an_exact_cache_in_float64_is_dynamic_cache(family):
    model, ids = tiny_model(family).double(), random_ids(2, 60)
    wanted = logits(model, DynamicCache(config=model.config), ids)
    assert torch.equal(logits(model, WildCatCache(model.config, ratio=1.0), ids), wanted)


@pytest.mark.parametrize("settings", [{}, {"ratio": None, "max_tokens": 24}], ids=["ratio", "max_tokens"])
@pytest.mark.parametrize("method", METHODS)
def test_float64_gives_what_float32_gives(method, settings):
    keys, values = tokens(2, 90)
    found = {}
    for dtype in (torch.float32, torch.float64):
        cache = small_cache(method=method, **{"ratio": 0.5, **settings})
        read(cache, keys.to(dtype), values.to(dtype), 0, 60)
        found[dtype] = [read(cache, keys.to(dtype), values.to(dtype), start, 1)[-1] for start in range(60, 90)]
    for narrow, wide in zip(found[torch.float32], found[torch.float64], strict=True):
        assert wide.dtype == torch.float64
        torch.testing.assert_close(wide.float(), narrow, rtol=1e-3, atol=1e-3)
    held = cache.layers[0].state.entries
    assert (held.keys.dtype, held.values.dtype, held.weights.dtype) == (torch.float64, torch.float64, torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_models_in_float64_generate(llama, method):
    wanted = logits(llama, compressed(llama, method), random_ids(2, 60), steps=2)
    model = llama.double()
    torch.testing.assert_close(
        logits(model, compressed(model, method), random_ids(2, 60), steps=2).float(), wanted, rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if isinstance(method, Scorer)])
def test_tokens_that_are_kept_keep_all_digits_of_float64(method):
    keys, values = (tensor.double() + torch.rand(tensor.shape, dtype=torch.float64) for tensor in tokens(1, 90))
    cache = small_cache(method=method, ratio=None, max_tokens=25)
    for start in range(0, 90, 30):
        read(cache, keys, values, start, 30)
    held = cache.layers[0].state.entries
    same = (held.keys[0, 0, :, None] == keys[0, 0, 0]).all(-1) & (held.values[0, 0, :, None] == values[0, 0, 0]).all(-1)
    assert held.valid.all() and same.any(-1).all()
    queries = torch.randn(1, 4, 1, 16, dtype=torch.float64)
    found = cache.layers[0].attend(queries, *cache.layers[0].state.storage.view(), SCALE, {})
    wanted = (queries[:, :2] * SCALE @ held.keys[:, :1].mT).softmax(-1) @ held.values[:, :1]
    torch.testing.assert_close(found[:, :2], wanted, rtol=1e-12, atol=1e-12)


def test_a_static_cache_in_float64_gives_what_one_that_grows_gives(llama):
    model, budget = llama.double(), {"ratio": None, "max_tokens": 30}
    wanted = logits(model, compressed(model, **budget), random_ids(1, 60), steps=20)
    static = compressed(model, **budget, static=True)
    torch.testing.assert_close(logits(model, static, random_ids(1, 60), steps=20), wanted, rtol=1e-4, atol=1e-4)


def test_a_context_in_float64_survives_a_file(llama, tmp_path):
    model = llama.double()
    cache = compressed(model)
    model(random_ids(1, 60), **{CACHE: cache})
    cache.save(tmp_path / "context.safetensors")
    loaded = CompressedCache.load(tmp_path / "context.safetensors", model.config, compressor=METHODS["wildcat"]).clone()
    assert loaded.layers[0].keys.dtype == torch.float64
    assert torch.equal(logits(model, loaded, random_ids(1, 9, 3)), logits(model, cache, random_ids(1, 9, 3)))


def test_keys_beyond_the_range_of_float32_are_refused():
    keys, values = (tensor.double() for tensor in tokens(1, 40))
    keys[0, 0, 0, 5] = 1e200
    with pytest.raises(ValueError, match="layer 0: NaN or infinity in the keys"):
        read(small_cache(ratio=0.5), keys, values, 0, 40)
