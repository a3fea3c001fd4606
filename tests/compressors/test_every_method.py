"""What holds for every method, whatever it does."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compressors.blocks import HEADS, Size, half, make, sizes
from tests.compressors.definitions import DEFINITIONS
from wildcat_kv.compressors.ours import OURS

METHODS = {name: row.method for name, row in DEFINITIONS.items()}
SLOTS = ("keys", "values", "weights", "valid")


def test_every_method_of_ours_has_a_definition():
    assert [name for name in DEFINITIONS if "," not in name] == list(OURS)
    assert all(isinstance(DEFINITIONS[name].method, kind) for name, kind in OURS.items())
    assert all(row.method.needs_queries == row.queries for row in DEFINITIONS.values())


def run(method, block, rank):
    """What a fold does: bring the carried state up to date, then compress."""
    if method.state_size:
        block = replace(block, carried_state=method.remember(block))
    return method.compress(block, rank)


def block_for(name, size, seed=0, rows=1, **fields):
    exact = {"padding": False, "powers": True} if name == "balancekv" else {}
    return make(size, seed, rows=rows, state=METHODS[name].state_size, **exact, **fields)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=12)
@given(size=sizes(), rows=st.integers(2, 4), seed=st.integers(0, 1000))
def test_a_row_beside_others_gives_what_it_gives_alone(name, size, rows, seed):
    method, block = METHODS[name], block_for(name, size, seed, rows)
    together, rank = run(method, block, half(block)), half(block)
    for b in range(rows):
        alone = run(method, block.take_rows([b]), rank)
        width = alone.coreset.valid.shape[-1]
        assert (together.columns or [rank] * rows)[b] == (alone.columns or [rank])[0] == width
        first = together.coreset.valid.shape[-1] - width
        assert not together.coreset.valid[b, :, :first].any() and not together.coreset.weights[b, :, :first].any()
        pairs = [(getattr(together.coreset, name), getattr(alone.coreset, name)) for name in SLOTS]
        if alone.carried_state is None:  # it keeps nothing
            assert together.carried_state is None
        else:
            pairs.append((together.carried_state, alone.carried_state))
        for ours, theirs in pairs:
            torch.testing.assert_close(ours[b : b + 1, :, first:], theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_blocks_give_finite_slots_in_their_dtype(name, dtype):
    for size in (Size(slots=4), Size(slots=3, recent=9, whole=False), Size(sink=0, recent=20, window=0)):
        block = block_for(name, size, rows=2, dtype=dtype)
        coreset = run(METHODS[name], block, half(block)).coreset
        assert coreset.keys.dtype == coreset.values.dtype == dtype and coreset.weights.dtype == torch.float32
        for tensor in (coreset.keys, coreset.values, coreset.weights):
            assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("length", [2, 3])
def test_of_two_or_three_items_one_is_left(name, length):
    block = block_for(name, Size(sink=1, recent=length, window=0, queried=1), rows=2)
    found = run(METHODS[name], block, 1)
    columns, coreset = found.columns or [1, 1], found.coreset
    assert torch.isfinite(coreset.values).all() and max(columns) == coreset.valid.shape[-1]
    if name not in ("pyramidkv", "adakv", "criticalkv, heads compete", "kvzip", "kvzip_plus"):
        assert coreset.valid.sum(-1).eq(1).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("size", "rank"),
    [(Size(sink=0, slots=8, recent=6, window=2), 11), (Size(sink=1, slots=6, recent=9, window=4), 10)],
)
def test_padding_slots_are_never_kept(name, size, rank):
    """With a budget for more slots than there are items."""
    if name == "balancekv":
        pytest.skip("its slots are padding in all heads or in none")
    block = block_for(name, size, rows=2)
    assert not block.valid.all()
    coreset = run(METHODS[name], block, rank).coreset
    keys, valid = block.slice_items(block.keys), block.slice_items(block.valid)
    for b in range(2):
        for h in range(HEADS):
            there = {tuple(key.tolist()) for key in keys[b, h][valid[b, h]]}
            slots = coreset.keys[b, h][coreset.valid[b, h]]
            assert {tuple(key.tolist()) for key in slots} <= there and len(slots) <= len(there)
    assert torch.equal(coreset.weights != 0, coreset.valid)


@pytest.mark.parametrize("name", METHODS)
def test_equal_rows_stay_equal(name):
    one = block_for(name, Size(slots=4, recent=20))
    found = run(METHODS[name], one.take_rows([0, 0, 0]), half(one))
    for tensor in (getattr(found.coreset, name) for name in SLOTS):
        assert torch.equal(tensor[0], tensor[1]) and torch.equal(tensor[0], tensor[2])
