"""The memory of a layer: what it holds against plain concatenation, where it is, and what is in its free room."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.storage import Room, Storage
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.wtdattn import WeightSigns, mass_of

HEADS, CHANNELS, VALUE_CHANNELS = 2, 4, 3
ORDER = list(WeightSigns)


def entries(rows, n, seed=0, memory=0, dtype=torch.float32, exact=False):
    """Random entries; slots of a coreset, some of them padding, unless `exact`."""
    generator = torch.Generator().manual_seed(seed)
    weights, valid = torch.ones(rows, HEADS, n), torch.ones(rows, HEADS, n, dtype=torch.bool)
    if not exact:
        valid = torch.rand(rows, HEADS, n, generator=generator) > 0.2
        weights = (1 + 3 * torch.rand(rows, HEADS, n, generator=generator)) * valid
        if seed % 3 == 0:
            weights = -weights
    return Entries(
        torch.randn(rows, HEADS, n, CHANNELS, generator=generator).to(dtype),
        torch.randn(rows, HEADS, n, VALUE_CHANNELS, generator=generator).to(dtype),
        weights,
        valid,
        torch.rand(rows, HEADS, n, memory, generator=generator),
    )


def joined(*parts):
    return Entries(*(torch.cat(pieces, 2) for pieces in zip(*(part.tensors() for part in parts), strict=True)))


def addresses(storage):
    return [tensor.data_ptr() for tensor in storage.allocated.tensors()]


class Storages(RuleBasedStateMachine):
    """A storage, and what it should hold."""

    @initialize(
        rows=st.integers(1, 3),
        first=st.integers(1, 40),
        limit=st.sampled_from([None, 24]),
        fixed=st.booleans(),
        memory=st.sampled_from([0, 2]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def build(self, rows, first, limit, fixed, memory, dtype):
        self.rows, self.limit, self.fixed, self.dtype = rows, limit, fixed and limit is not None, dtype
        self.seed, self.remembered, self.folded = 0, memory, False
        held = self.new(first)
        self.storage = Storage.empty(held.keys, held.values, memory, Room(limit, self.fixed))
        self.held = held.slice(0, 0)
        self.home = None

    def new(self, n, exact=False):
        self.seed += 1
        return entries(self.rows, n, self.seed, self.remembered, self.dtype, exact)

    @rule(n=st.integers(1, 20), masked=st.booleans())
    def append(self, n, masked):
        new, shown = self.new(n, exact=True), None
        if masked:
            shown = torch.rand(self.rows, n, generator=torch.Generator().manual_seed(self.seed)) > 0.3
            new.valid.copy_(shown.unsqueeze(1))
            new.weights.copy_(shown.unsqueeze(1))
        new.carried_state.zero_()
        with torch.inference_mode(self.seed % 2 == 0):
            self.storage.append(new.keys, new.values, shown)
        self.held, self.folded = joined(self.held, new), False

    @rule(start=st.floats(0, 1), stop=st.floats(0, 1), n=st.integers(0, 12))
    def fold(self, start, stop, n):
        """New slots instead of the columns between two others; what is behind them moves."""
        length = self.storage.length
        start, stop = sorted((round(start * length), round(stop * length)))
        slots, view = self.new(n), self.storage.entries
        self.storage.rewrite(start, [slots, view.slice(stop, length)])
        self.held = joined(self.held.slice(0, start), slots, self.held.slice(stop, length))
        self.folded = self.limit is None or self.storage.length <= self.limit
        assert self.storage.weighting is WeightSigns.of(self.held.weights, self.held.valid)

    @rule(share=st.floats(0, 1))
    def truncate(self, share):
        length = round(share * self.storage.length)
        self.storage.truncate(length)
        self.held = self.held.slice(0, length)

    @rule(data=st.data())
    def select_rows(self, data):
        index = torch.tensor(data.draw(st.lists(st.integers(0, self.rows - 1), min_size=1, max_size=3)))
        if len(index) != self.rows or not self.folded:
            self.home = None
        self.storage.select_rows(index)
        self.held, self.rows = self.held.rows(index), len(index)

    @rule()
    def move(self):
        before = addresses(self.storage)
        self.storage.to(torch.device("cpu"))
        assert addresses(self.storage) == before

    @precondition(lambda self: not self.fixed)
    @rule()
    def save_and_load(self):
        saved = self.storage.snapshot()
        self.storage, self.folded = Storage.adopt(saved, self.storage.length, Room(self.limit)), False

    @invariant()
    def holds_what_was_put_there(self):
        assert self.storage.length == self.held.keys.shape[2]
        found = self.storage.entries
        for ours, theirs in zip(found.tensors(), self.held.tensors(), strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(self.storage.entries.tensors(), found.tensors(), strict=False):
            assert torch.equal(ours, theirs)

    @invariant()
    def knows_its_weights(self):
        truth = WeightSigns.of(self.held.weights, self.held.valid)
        assert ORDER.index(self.storage.weighting) >= ORDER.index(truth)

    @invariant()
    def free_room_is_nothing(self):
        free = self.storage.allocated.slice(self.storage.length, self.storage.allocated.keys.shape[2])
        assert not free.valid.any() and not free.weights.any() and not free.carried_state.any()
        if self.fixed:  # traced steps attend to it, with weight 0
            assert torch.isfinite(free.keys).all() and torch.isfinite(free.values).all()

    @invariant()
    def takes_no_more_than_it_needs_after_a_fold(self):
        columns, length = self.storage.allocated.keys.shape[2], self.storage.length
        if self.folded and self.limit is not None:
            assert columns == self.limit if self.fixed else columns <= self.limit
        elif self.folded:
            assert columns <= length + 200

    @invariant()
    def fixed_memory_is_where_it_was_after_a_fold(self):
        if self.fixed and self.folded:
            here = addresses(self.storage)
            assert self.home in (None, here)
            self.home = here


TestStorages = Storages.TestCase
TestStorages.settings = settings(max_examples=max(30, settings().max_examples), stateful_step_count=15)


def filled(n, limit=None, fixed=False):
    """A storage of `n` exact tokens in one row."""
    held = entries(1, n, exact=True)
    storage = Storage.empty(held.keys, held.values, 0, Room(limit, fixed))
    storage.append(held.keys, held.values, None)
    return storage


@pytest.mark.parametrize(("limit", "fixed"), [(None, False), (20, False), (20, True)])
def test_a_fold_in_place_touches_nothing_before_its_start(limit, fixed):
    storage = filled(20, limit, fixed)
    before = storage.entries.slice(0, 6)
    copied, at = [tensor.clone() for tensor in before.tensors()], addresses(storage)
    storage.rewrite(6, [entries(1, 3, seed=5), storage.entries.slice(15, 20)])
    assert addresses(storage) == at and storage.length == 14
    assert all(torch.equal(view, copy) for view, copy in zip(before.tensors(), copied, strict=True))


@pytest.mark.parametrize("first", [5, 20, 21, 24, 60])
def test_fixed_memory_has_its_columns_whatever_came_first(first):
    """A first prompt a little longer than the limit must not make larger memory the one that stays."""
    storage = filled(first, 20, fixed=True)
    storage.rewrite(2, [entries(1, 4, seed=5), storage.entries.slice(first - 1, first)])
    assert storage.allocated.keys.shape[2] == 20
    at = addresses(storage)
    for chunk in (3, 30, 13, 14):
        new = entries(1, chunk, seed=chunk, exact=True)
        storage.append(new.keys, new.values, None)
        storage.rewrite(2, [entries(1, 4, seed=chunk), storage.entries.slice(storage.length - 1, storage.length)])
        assert addresses(storage) == at and storage.length == 7


def test_a_fold_that_fails_leaves_everything_as_it_was(monkeypatch):
    storage = filled(20, 20)
    held = [tensor.clone() for tensor in storage.entries.tensors()]

    def fail(weights, valid):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(WeightSigns, "of", staticmethod(fail))
    with pytest.raises(torch.OutOfMemoryError):
        storage.rewrite(2, [entries(1, 4, seed=5)])
    assert storage.length == 20
    assert all(torch.equal(ours, copy) for ours, copy in zip(storage.entries.tensors(), held, strict=True))


def test_fixed_memory_that_is_too_small_is_left_whole():
    storage = filled(20, 20, fixed=True)
    held, more = joined(storage.entries), entries(1, 8, seed=4)
    storage.rewrite(15, [more, storage.entries.slice(15, 20)])
    expected = joined(held.slice(0, 15), more, held.slice(15, 20))
    for ours, theirs in zip(storage.entries.tensors(), expected.tensors(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("limit", [None, 40])
def test_tokens_beyond_the_limit_are_not_moved_one_by_one(limit):
    """Methods that share unequally, and tokens that may be taken back, need more columns than the budget says."""
    storage = filled(50, limit)
    moves, at = 0, addresses(storage)
    for seed in range(100):
        new = entries(1, 1, seed, exact=True)
        storage.append(new.keys, new.values, None)
        moves, at = moves + (addresses(storage) != at), addresses(storage)
    assert moves <= 5


def test_memory_within_the_limit_is_kept_from_fold_to_fold():
    storage = filled(300, 300)
    at = addresses(storage)
    storage.rewrite(2, [entries(1, 4, seed=5)])
    assert addresses(storage) == at


@given(st.integers(1, 9), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_numerators_of_a_coreset_come_back(n, seed, dtype):
    like = entries(2, 1, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, HEADS, n, generator=generator) * 10.0 ** torch.randint(-4, 4, (n,), generator=generator)
    values = torch.randn(2, HEADS, n, VALUE_CHANNELS, generator=generator) * weights.unsqueeze(-1)
    valid = torch.rand(2, HEADS, n, generator=generator) > 0.2
    stored = Entries.of(Coreset(like.keys.expand(-1, -1, n, -1), values, weights, valid), None, like)
    assert stored.values.dtype == dtype
    assert torch.equal(stored.weights, weights * valid)  # a slot that is none weighs nothing, whatever it says
    rounding = torch.finfo(dtype).eps * values.abs() + torch.finfo(dtype).smallest_normal * mass_of(weights)[..., None]
    assert ((stored.numerators() - values).abs() <= rounding)[valid].all()


def test_numerators_beyond_half_precision_become_its_largest_number():
    like = entries(1, 1, dtype=torch.float16)
    values = torch.tensor([1e6, -1e6, 2.0]).expand(1, HEADS, 1, -1)
    weights, valid = torch.ones(1, HEADS, 1), torch.ones(1, HEADS, 1, dtype=torch.bool)
    assert torch.isfinite(Entries.of(Coreset(like.keys, values, weights, valid), None, like).values).all()


def test_memory_that_was_loaded_for_inference_can_be_written_to_later():
    with torch.inference_mode():
        storage = Storage.adopt(entries(1, 8), 5)
    new = entries(1, 2, exact=True)
    storage.append(new.keys, new.values, None)
    assert storage.length == 7 and torch.equal(storage.entries.keys[:, :, 5:], new.keys)
