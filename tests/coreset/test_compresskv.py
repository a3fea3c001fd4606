"""COMPRESSKV: the reference's coreset, what must hold for any keys, and what the inputs may be."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.coreset.mass import token_mass
from wildcat_kv import compress_kv, weighted_attention
from wildcat_kv.coreset import binned, reference
from wildcat_kv.coreset.temperature import squared_temperature

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def tokens(*shape, d=8, d_v=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(*shape, d, generator=generator)
    values = torch.randn(*shape, d_v, generator=generator)
    return keys.to(dtype), values.to(dtype)


def gumbel(*shape, seed=1):
    return -torch.empty(*shape).exponential_(generator=torch.Generator().manual_seed(seed)).log()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [10, 17])
def test_enough_slots_store_the_tokens_bit_for_bit(dtype, rank):
    keys, values = tokens(2, 3, 10, dtype=dtype)
    values[0, 0, 0, 0] = -0.0
    coreset = compress_kv(keys, values, rank=rank, bins=2)
    assert coreset.valid.sum(-1).eq(10).all()
    assert torch.equal(coreset.keys[coreset.valid], keys.flatten(0, 2))
    stored = coreset.values[coreset.valid].flatten()
    assert torch.equal(stored.double().signbit(), values.flatten().double().signbit())
    assert torch.equal(stored, values.flatten())
    assert torch.equal(coreset.weights, coreset.valid.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_shapes(dtype):
    keys, values = tokens(2, 3, 50, dtype=dtype)
    coreset = compress_kv(keys, values, rank=11, bins=3)
    assert coreset.keys.shape == (2, 3, 11, 8) and coreset.values.shape == (2, 3, 11, 5)
    assert coreset.keys.dtype == coreset.values.dtype == dtype
    assert coreset.weights.dtype == torch.float32 and coreset.valid.all()


def test_every_batch_entry_is_compressed_on_its_own():
    keys, values = tokens(2, 3, 60)
    noise = gumbel(2, 3, 4, 60)
    together = compress_kv(keys, values, rank=8, bins=2, noise=noise)
    alone = compress_kv(keys[1, 2], values[1, 2], rank=8, bins=2, noise=noise[1, 2])
    assert torch.equal(together.keys[1, 2], alone.keys)
    torch.testing.assert_close(together.values[1, 2], alone.values)


def in_order(keys, coreset):
    """K_S, V_S and w of the reference, sorted by the positions of the pivots."""
    places = torch.cdist(coreset[0], keys.double()).argmin(-1)
    return [tensor[places.argsort()] for tensor in coreset]


@given(
    st.integers(0, 2**31),
    st.integers(2, 60),
    st.integers(1, 30),
    st.integers(1, 6),
    st.floats(0.3, 2.0),
    st.sampled_from(["released", "theory"]),
    st.sampled_from([None, 1.5, 6.0]),
)
def test_matches_the_reference(seed, n, rank, bins, scale, temperature, query_norm):
    bins = min(bins, rank, n)
    keys, values = tokens(n, d=16, seed=seed)
    noise = gumbel(-(-rank // bins), n, seed=seed)
    options = {"scale": scale, "R_Q": query_norm, "B": bins, "rule": temperature}
    expected = in_order(keys, reference.compress_kv(keys, values, rank, noise, **options))
    for nudge in gumbel(2, *noise.shape, seed=seed):  # a draw so close that rounding decides
        nudged = reference.compress_kv(keys, values, rank, noise + 1e-4 * nudge, **options)
        assume(torch.equal(in_order(keys, nudged)[0], expected[0]))
    ours = compress_kv(
        keys, values, rank=rank, scale=scale, bins=bins, temperature=temperature, query_norm=query_norm, noise=noise
    )
    held = ours.valid
    assert torch.equal(ours.keys[held].double(), expected[0])
    torch.testing.assert_close(ours.values[held].double(), expected[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.weights[held].double(), expected[2], rtol=1e-3, atol=1e-3)


@given(st.integers(0, 2**31), st.integers(40, 80), st.integers(5, 20), st.integers(1, 3))
def test_attention_to_a_coreset_is_the_wildcat_of_the_reference(seed, n, rank, bins):
    keys, values = tokens(n, d=16, seed=seed)
    query, noise = gumbel(7, 16, seed=seed + 1), gumbel(rank, n, seed=seed)
    expected = reference.wildcat(query, keys, values, rank, noise, scale=0.5, B=bins)
    for nudge in gumbel(2, *noise.shape, seed=seed):
        nudged = reference.wildcat(query, keys, values, rank, noise + 1e-4 * nudge, scale=0.5, B=bins)
        assume(torch.equal(nudged, expected))
    bound = float(query.norm(dim=-1).max())
    coreset = compress_kv(keys, values, rank=rank, scale=0.5, bins=bins, query_norm=bound, noise=noise)
    ours = weighted_attention(
        query[None],
        coreset.keys[None],
        coreset.values[None],
        coreset.weights[None],
        scale=0.5,
        value_range=(values.amin(0)[None, None], values.amax(0)[None, None]),
    )
    torch.testing.assert_close(ours[0].double(), expected, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 2**31), st.integers(2, 60), st.floats(-20, 20))
def test_shifting_all_keys_leaves_the_weights(seed, n, shift):
    keys, values = tokens(n, seed=seed)
    rank, noise = max(1, n // 3), gumbel(max(1, n // 3), n, seed=seed)
    plain = compress_kv(keys, values, rank=rank, noise=noise)
    shifted = compress_kv(keys + shift, values, rank=rank, noise=noise)
    torch.testing.assert_close(shifted.values, plain.values, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(shifted.weights, plain.weights, rtol=2e-3, atol=2e-3)


@given(st.integers(0, 2**31))
def test_permuting_tokens_and_noise_leaves_the_coreset(seed):
    keys, values = tokens(30, seed=seed)
    noise, order = gumbel(6, 30, seed=seed), torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    plain = compress_kv(keys, values, rank=6, noise=noise)
    mixed = compress_kv(keys[order], values[order], rank=6, noise=noise[:, order])
    match = torch.cdist(plain.keys, mixed.keys).argmin(-1)
    torch.testing.assert_close(mixed.keys[match], plain.keys)
    torch.testing.assert_close(mixed.values[match], plain.values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed.weights[match], plain.weights, rtol=1e-3, atol=1e-3)


def test_compressing_twice_carries_weights_of_either_sign():
    """U' = W U and w' = W w: linear in what the slots stand for."""
    keys, values = tokens(30)
    weights = torch.randn(30)
    noise = gumbel(6, 30)
    once = compress_kv(keys, values, rank=6, weights=weights, noise=noise)
    twice = compress_kv(keys, 2 * values, rank=6, weights=weights, noise=noise)
    assert torch.equal(once.keys, twice.keys)
    torch.testing.assert_close(2 * once.values, twice.values)
    # The importance changes which keys are drawn: check the solve with those that were.
    _, expected = solved(keys, values, once, 8**-0.5, weights=weights)
    torch.testing.assert_close(once.weights.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_heavy_slots_are_drawn_as_by_the_reference_with_their_importance(seed):
    keys, values = tokens(40, d=16, seed=seed)
    weights, noise = 3 * torch.randn(40, generator=torch.Generator().manual_seed(seed)), gumbel(6, 40, seed=seed)
    heavy = noise + 2 * weights.abs().log()
    expected, _, _ = in_order(keys, reference.compress_kv(keys, values, 6, heavy, scale=0.5))
    assert torch.equal(
        compress_kv(keys, values, rank=6, scale=0.5, weights=weights, noise=noise).keys.double(), expected
    )


def test_padding_slots_take_part_in_nothing():
    keys, values = tokens(30)
    keys[4], values[4] = 1e4, float("inf")
    weights, valid = torch.ones(30), torch.ones(30, dtype=torch.bool)
    weights[4], valid[4] = 0.0, False
    noise = gumbel(6, 30)
    padded = compress_kv(keys, values, rank=6, weights=weights, valid=valid, noise=noise)
    kept = torch.arange(30) != 4
    alone = compress_kv(keys[kept], values[kept], rank=6, weights=weights[kept], noise=noise[:, kept])
    torch.testing.assert_close(padded.keys, alone.keys)
    torch.testing.assert_close(padded.values, alone.values)


def test_few_enough_valid_points_are_stored_unchanged():
    keys, values = torch.full((12, 8), 0.5), torch.randn(12, 5)
    valid = torch.arange(12) % 2 == 0
    coreset = compress_kv(keys, values, rank=8, valid=valid)
    assert coreset.valid.sum() == 6
    assert torch.equal(coreset.values[coreset.valid], values[valid])
    assert torch.equal(coreset.weights, coreset.valid.float())


@pytest.mark.parametrize("weighted", [False, True])
def test_what_fits_the_workspace_changes_nothing(weighted, monkeypatch):
    keys, values = tokens(3, 200)
    weights, noise = torch.rand(3, 200) if weighted else None, gumbel(3, 4, 200)
    whole = compress_kv(keys, values, rank=37, bins=10, weights=weights, noise=noise)
    for size in (30_000, 1):  # some bins of all heads; one bin of one head
        monkeypatch.setattr(binned, "_WORKSPACE", (size, size))
        parts = compress_kv(keys, values, rank=37, bins=10, weights=weights, noise=noise)
        assert torch.equal(parts.keys, whole.keys) and torch.equal(parts.valid, whole.valid)
        torch.testing.assert_close(parts.values, whole.values)
        torch.testing.assert_close(parts.weights, whole.weights)


def solved(keys, values, coreset, scale, weights=1.0, clipped=False):
    """U and w of the coreset's keys, by the reference's Nystrom weights for them."""
    centred = keys.double() - keys.double().mean(0)
    points = centred * scale**0.5 / reference.temperature(centred, scale, None, "released")
    drawn = torch.cdist(coreset.keys[coreset.valid], keys, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    matrix = reference.nystrom_weights(reference.kernel(points), drawn.tolist())
    matrix = matrix.clamp_min(0) if clipped else matrix
    return matrix @ values.double(), (matrix * weights).sum(-1)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("apart", [0.03, 0.3])
@pytest.mark.parametrize("square", [100, 400, 1000])
def test_near_duplicates_of_large_norm_do_not_spoil_attention(square, apart, blocked):
    """Distances from products are off by about 1e-7 |z|^2, where G is steepest."""
    n, scale = 160, 0.25
    root = (scale / 3.94582) ** 0.5
    generator = torch.Generator().manual_seed(square)
    directions = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=-1)
    points = square**0.5 * directions.repeat(4, 1) + apart / 4 * torch.randn(n, 16, generator=generator)
    keys, values = points / root, torch.randn(n, 8, generator=generator)
    rank = 64 if blocked else 30
    torch.manual_seed(square)
    coreset = compress_kv(keys, values, rank=rank, scale=scale, noise=None if blocked else gumbel(rank, n))
    assert coreset.valid.all()
    query = 0.3 * keys[::4] + torch.randn(40, 16, generator=generator)
    sums, mass = solved(keys, values, coreset, scale)
    box = values.amin(0), values.amax(0)
    expected = reference.wtdattn(query, coreset.keys, sums, mass, *box, scale=scale)
    ours = reference.wtdattn(query, coreset.keys, coreset.values, coreset.weights, *box, scale=scale)
    # Attention over so few of these keys is itself off by about as much as it is large.
    assert (ours - expected).norm() < 1e-2 * expected.norm()


@given(st.integers(0, 2**31), st.integers(100, 200), st.sampled_from(["nystrom", "clipped"]))
def test_large_ranks_without_noise_are_drawn_in_blocks_and_solve_the_same_system(seed, n, weighting):
    keys, values = tokens(2, n, seed=seed)
    torch.manual_seed(seed)
    coreset = compress_kv(keys, values, rank=80, weighting=weighting)
    for head in range(2):
        one = type(coreset)(coreset.keys[head], coreset.values[head], coreset.weights[head], coreset.valid[head])
        assert one.valid.all() and len(torch.unique(one.keys, dim=0)) == 80
        sums, mass = solved(keys[head], values[head], one, 8**-0.5, clipped=weighting == "clipped")
        torch.testing.assert_close(one.values.double(), sums, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(one.weights.double(), mass, rtol=1e-2, atol=1e-2)
        assert weighting == "nystrom" or (one.weights > 0).all()


@given(
    st.sampled_from(["duplicates", "constant", "zero", "huge", "one far away"]),
    st.sampled_from(DTYPES),
    st.one_of(st.integers(1, 40), st.integers(65, 90)),
    st.one_of(st.integers(1, 20), st.integers(64, 80)),
    st.sampled_from(["released", "theory"]),
    st.sampled_from(["nystrom", "clipped"]),
)
def test_hostile_keys_give_finite_coresets(kind, dtype, n, rank, temperature, weighting):
    keys, values = tokens(2, n)
    match kind:
        case "duplicates":
            keys = keys[:, torch.arange(n) // 5]
        case "constant":
            keys = torch.full_like(keys, 3.0)
        case "zero":
            keys = torch.zeros_like(keys)
        case "huge":
            keys = 1e4 * keys / keys.norm(dim=-1, keepdim=True)
        case "one far away":
            keys[:, 0] += 1e3
    coreset = compress_kv(keys.to(dtype), values.to(dtype), rank=rank, temperature=temperature, weighting=weighting)
    for tensor in (coreset.keys, coreset.values, coreset.weights):
        assert torch.isfinite(tensor).all()
    assert coreset.valid.any(-1).all()
    if weighting == "clipped":
        assert (coreset.weights >= 0).all()
    query = torch.randn(2, 3, 8, dtype=torch.float32).to(dtype)
    output = weighted_attention(query, coreset.keys, coreset.values, coreset.weights, valid=coreset.valid)
    assert torch.isfinite(output).all()


def test_equal_keys_are_compressed_without_loss():
    keys, values = torch.full((1, 20, 8), 0.7), torch.randn(1, 20, 5)
    coreset = compress_kv(keys, values, rank=4)
    output = weighted_attention(torch.randn(1, 3, 8), coreset.keys, coreset.values, coreset.weights)
    torch.testing.assert_close(output, values.mean(1, keepdim=True).expand(1, 3, 5))


def test_error_falls_with_rank_on_smooth_keys():
    keys, values = tokens(4, 200, d=3)
    query = torch.randn(4, 50, 3)
    exact = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    errors = []
    for rank in (4, 16, 64):
        coreset = compress_kv(keys, values, rank=rank, noise=gumbel(4, rank, 200))
        output = weighted_attention(query, coreset.keys, coreset.values, coreset.weights)
        errors.append(float((output - exact).norm() / exact.norm()))
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 4


def test_token_mass_is_one_for_pivots_and_falls_with_spread():
    keys, _ = tokens(60, d=16)
    mass = token_mass(keys, rank=10, noise=gumbel(10, 60))
    assert (mass - 1).abs().lt(1e-5).sum() >= 10
    assert token_mass(20 * keys, rank=10).median() < 0.05 < token_mass(0.5 * keys, rank=10).median()


def test_autocast_and_reduced_precision_change_nothing():
    keys, values = tokens(2, 50)
    noise = gumbel(2, 6, 50)
    plain = compress_kv(keys, values, rank=6, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compress_kv(keys, values, rank=6, noise=noise)
    assert torch.equal(plain.values, inside.values) and torch.equal(plain.weights, inside.weights)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older torch")
def test_a_programs_own_precision_is_left_as_it_was():
    backend = torch.backends.cuda.matmul
    before, backend.fp32_precision = backend.fp32_precision, "tf32"
    try:
        compress_kv(*tokens(2, 50), rank=6)
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


def test_slots_with_large_numerators_are_drawn_first():
    keys, values = tokens(60)
    values[17] *= 1e4
    for seed in range(20):
        coreset = compress_kv(
            keys, values, rank=2, weights=torch.ones(60), value_bound=torch.tensor(5.0), noise=gumbel(2, 60, seed=seed)
        )
        assert (coreset.keys == keys[17]).all(-1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.ones(9, 8, dtype=torch.int64)}, "keys has dtype torch.int64"),
        ({"values": torch.ones(8, 5)}, r"values has shape \(8, 5\)"),
        ({"rank": 0}, "bins=1 with rank=0"),
        ({"bins": 4}, "bins=4 with rank=3"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"weights": torch.ones(7)}, r"weights has shape \(7,\)"),
        ({"noise": torch.ones(2, 9)}, r"noise has shape \(2, 9\)"),
        ({"keys": torch.full((9, 8), float("nan"))}, "keys holds NaN"),
        ({"values": torch.full((9, 5), float("inf"))}, "values holds NaN"),
        ({"valid": torch.ones(9, dtype=torch.int64)}, "valid has dtype torch.int64"),
        ({"temperature": "hot"}, "temperature='hot' must be one of 'released', 'theory'"),
        ({"weighting": "heavy"}, "weighting='heavy' must be one of 'nystrom', 'clipped'"),
        ({"query_norm": -1.0}, "query_norm=-1.0"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {"keys": torch.ones(9, 8), "values": torch.ones(9, 5), "rank": 3} | change
    with pytest.raises(ValueError, match=message):
        compress_kv(given.pop("keys"), given.pop("values"), **given)


class TestTemperature:
    def by_mpmath(self, key_norm, query_norm, n, scale):
        from mpmath import exp, lambertw, log, mpf, sqrt

        rho = sqrt(1 + exp(lambertw(2 / exp(2)) + 2))
        s = log(n) / (mpf(scale) * key_norm * query_norm) + 2
        return float(mpf(key_norm) / query_norm * s / (2 * lambertw(s / (2 * rho)).real))

    @given(st.floats(1e-6, 1e4), st.floats(1e-6, 1e4), st.integers(2, 10**6), st.floats(1e-3, 1.0))
    def test_theory_is_the_papers_formula(self, key_norm, query_norm, n, scale):
        ours = squared_temperature(torch.tensor(key_norm), torch.tensor(query_norm), torch.tensor(n), scale, "theory")
        expected = self.by_mpmath(key_norm, query_norm, n, scale)
        assert float(ours) == pytest.approx(expected, rel=2e-4) or not 1e-26 < expected < 1e26
        keys = torch.tensor([[key_norm]], dtype=torch.float64).expand(n, 1)
        assert reference.temperature(keys, scale, query_norm, "theory") ** 2 == pytest.approx(expected, rel=1e-6)

    @given(st.floats(0, 3e38), st.floats(0, 3e38), st.integers(0, 10**9), st.sampled_from(["released", "theory"]))
    def test_always_finite_and_positive(self, key_norm, query_norm, n, rule):
        tau2 = squared_temperature(torch.tensor(key_norm), torch.tensor(query_norm), torch.tensor(n), 0.1, rule)
        assert torch.isfinite(tau2) and tau2 > 0

    def test_released_is_constant_unless_queries_are_bounded(self):
        norms, n = torch.tensor([0.5, 3.0]), torch.tensor(10)
        ours = squared_temperature(norms, None, n, 0.1, "released")
        torch.testing.assert_close(ours, torch.full((2,), 3.94582))
        ours = squared_temperature(norms, torch.tensor(6.0), n, 0.1, "released")
        torch.testing.assert_close(ours, 3.94582 * norms / 6)
