"""The budget arithmetic: exact for every length and ratio."""

from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wildcat_kv import WildCatConfig
from wildcat_kv.cache.budget import FoldPlan, Row, block_size, exact_ends, kept_tokens, plan_fold, tokens_until_fold
from wildcat_kv.coreset.bins import split_evenly

ratios = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)
ends = st.tuples(st.integers(0, 64), st.integers(0, 64), st.integers(1, 40))


@given(st.integers(1, 100_000), ratios)
def test_budget_rounds_the_written_decimal_half_up(tokens, ratio):
    exact = (Decimal(str(ratio)) * tokens).quantize(Decimal(1), rounding=ROUND_HALF_UP)
    assert kept_tokens(tokens, ratio) == max(1, int(exact))


@given(st.integers(1, 20_000), ratios, ends)
def test_a_prompt_is_brought_to_its_budget_exactly(tokens, ratio, sizes):
    sink, window, bin_rank = sizes
    config = WildCatConfig(ratio=ratio, sink=sink, window=window, bin_rank=bin_rank)
    row = Row().append(tokens)
    fold = plan_fold(row, config, prefill=True)
    budget = kept_tokens(tokens, ratio)
    if budget >= tokens:
        assert fold is None
    else:
        assert fold.apply(row).stored == budget
        assert fold.sink + fold.kept + fold.items + fold.window == tokens
        assert fold.sink <= sink and fold.window <= window and 1 <= fold.rank < fold.items


@given(st.integers(1, 3000), ratios, ends, st.integers(1, 500))
def test_ratio_holds_through_decoding_to_within_a_block(prompt, ratio, sizes, steps):
    sink, window, bin_rank = sizes
    config = WildCatConfig(ratio=ratio, sink=sink, window=window, bin_rank=bin_rank)
    row, folds = Row(), 0
    for new in (prompt, *[1] * steps):
        prefill = row.seen == 0 and new > 1
        row = row.append(new)
        fold = plan_fold(row, config, prefill=prefill)
        if fold:
            row, folds = fold.apply(row), folds + 1
            assert row.stored == kept_tokens(row.seen, ratio)
        else:
            assert row.stored - kept_tokens(row.seen, ratio) < max(block_size(config), 2)
    assert ratio == 1 or steps + prompt < 2 * block_size(config) or folds


def decode(config, prompt, steps):
    """Read a prompt and then single tokens; give the row after each forward pass, and whether it folded."""
    row = Row()
    for new in (prompt, *[1] * steps):
        prefill = row.seen == 0 and new > 1
        row = row.append(new)
        fold = plan_fold(row, config, prefill=prefill)
        row = fold.apply(row) if fold else row
        yield row, fold


floors = st.integers(0, 800)


@given(st.integers(1, 1500), ratios, floors, ends, st.integers(1, 500))
def test_a_row_keeps_all_up_to_its_floor_and_then_the_larger_of_floor_and_share(prompt, ratio, floor, sizes, steps):
    sink, window, bin_rank = sizes
    config = WildCatConfig(ratio=ratio, min_tokens=floor, sink=sink, window=window, bin_rank=bin_rank)
    for row, fold in decode(config, prompt, steps):
        budget = max(kept_tokens(row.seen, ratio), min(row.seen, floor))
        if row.seen <= floor:
            assert fold is None and row == Row(seen=row.seen, exact=row.seen)
        elif fold:
            assert row.stored == budget
        assert 0 <= row.stored - budget < max(block_size(config), 2)


@given(st.integers(2, 5000), ratios, floors, ends)
def test_a_floor_that_the_share_exceeds_changes_nothing(prompt, ratio, floor, sizes):
    sink, window, bin_rank = sizes
    plain = WildCatConfig(ratio=ratio, sink=sink, window=window, bin_rank=bin_rank)
    floored = plain.changed(min_tokens=min(floor, kept_tokens(prompt, ratio)))
    assert list(decode(floored, prompt, 200)) == list(decode(plain, prompt, 200))


