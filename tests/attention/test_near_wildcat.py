"""The parts of our method: metric, tiles, samples, near bins, and settings."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.attention.heads import SCALE, heads
from wildcat_kv.attention import Exact, NearWildCat, Stratified, Uniform
from wildcat_kv.attention.bin_slots import bin_slots
from wildcat_kv.attention.metric import balanced_metric
from wildcat_kv.attention.order import cells, tile_order
from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.draws import KeyedDraws
from wildcat_kv.coreset.noise import uniform_rows

# Metric


def test_the_metric_balances_queries_and_keys():
    query, key, _ = heads(90, 80, d=6, heads=2)
    query, key = query * torch.arange(1, 7), key @ torch.randn(6, 6, dtype=torch.float64)
    metric = balanced_metric(query, key, SCALE)
    inverse = torch.linalg.inv(metric).mT * SCALE  # u = b M^-1 q, so that z.u = b k.q
    z, u = (key - key.mean(2, keepdim=True)) @ metric, query @ inverse
    torch.testing.assert_close(u @ z.mT, SCALE * query @ (key - key.mean(2, keepdim=True)).mT)
    of_key, of_query = z.mT @ z / 80 * 3.94582, u.mT @ u / 90 / 3.94582
    torch.testing.assert_close(of_key, of_query, rtol=1e-4, atol=1e-4)
    diagonal = of_key.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(of_key, torch.diag_embed(diagonal), rtol=1e-4, atol=1e-4)
    assert (diagonal.diff(dim=-1) < 0).all()
    assert torch.equal(balanced_metric(query, key, SCALE, 4), metric[..., :4])


@pytest.mark.parametrize("case", ["no queries", "equal keys", "flat keys", "one query"])
def test_the_metric_is_finite_where_nothing_varies(case):
    query, key, _ = heads(90, 80, heads=2)
    query = {"no queries": query * 0, "one query": query[:, :, :1]}.get(case, query)
    key = {"equal keys": key[:, :, :1].expand_as(key), "flat keys": key * torch.tensor([1, 1, 0, 0, 0, 0])}.get(
        case, key
    )
    metric = balanced_metric(query, key, SCALE)
    assert metric.isfinite().all() and ((key - key.mean(2, keepdim=True)) @ metric).abs().max() < 1e3


# Tiles


@given(st.integers(1, 20), st.integers(1, 20))
def test_tiles_hold_each_cell_once(height, width):
    assert tile_order(height, width).sort().values.tolist() == list(range(height * width))


def test_cuts_of_the_tile_order_are_tiles():
    tiles = tile_order(8, 8).view(4, 16)
    for tile, (row, column) in zip(tiles, [(0, 0), (0, 4), (4, 0), (4, 4)], strict=True):
        expected = [8 * (row + i) + column + j for i in range(4) for j in range(4)]
        assert sorted(tile.tolist()) == expected


@given(st.integers(1, 50), st.integers(1, 20))
def test_cells_are_cuts_of_a_line(total, parts):
    places, used, line = cells(total, parts)
    assert [row[use].tolist() for row, use in zip(places, used, strict=True)] == [
        part.tolist() for part in torch.arange(total).tensor_split(parts)
    ]
    assert places.flatten()[line].tolist() == list(range(total))


@pytest.mark.parametrize("kind", [NearWildCat, Stratified])
def test_a_grid_is_the_line_in_the_order_of_its_tiles(kind):
    query, key, value = heads(66, 66)
    order = torch.cat((torch.arange(2), 2 + tile_order(8, 8)))
    method = kind(rank=24, prefix=2, **({"bins": 4} if kind is NearWildCat else {}))
    on_grid = replace(method, grid=(8, 8))(query, key, value)
    in_line = method(*(tensor[:, :, order] for tensor in (query, key, value)))
    torch.testing.assert_close(on_grid[:, :, order], in_line, rtol=0, atol=1e-6)
    assert not torch.allclose(on_grid, method(query, key, value), atol=1e-3)


@pytest.mark.parametrize("kind", [NearWildCat, Stratified])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_a_square_grid_is_found(kind, prefix):
    query, key, value = heads(144 + prefix, 144 + prefix)
    found, given = kind(rank=40, grid="auto"), kind(rank=40, grid=(12, 12), prefix=prefix)
    assert torch.equal(found(query, key, value), given(query, key, value))
    assert found.cost(144 + prefix, 8) == given.cost(144 + prefix, 8)


def test_queries_before_the_grid_see_every_key_and_its_keys_are_seen_by_all():
    query, key, value = heads(66, 66, dtype=torch.float32)
    value = value * 0 + (torch.arange(66) == 0).view(-1, 1)  # outputs are the shares of the first key
    method = NearWildCat(rank=16, bins=4, prefix=2, grid=(8, 8), near=0, residual=0.0)
    output, expected = method(query, key, value), Exact()(query, key, value)
    torch.testing.assert_close(output[:, :, :2], expected[:, :, :2], rtol=0, atol=1e-5)
    error = (output - expected).norm()
    assert error < 0.5 * (replace(method, prefix=0, grid=None)(query, key, value) - expected).norm()
    crossed = method(query[:, :, :50], key, value)  # queries of other tokens have no such places
    assert crossed.shape == (2, 4, 50, 5) and (crossed - expected[:, :, :50]).norm() < 2 * error


# Samples


@pytest.mark.parametrize("samples", [1, 5])
def test_samples_make_sums_unbiased(samples):
    """The mean over seeds of what a query sums up is what exact attention sums up."""
    query, key, value = heads(5, 40, d=3, d_v=2, heads=1, kv_heads=1, batch=(1,))
    layout = BinLayout.build(40, 4, 2)
    points = (key - key.mean(2, keepdim=True)) * 0.5
    terms = (SCALE * query @ key.mT).exp()
    exact = torch.cat((terms @ value, terms.sum(-1, keepdim=True)), dim=-1)
    sums = []
    for seed in range(1000):
        offset = uniform_rows(seed, torch.tensor([[0]]), torch.arange(2), columns=1)
        slots = bin_slots(points, value, layout, KeyedDraws(layout, 0, 0, 40, 1), samples, offset)
        both = torch.cat((slots.sums, slots.weights.unsqueeze(-1)), dim=-1).flatten(2, 3)
        sums.append((SCALE * query @ key.take_along_dim(slots.places.flatten(2).unsqueeze(-1), 2).mT).exp() @ both)
    sums = torch.stack(sums)
    error = (sums.mean(0) - exact) / (sums.std(0) / 1000**0.5)
    assert error.abs().max() < 4
    none = bin_slots(points, value, layout, KeyedDraws(layout, 0, 0, 40, 1))
    both = torch.cat((none.sums, none.weights.unsqueeze(-1)), dim=-1).flatten(2, 3)
    biased = (SCALE * query @ key.take_along_dim(none.places.flatten(2).unsqueeze(-1), 2).mT).exp() @ both
    assert ((biased - exact).abs() / (sums.std(0) / 1000**0.5)).max() > 8


# Near bins


def test_every_key_is_counted_once():
    """Values that mark the bins: near bins and the slots of the others have the mass of all keys together."""
    query, key, _ = heads(64, 64)
    value = torch.nn.functional.one_hot(torch.arange(64) // 16, 4).double().expand(2, 2, 64, 4)
    output = NearWildCat(rank=56, bins=4, residual=0.0, near=2, dims=None)(query, key, value, scale=0.02)
    torch.testing.assert_close(output.sum(-1), torch.ones_like(output[..., 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(output, Exact()(query, key, value, scale=0.02), rtol=0, atol=1e-3)


@pytest.mark.parametrize("factor", [1, 10, 30])
def test_large_scores_stay_in_range(factor):
    """Scores of both signs, in the hundreds with the last factor: float32 sums up what float64 does."""
    query, key, value = heads(64, 64, heads=1, kv_heads=1)
    method = NearWildCat(rank=32, bins=4, near=2, residual=0.0)
    expected = method(query * factor, key, value)
    assert ((query * factor) @ (key - key.mean(2, True)).mT * 6**-0.5).abs().max() > 3 * factor
    output = method(*(tensor.float() for tensor in (query * factor, key, value)))
    assert output.isfinite().all()
    assert (output - expected).abs().flatten().quantile(0.95) < 1e-3


def test_near_bins_rescue_local_heads():
    """Tokens that attend to their neighbours: what no low rank follows."""
    places = torch.arange(256)[:, None] / 8.0
    waves = torch.cat([f(places / 3**i) for i in range(4) for f in (torch.sin, torch.cos)], dim=-1)
    query = key = (4 * waves).expand(1, 1, 256, 8).contiguous()
    value = torch.randn(1, 1, 256, 4)
    expected = Exact()(query, key, value)
    errors = [
        float((NearWildCat(rank=32, bins=8, near=near)(query, key, value) - expected).norm() / expected.norm())
        for near in (0, 1, 2, 3)
    ]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.3 * errors[0]


# Settings


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(1, 40),
    st.integers(1, 8), st.integers(0, 3), st.sampled_from([0.0, 0.5, 0.9]),
)  # fmt: skip
def test_any_settings_give_averages(height, width, prefix, on_grid, own, rank, bins, near, residual):
    n = height * width + prefix
    query, key, value = heads(n if own else 7, n, dtype=torch.float32)
    grid = (height, width) if on_grid else None
    bins = min(bins, rank, height * width)
    method = NearWildCat(rank, bins, near, residual, 4, grid, prefix)
    output = method(query, key, value)
    low, high = (end.repeat_interleave(2, 1) for end in (value.amin(2, True), value.amax(2, True)))
    assert (output >= low - 1e-5).all() and (output <= high + 1e-5).all()
    assert method.cost(n, 6) > 0
    if near >= bins or rank >= height * width:
        torch.testing.assert_close(output, Exact()(query, key, value), rtol=0, atol=1e-5)


def test_defaults_follow_the_number_of_keys():
    plan = NearWildCat().plan(4097)
    assert (plan.bins, plan.pivots, plan.samples) == (16, 48, 29)
    assert NearWildCat().plan(9217).bins == 32
    assert NearWildCat().plan(1) is None
    plan = NearWildCat(rank=100, bins=8, residual=0.25).plan(1000)
    assert (plan.pivots, plan.samples) == (76, 3) and plan.pivots + 8 * plan.samples == 100


@pytest.mark.parametrize("name", NearWildCat.presets)
def test_presets_are_settings(name):
    query, key, value = heads(600, 600, dtype=torch.float32)
    method = NearWildCat.preset(name, rank=128, bins=8)
    error, by_chance = (
        float((each(query, key, value) - Exact()(query, key, value)).norm()) for each in (method, Uniform(rank=128))
    )
    assert error < 0.9 * by_chance
