"""RPNYS in float32 batches: the pivots, their law and the weights against the reference."""

from contextlib import nullcontext

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.launches import Launches, as_on_a_device
from wildcat_kv import weighted_attention
from wildcat_kv.coreset import launching, reference
from wildcat_kv.coreset.noise import gumbel_noise
from wildcat_kv.coreset.rpnys import nystrom_weights, pivoted_cholesky


@pytest.fixture(params=["host", "device"], scope="module", autouse=True)
def way(request):
    """Pivots are drawn in the way of a host, and in that of a device."""
    with as_on_a_device() if request.param == "device" else nullcontext():
        yield request.param


def points_and_noise(seed, n, d, rank, spread, batch=()):
    generator = torch.Generator().manual_seed(seed)
    points = spread * torch.randn(*batch, n, d, generator=generator)
    noise = -torch.empty(*batch, rank, n).exponential_(generator=generator).log()
    return points, noise


def factorised(seed, n, d, rank, spread):
    points, noise = points_and_noise(seed, n, d, min(rank, n), spread)
    factor = pivoted_cholesky(points, noise)
    return points, noise, factor, nystrom_weights(points, factor)


cases = st.tuples(
    st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 16), st.integers(1, 12), st.floats(0.05, 3.0)
)


def rounded(kernel, points):
    """The kernel with entries off by as much as float32 distances are: what it changes, rounding may change."""
    noise = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = 2.0**-22 * (1 + float(points.square().sum(-1).max()))
    return kernel * (1 + error * (noise + noise.T).fill_diagonal_(0))


def assert_reference_pivots(points, noise, pivots):
    """Each draw is the reference's, as far as rounding lets one tell."""
    kernel = reference.kernel(points.double())
    diagonal, other = kernel.diagonal(), rounded(kernel, points)
    for step in range(len(noise)):
        left = reference.residual_diagonal(kernel, pivots[:step])
        doubt = ((left - reference.residual_diagonal(other, pivots[:step])).abs() / diagonal).max()
        rounding = (10 * doubt + 2e-5 * max(1.0, float(points.square().sum(-1).max()))) * diagonal
        if step == len(pivots):
            assert (left <= rounding).all()
            break
        least, most = ((left + error).clamp_min(0).log() + noise[step] for error in (-rounding, rounding))
        assert most[pivots[step]] >= least.max()


def assert_reference_weights(points, pivots, weights):
    """W (r, n) solves H_SS W = H_S as the reference does."""
    kernel = reference.kernel(points.double())
    expected, ours = reference.nystrom_weights(kernel, pivots.tolist()), weights.double()
    root = kernel.diagonal()[pivots].sqrt()
    other = reference.nystrom_weights(rounded(kernel, points), pivots.tolist())
    if torch.linalg.cond(kernel[pivots][:, pivots] / root / root.unsqueeze(-1)) <= 1e3 and expected.abs().max() < 1e4:
        allowed = 1e-4 * expected.abs().max() + 10 * (other - expected).abs().max()
        assert (ours - expected).abs().max() <= allowed
    else:  # the system is not well determined, what it is for still is
        query = points.double()[:5]
        scores = (query @ points.double()[pivots].T).exp()
        exact, nearby = ((scores @ matrix).sum(-1) for matrix in (expected, other))
        assert ((scores @ ours).sum(-1) - exact).abs().le(1e-2 * exact.abs() + 30 * (nearby - exact).abs()).all()


@given(cases)
def test_matches_the_reference(case):
    points, noise, factor, weights = factorised(*case)
    assert_reference_pivots(points, noise, factor.pivots[factor.valid].tolist())
    assert_reference_weights(points, factor.pivots[factor.valid], weights[factor.valid])


@pytest.mark.parametrize("seed", range(20))
def test_draws_the_pivots_of_the_reference(seed):
    points, noise, factor, weights = factorised(seed, 60, 8, 12, 1.0)
    pivots, expected = reference.rpnys(reference.kernel(points.double()), noise)
    assert factor.pivots.tolist() == pivots
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-4)


@given(cases)
def test_pivots_stand_for_themselves_alone(case):
    _, _, factor, weights = factorised(*case)
    chosen = factor.pivots[factor.valid]
    assert torch.equal(weights[factor.valid][:, chosen], torch.eye(len(chosen)))
    assert len(set(chosen.tolist())) == len(chosen)
    assert torch.isfinite(weights).all()
    assert weights.abs().max() <= 1e4 * (1 + 1e-4)