@given(st.integers(100, 400), st.integers(100, 300), st.sampled_from([0.1, 0.25, 0.5]))
def test_no_fold_above_the_floor_is_short_of_a_bin(prompt, floor, ratio):
    """Old slots stay only where there is room beside them for those of a block."""
    config = WildCatConfig(ratio=ratio, min_tokens=floor, sink=4, window=8, bin_rank=12)
    for row, fold in decode(config, prompt, 3000):
        if fold and row.seen > floor + block_size(config) and row.seen > prompt + block_size(config):
            assert fold.rank >= config.bin_rank - 1, row  # 1: what the share of a block rounds to


@given(ends, st.integers(0, 400), st.integers(1, 2000), st.integers(1, 600))
def test_max_tokens_bounds_what_is_stored(sizes, more, prompt, steps):
    sink, window, bin_rank = sizes
    limit = sink + window + bin_rank + more
    config = WildCatConfig(max_tokens=limit, sink=sink, window=window, bin_rank=bin_rank)
    row = Row()
    for new in (prompt, *[1] * steps):
        row = row.append(new)
        fold = plan_fold(row, config, prefill=False)
        if fold:
            row = fold.apply(row)
        assert row.stored <= limit
        if row.seen > limit:  # the last tokens stay as they are
            assert row.exact >= min(exact_ends(limit + 1 - block_size(config), config)[1], window)
        else:
            assert row.stored == row.seen


@given(ratios | st.none(), floors, ends, st.integers(1, 1500), st.integers(1, 300))
def test_no_fold_is_due_before_it_is_announced(ratio, floor, sizes, prompt, steps):
    """The hot path asks only `tokens_until_fold`."""
    sink, window, bin_rank = sizes
    limit = {"max_tokens": sink + window + bin_rank + 7}
    budget = limit if ratio is None else {"ratio": ratio, "min_tokens": floor}
    config = WildCatConfig(**budget, sink=sink, window=window, bin_rank=bin_rank)
    row = Row().append(prompt)
    row = (plan_fold(row, config, prefill=prompt > 1) or FoldPlan.nothing(row)).apply(row)
    wait = tokens_until_fold(row, config)
    for step in range(1, steps):
        if wait is not None and step >= wait:
            break
        assert plan_fold(row.append(step), config, prefill=False) is None


@given(st.integers(0, 1000), st.integers(1, 50))
def test_even_split(total, parts):
    sizes = split_evenly(total, parts)
    assert sum(sizes) == total and len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("ratio", "block"), [(0.25, 48), (0.5, 24), (0.1, 120), (1.0, 12)])
def test_a_block_is_worth_one_bin(ratio, block):
    assert block_size(WildCatConfig(ratio=ratio)) == block


@given(
    st.sampled_from(
        [
            {"ratio": 0.2},
            {"ratio": 0.2, "min_tokens": 30},
            {"ratio": 1.0},
            {"ratio": 1.0, "min_tokens": 40},
            {"max_tokens": 16},
            {"max_tokens": 33},
            {"max_tokens": 60},
        ]
    ),
    st.sampled_from([{}, *({"bits": 4, "group": group} for group in (8, 16, 64))]),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.lists(st.integers(1, 40), min_size=1, max_size=20),
)
def test_a_plan_takes_every_column_once_and_no_slot_back(budget, bits, sink, window, bin_rank, cost, chunks):
    settings = WildCatConfig(sink=sink, window=window, bin_rank=bin_rank, **budget, **bits)
    row = Row()
    for number, count in enumerate(chunks):
        row = row.append(count)
        plan = plan_fold(row, settings, prefill=number == 0 and count > 1, slot_cost=cost)
        if plan is None:
            continue
        assert plan.head + plan.items + plan.window == row.stored
        assert row.seen > settings.min_tokens
        assert 0 < plan.rank <= plan.items and min(plan.sink, plan.kept) >= 0
        assert 0 <= plan.window <= row.exact  # a slot is no exact token again
        assert plan.kept <= row.slots and (not row.slots or plan.sink == row.sink)
        row = plan.apply(row)
        assert settings.max_tokens is None or row.counted <= settings.max_tokens
