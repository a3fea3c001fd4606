"""Bins: every token is in one of them, and what is cut comes together again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from wildcat_kv.coreset.bins import BinLayout, split_evenly


@st.composite
def layouts(draw):
    bins = draw(st.integers(1, 6))
    return draw(st.integers(bins, 40)), draw(st.integers(bins, 20)), bins


@given(layouts())
def test_every_token_is_in_one_bin_and_slots_come_together_again(sizes):
    length, rank, bins = sizes
    layout = BinLayout.build(length, rank, bins)
    assert (layout.bins, layout.longest, layout.bin_rank) == (bins, -(-length // bins), -(-rank // bins))
    line = torch.arange(1, length + 1).view(1, 1, length).expand(2, 3, -1)
    cut = layout.gather(line)
    assert torch.equal(cut[1, 2][layout.used], line[0, 0]) and not cut[..., ~layout.used].any()
    places = torch.arange(layout.longest).expand(2, 3, bins, -1)
    assert torch.equal(layout.columns(places)[0, 0][layout.used] + 1, line[0, 0])
    assert layout.columns(places).max() < length
    some = range(bins // 2, bins)
    assert torch.equal(layout.gather(line, some, torch.float64), cut[:, :, some.start :].double())
    slots = torch.arange(rank).view(1, 1, rank)
    assert torch.equal(layout.collect(layout.slots.rectangle(slots, range(bins), torch.int64)), slots)


@given(layouts())
def test_bins_with_a_slot_for_each_token_are_known(sizes):
    length, rank, bins = sizes
    layout = BinLayout.build(length, rank, bins)
    whole = [size <= slots for size, slots in zip(split_evenly(length, bins), split_evenly(rank, bins), strict=True)]
    assert layout.lossless == all(whole) and layout.mixed == (any(whole) and not all(whole))
    assert layout.rank.tolist() == split_evenly(rank, bins)
