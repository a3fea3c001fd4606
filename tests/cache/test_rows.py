"""Rows of a batch that hold unequally much: what a method is given of them, and how its slots come together again."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from tests.driver import METHODS, read, tokens
from tests.tiny import SMALL
from wildcat_kv import CompressedCache, Coreset
from wildcat_kv.cache.budget import FoldPlan, Row
from wildcat_kv.cache.rows import RowGroup, common_groups, group_rows, join_groups, take_rows
from wildcat_kv.compressors import Compressor, KVBlock
from wildcat_kv.compressors.base import Compressed
from wildcat_kv.compressors.knorm import KNorm


def plan(rank, items):
    return FoldPlan(sink=2, kept=0, items=items, rank=rank, window=3)


ROW = Row(seen=30, sink=2, exact=28)


def test_rows_are_alike_where_a_method_could_not_tell_them_apart():
    longer = replace(ROW, seen=31, exact=29)
    rows = [ROW, longer, ROW, ROW, replace(ROW, seen_at_fold=9), ROW]
    plans = [plan(6, 25), plan(6, 26), plan(6, 25), FoldPlan.nothing(ROW), plan(6, 25), plan(5, 25)]
    groups = group_rows(rows, plans, [4] * 6)
    assert [group.rows for group in groups] == [(0, 2, 4), (1,), (5,)]  # the fourth row does not fold
    assert groups[1] == RowGroup((1,), 31, 26, 6, 3, 29, 31, 4, weighted=False)
    assert [group.rows for group in group_rows(rows, plans, [4, 4, 3, 4, 4, 4])] == [(0, 4), (1,), (2,), (5,)]


def test_slots_among_the_items_make_a_group_of_their_own():
    slots = Row(seen=30, sink=2, slots=5, exact=23)
    [first, second] = group_rows([slots, ROW], [plan(6, 25), plan(6, 25)], [0, 0])
    assert first.weighted and not second.weighted and (first.held, second.held) == (30, 30)


def test_layers_share_rows_that_are_alike_in_all_of_them():
    layers = [[(0, 1, 2, 4)], [(0, 2), (1, 4)], [(0, 1, 2), (4,)]]
    groups = [[RowGroup(rows, 9, 5, 2, 1, 9, 9, 0, weighted=False) for rows in layer] for layer in layers]
    assert common_groups(groups) == [((0, 2), (0, 0, 0)), ((1,), (0, 1, 0)), ((4,), (0, 1, 1))]


class Survey(NamedTuple):
    scores: torch.Tensor
    more: dict
    group: int


def test_rows_are_taken_of_every_tensor_and_all_of_them_without_a_copy():
    scores = torch.arange(12.0).view(4, 3)
    survey = Survey(scores, {"parts": [scores + 1, "name"]}, 2)
    assert take_rows(survey, (0, 1, 2, 3), 4) is survey
    taken = take_rows(survey, [3, 1], 4)
    assert isinstance(taken, Survey) and taken.group == 2 and taken.more["parts"][1] == "name"
    assert torch.equal(taken.scores, scores[[3, 1]]) and torch.equal(taken.more["parts"][0], scores[[3, 1]] + 1)


def test_what_has_no_rows_to_take_is_named():
    with pytest.raises(TypeError, match="a survey holds a Row; make it of tensors"):
        take_rows([torch.zeros(2), ROW], [0], 2)


def slots(rows, width, dtype=torch.float32, state=2):
    shape = (rows, 2, width)
    coreset = Coreset(
        torch.randn(*shape, 3), torch.randn(*shape, 4).to(dtype), torch.rand(shape) + 1, torch.ones(shape).bool()
    )
    return Compressed(coreset, carried_state=torch.rand(*shape, state), error=torch.rand(rows, 4))


def group(rows, rank):
    return RowGroup(rows, 30, 25, rank, 3, 28, 30, 0, weighted=False)


@given(st.permutations(range(5)), st.integers(0, 5), st.integers(1, 4), st.integers(0, 4))
def test_slots_of_groups_come_together_right_aligned(order, cut, first, second):
    """Leave rows that do not fold empty, and cut the columns that a group's rows do not take."""
    members = [tuple(sorted(order[:cut])), tuple(sorted(order[cut:4]))]
    groups = [group(rows, rank) for rows, rank in zip(members, (first, second + 1), strict=True) if rows]
    parts = [
        slots(len(each.rows), each.rank, dtype)
        for each, dtype in zip(groups, (torch.float32, torch.float64), strict=False)
    ]
    if len(parts) == 2:
        parts[1] = replace(parts[1], columns=[second] * len(members[1]))
    joined = join_groups(groups, parts, 5)
    for row in range(5):
        found = [(each, part) for each, part in zip(groups, parts, strict=True) if row in each.rows]
        if not found:
            assert joined.columns[row] == 0 and not joined.coreset.valid[row].any() and not joined.error[row].any()
            continue
        [(each, part)] = found
        place, taken = each.rows.index(row), joined.columns[row]
        assert taken == (each.rank if part.columns is None else second)
        for name in ("keys", "values", "weights", "valid"):
            ours, theirs = getattr(joined.coreset, name)[row], getattr(part.coreset, name)[place]
            assert torch.equal(ours[:, ours.shape[1] - taken :].double(), theirs[:, theirs.shape[1] - taken :].double())
        assert torch.equal(joined.error[row], part.error[place])
        state = joined.carried_state[row]
        assert torch.equal(
            state[:, state.shape[1] - taken :], part.carried_state[place, :, part.carried_state.shape[2] - taken :]
        )


