"""Essays with rare strings among their sentences: names, numbers, codes and lists of many forms."""

from __future__ import annotations

import random
import re
import string
from dataclasses import dataclass
from typing import Any

from wildcat_kv.data.haystack import Half, build_context

_NAMES = """
    Ilse Marlow Quentin Brandt Yusuf Okafor Petra Lindqvist Hamish Odell Noor Castellane Ravi Thorne Wilhelmina Drax
    Tomas Everly Oona Pell Casper Whitlock Ingrid Vale Leopold Strand Mirela Hask Dorian Finch
"""
_WORDS = """
    plover quartz lantern nimbus cobalt thicket marble saffron ember walnut glacier pewter juniper meadow falcon copper
    orchid tundra velvet basil
"""
_DRAWN = {"name": _NAMES.split(), "word": _WORDS.split()}
# Digits, capitals and hexadecimal digits; a number behind the letter is how many.
_CHARACTERS = {"d": string.digits, "c": string.ascii_uppercase, "x": "0123456789abcdef"}
_BLANK = re.compile(r"<(name|word|[dcx])(\d*)>")

_FORMS = (
    "Invoice <c2>-<d4> went to <name> <name> on the 1<d1>th, and nobody paid it.",
    '"Write this down," said <name>: "<d3>, then <d2>, then <d4>."',
    "You could reach <name> by telephone (+<d2> <d3> <d4>) until spring.",
    "user=<name> password=<word>-<word>-<d2>",
    "He mailed <name>.<name>@<word><word>.org twice.",
    "Flight <c2><d4> left gate <c1><d2> at 1<d1>:<d1>5.",
    "Total due, by cheque: $<d1>,<d3>.<d2> (<name> <name>).",
    "| <word> | <d5> |\n| <word> | <d5> |\n| <word> | <d5> |\n",
    "The commit <x10> broke the <word> build.",
    "Between <word> and <word> lay <word>, <d3> miles from <name>'s house in <name>ville.",
    "<name> was born in 18<d2>, married in 19<d2>, and kept a dog named <word>.",
    "ISBN <d3>-<d1>-<d4>-<d4>-<d1>.",
    "Locker <d3>, shelf <c1>, parcel <c3><d3>: that was where <name> had put the <word>.",
    "They called the project <word> <word>, and its budget was <d2>,<d3> crowns.",
    '{"id": "<c2><d6>", "owner": "<name>", "colour": "<word>"}',
    "On page <d3> <name> <name> underlined the word <word> and wrote <d4> beside it.",
    "The plate read <c3> <d4>; the driver, one <name> <name>, wore <word> gloves.",
    "Coordinates: <d2>.<d4> N, <d2>.<d4> E.",
)
# Tokens of a text for each sentence.
_APART = 48


@dataclass(frozen=True)
class RareString:
    """A sentence with a string that nothing else in a text gives away.

    Attributes:
        sentence: sentence to plant.
    """

    sentence: str


def make_rare_string(rng: random.Random) -> RareString:
    """Draw a sentence of one of many forms."""

    def drawn(blank: re.Match[str]) -> str:
        kind, count = blank.groups()
        if kind in _DRAWN:
            return rng.choice(_DRAWN[kind])
        return "".join(rng.choices(_CHARACTERS[kind], k=int(count)))

    return RareString(_BLANK.sub(drawn, rng.choice(_FORMS)))


def rare_text(tokenizer: Any, tokens: int, *, seed: int, half: Half | None = None) -> str:
    """Plant rare strings in a stretch of the essays, a sentence for each 48 tokens.

    None of the forms is that of the needles in `wildcat_kv.data.haystack`.

    Args:
        tokenizer: tokenizer that counts the tokens.
        tokens: tokens of the text, as in `build_context`.
        seed: seed of the stretch and of the strings.
        half: half of the essays.

    Raises:
        ValueError: errors of `build_context`.
    """
    rng = random.Random(seed)
    planted = [make_rare_string(rng) for _ in range(tokens // _APART)]
    return build_context(tokenizer, tokens, planted, seed=seed, half=half)
