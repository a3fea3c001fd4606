"""Rare strings in essays: many forms, the same for a seed, and none that a needle has."""

import random
import re

from tests.data.test_haystack import TOKENIZER, stories  # noqa: F401  # a fixture
from wildcat_kv.data.haystack import CITIES
from wildcat_kv.data.rare_strings import make_rare_string, rare_text


def test_sentences_are_filled_in_and_differ():
    rng = random.Random(0)
    sentences = [make_rare_string(rng).sentence for _ in range(300)]
    assert not any(re.search(r"<\w+>", sentence) for sentence in sentences)
    assert len(set(sentences)) == 300


def test_no_form_is_that_of_a_needle():
    rng = random.Random(0)
    text = " ".join(make_rare_string(rng).sentence for _ in range(300))
    assert "magic" not in text and "number" not in text and not set(re.findall(r"\w+", text)) & set(CITIES)


def test_a_text_has_a_rare_string_for_every_48_tokens(stories):  # noqa: F811
    text = rare_text(TOKENIZER, 480, seed=3)
    assert text == rare_text(TOKENIZER, 480, seed=3) != rare_text(TOKENIZER, 480, seed=4)
    assert len(text.split()) == 480
    rng = random.Random(3)
    assert all(make_rare_string(rng).sentence in text for _ in range(10))
