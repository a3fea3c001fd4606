"""Test what all methods have in common: shapes, dtypes, groups, padding, noise, and what they refuse."""

import copy
import pickle
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.attention.heads import METHODS, SCALE, heads
from wildcat_kv import attention
from wildcat_kv.attention import Exact, NearWildCat, Stratified, Uniform, WildCatAttention

ALL = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def same(one, other, atol=1e-6):
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exact_is_torchs(dtype):
    query, key, value = heads(dtype=dtype)
    expected = F.scaled_dot_product_attention(query, key, value, scale=SCALE, enable_gqa=True)
    same(Exact()(query, key, value, scale=SCALE), expected, atol=2 * torch.finfo(dtype).eps)
    same(Exact()(query, key, value), F.scaled_dot_product_attention(query, key, value, enable_gqa=True), atol=1e-2)


@ALL
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-4), (torch.bfloat16, 0.02), (torch.float16, 3e-3)])
def test_half_precision_is_rounded_at_the_ends_only(method, dtype, atol):
    tensors = heads(dtype=dtype)
    output = method(*tensors, scale=SCALE)
    assert output.dtype == dtype
    # Choices by comparing sums may fall the other way for a few queries.
    error = (output.double() - method(*(tensor.double() for tensor in tensors), scale=SCALE)).abs()
    assert error.flatten().quantile(0.98) < atol


@ALL
def test_a_row_of_a_batch_is_what_it_is_alone(method):
    query, key, value = heads(batch=(2, 2))
    together = method(query, key, value, scale=SCALE)
    for row in range(2):
        same(together[1, row], method(query[1, row], key[1, row], value[1, row], scale=SCALE))


@ALL
def test_query_heads_of_a_group_share_keys_in_order(method):
    query, key, value = heads(q=30)
    output = method(query, key, value, scale=SCALE)
    assert output.shape == (2, 4, 30, 5)
    if "wildcat" in method.name or method.name in ("reformer", "kdeformer", "hyperattention"):
        return  # all queries of a group choose together
    same(output[:, 1::2], method(query[:, 1::2], key, value, scale=SCALE))


@ALL
def test_a_padded_row_is_what_its_keys_alone_are(method):
    query, key, value = heads(batch=(3,))
    mask = torch.zeros(3, 70, dtype=torch.bool)
    mask[0, 60:] = True
    mask[1, [0, 1, 33]] = True
    key[0, :, 65], value[0, :, 65] = torch.nan, torch.inf
    output = method(query, key, value, scale=SCALE, key_padding_mask=mask)
    for row in range(3):
        alone = (tensor[row : row + 1, :, ~mask[row]] for tensor in (key, value))
        same(output[row : row + 1], method(query[row : row + 1], *alone, scale=SCALE))


@ALL
def test_rows_without_keys_give_zeros(method):
    query, key, value = heads()
    mask = torch.tensor([[True], [False]]).expand(2, 70)
    output = method(query, key, value, key_padding_mask=mask)
    assert (output[0] == 0).all() and (output[1] != 0).any()
    assert (method(query, key[:, :, :0], value[:, :, :0]) == 0).all()
    assert method(query[:, :, :0], key, value).shape == (2, 4, 0, 5)


@ALL
def test_noise_is_the_methods_own(method):
    query, key, value = heads()
    state = torch.random.get_rng_state()
    output = method(query, key, value)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(method(query, key, value), output)
    if method.name != "exact":
        assert not torch.allclose(replace(method, seed=1)(query, key, value), output, atol=1e-3)
        assert not torch.allclose(method.for_layer(1)(query, key, value), output, atol=1e-3)
    assert torch.equal(method.for_layer(0)(query, key, value), output)


