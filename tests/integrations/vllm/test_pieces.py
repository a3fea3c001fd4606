"""Placeholders, heads of several processes, versions: numbers alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wildcat_kv.integrations.vllm.heads import heads_of_rank
from wildcat_kv.integrations.vllm.placeholders import placeholder_ids, read_placeholder, spelling_length
from wildcat_kv.integrations.vllm.versions import check_version


@given(st.binary(min_size=24, max_size=24), st.integers(0, 5000), st.sampled_from([120, 32000, 49152, 151936]))
def test_placeholders_spell_a_context(digest, more, vocabulary):
    slots = spelling_length(vocabulary) + more
    ids = placeholder_ids(digest, slots, vocabulary)
    assert len(ids) == slots and all(0 <= number < vocabulary for number in ids)
    assert read_placeholder([*ids, 5, 6], vocabulary) == (digest, slots)


@given(st.lists(st.integers(0, 31999), max_size=60))
def test_no_text_spells_one(ids):
    assert read_placeholder(ids, 32000) is None


def test_a_changed_id_spells_none():
    ids = placeholder_ids(bytes(range(24)), 64, 32000)
    for place in range(spelling_length(32000)):
        assert read_placeholder([*ids[:place], (ids[place] + 1) % 32000, *ids[place + 1 :]], 32000) is None


def test_too_few_slots_are_refused():
    with pytest.raises(ValueError, match="slots=17 are too few"):
        placeholder_ids(bytes(24), 17, 32000)
    assert len(placeholder_ids(bytes(24), 18, 32000)) == 18


@pytest.mark.parametrize(
    ("heads", "ranks", "expected"),
    [
        (8, 1, [range(8)]),
        (8, 4, [range(2), range(2, 4), range(4, 6), range(6, 8)]),
        (2, 4, [range(1), range(1), range(1, 2), range(1, 2)]),
        (1, 2, [range(1), range(1)]),
    ],
)
def test_ranks_share_heads(heads, ranks, expected):
    found = [range(heads)[heads_of_rank(heads, rank, ranks)] for rank in range(ranks)]
    assert found == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 0, 2), "do not divide 3"), ((2, 0, 3), "no multiple of 2"), ((4, 4, 4), "rank=4"), ((4, -1, 4), "rank=-1")],
)
def test_ranks_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        heads_of_rank(*arguments)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.1.dev3"])
def test_tested_versions_pass(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "dev"])
def test_other_versions_are_refused(version):
    with pytest.raises(ValueError, match=f"vllm={version} was not tested"):
        check_version(version)
