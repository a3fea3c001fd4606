"""Devices compute in few launches, and hosts in few numbers: both to the same end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.launches import Launches, as_on_a_device
from tests.tiny import random_ids, tiny_model
from wildcat_kv import CompressedCache
from wildcat_kv.cache.banding import Line, sort_into_bands
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.storage import Storage
from wildcat_kv.coreset.slot_facts import SlotFacts
from wildcat_kv.hook.keyword import CACHE

STEPS = 60


def answer(model, masked, method, budget):
    """Logits of a prompt and of the tokens behind it, folds between them, and the entries then held."""
    cache = CompressedCache(model.config, compressor=method, **budget)
    ids, mask = random_ids(2, 300 + STEPS), torch.ones(2, 300 + STEPS, dtype=torch.int64)
    if masked:
        mask[0, :40] = 0
    parts = [(0, 300), *((at, at + 1) for at in range(300, 300 + STEPS))]
    with torch.no_grad():
        logits = [
            model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop] if masked else None,
                **{CACHE: cache},
                logits_to_keep=1,
            ).logits
            for start, stop in parts
        ]
    return torch.cat(logits, dim=1), [layer.state.entries for layer in cache.layers]


@pytest.mark.parametrize("masked", [False, True], ids=["alike", "ragged"])
@pytest.mark.parametrize(
    "budget", [{"ratio": 0.25}, {"ratio": 0.25, "sink": 4}, {"max_tokens": 100}, {"ratio": 0.25, "bits": 4}], ids=str
)
@pytest.mark.parametrize("method", ["wildcat", "query_wildcat", "adakv"])
def test_a_device_answers_as_a_host_does(method, budget, masked):
    model = tiny_model("llama")
    expected, held = answer(model, masked, method, budget)
    with as_on_a_device():
        found, there = answer(model, masked, method, budget)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(there, held, strict=True):
        for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@st.composite
def unequal(draw):
    """A rectangle whose heads hold unequally many slots, anywhere among its slots, and its line."""
    rows, heads, slots = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(0, 30))
    line = Line(draw(st.integers(0, 2)), 0, slots, draw(st.integers(1, 3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = torch.rand(rows, heads, 1, generator=generator)
    n = line.sink + slots + line.exact + draw(st.integers(0, 3))
    stop = n - line.exact
    place = torch.arange(n)
    slot = (place >= stop - slots) & (place < stop)
    there = torch.rand(rows, heads, n, generator=generator) < draw(st.sampled_from([0.0, 1.0])) * 0.5 + share / 2
    valid = torch.where(slot, there, place >= stop - slots - line.sink)
    lowest = draw(st.sampled_from([-0.2, 0.5, 1.0]))
    weights = torch.where(slot, lowest + (1 - lowest) * torch.rand(rows, heads, n, generator=generator), 1.0) * valid
    keys, values, state = (torch.randn(rows, heads, n, wide, generator=generator) for wide in (4, 3, 1))
    return Entries(keys, values, weights, valid, state), line


@given(unequal())
def test_bands_made_at_once_are_those_made_one_by_one(drawn):
    whole, line = drawn
    slots = slice(whole.valid.shape[2] - line.exact - line.slots, whole.valid.shape[2] - line.exact)
    facts = SlotFacts.read(whole.weights[:, :, slots], whole.valid[:, :, slots])
    lines = [line] * whole.valid.shape[0]
    expected = sort_into_bands(whole, lines, Storage([whole]), None, 16)
    with as_on_a_device(), Launches() as launches:
        found = sort_into_bands(whole, lines, Storage([whole]), None, 16, facts)
    assert launches.reads.total() == 1  # the Storage that stands for the one before
    assert [band.places for band in found.bands] == [band.places for band in expected.bands]
    for one, other in zip(found.bands, expected.bands, strict=True):
        assert (one.sink, one.waiting, one.open.length) == (other.sink, other.waiting, other.open.length)
        assert one.open.weighting is other.open.weighting
        mine, theirs = one.open.entries, other.open.entries
        assert torch.equal(mine.valid, theirs.valid) and torch.equal(mine.weights, theirs.weights)
        for own, their in zip(mine.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(own[mine.valid], their[mine.valid])


def test_nan_in_keys_is_found_at_the_fold_and_nothing_is_overwritten():
    """Nothing waits for it before: the keys are looked at with what the fold reads anyway."""
    model = tiny_model("llama")
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    for method in ("wildcat", "query_wildcat"):
        cache = CompressedCache(model.config, compressor=method, ratio=0.25)
        with as_on_a_device(), pytest.raises(ValueError, match="layer 1: NaN or infinity in the keys"):
            model(random_ids(1, 300), **{CACHE: cache})
        assert cache.layers[1].stored == 300 and cache.layers[1].state.folded_range is None


def test_large_keys_whose_sum_overflows_are_no_reason_to_stop():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.k_proj.weight.data.mul_(1e36)
    cache = CompressedCache(model.config, compressor="uniform", ratio=0.25)
    with as_on_a_device():
        model(random_ids(1, 300), **{CACHE: cache})
    assert cache.layers[1].stored < 300
