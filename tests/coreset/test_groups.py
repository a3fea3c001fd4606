"""Quantised slots of many heads in groups, against what they unpack to, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wildcat_kv.coreset import groups as module
from wildcat_kv.coreset.groups import Groups, Packed
from wildcat_kv.coreset.quantised import Quantised


def made(heads, sizes, bits, shape, channels, generator, *, weighted):
    """Slots of some heads in segments, one for each (groups, size)."""
    found = []
    for groups, size in sizes:
        n = groups * size
        keys, values = (torch.randn(heads, n, wide, generator=generator) for wide in shape)
        keys[..., 0] += 50  # a channel far from 0
        weights = torch.rand(heads, n, generator=generator).add(0.5).half()
        weights[:, ::5] = 0
        packed = Quantised.keys(keys, bits, size), Quantised.values(values, bits, size, channels)
        found.append(Packed(*packed, weights if weighted else None))
    return heads, found


def unpacked(bands):
    """Keys, values and weights of each head, float64."""
    for heads, band in bands:
        for head in range(heads):
            keys = [packed.keys.unpack()[head].double() for packed in band]
            values = [packed.values.unpack()[head].double() for packed in band]
            ones = [torch.ones(packed.keys.slots, dtype=torch.float64) for packed in band]
            weights = [
                one if packed.weights is None else packed.weights[head].double()
                for one, packed in zip(ones, band, strict=True)
            ]
            yield (torch.cat(side) for side in (keys, values, weights)) if band else None


SEGMENTS = st.sampled_from([[], [(1, 8)], [(2, 16)], [(3, 16), (1, 8)], [(1, 16), (2, 8)]])


@given(
    bands=st.lists(st.tuples(st.integers(1, 2), SEGMENTS, st.booleans()), min_size=1, max_size=4),
    bits=st.sampled_from([8, 4, 2]),
    shape=st.sampled_from([(8, 8), (4, 16)]),
    at_once=st.sampled_from([1, 512, 2**18]),
    seed=st.integers(0, 99),
)
def test_one_softmax_over_all_groups_of_a_head(bands, bits, shape, at_once, seed):
    generator = torch.Generator().manual_seed(seed)
    held = [made(heads, sizes, bits, shape, 8, generator, weighted=weighted) for heads, sizes, weighted in bands]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_UNPACKED_AT_ONCE", at_once)
        groups = Groups.of(held)
    if not any(sizes for _, sizes, _ in bands):
        assert groups is None
        return
    query = torch.randn(sum(heads for heads, _ in held), 3, shape[0], generator=generator) / 8
    scores = groups.scores(query)
    largest = groups.largest(scores)
    shift = largest.clamp_min(-1e30).unsqueeze(-1)
    sums, products = groups.weighted_sums((scores - shift.index_select(0, groups.owner)).exp())
    for head, sides in enumerate(unpacked(held)):
        if sides is None:
            assert (largest[head] == -torch.inf).all() and not sums[head].any() and not products[head].any()
            continue
        keys, values, weights = sides
        own = query[head].double() @ keys.T + weights.log()
        torch.testing.assert_close(largest[head].double(), own.amax(-1), rtol=1e-5, atol=1e-5)
        terms = (own - shift[head].double()).exp()
        torch.testing.assert_close(sums[head, :, 0].double(), terms.sum(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(products[head].double(), terms @ values, rtol=1e-4, atol=1e-4)


def test_codes_in_two_planes_are_not_read_in_groups():
    generator = torch.Generator().manual_seed(0)
    assert Groups.of([made(1, [(1, 8)], 3, (4, 4), 4, generator, weighted=True)]) is None
