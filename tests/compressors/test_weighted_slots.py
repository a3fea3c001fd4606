"""BalanceKV and Attention Matching: slots with weights of their own."""

from dataclasses import replace

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compressors.blocks import GROUP, HEADS, SCALE, D, Head, Size, half, heads, make, sizes
from wildcat_kv import weighted_attention
from wildcat_kv.compressors import AttentionMatching, BalanceKV, Uniform

# BalanceKV


def totals(block, coreset, query):
    """Denominator and numerator of what a query sees of a coreset, or of all items, float64."""
    if coreset is None:
        keys, values, weights = (block.slice_items(tensor) for tensor in (block.keys, block.values, block.weights))
    else:
        keys, values, weights = coreset.keys, coreset.values, coreset.weights
    terms = (SCALE * keys.double() @ query.double().unsqueeze(-1)).squeeze(-1).exp()
    return torch.cat(((terms * weights).sum(-1, keepdim=True), (terms.unsqueeze(-1) * values).sum(-2)), dim=-1)


@settings(max_examples=25)
@given(size=sizes(slots=6), rows=st.integers(1, 3), seed=st.integers(0, 1000), share=st.floats(0.3, 0.95))
def test_balancekv_weights_are_powers_of_two_and_add_up(size, rows, seed, share):
    block = make(replace(size, recent=size.recent + 24), seed, rows=rows, padding=False, powers=True)
    rank = max(10, int(share * block.items))
    coreset = BalanceKV(block=8, seed=seed).compress(block, rank).coreset
    for b, h, head in heads(block):
        weights = coreset.weights[b, h][coreset.valid[b, h]]
        assert len(weights) == rank
        assert torch.equal(weights.log2(), weights.log2().round())
        old = block.weights[b, h]
        assert weights.sum() == old[head.items.start : head.items.stop].sum()
        slot_keys = coreset.keys[b, h][coreset.valid[b, h]]
        places = [next(i for i in head.items if torch.equal(head.k[i], key.double())) for key in slot_keys]
        assert places == sorted(set(places))
        for place, weight, value in zip(places, weights, coreset.values[b, h][coreset.valid[b, h]], strict=True):
            torch.testing.assert_close(value.double(), head.v[place] * float(weight / old[place]))


def test_balancekv_halves_more_evenly_than_chance():
    """Halved, the sums that queries see are nearer to those of all tokens than of a random half, doubled."""
    generator = torch.Generator().manual_seed(2)
    block = make(Size(sink=0, recent=256, window=0), 1, padding=False)
    block = replace(block, keys=block.keys * 0.5, values=block.values * 0.3 + 1.0)
    query = torch.randn(1, HEADS, 1, D, generator=generator) * 0.5
    exact = totals(block, None, query)
    errors = {}
    for name, method in (("balancekv", BalanceKV(gamma=4.0, block=64)), ("coin", BalanceKV(gamma=0.0, block=64))):
        found = [
            totals(block, replace(method, seed=seed).compress(block, 128).coreset, query) / exact - 1
            for seed in range(60)
        ]
        errors[name] = torch.stack(found).square().mean().sqrt()
    found = []
    for seed in range(60):
        coreset = Uniform(seed=seed).compress(block, 128).coreset
        found.append(2 * totals(block, coreset, query) / exact - 1)
    errors["uniform"] = torch.stack(found).square().mean().sqrt()
    assert errors["balancekv"] < 0.8 * errors["uniform"]
    assert errors["balancekv"] < 0.8 * errors["coin"]


def test_balancekv_is_right_on_average():
    block = make(Size(sink=0, recent=64, window=0), 1, padding=False)
    block = replace(block, keys=block.keys * 0.3)
    query = torch.randn(1, HEADS, 1, D, generator=torch.Generator().manual_seed(2)) * 0.5
    exact = totals(block, None, query)
    found = torch.stack(
        [totals(block, BalanceKV(block=16, seed=seed).compress(block, 32).coreset, query) for seed in range(400)]
    )
    deviation = (found.mean(0) - exact) / (found.std(0) / 20 + 1e-9)
    assert deviation.abs().max() < 4.5


def test_balancekv_prefers_no_token_for_its_place():
    block = make(Size(sink=0, recent=64, window=0), 1, padding=False)
    kept = torch.zeros(64)
    for seed in range(300):
        keys = BalanceKV(block=16, seed=seed).compress(block, 32).coreset.keys
        kept += (keys.unsqueeze(3) == block.keys[:, :, None]).all(-1).sum((0, 1, 2))
    quarters = kept.view(4, 16).mean(-1) / (300 * HEADS)
    assert (quarters - 0.5).abs().max() < 0.03


def test_balancekv_again_and_again_keeps_the_mass():
    method, block = BalanceKV(block=8), make(Size(sink=0, recent=100, window=0), padding=False)
    coreset, mass = method.compress(block, 40).coreset, 100
    for step in range(1, 6):
        new = make(Size(sink=0, recent=23, window=0), step, padding=False)
        joined = {
            name: torch.cat((getattr(coreset, name), getattr(new, name)), dim=2)
            for name in ("keys", "values", "weights", "valid")
        }
        block = replace(new, **joined, items=63, exact=23, seen=100 + 23 * step, carried_state=None)
        coreset, mass = method.compress(block, 40).coreset, mass + 23
        assert coreset.weights.sum(-1).eq(mass).all() and coreset.valid.all()


