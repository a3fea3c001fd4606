"""The counter hash: Gumbel, and a function of the counters alone."""

import pytest
import scipy.stats
import torch

from wildcat_kv.coreset.noise import gumbel_noise, gumbel_rows, uniform_rows


def by_counter(seed, rows, columns):
    return gumbel_noise(seed, torch.arange(rows).view(-1, 1), torch.arange(columns))


def by_row(seed, rows, columns):
    return gumbel_rows(seed, torch.arange(rows), columns=columns)


@pytest.mark.parametrize("draw", [by_counter, by_row])
def test_is_standard_gumbel(draw):
    noise = draw(7, 50, 2000).flatten()
    assert noise.dtype == torch.float32 and torch.isfinite(noise).all()
    assert scipy.stats.kstest(noise.numpy(), scipy.stats.gumbel_r.cdf).pvalue > 1e-3


@pytest.mark.parametrize("draw", [by_counter, by_row])
def test_neighbouring_counters_and_seeds_are_uncorrelated(draw):
    grid, other = draw(7, 300, 300), draw(8, 300, 300)
    pairs = [(grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid, grid.T), (grid, other)]
    for left, right in pairs:
        assert abs(torch.corrcoef(torch.stack((left.flatten(), right.flatten())))[0, 1]) < 0.02


def test_depends_on_its_own_counters_only():
    large = gumbel_noise(3, torch.arange(5).view(-1, 1), torch.arange(9))
    small = gumbel_noise(3, torch.tensor([[4]]), torch.arange(3, 6))
    assert torch.equal(large[4, 3:6], small[0])


def test_rows_depend_on_their_own_counters_and_begin_alike():
    large = gumbel_rows(3, torch.arange(4).view(-1, 1), torch.arange(5), columns=9)
    assert large.shape == (4, 5, 9)
    for columns in (1, 4, 9):
        small = gumbel_rows(3, torch.tensor(2), torch.tensor([3]), columns=columns)
        assert torch.equal(large[2, 3:4, :columns], small)
    assert len(torch.unique(uniform_rows(3, torch.arange(50), columns=50))) > 2490


def test_largest_and_smallest_draw_are_finite():
    noise = gumbel_noise(0, torch.arange(3_000_000))
    assert torch.isfinite(noise).all() and noise.max() < 16.7 and noise.min() > -2.9
