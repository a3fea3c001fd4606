"""One token's attention to all bands together, and what is appended to all of them at once."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wildcat_kv import weighted_attention
from wildcat_kv.cache.banding import Line, sort_into_bands
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.storage import Storage
from wildcat_kv.coreset.wtdattn import AttentionOptions

SINK, WINDOW, SCALE, D, D_V = 2, 3, 0.3, 8, 16


def layer(counts, bits=4, dtype=torch.float32, seed=0, rows=1, group=16, *, signed=False):
    """A layer whose heads hold `counts` slots."""
    generator = torch.Generator().manual_seed(seed)
    heads, most = len(counts), max(counts)
    n = SINK + most + WINDOW
    keys, values = (torch.randn(rows, heads, n, wide, generator=generator).to(dtype) for wide in (D, D_V))
    place, lacking = torch.arange(n) - SINK, most - torch.tensor(counts)
    valid = ((place < 0) | (place >= lacking.unsqueeze(-1))).expand(rows, -1, -1).clone()
    weights = 0.5 + torch.rand(rows, heads, n, generator=generator)
    if signed:
        weights[:, 0, SINK + most - 1] = -0.3
    weights = torch.where((place < 0) | (place >= most), 1.0, weights) * valid
    whole = Entries(keys, values, weights, valid, torch.zeros(rows, heads, n, 0))
    before = Storage([whole])
    return sort_into_bands(whole, [Line(SINK, 0, most, WINDOW)] * rows, before, bits, group)


def options(**changed):
    return AttentionOptions(SCALE, None, True, None)._replace(**changed)


def attend(storage, query):
    return storage.attend(query, *storage.shown(query, query), options())


def check(storage, query, tolerance=1e-4):
    """Attention is what the definition says of all entries."""
    held = storage.entries
    numbers = held.keys.double(), held.numerators().double(), held.weights
    expected = weighted_attention(query.double(), *numbers, scale=SCALE, valid=held.valid)
    torch.testing.assert_close(attend(storage, query).double(), expected, rtol=tolerance, atol=tolerance)


def token(storage, seed):
    rows, heads = storage.allocated.keys.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    dtype = storage.allocated.keys.dtype
    return tuple(torch.randn(rows, heads, 1, wide, generator=generator).to(dtype) for wide in (D, D_V))


def query_of(storage, count=1):
    rows, heads = storage.allocated.keys.shape[:2]
    generator = torch.Generator().manual_seed(77)
    return torch.randn(rows, 2 * heads, count, D, generator=generator).to(storage.allocated.keys.dtype)


STEPS = st.lists(st.sampled_from(["token", "tokens", "masked", "take back", "rows", "clone", "attend"]), max_size=12)


@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    bits=st.sampled_from([None, 8, 4, 3, 2]),
    rows=st.integers(1, 2),
    steps=STEPS,
    seed=st.integers(0, 99),
)
def test_whatever_happens_between_tokens_all_entries_count(counts, bits, rows, steps, seed):
    """Appended one by one or together, with padding, taken back, rows chosen, copied."""
    with torch.no_grad():
        storage = layer(counts, bits, seed=seed, rows=rows)
        check(storage, query_of(storage))
        expected = [tensor.clone() for tensor in storage.newest(WINDOW).tensors()[:4]]
        for number, step in enumerate(steps):
            keys, values = token(storage, number)
            if step == "take back" and expected[0].shape[2] > WINDOW:
                storage.truncate(storage.length - 1)
                expected = [side[:, :, :-1] for side in expected]
            elif step == "rows":
                index = [0] * storage.allocated.keys.shape[0]
                storage.select_rows(torch.tensor(index))
                expected = [side[index] for side in expected]
            elif step == "clone":
                other, storage = storage, copy.deepcopy(storage)
                other.append(keys + 1, values + 1, None)  # it must not show in the copy
            elif step == "attend":
                attend(storage, query_of(storage))
            elif step.startswith(("token", "masked")):
                if step == "tokens":
                    keys, values = keys.repeat(1, 1, 3, 1), values.repeat(1, 1, 3, 1)
                mask = torch.zeros(len(keys), 1, dtype=torch.bool) if step == "masked" else None
                storage.append(keys, values, mask)
                shown = torch.full(keys.shape[:3], step != "masked")
                new = keys, values, shown.float(), shown
                expected = [torch.cat(pair, dim=2) for pair in zip(expected, new, strict=True)]
        newest = storage.newest(expected[0].shape[2]).tensors()[:4]
        assert all(torch.equal(*pair) for pair in zip(newest, expected, strict=True))
        check(storage, query_of(storage))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
def test_half_precision_is_read_in_float32(dtype, bits):
    storage = layer([40, 20, 7], bits, dtype)
    query = query_of(storage)
    with torch.no_grad():
        storage.append(*token(storage, 0), None)
        check(storage, query, tolerance=2e-2)
        wide = layer([40, 20, 7], bits, torch.float32)
    assert attend(storage, query).dtype == dtype and attend(wide, query.float()).dtype == torch.float32


@pytest.mark.parametrize("bits", [None, 4])
def test_what_one_softmax_cannot_do_is_done_by_band(bits):
    """Negative weights, a softcap, learned sinks, several queries, float64."""
    with torch.no_grad():
        signed = layer([40, 20], bits, signed=True)
        assert (signed.entries.weights < 0).any()
        check(signed, query_of(signed))
        storage = layer([40, 20], bits)
        held = storage.entries
        numbers = held.keys, held.numerators(), held.weights
        query = query_of(storage)
        for changed in ({"softcap": 2.0}, {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}):
            found = storage.attend(query, query, query, options(**changed))
            expected = weighted_attention(query, *numbers, scale=SCALE, valid=held.valid, **changed)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        check(layer([40, 20], bits, torch.float64), query_of(storage).double())


def test_gradients_reach_the_query():
    storage = layer([40, 20], 4)
    query = query_of(storage).requires_grad_()
    with torch.enable_grad():
        attend(storage, query).sum().backward()
    assert query.grad is not None and query.grad.abs().sum() > 0


def test_keys_far_apart_do_not_underflow():
    """A head's terms are shifted by its own largest score, padding left out."""
    with torch.no_grad():
        storage = layer([40, 20, 9], 4)
        for band, factor in zip(storage.bands, (1, 40, 400), strict=True):
            for segment in band.packed:
                segment.keys.scale.mul_(factor)
                segment.keys.lowest.mul_(factor)
        check(storage, query_of(storage), tolerance=1e-3)


def test_the_bytes_are_those_of_the_bands():
    """Putting bands side by side takes no further memory."""
    with torch.no_grad():
        storage = layer([40, 20, 20], 4)
        before = sum(tensor.nbytes for tensor in storage.tensors())
        attend(storage, query_of(storage))
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in storage.tensors()}
        assert sum(held.values()) == before
