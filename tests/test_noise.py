"""The counter hash: Gumbel, and a function of the counters alone."""

import scipy.stats
import torch

from wildcat_kv.noise import gumbel_noise


def test_is_standard_gumbel():
    noise = gumbel_noise(7, torch.arange(50).view(-1, 1), torch.arange(2000)).flatten()
    assert noise.dtype == torch.float32 and torch.isfinite(noise).all()
    assert scipy.stats.kstest(noise.numpy(), scipy.stats.gumbel_r.cdf).pvalue > 1e-3


def test_neighbouring_counters_and_seeds_are_uncorrelated():
    grid = gumbel_noise(7, torch.arange(300).view(-1, 1), torch.arange(300))
    other = gumbel_noise(8, torch.arange(300).view(-1, 1), torch.arange(300))
    pairs = [(grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid, grid.T), (grid, other)]
    for left, right in pairs:
        assert abs(torch.corrcoef(torch.stack((left.flatten(), right.flatten())))[0, 1]) < 0.02


def test_depends_on_its_own_counters_only():
    large = gumbel_noise(3, torch.arange(5).view(-1, 1), torch.arange(9))
    small = gumbel_noise(3, torch.tensor([[4]]), torch.arange(3, 6))
    assert torch.equal(large[4, 3:6], small[0])


def test_largest_and_smallest_draw_are_finite():
    noise = gumbel_noise(0, torch.arange(3_000_000))
    assert torch.isfinite(noise).all() and noise.max() < 16.7 and noise.min() > -2.9