@ALL
def test_methods_are_modules_without_parameters(method):
    assert not list(method.parameters()) and not method.state_dict()
    assert torch.nn.Sequential(method).eval().train()[0].training
    twin = pickle.loads(pickle.dumps(copy.deepcopy(method)))
    assert repr(twin) == repr(method)
    assert torch.equal(twin(*heads()), method(*heads()))
    with pytest.raises(AttributeError):
        method.seed = 3


@ALL
def test_no_autocast_reaches_inside(method):
    tensors = heads(dtype=torch.float32)
    expected = method(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(method(*tensors), expected)


@ALL
def test_functions_take_settings_beside_tensors(method):
    function = getattr(attention, FUNCTIONS[method.name])
    settings = {name: getattr(method, name) for name in [field.name for field in fields(method)]}
    expected = method(*heads(), scale=SCALE)
    assert torch.equal(function(*heads(), scale=SCALE, **settings), expected)
    with pytest.raises(TypeError, match="rankk"):
        function(*heads(), rankk=3)


FUNCTIONS = {name: f"{name}_attention" for name in METHODS} | {
    "balancekv": "balance_attention",
    "hyperattention": "hyper_attention",
}


@given(
    st.sampled_from(list(METHODS)), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(0, 9),
)  # fmt: skip
def test_any_shape_gives_finite_averages(name, q, n, d, d_v, counts, seed):
    query, key, value = heads(q, n, d, d_v, heads=counts[0], kv_heads=counts[1], dtype=torch.float32, seed=seed)
    method = METHODS[name]
    if name in ("wildcat", "near_wildcat"):
        method = replace(method, bins=min(method.bins, n))
    output = method(4 * query, 4 * key, value)
    assert output.shape == (2, counts[0], q, d_v) and output.isfinite().all()
    if name != "scatterbrain":  # whose weights of keys may be negative
        low, high = (
            end.repeat_interleave(counts[0] // counts[1], 1) for end in (value.amin(2, True), value.amax(2, True))
        )
        assert (output >= low - 1e-4).all() and (output <= high + 1e-4).all()


# Operations


@ALL
def test_costs_are_counted(method):
    wide_values = method.cost(70, 6, value_dim=50)
    assert 0 < method.cost(70, 6) < wide_values
    assert method.cost(70, 6, queries=700) > method.cost(70, 6)
    assert method.complexity.startswith("O(")


@pytest.mark.parametrize("name", ["wildcat", "performer", "scatterbrain", "kdeformer", "hyperattention", "uniform"])
def test_costs_grow_in_proportion_to_n_at_a_fixed_rank(name):
    assert 1.9 < METHODS[name].cost(200_000, 64) / METHODS[name].cost(100_000, 64) < 2.1


def test_exact_costs_what_it_multiplies():
    assert Exact().cost(10, 3, queries=4, value_dim=5) == 4 * 10 * (3 + 5 + 1)
    for method in (WildCatAttention(rank=10), Uniform(rank=10), Stratified(rank=10), NearWildCat(rank=10)):
        assert method.cost(10, 3) == Exact().cost(10, 3)


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": True}, "is_causal=True: every query sees every key here; for causal models use the cache"),
        ({"attn_mask": torch.zeros(70, 70)}, r"attn_mask has shape \(70, 70\): .* mark padding by key_padding_mask"),
        ({"dropout_p": 0.1}, "dropout_p=0.1 in training: no probabilities exist to be dropped"),
        ({"scale": 0.0}, "scale=0.0 must be positive and finite"),
        ({"scale": torch.inf}, "scale=inf must be positive and finite"),
        ({"key_padding_mask": torch.zeros(2, 69, dtype=torch.bool)}, r"\(2, 69\); it must be bool \(2, 70\)"),
        ({"key_padding_mask": torch.zeros(2, 70)}, "torch.float32 .* it must be bool"),
        ({"query": torch.zeros(2, 3, 70, 6, dtype=torch.float64)}, r"query \(2, 3, 70, 6\), .* do not fit"),
        ({"value": torch.zeros(2, 2, 69, 5, dtype=torch.float64)}, r"value \(2, 2, 69, 5\) do not fit"),
        ({"key": torch.zeros(2, 2, 70, 6)}, "must have one floating-point dtype and one device"),
        ({"query": torch.full((2, 4, 70, 6), torch.nan, dtype=torch.float64)}, "query holds NaN or infinity"),
        ({"value": torch.full((2, 2, 70, 5), torch.inf, dtype=torch.float64)}, "value holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("name", ["exact", "near_wildcat"])
def test_calls_that_cannot_be_followed_are_refused(name, change, message):
    query, key, value = heads()
    with pytest.raises(ValueError, match=message):
        METHODS[name](**{"query": query, "key": key, "value": value, **change})


def test_dropout_is_without_effect_out_of_training():
    method = Exact().eval()
    assert torch.equal(method(*heads(), dropout_p=0.1), method(*heads()))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("WildCatAttention", {"rank": 0}, "rank=0 must be at least 1"),
        ("WildCatAttention", {"bins": 0}, "bins=0 must be at least 1"),
        ("WildCatAttention", {"temperature": "warm"}, "temperature='warm' must be one of 'released', 'theory'"),
        ("NearWildCat", {"near": -1}, "near=-1 must be at least 0"),
        ("NearWildCat", {"residual": 1.0}, r"residual=1.0 must be in \[0, 1\)"),
        ("NearWildCat", {"grid": (0, 3)}, r"grid=\(0, 3\) must be a height and a width, each at least 1"),
        ("NearWildCat", {"grid": "tiles"}, "grid='tiles' must be a height and a width, each at least 1, or 'auto'"),
        ("Stratified", {"grid": "auto", "prefix": 1}, "prefix=1 with grid='auto', which finds the prefix itself"),
        ("Uniform", {"rank": 0}, "rank=0 must be at least 1"),
        ("Stratified", {"rank": -1}, "rank=-1 must be at least 1"),
        ("Thinformer", {"g": -1}, "g=-1 must be at least 0"),
        ("BalanceKV", {"gamma": float("nan")}, "gamma=nan must be at least 0"),
        ("BalanceKV", {"block": 1}, "block=1 must be at least 2"),
        ("Performer", {"features": 0}, "features=0 must be at least 1"),
        ("ScatterBrain", {"features": 7}, "features=7 must be even"),
        ("Reformer", {"rounds": 0}, "rounds=0 must be at least 1"),
        ("KDEformer", {"planes": 0}, "planes=0 must be at least 1"),
        ("HyperAttention", {"samples": 0}, "samples=0 must be at least 1"),
        ("Uniform", {"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(attention, kind)(**settings)


def test_more_bins_than_keys_are_refused():
    with pytest.raises(ValueError, match="bins=71 with 70 keys: every bin takes at least one; lower bins"):
        WildCatAttention(bins=71)(*heads())
    with pytest.raises(ValueError, match="bins=30 with rank=20 and 70 keys: every bin takes at least one slot"):
        NearWildCat(rank=20, bins=30)(*heads())


@pytest.mark.parametrize("kind", [NearWildCat, Stratified])
def test_keys_that_are_no_square_are_refused(kind):
    method = kind(rank=20, grid="auto")
    method(*heads(n=82))
    with pytest.raises(ValueError, match="grid='auto' finds no square grid in 96 keys with at most 8 before it"):
        method(*heads(n=96))


@pytest.mark.parametrize("kind", [NearWildCat, Stratified])
def test_a_grid_that_does_not_hold_the_keys_is_refused(kind):
    method = kind(rank=20, grid=(7, 9), prefix=7)
    method(*heads())
    with pytest.raises(
        ValueError, match=r"grid=\(7, 9\) with prefix=7 holds 70 keys, and there are 69 without padding"
    ):
        method(*heads(), key_padding_mask=(torch.arange(70) == 50).expand(2, -1))
