"""One token's attention by Triton's kernels, run by its interpreter in a process of its own."""

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wildcat_kv.coreset import decoding
from wildcat_kv.coreset.decoding import DecodePlan, HeldBand, PackedPart, supports
from wildcat_kv.coreset.quantised import Quantised


def _call(name, *arguments):
    torch.set_num_threads(1)
    return getattr(importlib.import_module("tests.coreset.decode_compare"), name)(*arguments)


@pytest.fixture(scope="module")
def interpreted():
    """Calls functions of `decode_compare` by name, in the other process."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        yield lambda *arguments: pool.submit(_call, *arguments).result()


WIDTHS = [(16, 16), (32, 16), (64, 64), (80, 80), (96, 96), (16, 32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def cases(draw, bits):
    """Up to two bands, most of them with one item or two: the interpreter is slow."""
    rows, kv_heads = draw(st.sampled_from([(1, 1), (1, 1), (1, 2), (2, 1)]))
    d, d_v = draw(st.sampled_from(WIDTHS))
    added = draw(st.integers(0, 2))
    bands = []
    for _ in range(draw(st.integers(1, rows * kv_heads))):
        free = draw(st.integers(0, 5))
        columns = draw(st.integers(1 + added + free, 80))
        bands.append((columns, free, draw(st.integers(0, 1)) if bits else 0))
    return {
        "rows": rows,
        "kv_heads": kv_heads,
        "group": draw(st.sampled_from([1, 1, 2, 2, 3, 4, 8])),
        "d": d,
        "d_v": d_v,
        "dtype": draw(st.sampled_from(DTYPES)),
        "bands": tuple(bands),
        "bits": bits,
        "size": draw(st.sampled_from([8, 16, 24, 40, 64])),
        "share": draw(st.sampled_from([8, 16, 32, 64])),
        "signed": draw(st.booleans()),
        "added": added,
        "least": draw(st.sampled_from([16, 128, 128, 128])),
        "softcap": draw(st.sampled_from([None, 5.0])),
        "sinks": draw(st.booleans()),
        "clipped": draw(st.booleans()),
        "seed": draw(st.integers(0, 999)),
    }


@pytest.mark.parametrize("bits", [0, 8, 4, 3, 2])
@given(data=st.data())
def test_attention_is_that_of_the_reference(interpreted, bits, data):
    """Ragged bands, padding, signed weights, quantised slots, softcap, sinks, clipping, and NaN in free columns."""
    case = data.draw(cases(bits))
    if case["share"] > case["d_v"] or case["d_v"] % case["share"] or case["d_v"] // case["share"] > 8:
        case["share"] = case["d_v"]
    interpreted("compare", case)


@pytest.mark.parametrize(("d", "group", "bits"), [(128, 8, 4), (256, 3, 0)])
def test_wide_heads(interpreted, d, group, bits):
    bands = ((70, 3, 1),) if bits else ((70, 3, 0),)
    case = {"rows": 1, "kv_heads": 1, "group": group, "d": d, "d_v": d, "dtype": torch.bfloat16, "bands": bands}
    interpreted("compare", {**case, "bits": bits, "size": 64, "share": 64})


def test_a_denominator_that_cancels_out_gives_0_then_the_clip(interpreted):
    assert interpreted("cancelled") == [[0.0], [0.5]]


def test_nan_shows_and_nothing_gives_0(interpreted):
    assert interpreted("nothing_is_hidden") == ([4], 0.0)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("query_wildcat", {"ratio": 0.5, "bits": 4, "group": 8}), ("wildcat", {"ratio": 0.25, "bin_rank": 4})],
)
def test_a_model_decodes_as_without_the_kernels(interpreted, method, settings):
    """Two layers and three tokens, each a launch; plans are made anew only where memory changes."""
    (ordinary, by_kernels), launches, plans = interpreted("decode", method, settings)
    torch.testing.assert_close(by_kernels, ordinary, rtol=1e-4, atol=1e-4)
    assert launches == 2 * (3 + 2) and plans <= 2 * 3


# What the kernels take


def band(d=16, d_v=16, dtype=torch.float32, bits=(4,), shares=16):
    keys, values = torch.randn(2, 8, d, dtype=dtype), torch.randn(2, 8, d_v, dtype=dtype)
    parts = [
        PackedPart(
            Quantised.keys(torch.randn(2, 8, d), own, 8),
            Quantised.values(torch.randn(2, 8, d_v), own, 8, shares),
            None,
            None,
        )
        for own in bits
    ]
    return HeldBand([0, 1], keys, values, torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool), 8, parts)


@pytest.mark.parametrize(
    ("held", "dtype", "group"),
    [
        (band(d=24), torch.float32, 1),
        (band(d_v=272), torch.float32, 1),
        (band(dtype=torch.float64), torch.float64, 1),
        (band(), torch.bfloat16, 1),
        (band(), torch.float32, 9),
        (band(bits=(4, 8)), torch.float32, 1),
        (band(d_v=128, shares=8), torch.float32, 1),
        (band()._replace(keys=torch.randn(2, 16, 8).mT), torch.float32, 1),
        (band()._replace(keys=torch.randn(2 * 8 * 16 + 1)[1:].view(2, 8, 16)), torch.float32, 1),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(held, dtype, group):
    assert supports([band()], torch.float32, 8)
    assert not supports([held], dtype, group)


def test_items_hold_each_entry_of_each_place_once():
    """Three bands of unequal lines: the items of a place are side by side, and their entries are all there are."""
    long = band()._replace(places=[4, 5], **{name: torch.zeros(2, 300, *rest) for name, rest in SIDES.items()})
    plan = DecodePlan.of([band()._replace(places=[3, 0]), band(bits=(8,))._replace(places=[1, 2]), long], 3, 1, 64)
    entries = {0: 16, 1: 16, 2: 16, 3: 16, 4: 308, 5: 308}
    for place, (first, stop) in enumerate(plan.places.tolist()):
        own = plan.items[first:stop]
        assert (own[:, 2] == place).all()
        sizes = torch.tensor([8 if plan.parts[part, 0] else 1 for part in own[:, 0].tolist()])
        assert ((own[:, 4] - own[:, 3]) * sizes).sum() == entries[place]
    assert plan.places[:, 1].max() == len(plan.items)


SIDES = {"keys": (16,), "values": (16,), "weights": (), "valid": ()}


def test_the_cpu_has_no_kernels():
    assert "cpu" not in decoding.DEVICES