def test_one_group_of_all_rows_passes_through():
    part = slots(3, 4)
    joined = join_groups([group((0, 1, 2), 4)], [part], 3)
    assert joined.coreset is part.coreset and joined.columns == [4] * 3 and joined.error is part.error
    assert join_groups([], [], 3) is None


@dataclass(frozen=True)
class Watching(Compressor):
    """Notes the blocks that it is given."""

    blocks: list

    def compress(self, block: KVBlock, rank: int):
        self.blocks.append((block, rank))
        return KNorm().compress(block, rank)


@pytest.mark.parametrize("budget", [{"ratio": 0.5}, {"max_tokens": 30}])
def test_a_method_sees_plain_rectangles_of_what_each_row_holds(budget):
    blocks = []
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    cache = CompressedCache(config, compressor=Watching(blocks), sink=3, window=8, bin_rank=4, **budget)
    keys, values = tokens(4, 90, 1)
    mask = torch.ones(4, 90, dtype=torch.bool)
    mask[1, :20] = mask[3, :20] = False
    read(cache, keys, values, 0, 90, mask)
    sizes = [(len(block.keys), block.keys.shape[2], block.seen) for block, _ in blocks]
    assert sizes == [(2, 90, 90), (2, 70, 70)] * 2
    for (block, rank), rows, layer in zip(blocks, [[0, 2], [1, 3]] * 2, (0, 0, 1, 1), strict=True):
        assert block.keys.is_contiguous() and rank < block.items and block.exact == block.seen
        assert torch.equal(block.keys, keys[layer, rows][:, :, 90 - block.seen :])


def test_rows_that_are_alike_are_given_without_a_copy():
    blocks = []
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    cache = CompressedCache(config, compressor=Watching(blocks), ratio=0.5, sink=3, window=8, bin_rank=4)
    keys, values = tokens(2, 90, 1)
    cache.layers[0].announce(2, 90, None)
    cache.update(keys[0], values[0], 0)
    storage = cache.layers[0].state.storage.allocated
    places = storage.keys.data_ptr(), storage.values.data_ptr()
    cache.layers[0].after_attention(keys[0].repeat_interleave(2, 1), 0.25)
    [(block, _)] = blocks
    assert (block.keys.data_ptr(), block.values.data_ptr()) == places


@pytest.mark.parametrize("method", ["query_wildcat", "adakv", "balancekv"])
def test_equal_rows_stay_equal_beside_others(method):
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    cache = CompressedCache(config, compressor=METHODS[method], ratio=0.4, sink=3, window=8, bin_rank=4)
    keys, values = (part[:, [0, 1, 0]] for part in tokens(2, 150, 2))
    for at, count in ((0, 80), (80, 40), (120, 30)):
        read(cache, keys, values, at, count)
    for layer in cache.layers:
        entries = layer.state.entries
        assert torch.equal(entries.valid[0], entries.valid[2])
        for tensor in entries.tensors()[:3]:
            assert torch.equal(tensor[0][entries.valid[0]], tensor[2][entries.valid[2]])