@given(cases)
def test_permuting_tokens_and_noise_permutes_everything(case):
    points, noise, factor, weights = factorised(*case)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(case[0]))
    permuted = pivoted_cholesky(points[order], noise[:, order])
    assert torch.equal(factor.valid, permuted.valid)
    assert torch.equal(factor.pivots[factor.valid], order[permuted.pivots[permuted.valid]])
    expected = weights[:, order]
    torch.testing.assert_close(nystrom_weights(points[order], permuted), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_pivots_follow_the_residual_diagonal(weighted):
    draws, n = 20_000, 9
    points, _ = points_and_noise(3, n, 4, 1, 0.5)
    importance = torch.linspace(-1.0, 1.5, n) if weighted else torch.zeros(n)
    noise = gumbel_noise(11, torch.arange(draws).view(-1, 1, 1), torch.arange(2).view(-1, 1), torch.arange(n))
    factor = pivoted_cholesky(
        points.expand(draws, n, 4), noise, log_importance=importance.expand(draws, n) if weighted else None
    )
    first, second = factor.pivots.T
    assert_law(first, points, [], importance)
    for pivot in range(n):
        assert_law(second[first == pivot], points, [pivot], importance)


def assert_law(drawn, points, before, importance):
    """Pivots drawn after `before` follow the reference's residual diagonal times exp(importance)."""
    mass = reference.residual_diagonal(reference.kernel(points.double()), before) * importance.double().exp()
    assert_frequencies(drawn, mass / mass.sum())


def assert_frequencies(drawn, probability):
    """Chi-square over the cells with an expected count of at least 5; the others are pooled."""
    observed = torch.bincount(drawn, minlength=len(probability)).double()
    expected = probability * len(drawn)
    large = expected >= 5
    observed = torch.cat((observed[large], observed[~large].sum().view(1)))
    expected = torch.cat((expected[large], expected[~large].sum().view(1)))
    keep = expected >= 5
    if not keep[-1]:
        assert observed[-1] <= 25
    observed, expected = observed[keep], expected[keep]
    result = scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum())
    assert result.pvalue > 1e-4


def test_full_rank_attention_is_exact():
    points, noise = points_and_noise(5, 24, 16, 24, 1.0)
    points *= 4 / torch.pdist(points).min().clamp_max(4)  # at least 1 apart, well conditioned
    assert torch.pdist(points).min() >= 1
    keys, values = points, torch.randn(24, 8)
    factor = pivoted_cholesky(points, noise)
    assert factor.valid.all()
    weights = nystrom_weights(points, factor)
    query = torch.randn(1, 7, 16)
    approximate = weighted_attention(
        query, keys[factor.pivots][None], (weights @ values)[None], weights.sum(-1)[None], scale=0.25
    )
    exact = torch.nn.functional.scaled_dot_product_attention(query, keys[None], values[None], scale=0.25)
    torch.testing.assert_close(approximate, exact, rtol=1e-5, atol=1e-5)


def test_points_that_do_not_take_part_change_nothing():
    points, noise = points_and_noise(7, 20, 6, 5, 1.0)
    valid = torch.ones(20, dtype=torch.bool)
    valid[[0, 3, 19]] = False
    factor = pivoted_cholesky(points, noise, valid=valid)
    weights = nystrom_weights(points, factor, valid=valid)
    alone = pivoted_cholesky(points[valid], noise[:, valid])
    assert torch.equal(valid.nonzero().squeeze()[alone.pivots], factor.pivots)
    torch.testing.assert_close(weights[:, valid], nystrom_weights(points[valid], alone))
    assert not weights[:, ~valid].any()


@pytest.mark.parametrize("points", [torch.zeros(10, 4), torch.ones(10, 4), torch.eye(4).repeat(3, 1)])
def test_slots_past_the_numerical_rank_stay_empty(points):
    noise = gumbel_noise(0, torch.arange(8).view(-1, 1), torch.arange(len(points)))
    factor = pivoted_cholesky(points, noise)
    distinct = len(torch.unique(points, dim=0))
    assert factor.valid.sum() == distinct
    weights = nystrom_weights(points, factor)
    assert not weights[~factor.valid].any()
    torch.testing.assert_close(weights.sum(0), torch.ones(len(points)))


def test_a_step_takes_seven_launches_on_a_device(way):
    (points, noise), counts = points_and_noise(1, 40, 8, 12, 1.0), []
    for rank in (6, 12):
        with Launches() as launches:
            pivoted_cholesky(points, noise[:rank])
        counts.append(launches.operations.total())
    one_more = (counts[1] - counts[0]) / 6
    assert one_more == 7 if way == "device" else one_more > 14


def test_both_ways_draw_the_same(monkeypatch):
    points, noise = points_and_noise(4, 50, 16, 12, 1.0, batch=(3, 2))
    valid = torch.rand(3, 2, 50, generator=torch.Generator().manual_seed(9)) < 0.8
    importance = torch.linspace(-2.0, 2.0, 50).expand(3, 2, -1)
    ranks = torch.tensor([[12, 3], [0, 12], [7, 1]])
    arguments = {"valid": valid, "log_importance": importance, "ranks": ranks}
    found = pivoted_cholesky(points, noise, **arguments)
    monkeypatch.setattr(launching, "HOSTS", launching.HOSTS ^ {"cpu"})
    other = pivoted_cholesky(points, noise, **arguments)
    assert torch.equal(found.valid, other.valid) and found.valid.sum() == ranks.sum()
    assert torch.equal(found.pivots[found.valid], other.pivots[other.valid])
    torch.testing.assert_close(found.rows, other.rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.triangle.triu(), other.triangle.triu(), rtol=1e-4, atol=1e-5)


def test_large_norms_neither_overflow_nor_vanish():
    points, noise = points_and_noise(2, 30, 8, 6, 40.0)
    factor = pivoted_cholesky(points, noise)
    weights = nystrom_weights(points, factor)
    assert torch.isfinite(weights).all() and factor.valid.all()
