"""Where every method is exact, and what it tends to elsewhere."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.attention.heads import METHODS, SCALE, heads
from wildcat_kv.attention import (
    Exact,
    HyperAttention,
    KDEformer,
    NearWildCat,
    Performer,
    Reformer,
    ScatterBrain,
    Thinformer,
    WildCatAttention,
)

# What makes each method exact for 70 keys.
COVERING = {
    "wildcat": {"rank": 70, "bins": 1},
    "near_wildcat": {"near": 4},
    "uniform": {"rank": 70},
    "stratified": {"rank": 70},
    "thinformer": {"g": 3},
    "balancekv": {"rank": 70},
    "scatterbrain": {"band": 140},
    "reformer": {"chunk": 35},
    "kdeformer": {"block": 70},
    "hyperattention": {"block": 70},
}


@pytest.mark.parametrize("name", COVERING)
def test_all_keys_are_exact(name):
    query, key, value = heads(q=33, dtype=torch.float32)
    method = replace(METHODS[name], **COVERING[name])
    expected = Exact()(query, key, value)
    torch.testing.assert_close(method(query, key, value), expected, rtol=0, atol=2e-6)
    assert method.cost(70, 6) == Exact().cost(70, 6)
    assert (METHODS[name](query, key, value) - expected).abs().max() > 1e-3


def test_band_and_two_chunks_are_exact_without_a_short_cut():
    query, key, value = heads(q=33)
    expected = Exact()(query, key, value)
    for method in (Reformer(chunk=36, rounds=3), ScatterBrain(band=139, features=8)):
        torch.testing.assert_close(method(query, key, value), expected)


def test_little_less_than_all_keys_is_nearly_exact():
    query, key, value = heads(q=33)
    expected = Exact()(query, key, value, scale=SCALE)
    for method in (WildCatAttention(rank=68), NearWildCat(rank=68, bins=1, near=0, residual=0.0, dims=None)):
        torch.testing.assert_close(method(query, key, value, scale=SCALE), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_equal_keys_are_averaged(method):
    """Equal keys have equal scores: methods that weigh all keys are exact, others average what they kept."""
    query, key, value = heads(q=33)
    key = key[:, :, :1].expand_as(key)
    output = method(query, key, value)
    assert output.isfinite().all()
    if method.name not in ("scatterbrain", "reformer", "kdeformer", "hyperattention"):  # to which places matter
        torch.testing.assert_close(output, output[:, :, :1].expand_as(output))
    if method.name in ("exact", "wildcat", "near_wildcat", "performer"):
        expected = value.mean(2).repeat_interleave(2, 1).unsqueeze(2).expand_as(output)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_equal_values_come_back(method):
    query, key, value = heads(q=33)
    value = value[:, :, :1].expand_as(value)
    output = method(query, key, value)
    torch.testing.assert_close(output, value[:, :, :1].repeat_interleave(2, 1).expand_as(output), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["wildcat", "near_wildcat"])
def test_duplicated_keys_take_one_slot(name):
    """Ten different keys, seven times each, in bins of all: slots for ten are enough."""
    query, key, value = heads(q=33)
    key = key[:, :, :10].repeat(1, 1, 7, 1)
    settings = {"near": 0, "residual": 0.0, "dims": None} if name == "near_wildcat" else {}
    method = replace(METHODS[name], rank=12, bins=1, **settings)
    torch.testing.assert_close(method(query, key, value), Exact()(query, key, value), rtol=0, atol=1e-4)


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 5))
def test_wildcat_of_a_full_rank_is_exact_whatever_the_bins(n, bins, seed):
    query, key, value = heads(7, n, seed=seed)
    method = WildCatAttention(rank=n + bins, bins=min(bins, n))
    torch.testing.assert_close(method(query, key, value), Exact()(query, key, value), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [WildCatAttention, NearWildCat])
def test_a_common_shift_of_the_keys_changes_nothing(kind):
    query, key, value = heads(q=33)
    method = kind(rank=24, bins=4)
    torch.testing.assert_close(method(query, key + 7, value), method(query, key, value), rtol=0, atol=1e-4)


def test_errors_fall_with_the_work():
    query, key, value = heads(200, 256, heads=2, kv_heads=2, dtype=torch.float32)
    expected = Exact()(query, key, value, scale=0.1)

    def error(method):
        return float((method(query, key, value, scale=0.1) - expected).norm())

    assert error(Performer(features=4000)) < 0.3 * error(Performer(features=40))
    assert error(ScatterBrain(band=16, features=4000)) < 0.3 * error(ScatterBrain(band=16, features=40))
    assert error(Reformer(chunk=32, rounds=16)) < 0.6 * error(Reformer(chunk=32, rounds=1))
    assert error(Thinformer(g=3)) < 0.7 * error(Thinformer(g=1))
    for kind, settings in ((KDEformer, {}), (HyperAttention, {"exact_below": 0})):
        few, many = (kind(block=16, samples=samples, **settings) for samples in (16, 1600))
        assert error(many) < 0.3 * error(few)


@pytest.mark.parametrize("name", ["kdeformer", "hyperattention"])
def test_sampling_is_unbiased(name):
    """The mean weight of each key over many seeds is 1: so are sums of any terms the exact ones."""
    _, key, value = heads(4, 30, d=3, d_v=2, heads=1, kv_heads=1, batch=())
    method = replace(METHODS[name], block=15, planes=1)
    draws = []
    for seed in range(2000):
        samples = replace(method, seed=seed).draw(key.unsqueeze(0) if name == "hyperattention" else value.unsqueeze(0))
        draws.append(
            torch.zeros(30, dtype=torch.float64).index_add(0, samples.places[0, 0], samples.log_weight[0, 0].exp())
        )
    weights = torch.stack(draws)
    error = (weights.mean(0) - 1) / (weights.std(0) / 2000**0.5)
    assert error.abs().max() < 4.5
