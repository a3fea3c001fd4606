"""The guarantee: the rank that suffices, the bound of a coreset, the measured error."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from wildcat_kv import compress_kv, weighted_attention
from wildcat_kv.coreset import reference
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.guarantee import attention_error, error_bound, log_taylor_rest, rank_for_error

# The rank for an error by the temperature with the least bound, as first derived; the best temperature needs less.
FIRST_DERIVED = {(2, 1.0, 0.1): 389, (2, 1.0, 1e-3): 1022, (4, 0.25, 0.1): 217, (4, 0.25, 1e-3): 1940}
FIRST_DERIVED |= {(4, 1.0, 0.1): 2331, (4, 1.0, 1e-3): 9361, (8, 1.0, 0.1): 23805}


def rank(d, gamma, error, **options):
    return rank_for_error(16384, d, error, query_norm=gamma, key_norm=1.0, scale=1.0, **options)


def bounded(n, d, norm, generator):
    """Points of at most this norm whose mean is 0."""
    points = torch.randn(n, d, generator=generator, dtype=torch.float64)
    points = points / points.norm(dim=-1, keepdim=True)
    points = points - points.mean(0)
    return points * (norm / points.norm(dim=-1).max())


def exact_attention(q, k, v, scale):
    return torch.softmax(scale * q.double() @ k.double().mT, dim=-1) @ v.double()


# The rank


@pytest.mark.parametrize(("setting", "first"), FIRST_DERIVED.items())
def test_the_best_temperature_needs_less_than_the_first_derived(setting, first):
    d, gamma, error = setting
    best = rank(d, gamma, error)
    assert 0.6 * first < best.rank < 0.8 * first
    s, theta = best.degree, best.theta
    by_hand = math.comb(s + d, d) * (1 + math.log(32 / error**2) + gamma * (theta + 1 / theta))
    assert best.rank == math.ceil(by_hand)
    assert 32 * math.exp(gamma * theta + log_taylor_rest(s, gamma / theta)) <= error**2 * (1 + 1e-9)


@given(st.integers(1, 10), st.floats(0.01, 8), st.floats(1e-4, 1), st.floats(1.01, 3))
def test_it_grows_with_all_that_makes_it_harder(d, gamma, error, factor):
    base = rank(d, gamma, error).rank
    assert rank(d + 1, gamma, error).rank >= base
    assert rank(d, gamma * factor, error).rank >= base
    assert rank(d, gamma, error / factor).rank >= base
    assert rank(d, gamma, error, bins=3).rank == 3 * base
    for theta in (0.8, 1.0, 2.0, 3.94582):
        assert rank(d, gamma, error, theta=theta).rank >= base


@given(st.integers(0, 40), st.floats(1e-3, 60))
def test_the_rest_of_the_series_is_its_definition(degree, rho):
    terms = [math.exp(j * math.log(rho) - math.lgamma(j + 1)) for j in range(degree + 1, 400)]
    assert log_taylor_rest(degree, rho) == pytest.approx(math.log(math.fsum(terms)), abs=1e-9)


def test_real_heads_get_a_rank_beyond_their_tokens():
    found = rank_for_error(16_384, 64, 0.1, query_norm=14.0, key_norm=14.0)  # b R_Q R_K = 24.5
    assert found.vacuous and found.rank > 2**64
    assert not rank_for_error(16_384, 4, 0.1, query_norm=1.0, key_norm=1.0).vacuous
    assert rank_for_error(100, 4, 0.1, query_norm=1.0, key_norm=1.0).vacuous


@pytest.mark.parametrize("wrong", [{"n": 0}, {"error": 0.0}, {"error": math.nan}, {"key_norm": math.inf}, {"bins": 0}])
def test_a_number_that_cannot_be_is_named(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name}={value} must be positive and finite"):
        rank_for_error(**{"n": 100, "dim": 4, "error": 0.1, "query_norm": 1.0, "key_norm": 1.0, **wrong})


@pytest.mark.parametrize("seed", range(3))
def test_the_error_at_that_rank_is_below_its_target(seed):
    """On bounded inputs, with the temperature that comes out; far below, in truth."""
    generator = torch.Generator().manual_seed(seed)
    n, d, gamma, error = 600, 2, 1.0, 0.1
    found = rank(d, gamma, error)
    q, k = bounded(40, d, gamma, generator), bounded(n, d, 1.0, generator)
    v = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    noise = -torch.empty(found.rank, n, dtype=torch.float64).exponential_(generator=generator).log()
    got = reference.wildcat(q, k, v, found.rank, noise, scale=1.0, R_Q=gamma * 3.94582 / found.theta)
    assert (got - exact_attention(q, k, v, 1.0)).abs().max() <= 0.01 * error * v.abs().max()


# The proof's steps, on random inputs


@given(st.integers(1, 60), st.integers(1, 6), st.floats(0.1, 30), st.integers(0, 999))
def test_recentred_keys_have_denominators_of_at_least_n(n, d, norm, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = keys - keys.mean(0)
    q = norm * torch.randn(5, d, generator=generator, dtype=torch.float64)
    assert (torch.logsumexp(q @ x.T, dim=-1) >= math.log(n) - 1e-9).all()


@given(st.integers(2, 5), st.integers(1, 30), st.integers(1, 3), st.floats(0.05, 2), st.booleans(), st.integers(0, 999))
def test_the_bound_holds(d, slots, bins, norm, far, seed):
    """In float64, of the definition: any rank, bins and norms, keys far from 0."""
    generator = torch.Generator().manual_seed(seed)
    n, slots = 60, max(slots, bins)
    q, k, v = (torch.randn(size, d, generator=generator, dtype=torch.float64) for size in (7, n, n))
    q, k = norm * q, norm * k + 5 * far
    query_norm = float(q.norm(dim=-1).max())
    noise = -torch.empty(slots, n, dtype=torch.float64).exponential_(generator=generator).log()
    options = {"scale": 0.7, "bins": bins}
    made = compress_kv(k, v, rank=slots, noise=noise, query_norm=query_norm, **options)
    k_s, v_s, w = reference.compress_kv(k, v, slots, noise, scale=0.7, R_Q=query_norm, B=bins)
    got = reference.wtdattn(q, k_s, v_s, w, v.amin(0), v.amax(0), scale=0.7)
    wrong = (got - exact_attention(q, k, v, 0.7)).abs() / (v.amax(0) - v.amin(0))
    order = torch.cdist(made.keys, k_s).argmin(-1)  # sorted by position
    # An early end leaves padding, which the definition has not.
    assume(len(w) == slots and torch.equal(k_s[order], made.keys))
    bound = error_bound(q, k, Coreset(k_s[order], v_s[order], w[order], made.valid), query_norm=query_norm, **options)
    assert ((bound >= 0) & (bound <= 1)).all()
    assert (wrong.amax(-1) <= bound + 1e-9).all()


@pytest.mark.parametrize("bins", [1, 4])
def test_the_bound_is_of_use_on_bounded_inputs(bins):
    """It falls with the rank, and vanishes where nothing is compressed."""
    q, k, v = 0.5 * torch.randn(2, 20, 4), 0.5 * torch.randn(2, 400, 4), torch.randn(2, 400, 3)
    norm = q.norm(dim=-1).amax(-1)
    bounds = []
    for slots in (16, 64, 200, 400):
        coreset = compress_kv(k, v, rank=slots, bins=bins, query_norm=norm)
        bounds.append(float(error_bound(q, k, coreset, bins=bins, query_norm=norm).max()))
    assert bounds[-1] == 0 and bounds[2] < 0.25 and sorted(bounds, reverse=True) == bounds


def test_padding_has_no_part_in_the_bound():
    q, k, v = 0.5 * torch.randn(1, 20, 4), 0.5 * torch.randn(1, 90, 4), torch.randn(1, 90, 3)
    alone = error_bound(q, k, compress_kv(k, v, rank=40, query_norm=1.0), query_norm=1.0)
    padded = [torch.cat((x, torch.full((1, 30, x.shape[-1]), math.nan)), dim=1) for x in (k, v)]
    valid = torch.arange(120) < 90
    noisy = compress_kv(*padded, rank=40, query_norm=1.0, valid=valid)
    bound = error_bound(q, padded[0], noisy, query_norm=1.0, valid=valid)
    assert bool((bound < 1).any()) and bound.isfinite().all()
    assert bound.mean() == pytest.approx(float(alone.mean()), rel=1.0)  # other pivots, the same keys


# The measured error


def test_all_rows_give_the_whole_error():
    q, k, v = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 5)
    output = torch.randn(2, 4, 30, 5)
    whole = exact_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), 0.3)
    found = attention_error(q, k, v, output, rows=99, scale=0.3)
    wrong = output - whole
    assert found.relative.shape == (2, 4)
    assert torch.allclose(found.relative.double(), wrong.norm(dim=(-2, -1)) / whole.norm(dim=(-2, -1)), rtol=1e-5)
    assert torch.allclose(found.largest.double(), wrong.abs().amax((-2, -1)), rtol=1e-5)


def test_few_rows_estimate_it():
    q, k, v = torch.randn(8, 1000, 8), torch.randn(8, 200, 8), torch.randn(8, 200, 8)
    coreset = compress_kv(k, v, rank=20)
    output = weighted_attention(q, coreset.keys, coreset.values, coreset.weights)
    every, some = (attention_error(q, k, v, output, rows=rows).relative for rows in (1000, 32))
    assert ((some / every).log().abs() < 0.5).all() and not torch.equal(some, every)
    assert torch.equal(some, attention_error(q, k, v, output, rows=32).relative)
    assert not torch.equal(some, attention_error(q, k, v, output, rows=32, seed=1).relative)


def test_masked_keys_are_left_out_of_the_exact_rows():
    q, k, v = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    padding = torch.arange(9) >= torch.tensor([[9], [5]])
    shown = ~padding[:, None, None]
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown)
    assert attention_error(q, k, v, output, key_padding_mask=padding).largest.max() < 1e-5
    nothing = attention_error(q, k, v, torch.zeros_like(q), key_padding_mask=padding | True)
    assert nothing.relative.eq(0).all() and nothing.largest.eq(0).all()


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        attention_error(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), rows=0)
