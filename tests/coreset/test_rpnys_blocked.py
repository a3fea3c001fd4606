"""Pivots drawn in blocks: the law of one at a time, and a factor as good."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.coreset.test_rpnys import assert_law, assert_reference_weights, points_and_noise
from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.wildcat import WildCat
from wildcat_kv.coreset import reference, rpnys_blocked
from wildcat_kv.coreset.noise import uniform_rows
from wildcat_kv.coreset.rpnys import nystrom_sums, nystrom_weights, pivoted_cholesky
from wildcat_kv.coreset.rpnys_blocked import BLOCK, accelerated_cholesky


def uniforms(entries, seed=5, block=BLOCK):
    """Noise keyed by the entry, as a fold keys it by bin."""
    entry = torch.as_tensor(entries).view(-1, 1)
    return lambda turn: uniform_rows(seed, entry, torch.arange(3 * turn, 3 * turn + 3), columns=block)


def gaussian_kernel(points):
    """G = D^-1 H D^-1 of the reference's H."""
    kernel = reference.kernel(points.double())
    root = kernel.diagonal().sqrt()
    return kernel / root / root.unsqueeze(-1)


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_pivots_follow_the_residual_diagonal(block, weighted, monkeypatch):
    """Whether the first two come in one round or in two."""
    monkeypatch.setattr(rpnys_blocked, "BLOCK", block)
    draws, n = 8_000, 9
    points, _ = points_and_noise(3, n, 4, 1, 0.5)
    importance = torch.linspace(-1.0, 1.5, n) if weighted else torch.zeros(n)
    factor = accelerated_cholesky(
        points.expand(draws, n, 4),
        uniforms(torch.arange(draws), block=block),
        2,
        log_importance=importance.expand(draws, n) if weighted else None,
    )
    assert factor.valid.all()
    first, second = factor.pivots.T
    assert_law(first, points, [], importance)
    for pivot in range(n):
        assert_law(second[first == pivot], points, [pivot], importance)


@given(st.integers(0, 2**31), st.integers(70, 200), st.integers(2, 16), st.integers(1, 90), st.floats(0.05, 3.0))
def test_the_rows_reproduce_the_kernel_at_the_pivots(seed, n, d, rank, spread):
    points, _ = points_and_noise(seed, n, d, 1, spread)
    rank = min(rank, n)
    factor = accelerated_cholesky(points, uniforms([seed]), rank)
    chosen, rows = factor.pivots[factor.valid], factor.rows[factor.valid]
    assert len(set(chosen.tolist())) == len(chosen)
    assert not factor.rows[~factor.valid].any()
    rounding = 1e-5 * max(1.0, float(points.square().sum(-1).max()))
    assert (rows.mT @ rows - gaussian_kernel(points))[chosen].abs().max() < rounding
    count = len(chosen)
    assert torch.equal(factor.triangle[:count, :count].triu(), rows[:, chosen].triu())
    if count < rank:  # nothing was left
        left = gaussian_kernel(points).diagonal() - rows.double().square().sum(0)
        assert left.max() < 10 * rounding


@given(st.integers(0, 2**31), st.integers(80, 160), st.integers(1, 12), st.integers(1, 100), st.floats(0.05, 2.0))
def test_matches_the_reference_given_its_pivots(seed, n, d, rank, spread):
    points, _ = points_and_noise(seed, n, d, 1, spread)
    factor = accelerated_cholesky(points, uniforms([seed]), min(rank, n))
    drawn = factor.pivots[factor.valid]
    assert_reference_weights(points, drawn, nystrom_weights(points, factor)[factor.valid])
    identity = nystrom_sums(factor, torch.eye(n), log_scale=points.square().sum(-1))
    assert_reference_weights(points, drawn, identity[factor.valid])


def test_as_many_rounds_as_it_takes_find_what_one_step_at_a_time_finds():
    """The trace of what is left, averaged over seeds."""
    points, noise = points_and_noise(1, 300, 3, 100, 0.8, batch=(40,))
    points = points[:1].expand(40, -1, -1)

    def left(factor):
        return (300 - factor.rows.square().sum((-2, -1))).mean()

    torch.testing.assert_close(
        left(accelerated_cholesky(points, uniforms(torch.arange(40)), 30)),
        left(pivoted_cholesky(points, noise[:, :30])),
        rtol=0.1,
        atol=0,
    )


