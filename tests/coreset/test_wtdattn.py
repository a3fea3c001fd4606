"""Attention to weighted entries, whichever way it is computed, against WTDATTN of the reference."""

import itertools
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wildcat_kv import weighted_attention
from wildcat_kv.coreset import fused, parts, reference, wtdattn
from wildcat_kv.coreset.quantised import Quantised
from wildcat_kv.coreset.wtdattn import AttentionOptions, WeightSigns, coreset_attention, mass_of, parted_attention


def definition(query, keys, values, weights, scale, valid=None, causal=False, softcap=None, sinks=None, box=None):
    """WTDATTN of the reference for every query: what it sees, as one channel that holds the scores."""
    groups, (n, own) = query.shape[-3] // keys.shape[-3], (keys.shape[-2], query.shape[-2])
    valid = torch.ones(keys.shape[:-1], dtype=torch.bool) if valid is None else valid
    scores = query.double() @ keys.double().repeat_interleave(groups, -3).mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    output = torch.empty(*query.shape[:-1], values.shape[-1], dtype=torch.float64)
    low, high = (torch.full_like(values[..., :1, :], end) for end in (-torch.inf, torch.inf)) if box is None else box
    for *batch, head, place in itertools.product(*map(range, query.shape[:-1])):
        of = (*batch, head // groups)
        seen = valid[of] & (torch.arange(n) <= (n - own + place if causal else n))
        entries = scores[(*batch, head, place)][seen].unsqueeze(-1), values[of][seen].double(), weights[of][seen]
        if sinks is not None:  # an entry of weight 1 without a value
            sink = sinks[head].double().view(1, 1), torch.zeros(1, values.shape[-1]), torch.ones(1)
            entries = [torch.cat(pair) for pair in zip(entries, sink, strict=True)]
        one = torch.ones(1, 1)
        output[(*batch, head, place)] = reference.wtdattn(one, *entries, low[of][0], high[of][0], scale=1.0)[0]
    return output


def inputs(heads=4, kv_heads=2, own=3, n=11, d=8, d_v=5, seed=0, batch=(2,)):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(*batch, heads, own, d, generator=generator)
    keys = torch.randn(*batch, kv_heads, n, d, generator=generator)
    values = torch.randn(*batch, kv_heads, n, d_v, generator=generator)
    weights = 1 + torch.rand(*batch, kv_heads, n, generator=generator) * 3
    weights[..., ::4] *= -0.05
    return query, keys, values, weights


@given(
    st.sampled_from([(4, 2), (6, 1), (3, 3)]),
    st.integers(1, 6),
    st.integers(6, 30),
    st.booleans(),
    st.sampled_from([None, 5.0]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
)
def test_matches_the_reference(heads, own, n, causal, softcap, with_sinks, clipped, seed):
    query, keys, values, weights = inputs(*heads, own=own, n=n, seed=seed)
    weights = weights.abs()
    valid = torch.rand(2, heads[1], n) < 0.7
    valid[..., 0] = True
    sinks = torch.randn(heads[0]) if with_sinks else None
    box = (values.amin(-2, keepdim=True) / 3, values.amax(-2, keepdim=True) / 3) if clipped else None
    ours = weighted_attention(
        query,
        keys,
        values,
        weights,
        scale=0.4,
        valid=valid,
        causal=causal,
        value_range=box,
        softcap=softcap,
        sink_logits=sinks,
    )
    expected = definition(query, keys, values, weights, 0.4, valid, causal, softcap, sinks, box)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_negative_weights_are_summed_with_their_sign():
    query, keys, values, weights = inputs()
    assert (weights < 0).any()
    torch.testing.assert_close(
        weighted_attention(query, keys, values, weights, scale=0.2).double(),
        definition(query, keys, values, weights, 0.2),
        rtol=1e-4,
        atol=1e-5,
    )


def test_weights_of_one_are_ordinary_attention():
    query, keys, values, _ = inputs(own=11)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(weighted_attention(query, keys, values, causal=True), expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_appending_exact_entries_joins_them(first, second, seed):
    """Design 4.7: [S, E] and then E' is one attention over [S, E, E'], and S stays as it was."""
    query, keys, values, weights = inputs(n=4 + first + second, own=1, seed=seed)
    weights[..., 4:] = 1
    slots = [tensor[:, :, :4].clone() for tensor in (keys, values, weights)]
    whole = weighted_attention(query, keys, values, weights)
    parts = [slice(0, 4 + first), slice(4 + first, None)]
    # Attention over parts combines by the masses of the parts.
    mass = []
    for part in parts:
        scores = (query @ keys[:, :, part].repeat_interleave(2, 1).mT * 8**-0.5).exp()
        mass.append((scores * weights[:, :, part].repeat_interleave(2, 1).unsqueeze(-2)).sum(-1, keepdim=True))
    outputs = [weighted_attention(query, keys[:, :, p], values[:, :, p], weights[:, :, p]) for p in parts]
    joined = sum(m * out for m, out in zip(mass, outputs, strict=True)) / sum(mass)
    # Signed weights may cancel in a part, whose output is then 0 by rule and says nothing.
    sound = ((mass[0] > 0.1) & (sum(mass) > 0.1)).expand_as(joined)
    torch.testing.assert_close(joined[sound], whole[sound], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(a, b[:, :, :4]) for a, b in zip(slots, (keys, values, weights), strict=True))


def test_a_denominator_that_cancels_gives_zero_then_the_clip():
    keys, values = torch.zeros(1, 2, 4), torch.tensor([[[3.0], [5.0]]])
    weights, query = torch.tensor([[1.0, -1.0]]), torch.randn(1, 2, 4)
    assert not weighted_attention(query, keys, values, weights).any()
    bounds = torch.tensor([[[2.0]]]), torch.tensor([[[9.0]]])
    assert weighted_attention(query, keys, values, weights, value_range=bounds).eq(2.0).all()


def test_output_is_clipped_to_the_values_seen():
    query, keys, values, weights = inputs()
    weights = weights * 0.1  # numerators ten times too large for their weights
    bounds = values.amin(-2, keepdim=True), values.amax(-2, keepdim=True)
    output = weighted_attention(query, keys, values, weights, value_range=bounds)
    lowest, highest = (bound.repeat_interleave(2, 1) for bound in bounds)
    assert (output >= lowest).all() and (output <= highest).all()
    assert not torch.allclose(output, weighted_attention(query, keys, values, weights))


def test_a_padding_slot_does_not_set_the_scale():
    query, keys, values, weights = inputs()
    keys[:, :, 5], values[:, :, 5], weights[:, :, 5] = 1e4, 0, 0
    valid = torch.ones(2, 2, 11, dtype=torch.bool)
    valid[:, :, 5] = False
    kept = torch.arange(11) != 5
    torch.testing.assert_close(
        weighted_attention(query, keys, values, weights, valid=valid),
        weighted_attention(query, keys[:, :, kept], values[:, :, kept], weights[:, :, kept]),
    )


def test_a_row_of_padding_is_finite():
    query, keys, values, weights = inputs()
    output = weighted_attention(query, keys, values, weights, valid=torch.zeros(2, 2, 11, dtype=torch.bool))
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_accumulates_in_float32(dtype):
    query, keys, values, weights = (tensor.to(dtype) for tensor in inputs(n=400))
    weights = weights.float()
    output = weighted_attention(query, keys, values, weights)
    assert output.dtype == dtype
    torch.testing.assert_close(
        output.double(),
        definition(query, keys, values, weights, 8**-0.5),
        rtol=1e-5 if dtype == torch.float64 else torch.finfo(dtype).eps,
        atol=1e-5 if dtype == torch.float64 else torch.finfo(dtype).eps,
    )


def test_long_prompts_are_attended_in_blocks(monkeypatch):
    query, keys, values, weights = inputs(own=9)
    whole = weighted_attention(query, keys, values, weights, causal=True)
    monkeypatch.setattr(wtdattn, "SCORES_AT_ONCE", 200)
    monkeypatch.setattr(fused, "SCORES_AT_ONCE", 200)
    torch.testing.assert_close(weighted_attention(query, keys, values, weights, causal=True), whole)


@pytest.mark.parametrize(
    ("query", "keys", "values"),
    [
        ((1, 3, 1, 8), (1, 2, 4, 8), (1, 2, 4, 8)),
        ((1, 2, 1, 8), (1, 2, 4, 6), (1, 2, 4, 6)),
        ((1, 2, 1, 8), (2, 2, 4, 8), (2, 2, 4, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_named(query, keys, values):
    with pytest.raises(ValueError, match=r"query \(1, "):
        weighted_attention(torch.ones(query), torch.ones(keys), torch.ones(values))


@pytest.mark.parametrize("name", ["weights", "valid"])
def test_weights_of_another_shape_are_named(name):
    query, keys, values, _ = inputs()
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 2, 10\); it must be \(2, 2, 11\)"):
        weighted_attention(query, keys, values, **{name: torch.ones(2, 2, 10)})


def test_nan_is_not_hidden():
    query, keys, values, weights = inputs()
    keys[0, 0, 3, 0] = float("nan")
    output = weighted_attention(query, keys, values, weights)
    assert output[0, :2].isnan().all() and torch.isfinite(output[1]).all()


# As a cache stores them: numerators over their masses, and what is known of the weights

KINDS = list(WeightSigns)


def stored_attention(query, keys, values, weights, valid, kind, **options):
    return coreset_attention(query, keys, values, weights, kind, AttentionOptions(0.4, valid, **options))


def as_stored(kind, heads, own, n, seed, dtype=torch.float32):
    """Query, keys, values, weights and validity of which `kind` is true; the first entry is always valid."""
    query, keys, values, weights = inputs(*heads, own=own, n=n, seed=seed)
    valid = torch.ones(weights.shape, dtype=torch.bool)
    if kind is WeightSigns.NONE:
        weights = torch.ones_like(weights)
    else:
        generator = torch.Generator().manual_seed(seed)
        valid = torch.rand(weights.shape, generator=generator) < 0.7
        valid[..., 0] = True
        if kind is WeightSigns.POSITIVE:
            weights = weights.abs().clamp_min(2**-7)
        else:  # little that is negative: a denominator that cancels is another test's
            weights[..., ::4] *= 0.1
            weights[..., 1::4] *= 1e-4
            weights[..., 0] = 4
        weights = weights * valid
    values = (values / mass_of(weights).unsqueeze(-1)).to(dtype)
    return query.to(dtype), keys.to(dtype), values, weights, valid


@given(
    st.sampled_from(KINDS),
    st.sampled_from([(4, 2), (6, 1), (3, 3)]),
    st.integers(1, 6),
    st.integers(6, 30),
    st.booleans(),
    st.sampled_from([None, 5.0]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([2**26, 150]),
    st.integers(0, 999),
)
def test_attention_to_stored_entries_matches_the_reference(
    kind, heads, own, n, causal, softcap, with_sinks, dtype, at_once, seed
):
    query, keys, values, weights, valid = as_stored(kind, heads, own, n, seed, dtype)
    sinks = torch.randn(heads[0]) if with_sinks else None
    with patch.object(wtdattn, "SCORES_AT_ONCE", at_once), patch.object(fused, "SCORES_AT_ONCE", at_once):
        ours = stored_attention(
            query, keys, values, weights, valid, kind, causal=causal, softcap=softcap, sink_logits=sinks
        )
    numerators = values.double() * mass_of(weights).unsqueeze(-1)
    expected = definition(query, keys, numerators, weights, 0.4, valid, causal, softcap, sinks)
    assert ours.dtype == dtype and ours.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    # The fused kernel rounds the terms of an average: the error is one of the largest value.
    largest = float(values.abs().max())
    torch.testing.assert_close(ours.double(), expected, rtol=10 * tolerance, atol=2 * tolerance * largest)


@pytest.mark.parametrize("own", [1, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [WeightSigns.POSITIVE, WeightSigns.SIGNED])
def test_a_query_that_sees_nothing_gives_finite_numbers(kind, dtype, softcap, own):
    query, keys, values, weights, valid = as_stored(kind, (4, 2), own, 9, 0, dtype)
    valid[0], weights[0] = False, 0
    keys[0] *= 100  # loud padding
    output = stored_attention(query, keys, values, weights, valid, kind, causal=True, softcap=softcap)
    assert torch.isfinite(output).all()
    rest = (tensor[1:] for tensor in (query, keys, values, weights, valid))
    alone = stored_attention(*rest, kind, causal=True, softcap=softcap)
    torch.testing.assert_close(output[1:], alone)


@given(st.integers(1, 5), st.integers(6, 30), st.booleans(), st.integers(0, 999))
def test_both_ways_agree_where_no_weight_is_negative(own, n, causal, seed):
    query, keys, values, weights, valid = as_stored(WeightSigns.POSITIVE, (4, 2), own, n, seed)
    box = (values.amin(-2, keepdim=True) / 3, values.amax(-2, keepdim=True) / 3)  # narrow: some outputs are clipped
    fused, general = (
        stored_attention(query, keys, values, weights, valid, kind, causal=causal, value_range=box)
        for kind in (WeightSigns.POSITIVE, WeightSigns.SIGNED)
    )
    torch.testing.assert_close(fused, general, rtol=1e-4, atol=1e-5)
    numerators = values * mass_of(weights).unsqueeze(-1)
    expected = definition(query, keys, numerators, weights, 0.4, valid, causal, box=box)
    torch.testing.assert_close(general.double(), expected, rtol=1e-4, atol=1e-5)
    lowest, highest = (bound.repeat_interleave(2, 1) for bound in box)
    assert ((fused >= lowest) & (fused <= highest)).all()


def test_a_large_key_of_padding_outweighs_nothing():
    for dtype in (torch.float32, torch.float16):
        query, keys, values, weights, valid = as_stored(WeightSigns.POSITIVE, (4, 2), 1, 12, 3, dtype)
        valid[..., 5], weights[..., 5] = False, 0
        keys[..., 5, :] = 300.0
        query = query.abs()
        kept = torch.arange(12) != 5
        torch.testing.assert_close(
            stored_attention(query, keys, values, weights, valid, WeightSigns.POSITIVE),
            stored_attention(
                query,
                keys[..., kept, :],
                values[..., kept, :],
                weights[..., kept],
                valid[..., kept],
                WeightSigns.POSITIVE,
            ),
        )


def test_keys_and_values_of_another_dtype_than_the_query_are_attended_to():
    query, keys, values, weights, valid = as_stored(WeightSigns.POSITIVE, (4, 2), 1, 12, 0)
    same = stored_attention(query, keys, values, weights, valid, WeightSigns.POSITIVE)
    mixed = stored_attention(query, keys.bfloat16(), values.bfloat16(), weights, valid, WeightSigns.POSITIVE)
    torch.testing.assert_close(mixed, same, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = stored_attention(query, keys, values, weights, valid, WeightSigns.POSITIVE)
    torch.testing.assert_close(under, same)


@pytest.mark.parametrize(
    ("weights", "valid", "expected"),
    [
        ([1, 1, 1], [1, 1, 1], WeightSigns.NONE),
        ([1, 0, 1], [1, 0, 1], WeightSigns.POSITIVE),
        ([1, 5, 2**-7], [1, 1, 1], WeightSigns.POSITIVE),
        ([1, 0, 1], [1, 1, 1], WeightSigns.SIGNED),
        ([1, 2**-8, 1], [1, 1, 1], WeightSigns.SIGNED),
        ([1, -3, 1], [1, 1, 1], WeightSigns.SIGNED),
        ([1, -3, 1], [1, 0, 1], WeightSigns.POSITIVE),
        ([1, float("nan"), 1], [1, 1, 1], WeightSigns.SIGNED),
        ([], [], WeightSigns.NONE),
    ],
)
def test_what_is_known_of_weights(weights, valid, expected):
    assert WeightSigns.of(torch.tensor(weights, dtype=torch.float32), torch.tensor(valid, dtype=torch.bool)) is expected


@given(
    st.sampled_from([(4, 2), (6, 1), (3, 3)]),
    st.integers(1, 5),
    st.integers(0, 20),
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(0, 999),
)
def test_log_weights_ride_in_channels_of_the_keys(heads, own, more, weighted, dtype, seed):
    """GPUs attend so with several queries: weights up to 10^5, and padding whose keys have the largest scores."""
    query, keys, values, _ = inputs(*heads, own=own, n=own + more, d=16, d_v=12, seed=seed)
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(dtype)
    weights = torch.logspace(-2.1, 5, own + more).expand(2, heads[1], -1).clone()
    valid = torch.rand(weights.shape) < 0.7
    weights[..., more:], valid[..., more:] = 1.0, True
    weights.masked_fill_(~valid, 0.0)
    if not weighted:
        weights, valid = torch.ones_like(weights), torch.ones_like(valid)
    keys.masked_fill_(~valid.unsqueeze(-1), 4.0)
    found = fused.by_channels(query, keys, values, weights if weighted else None, 0.3)
    numerators = values.float() * mass_of(weights).unsqueeze(-1)
    options = {"scale": 0.3, "valid": valid, "causal": True}
    expected = weighted_attention(query.float(), keys.float(), numerators, weights, **options)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_masses_are_weights_that_can_be_divided_by():
    weights = torch.tensor([1.0, 3.5, 2**-7, 2**-8, 0.0, -2.0, 1e30])
    assert torch.equal(mass_of(weights), torch.tensor([1.0, 3.5, 2**-7, 1.0, 1.0, 1.0, 1e30]))


# Several parts, some of them quantised


@given(
    st.lists(st.tuples(st.sampled_from([8, 4, 3, 2]), st.sampled_from([8, 16]), st.integers(1, 3)), max_size=3),
    st.integers(1, 6),
    st.integers(0, 20),
    st.sampled_from([None, 5.0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([1, 11, 4096]),
    st.integers(0, 999),
)
def test_parts_are_attended_to_as_if_they_were_one(
    packed, own, more, softcap, with_sinks, clipped, dtype, at_once, seed
):
    """Quantised parts of several widths, padding, negative weights, and new tokens that see each other."""
    batch, group, d, d_v, n = 3, 2, 8, 6, own + more
    query, keys, values, _ = inputs(group, 1, own, n, d, d_v, seed, (batch,))
    keys, values = keys.to(dtype), values.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    key_parts, value_parts, total = [], [], n
    for bits, size, groups in packed:
        slots = torch.randn(batch, size * groups, d + d_v, generator=generator)
        key_parts.append(Quantised.keys(slots[..., :d], bits, size))
        value_parts.append(Quantised.values(slots[..., d:], bits, size, 3))
        total += size * groups
    weights = 1 + torch.rand(batch, 1, total, generator=generator) * 3
    weights[..., : total - own : 4] *= -0.05
    valid = torch.rand(batch, 1, total, generator=generator) < 0.7
    valid[..., total - own :] = True
    weights.masked_fill_(~valid, 0.0)
    sinks = torch.randn(batch, group, generator=generator) if with_sinks else None
    whole_keys = torch.cat([*(part.unpack().unsqueeze(1) for part in key_parts), keys.float()], dim=2)
    whole_values = torch.cat([*(part.unpack().unsqueeze(1) for part in value_parts), values.float()], dim=2)
    box = (whole_values.amin(2, keepdim=True) / 3, whole_values.amax(2, keepdim=True) / 3) if clipped else None
    options = AttentionOptions(0.4, valid, True, box, softcap, sinks)
    with patch.object(parts, "_CONVERTED_AT_ONCE", at_once):
        signs = WeightSigns.of(weights, valid)
        ours = parted_attention(query, [*key_parts, keys], [*value_parts, values], weights, signs, options)
    numerators = whole_values * mass_of(weights).unsqueeze(-1)
    expected = [
        weighted_attention(
            query[b],
            whole_keys[b],
            numerators[b],
            weights[b],
            scale=0.4,
            valid=valid[b],
            causal=True,
            value_range=None if box is None else (box[0][b], box[1][b]),
            softcap=softcap,
            sink_logits=None if sinks is None else sinks[b],
        )
        for b in range(batch)
    ]
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_quantised_part_is_unpacked_a_block_at_a_time():
    """Unpack 40 groups: never more than a block at once, and no block too long."""
    keys, values = (Quantised.keys(torch.randn(2, 320, 4), 4, 8), Quantised.values(torch.randn(2, 320, 4), 4, 8, 4))
    seen, unpack = [], Quantised._unpack

    def noted(self, *args):
        block = unpack(self, *args)
        seen.append(block.shape[1])
        return block

    with patch.object(parts, "_CONVERTED_AT_ONCE", 24), patch.object(Quantised, "_unpack", noted):
        parted_attention(
            torch.randn(2, 1, 1, 4), [keys], [values], torch.ones(2, 1, 320), WeightSigns.NONE, AttentionOptions(0.5)
        )
    assert max(seen) == 24 and sum(seen) == 640


@pytest.mark.parametrize("inference", [False, True])
def test_parts_under_autocast_are_computed_in_full(inference):
    query = torch.randn(1, 2, 3, 8)
    keys, values = (Quantised.keys(torch.randn(1, 16, 8), 4, 8), Quantised.values(torch.randn(1, 16, 8), 4, 8, 8))
    own, weights, options = torch.randn(1, 1, 3, 8), torch.ones(1, 1, 19), AttentionOptions(0.4, causal=True)
    expected = parted_attention(query, [keys, own], [values, own], weights, WeightSigns.NONE, options)
    with torch.enable_grad(), torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16):
        found = parted_attention(query, [keys, own], [values, own], weights, WeightSigns.NONE, options)
    assert torch.equal(found, expected)
