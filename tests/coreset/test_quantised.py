"""Quantised slots, bit for bit against the definition in `reference.py`."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wildcat_kv.coreset import quantised, reference
from wildcat_kv.coreset.quantised import Quantised, fits_half

BITS = st.sampled_from([8, 4, 3, 2])
# Channels: what real keys and values have, and what could go wrong. Each gets normal numbers (n,).
KINDS = {
    "normal": lambda x: x,
    "outlier": lambda x: 200 + 0.1 * x,  # as in the first layers of Qwen2.5
    "negative outlier": lambda x: -313.3 + 0.02 * x,
    "constant": lambda x: torch.full_like(x, 0.3),
    "zero": torch.zeros_like,
    "large": lambda x: x.clamp(-3, 3) * 20000,
    "one spike": lambda x: torch.where(torch.arange(len(x)) == len(x) // 2, 3e4, x),
    "small": lambda x: x * 1e-6,
    "subnormal": lambda x: x * 1e-39,
    "signs": lambda x: x.sign() * 0.7,
}
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


def numbers(batch, n, kinds, dtype, seed):
    """Numbers (batch, n, channels), a channel of each of `kinds`."""
    normal = torch.randn(batch, len(kinds), n, generator=torch.Generator().manual_seed(seed))
    made = [torch.stack([KINDS[kind](x) for kind, x in zip(kinds, row, strict=True)], -1) for row in normal]
    return torch.stack(made).to(dtype)


def codes_of(found):
    """The codes, from what `unpack` gives for a scale of 1 and a lowest number of 0."""
    ones, zeros = torch.ones_like(found.scale), torch.zeros_like(found.lowest)
    return found.of(found.codes, ones, zeros).unpack().double()


def check(group, codes, scale, lowest, bits):
    """One group of float32 numbers (n,) against the definition."""
    expected, wide, start = reference.quantise(group, bits, scale.dtype)
    assert (float(scale), float(lowest)) == (wide, start)
    exact = (group.double() - start) / (wide or 1.0)
    # Differences are taken in float32: nearer to the middle of two codes than that, either will do.
    clear = (exact - exact.floor() - 0.5).abs() > 2**-22 * exact.abs()
    assert torch.equal(codes[clear], expected[clear]) and ((codes - exact).abs() <= 0.5 + 2**-14).all()
    if torch.equal((group - start).double(), group.double() - start):  # float32 takes the difference exactly
        assert torch.equal(codes, expected)


kinds = st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6)


@given(kinds, BITS, st.sampled_from([8, 24, 64]), st.integers(1, 3), st.integers(1, 2), DTYPES, st.integers(0, 999))
def test_keys_have_a_scale_a_channel_and_group(kinds, bits, size, groups, batch, dtype, seed):
    keys = numbers(batch, groups * size, kinds, dtype, seed)
    found = Quantised.keys(keys, bits, size)
    assert (found.size, found.slots, found.channels) == (size, groups * size, len(kinds))
    codes, single = codes_of(found), keys.float()
    for b in range(batch):
        for g in range(groups):
            own = slice(g * size, (g + 1) * size)
            for c in range(len(kinds)):
                check(single[b, own, c], codes[b, own, c], found.scale[b, g, 0, c], found.lowest[b, g, 0, c], bits)


@given(
    st.sampled_from([(1, 64), (5, 64), (64, 64), (128, 64), (96, 64), (256, 64), (16, 8), (24, 16)]),
    BITS,
    st.sampled_from([8, 64]),
    st.sampled_from(sorted(KINDS)),
    DTYPES,
    st.integers(0, 999),
)
def test_values_have_a_scale_a_slot_and_group_of_channels(widths, bits, size, kind, dtype, seed):
    d_v, channels = widths
    values = numbers(1, d_v, [kind] * size, dtype, seed).mT.contiguous()
    found = Quantised.values(values, bits, size, channels)
    parts = d_v // channels if d_v % channels == 0 else 1
    assert found.scale.shape == found.lowest.shape == (1, 1, size, parts)
    codes, single = codes_of(found)[0], values.float()[0]
    for slot in range(0, size, 7):
        for part in range(parts):
            own = slice(part * (d_v // parts), (part + 1) * (d_v // parts))
            scale, lowest = found.scale[0, 0, slot, part], found.lowest[0, 0, slot, part]
            check(single[slot, own], codes[slot, own], scale, lowest, bits)


@given(kinds, BITS, st.sampled_from([8, 64]), st.booleans(), DTYPES, st.integers(0, 999))
def test_every_number_comes_back_within_half_a_step(kinds, bits, size, by_slot, dtype, seed):
    x = numbers(2, 2 * size, kinds, dtype, seed)
    found = Quantised.values(x, bits, size, 64) if by_slot else Quantised.keys(x, bits, size)
    back, exact = found.unpack(), x.double()
    assert back.dtype == torch.float32 and back.shape == x.shape
    step = found.scale.double()
    step = step.flatten(1, 2) if by_slot else step.expand(-1, -1, size, -1).flatten(1, 2)
    rounding = 2**-22 * exact.abs().amax(1 if not by_slot else -1, keepdim=True)
    assert ((back.double() - exact).abs() <= step / 2 + rounding).all()
    # A step is the spread over the codes, but for the rounding of its two ends to 16 bits.
    spread = exact.unflatten(1, (-1, size)).flatten(1, 2) if by_slot else exact.unflatten(1, (-1, size))
    low, high = (spread.aminmax(dim=-1, keepdim=True)) if by_slot else spread.aminmax(dim=2, keepdim=True)
    ulp, least = (2**-7, 0.0) if by_slot else (2**-10, 2**-24)
    slack = (low.abs() * ulp + least) / (2**bits - 1) + least
    given_step = found.scale.double().flatten(1, 2) if by_slot else found.scale.double()
    assert (given_step <= ((high - low) / (2**bits - 1) + slack) * (1 + ulp) + 2**-133).all()


@given(BITS, st.sampled_from([8, 16, 40, 64, 128]), st.sampled_from([1, 2, 3, 16, 64, 128, 256]), st.integers(0, 999))
def test_every_code_is_packed_and_unpacked(bits, size, channels, seed):
    """Numbers that are codes themselves, in any order, come back as they are."""
    most = 2**bits - 1
    codes = torch.randint(0, most + 1, (2, 2, size, channels), generator=torch.Generator().manual_seed(seed)).float()
    codes[:, :, 0], codes[:, :, -1] = 0, most
    found = Quantised.keys(codes.flatten(1, 2), bits, size)
    assert (found.scale == 1).all() and (found.lowest == 0).all()
    assert torch.equal(found.unpack(), codes.flatten(1, 2))
    assert found.codes.dtype == torch.uint8 and found.codes.shape == (2, 2, size * bits // 8, channels)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("size", "channels"), [(64, 64), (8, 16), (64, 128)])
def test_the_bytes_are_those_of_the_formula(bits, size, channels):
    x = torch.randn(3, 4 * size, channels)
    keys, values = Quantised.keys(x, bits, size), Quantised.values(x, bits, size, 64)
    taken = [sum(tensor.nbytes for tensor in each.tensors()) for each in (keys, values)]
    number, parts = x.numel() * bits // 8, max(1, channels // 64)
    assert taken == [number + 3 * 4 * channels * 4, number + 3 * 4 * size * parts * 4]


@given(BITS, st.sampled_from([8, 16, 64]), st.integers(1, 9), st.integers(1, 400), st.booleans(), st.integers(0, 99))
def test_blocks_are_what_unpack_gives(bits, size, groups, most, by_slot, seed):
    x = torch.randn(2, groups * size, 8, generator=torch.Generator().manual_seed(seed))
    found = Quantised.values(x, bits, size, 4) if by_slot else Quantised.keys(x, bits, size)
    blocks = [block.clone() for block in found.blocks(most)]  # one holds until the next
    assert all(block.shape[1] <= max(most, size) for block in blocks)
    assert torch.equal(torch.cat(blocks, dim=1), found.unpack())


def test_blocks_share_their_memory_but_in_a_graph():
    """One scratch buffer for all, save where gradients hold on to what was multiplied."""
    found = Quantised.keys(torch.randn(2, 32, 4), 4, 8)
    places = [{block.data_ptr() for block in found.blocks(8)} for _ in range(2)]
    assert len(places[0]) == 1 and places[0] == places[1]
    with torch.enable_grad():
        blocks = list(found.blocks(8))
    assert torch.equal(torch.cat(blocks, dim=1), found.unpack())
    with torch.inference_mode():
        assert {block.data_ptr() for block in found.blocks(8)} == places[0]


@pytest.mark.parametrize("inference", [False, True])
def test_it_works_under_autograd_autocast_and_inference_mode(inference):
    x = torch.randn(1, 16, 8)
    found = Quantised.keys(x, 4, 8)
    expected = found.unpack()
    with torch.enable_grad(), torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16):
        again = Quantised.keys(x, 4, 8)
        assert torch.equal(again.unpack(), expected) and torch.equal(found.unpack(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_the_program_does_not_matter(dtype, monkeypatch):
    x = torch.randn(1, 16, 8)
    found = Quantised.keys(x, 8, 8), Quantised.values(x, 8, 8, 8)
    expected = [each.unpack() for each in found]
    monkeypatch.setattr(quantised, "_scratch", threading.local())
    torch.set_default_dtype(dtype)
    try:
        again = Quantised.keys(x, 8, 8), Quantised.values(x, 8, 8, 8)
        blocks = [next(each.blocks(16)).clone() for each in again]
    finally:
        torch.set_default_dtype(torch.float32)
    for block, whole in zip(blocks, expected, strict=True):
        assert block.dtype == torch.float32 and torch.equal(block, whole)


def test_what_half_precision_cannot_hold_is_seen():
    assert fits_half(torch.tensor([65504.0, -65504.0])) and fits_half(torch.empty(0))
    assert not fits_half(torch.tensor([65505.0])) and not fits_half(torch.tensor([0.0, -7e4]))
    assert not fits_half(torch.tensor([torch.nan])) and not fits_half(torch.tensor([torch.inf]))


def test_the_largest_numbers_come_back_finite():
    x = torch.tensor([-65504.0, 65504.0] * 4).view(1, 8, 1)
    for bits in (8, 4, 3, 2):
        back = Quantised.keys(x, bits, 8).unpack()
        assert torch.isfinite(back).all() and ((back - x).abs() <= 131008 / (2**bits - 1) / 2 + 64).all()