# Attention Matching


def reference(block, b, h, queries=None):
    """Scaled queries of a key head, and what they see of the items: terms e^(score), values and weights."""
    head = Head(block, b, h)
    flat = head.queries.flatten(0, 1) * head.scale
    picked = [entry for entry in head.items if head.valid[entry]]
    weights = block.weights[b, h].double()[picked]
    return flat, (flat @ head.k[picked].T), head.v[picked], weights, picked


@pytest.mark.parametrize(
    "size", [Size(queried=12), Size(slots=5, recent=10, queried=7), Size(sink=0, recent=20, window=0, queried=3)]
)
def test_attention_matching_picks_the_keys_with_the_highest_root_mean_square_attention(size):
    block = make(size, 4, rows=2)
    coreset = AttentionMatching().compress(block, half(block)).coreset
    for b, h, head in heads(block):
        flat, scores, _, _, picked = reference(block, b, h)
        attention = scores.softmax(-1)
        importance = {entry: float(attention[:, i].square().mean().sqrt()) for i, entry in enumerate(picked)}
        assert len(flat) == GROUP * size.queried
        keys = coreset.keys[b, h][coreset.valid[b, h]].double()
        kept = [entry for entry in head.items if any(torch.equal(head.k[entry], key) for key in keys)]
        best = sorted(picked, key=lambda entry: -importance[entry])[: half(block)]
        assert kept == sorted(best)


@pytest.mark.parametrize("size", [Size(queried=12), Size(recent=20, queried=7)])
def test_attention_matching_takes_queries_spread_over_all_of_them(size):
    block = make(size, 4, rows=2)
    coreset = AttentionMatching(queries=4).compress(block, half(block)).coreset
    spread = sorted(size.queried - 1 - step * size.queried // 4 for step in range(4))
    chosen = replace(block, queries=block.queries[:, :, spread])
    expected = AttentionMatching().compress(chosen, half(block)).coreset
    torch.testing.assert_close(coreset.keys, expected.keys)
    torch.testing.assert_close(coreset.weights, expected.weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bound", [1.5, 20.0])
def test_fitted_weights_are_nearly_the_best_within_bounds_for_the_mass_that_queries_see(bound):
    block = make(Size(recent=40, queried=30), 6)
    coreset = AttentionMatching(max_weight=bound).compress(block, 12).coreset
    assert coreset.weights.ge(1 / bound - 1e-6).all() and coreset.weights.le(bound + 1e-5).all()
    for _, h, _ in heads(block):
        flat, scores, _, _, _ = reference(block, 0, h)
        shares = (flat @ coreset.keys[0, h].double().T).exp() / scores.exp().sum(-1, keepdim=True)
        fitted = (shares @ coreset.weights[0, h].double() - 1).square().mean()
        best = scipy.optimize.lsq_linear(shares.numpy(), torch.ones(len(shares)).numpy(), bounds=(1 / bound, bound))
        assert fitted <= 1.5 * 2 * best.cost / len(shares)  # two steps of a gradient are not all the way
        assert fitted < 0.8 * (shares.sum(-1) - 1).square().mean()


def test_fitted_values_bring_the_output_nearer():
    block = make(Size(recent=40, queried=30), 6)
    coreset = AttentionMatching().compress(block, 12).coreset
    for _, h, head in heads(block):
        flat, scores, values, _, picked = reference(block, 0, h)
        exact = scores.softmax(-1) @ values
        ours = (flat @ coreset.keys[0, h].double().T).exp()
        weights = coreset.weights[0, h].double()
        denominator = (ours @ weights).unsqueeze(-1)
        own = torch.stack([head.v[next(i for i in picked if torch.equal(head.k[i], key.double()))]
                           for key in coreset.keys[0, h]])  # fmt: skip
        plain = ours @ (weights.unsqueeze(-1) * own) / denominator
        fitted = ours @ coreset.values[0, h].double() / denominator
        dropped = (ours @ own) / ours.sum(-1, keepdim=True)
        assert (fitted - exact).square().mean() < 0.5 * (plain - exact).square().mean()
        assert (fitted - exact).square().mean() < 0.5 * (dropped - exact).square().mean()


@pytest.mark.parametrize("queried", [1, 3, 30])
def test_with_as_many_slots_as_items_nothing_changes(queried):
    block = make(Size(slots=4, recent=14, queried=min(queried, 18)), 7, padding=False, powers=True)
    coreset = AttentionMatching().compress(block, block.items).coreset
    query = torch.randn(1, HEADS * GROUP, 5, D)
    items = [block.slice_items(tensor) for tensor in (block.keys, block.values, block.weights)]
    exact = weighted_attention(query, *items, scale=SCALE)
    ours = weighted_attention(query, coreset.keys, coreset.values, coreset.weights, scale=SCALE)
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)
