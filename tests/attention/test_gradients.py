"""Gradients, with what was drawn held fixed, against finite differences."""

import pytest
import torch

from tests.attention.heads import METHODS, SCALE, heads
from wildcat_kv.attention import Exact, WildCatAttention
from wildcat_kv.attention.fixed_pivots import FixedPivots
from wildcat_kv.attention.kernels import weighted_softmax_attention
from wildcat_kv.attention.near import Entries, near_attention
from wildcat_kv.coreset.compresskv import compress_bins
from wildcat_kv.coreset.draws import KeyedDraws
from wildcat_kv.coreset.tokens import KernelOptions, WeightedTokens

# The choices of these depend on keys and queries only by comparisons, or not at all: small steps change none.
DIFFERENTIABLE = [name for name in METHODS if name not in ("wildcat", "near_wildcat")]


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


def wanted(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_finite_differences(name):
    query, key, value = heads(6, 70, d=3, d_v=2, heads=2, kv_heads=1, batch=(1,))
    if name == "kdeformer":  # keys are drawn by their values, with weights that are held fixed
        value = value.detach()
        function = lambda q, k: METHODS[name](q, k, value, scale=SCALE)  # noqa: E731
        assert torch.autograd.gradcheck(function, wanted(query, key), fast_mode=True)
    else:
        function = lambda q, k, v: METHODS[name](q, k, v, scale=SCALE)  # noqa: E731
        assert torch.autograd.gradcheck(function, wanted(query, key, value), fast_mode=True)


@pytest.mark.parametrize("bins", [1, 3])
@pytest.mark.parametrize("temperature", ["released", "theory"])
def test_pivots_are_held_fixed_and_weights_are_not(bins, temperature):
    query, key, value = heads(6, 20, d=3, d_v=2, heads=1, kv_heads=1, batch=(1,))
    layout = WildCatAttention(rank=9, bins=bins).layout(20)
    options = KernelOptions(SCALE, query.norm(dim=-1).amax(-1).float(), temperature)
    coreset, source = compress_bins(WeightedTokens(key, value), layout, KeyedDraws(layout, 0, 0, 20, 1), options)
    pivots = FixedPivots.of(key, layout, source, coreset.valid, options)

    def attend(query, key, value):
        sums, weights = (layout.collect(part) for part in pivots.combine(key, value))
        keys = key.take_along_dim(source.unsqueeze(-1), 2)
        return weighted_softmax_attention(query, keys, sums, weights, SCALE)

    for found, expected in zip(pivots.combine(key, value), (coreset.values, coreset.weights), strict=True):
        torch.testing.assert_close(layout.collect(found), expected.double(), rtol=0, atol=1e-4)
    assert torch.autograd.gradcheck(attend, wanted(query, key, value), fast_mode=True)


@pytest.mark.parametrize("name", ["wildcat", "near_wildcat"])
def test_values_change_no_choice(name):
    query, key, value = heads(6, 20, d=3, d_v=2, heads=2, kv_heads=1, batch=(1,))
    method = type(METHODS[name])(rank=8, bins=2)
    assert torch.autograd.gradcheck(lambda v: method(query, key, v, scale=SCALE), wanted(value), fast_mode=True)


def test_near_bins_have_the_gradients_of_finite_differences():
    query, key, value = heads(8, 12, d=3, d_v=2, heads=2, kv_heads=1, batch=(1,))
    query, value = query.unflatten(1, (1, 2)), value.unflatten(2, (3, 4))
    weights = torch.linspace(-0.5, 3, 6, dtype=torch.float64).view(1, 1, 3, 2)

    def attend(query, key, value):
        whole = Entries.of(key.unflatten(2, (3, 4)), value, torch.ones_like(value[..., 0]))
        slots = Entries.of(key.unflatten(2, (3, 4))[..., :2, :], value[..., :2, :] * 2, weights)
        first = Entries.of(key[:, :, None, :1], value[:, :, :1, :1], torch.ones(1, 1, 1, 1, dtype=torch.float64))
        return near_attention(query, slots, whole, first, 1, 2, SCALE)

    assert torch.autograd.gradcheck(attend, wanted(query, key, value), fast_mode=True)


@pytest.mark.parametrize("name", ["wildcat", "near_wildcat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_with_gradients_are_those_without(name, dtype):
    tensors = heads(dtype=dtype)
    with torch.no_grad():
        plain = METHODS[name](*tensors)
    torch.testing.assert_close(METHODS[name](*wanted(*tensors)), plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["wildcat", "near_wildcat"])
def test_gradients_point_where_the_exact_ones_do(name):
    """A high rank: the gradients of queries and values are close to those of exact attention."""
    cosines = []
    tensors = heads(dtype=torch.float32)
    rank = {"rank": 60} if name == "wildcat" else {"rank": 60, "residual": 0.0, "dims": None}
    methods = (Exact(), type(METHODS[name])(**rank, bins=1 if name == "wildcat" else 2))
    grads = []
    for method in methods:
        inputs = wanted(*tensors)
        method(*inputs).square().sum().backward()
        grads.append([tensor.grad.flatten() for tensor in inputs])
    for exact, approximate in zip(*grads, strict=True):
        cosines.append(float(torch.cosine_similarity(exact, approximate, dim=0)))
    assert min(cosines[0], cosines[2]) > 0.98 and cosines[1] > 0.9


@pytest.mark.parametrize("name", METHODS)
def test_padding_gets_no_gradient(name):
    query, key, value = wanted(*heads(batch=(1,)))
    mask = (torch.arange(70) >= 60).unsqueeze(0)
    METHODS[name](query, key, value, key_padding_mask=mask).square().sum().backward()
    for tensor in (key, value):
        assert (tensor.grad[:, :, 60:] == 0).all() and tensor.grad[:, :, :60].any()
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))
