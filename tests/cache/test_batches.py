"""Rows of a batch: each is treated as it would be alone, wherever its padding is, and keeps what is its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.driver import METHODS, assert_same, read, small_cache, state, tokens
from tests.tiny import random_ids, tiny_model
from wildcat_kv import WildCatCache
from wildcat_kv.hook.keyword import CACHE

BUDGETS = [{"ratio": 0.25}, {"ratio": 0.6}, {"ratio": 0.1, "min_tokens": 40}, {"max_tokens": 30}, {"max_tokens": 64}]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=max(10, settings().max_examples // 4))
@given(
    st.sampled_from(BUDGETS),
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.integers(0, 99),
    st.integers(0, 59),
)
def test_a_row_of_any_call_is_what_the_row_alone_is(method, budget, counts, seed, late):
    """Rows padded on the left in every one of several calls, of very different lengths; one that starts late."""
    rows, total = 3, sum(counts)
    keys, values = tokens(rows, total, seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, total, dtype=torch.bool)
    at = 0
    for count in counts:
        for row in range(rows):
            mask[row, at : at + int(torch.randint(0, count, (1,), generator=generator))] = False
        at += count
    mask[0, : min(late, total - 1)] = False
    # Padding that is loud: were it counted anywhere, mean, norms, clip or draw, it would show.
    loud = torch.where(mask, 1.0, 40.0).view(rows, 1, total, 1)
    keys, values = keys * loud, values * loud
    together = small_cache(method=method, **budget)
    at = 0
    for count in counts:
        read(together, keys, values, at, count, mask)
        at += count
    for row in range(rows):
        alone, at, column = small_cache(method=method, **budget), 0, 0
        own = mask[row]
        for count in counts:
            shown = int(own[column : column + count].sum())
            if shown:
                read(alone, keys[:, row : row + 1, :, own], values[:, row : row + 1, :, own], at, shown)
            at, column = at + shown, column + count
        compare_rows(together, row, alone)


def compare_rows(together, row, alone):
    for ours, theirs in zip(together.layers, alone.layers, strict=True):
        mine = ours.state.count_rows(ours.get_seq_length())[row]
        [their] = theirs.state.count_rows(theirs.get_seq_length())
        assert (mine.seen, mine.sink, mine.slots, mine.exact) == (their.seen, their.sink, their.slots, their.exact)
        mine, their = ours.state.storage.entries, theirs.state.storage.entries
        valid, valid_alone = mine.valid[row], their.valid[0]
        for head in range(2):
            for a, b in zip(mine.tensors()[:3], their.tensors()[:3], strict=True):
                torch.testing.assert_close(
                    a[row, head][valid[head]], b[0, head][valid_alone[head]], rtol=1e-3, atol=1e-4
                )
        if ours.state.value_range is not None and theirs.state.value_range is not None:
            for a, b in zip(ours.state.value_range.tensors(), theirs.state.value_range.tensors(), strict=True):
                assert torch.equal(a[row], b[0])


@pytest.mark.parametrize("budget", [{"ratio": 0.25}, {"max_tokens": 90}, {"max_tokens": 500}])
def test_rows_padded_on_the_right_answer_as_they_do_alone(budget):
    """A plain forward pass; positions are the caller's, as they are with any cache."""
    model, ids, later = tiny_model("llama"), random_ids(2, 160), random_ids(2, 30, seed=5)
    length = torch.tensor([[160], [97]])
    mask = (torch.arange(160) < length).long()
    cache = WildCatCache(model.config, **budget)
    first = model(ids, attention_mask=mask, **{CACHE: cache}).logits
    mask = torch.cat((mask, torch.ones(2, 30, dtype=torch.int64)), 1)
    second = model(later, attention_mask=mask, **{CACHE: cache}, position_ids=length + torch.arange(30)).logits
    for row, own in enumerate(length.flatten().tolist()):
        alone = WildCatCache(model.config, **budget)
        pair = slice(row, row + 1)
        expected = model(ids[pair, :own], **{CACHE: alone}).logits
        torch.testing.assert_close(first[pair, :own], expected, rtol=1e-3, atol=1e-3)
        expected = model(later[pair], **{CACHE: alone}).logits
        torch.testing.assert_close(second[pair], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_move_take_all_that_is_theirs_along(method, how, masked):
    """Slots, weights, windows, clips and counts; what is read next goes to the right row."""
    keys, values = tokens(3, 150)
    scale = torch.tensor([1.0, 5.0, 30.0]).view(3, 1, 1, 1)  # clips that differ from row to row
    mask = torch.ones(3, 150, dtype=torch.bool)
    if masked:
        mask[0, :50], mask[2, :17] = False, False
    index = torch.arange(3).repeat_interleave(2) if how == "batch_repeat_interleave" else torch.tensor([2, 1, 0, 0])
    moved, fresh = (small_cache(method=method, ratio=0.25) for _ in range(2))
    read(moved, keys, values * scale, 0, 100, mask)
    getattr(moved, how)(2 if how == "batch_repeat_interleave" else index)
    read(fresh, keys[:, index], (values * scale)[:, index], 0, 100, mask[index])
    assert_same(state(moved), state(fresh), ignore=("fold_from",))
    for at, count in ((100, 1), (101, 30), (131, 1)):
        outputs = [
            read(kind, keys[:, index], (values * scale)[:, index], at, count, mask[index]) for kind in (moved, fresh)
        ]
        assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    assert_same(state(moved), state(fresh), ignore=("fold_from",))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([0, 2])), r"indices=\[0, 2\].*holds 2"),
        (lambda cache: cache.batch_select_indices(torch.tensor([-3])), r"indices=\[-3\]"),
        (lambda cache: cache.batch_select_indices(torch.tensor([True])), r"indices=\[True\]"),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, False])), "at least one"),
        (lambda cache: cache.batch_repeat_interleave(0), "repeats=0"),
        (lambda cache: cache.batch_repeat_interleave(1.5), "repeats=1.5"),
    ],
)
def test_rows_that_are_not_there_are_refused(call, message):
    cache = small_cache(ratio=0.25)
    keys, values = tokens(2, 60)
    read(cache, keys, values, 0, 60)
    before = state(cache)
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert_same(before, state(cache))


def test_rows_of_a_hybrid_are_repeated_and_selected_together():
    """Linear-attention layers of Transformers' have no such methods; the cache has."""
    model = tiny_model("qwen3_next")
    cache = WildCatCache(model.config, ratio=0.25)
    model(random_ids(2, 100), **{CACHE: cache})
    question = random_ids(1, 5, seed=3)
    expected = model(question.expand(2, -1), **{CACHE: cache.clone()}).logits
    cache.batch_repeat_interleave(3)
    torch.testing.assert_close(
        model(question.expand(6, -1), **{CACHE: cache.clone()}).logits, expected.repeat_interleave(3, 0)
    )
    cache.batch_select_indices(torch.tensor([-1, 0]))
    torch.testing.assert_close(model(question.expand(2, -1), **{CACHE: cache}).logits, expected.flip(0))
