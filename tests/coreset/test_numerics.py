"""Keys of every kind, in every dtype: what is stored keeps the dtype, and nothing is ever NaN."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.driver import read, small_cache
from tests.tiny import random_ids, tiny_model
from wildcat_kv import WildCatCache
from wildcat_kv.cache.budget import kept_tokens
from wildcat_kv.hook.keyword import CACHE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTH = 140


def keys_of(kind, generator):
    """Keys (2 layers, 2 rows, 2 heads, LENGTH, 16) of a kind that breaks careless arithmetic."""
    keys = torch.randn(2, 2, 2, LENGTH, 16, generator=generator)
    changed = {
        "random": lambda: keys,
        "zero": lambda: keys * 0,
        "constant": lambda: keys[..., :1, :].expand_as(keys),
        "duplicates": lambda: keys[..., torch.arange(LENGTH) % 5, :],
        "nearly the same": lambda: keys[..., :1, :] + 1e-4 * keys,
        "huge": lambda: 1e4 / 4 * keys,  # norms of about 1e4
        "tiny": lambda: 1e-6 * keys,
        "one huge": lambda: torch.where(torch.arange(LENGTH).view(-1, 1) == 7, 1e4 / 4 * keys, keys),
        "far off": lambda: keys + 300,
        "one channel": lambda: keys * (torch.arange(16) == 3) * 50,
    }
    return changed[kind]().contiguous()


KINDS = ["random", "zero", "constant", "duplicates", "nearly the same", "huge", "tiny", "one huge", "far off"]
KINDS.append("one channel")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    kind=st.sampled_from(KINDS),
    budget=st.one_of(
        st.builds(lambda ratio: {"ratio": ratio}, st.sampled_from([0.02, 0.1, 0.25, 0.37, 0.5, 0.99])),
        st.builds(lambda most: {"max_tokens": most}, st.integers(16, 90)),
    ),
    bin_rank=st.integers(1, 5),
    first=st.integers(1, LENGTH - 40),
    temperature=st.sampled_from(["released", "theory"]),
    weights=st.sampled_from(["nystrom", "clipped"]),
    seed=st.integers(0, 999),
)
def test_nothing_is_ever_nan(dtype, kind, budget, bin_rank, first, temperature, weights, seed):
    """Prompt, single tokens and a chunk, of budgets and bins that seldom divide."""
    generator = torch.Generator().manual_seed(seed)
    keys = keys_of(kind, generator).to(dtype)
    values = torch.randn(keys.shape, generator=generator).to(dtype)
    cache = small_cache(**budget, bin_rank=bin_rank, temperature=temperature, weights=weights)
    chunks = [(0, first), *((at, 1) for at in range(first, first + 20)), (first + 20, 20)]
    for at, count in chunks:
        outputs = read(cache, keys, values, at, count)
        seen = values[..., : at + count, :].float()
        for layer, output in enumerate(outputs):
            if output is None:
                continue
            assert output.dtype == dtype and torch.isfinite(output).all()
            # An average of values, by design of the clip.
            own = seen[layer].repeat_interleave(2, 1)
            assert (output <= own.amax(-2, keepdim=True) + 1e-2).all()
            assert (output >= own.amin(-2, keepdim=True) - 1e-2).all()
    for layer in cache.layers:
        entries = layer.state.storage.entries
        assert entries.keys.dtype == entries.values.dtype == dtype and entries.weights.dtype == torch.float32
        assert all(torch.isfinite(tensor).all() for tensor in entries.tensors()[:3])


@given(
    st.integers(2, 200),
    st.sampled_from([0.01, 0.1, 0.25, 1 / 3, 0.5, 0.77, 0.999]),
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 40),
)
def test_every_budget_is_met_exactly_after_a_prompt(length, ratio, sink, window, bin_rank):
    """Bins longer than the text, ends larger than the budget, and numbers that do not divide."""
    keys, values = torch.randn(2, 2, 1, 2, length, 16)
    cache = small_cache(ratio=ratio, sink=sink, window=window, bin_rank=bin_rank)
    read(cache, keys, values, 0, length)
    assert cache.stored_length() == kept_tokens(length, ratio)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_as_near_as_its_rounding_allows(dtype):
    """Compressed in float32: the same pivots as from the same numbers in float32, and the same weights."""
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, 1, 2, 200, 16, generator=generator).to(dtype) for _ in range(2))
    half, full = small_cache(ratio=0.25), small_cache(ratio=0.25)
    read(half, keys, values, 0, 200)
    read(full, keys.float(), values.float(), 0, 200)
    for ours, theirs in zip(half.layers, full.layers, strict=True):
        assert torch.equal(ours.keys.float(), theirs.keys)
        assert torch.equal(ours.state.storage.entries.weights, theirs.state.storage.entries.weights)
        # Rounded twice: as numerators, and again once they are divided by their mass.
        torch.testing.assert_close(ours.values.float(), theirs.values, rtol=2.1 * torch.finfo(dtype).eps / 2, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("budget", [{"ratio": 0.25}, {"max_tokens": 100}])
def test_models_in_half_precision_generate(dtype, budget):
    model = tiny_model("llama", initializer_range=0.1).to(dtype)
    cache = WildCatCache(model.config, compressor="wildcat", **budget)
    out = model.generate(
        random_ids(2, 150),
        **{CACHE: cache},
        max_new_tokens=100,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert all(torch.isfinite(logits).all() for logits in out.logits)
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}


def test_autocast_does_not_reach_the_compression():
    keys, values = torch.randn(2, 2, 1, 2, 200, 16)
    plain, cast = small_cache(ratio=0.25), small_cache(ratio=0.25)
    read(plain, keys, values, 0, 200)
    with torch.autocast("cpu", torch.bfloat16):
        read(cast, keys, values, 0, 200)
    for ours, theirs in zip(cast.layers, plain.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