def test_entries_stop_where_they_must_and_others_go_on():
    """A rank of its own, fewer distinct points than slots, points that do not take part: side by side."""
    points, _ = points_and_noise(2, 150, 6, 1, 1.0, batch=(4,))
    points[1] = points[1, torch.arange(150) % 5]
    valid = torch.ones(4, 150, dtype=torch.bool)
    valid[2] = torch.arange(150) < 7
    ranks = torch.tensor([100, 100, 100, 3])
    factor = accelerated_cholesky(points, uniforms(torch.arange(4)), 100, valid=valid, ranks=ranks)
    assert factor.valid.sum(-1).tolist() == [100, 5, 7, 3]
    assert (factor.pivots[2, :7] < 7).all()
    assert torch.isfinite(factor.rows).all() and not factor.rows[~factor.valid].any()


def test_an_entry_draws_alone_what_it_draws_among_others_and_behind_padding():
    points, _ = points_and_noise(4, 200, 6, 1, 1.0, batch=(3,))
    alone = accelerated_cholesky(points[1], uniforms([1]), 80)
    together = accelerated_cholesky(points, uniforms([0, 1, 2]), 100, ranks=torch.tensor([100, 80, 40]))
    assert torch.equal(together.pivots[1, :80], alone.pivots)
    padded = torch.cat((torch.full((50, 6), 9.0), points[1]))
    valid = torch.arange(250) >= 50
    behind = accelerated_cholesky(padded, uniforms([1]), 80, valid=valid)
    assert torch.equal(behind.pivots, alone.pivots + 50)
    assert not nystrom_weights(padded, behind, valid=valid)[:, :50].any()


def test_large_norms_and_heavy_points_come_to_an_end():
    """A point that holds all of the mass is proposed over and over, and drawn once."""
    points, _ = points_and_noise(6, 120, 8, 1, 1.0)
    points[:10] *= 30 * torch.linspace(1, 2, 10).unsqueeze(-1)
    factor = accelerated_cholesky(points, uniforms([0]), 70)
    assert factor.valid.all()
    assert set(factor.pivots[:10].tolist()) == set(range(10))


@given(st.integers(0, 2**31), st.integers(80, 160), st.integers(1, 12), st.integers(1, 100), st.floats(0.05, 2.0))
def test_sums_are_those_of_the_weights(seed, n, d, rank, spread):
    points, noise = points_and_noise(seed, n, d, min(rank, n), spread)
    values = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    for factor in (pivoted_cholesky(points, noise), accelerated_cholesky(points, uniforms([seed]), min(rank, n))):
        weights = nystrom_weights(points, factor)
        sums = nystrom_sums(factor, values, log_scale=points.square().sum(-1))
        if weights.abs().sum(-1).max() < 1e3:
            atol = 1e-4 * float(weights.abs().sum(-1).max()) * 10
            torch.testing.assert_close(sums, weights @ values, rtol=1e-3, atol=atol)
        assert not sums[~factor.valid].any()


@pytest.mark.parametrize(("length", "rank"), [(400, 100), (170, 43)])
def test_a_row_folds_alone_as_it_folds_in_a_batch(length, rank):
    """The method as the cache calls it, with ranks of either side of a block."""
    method = WildCat(bin_rank=100, seed=3)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2, length, 8, generator=generator)
    block = KVBlock(
        keys=keys,
        values=values,
        valid=torch.ones(2, 2, length, dtype=torch.bool),
        items=length,
        window=0,
        exact=length,
        seen=length,
        scale=0.3,
        layer_index=1,
        sharing=range(2),
    )
    together = method.compress(block, rank).coreset
    for row in range(2):
        alone = method.compress(block.take_rows([row]), rank).coreset
        assert alone.valid.all()
        assert torch.equal(together.keys[row], alone.keys[0])
        torch.testing.assert_close(together.values[row], alone.values[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.weights[row], alone.weights[0], rtol=1e-4, atol=1e-4)
