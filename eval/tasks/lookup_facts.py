"""Facts of the task `lookup`: what is planted, and what is asked about it."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from eval.tasks.lookup_texts import FormName, source_text
from wildcat_kv.data.haystack import CITIES, Half

Kind = Literal["words", "other", "joined", "absent"]

_FILE = Path(__file__).with_suffix(".yaml")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Numbers(_Model):
    """A pool of numbers: whole ones, or with as many digits after the point as their ends."""

    first: int | float = Field(alias="from")
    last: int | float = Field(alias="to")

    def draw(self, rng: random.Random) -> str:
        """Draw a number."""
        digits = len(str(self.first).partition(".")[2])
        scale = 10**digits
        return f"{rng.randint(round(self.first * scale), round(self.last * scale)) / scale:.{digits}f}"


class Letters(_Model):
    """A pool of capital letters in a row."""

    letters: int

    def draw(self, rng: random.Random) -> str:
        """Draw a word."""
        return "".join(rng.choices(string.ascii_uppercase, k=self.letters))


class Scene(_Model):
    """Templates of one fact and of the questions about it; see the file."""

    fact: str
    link: str
    words: tuple[str, str]
    other: tuple[str, str]
    joined: tuple[str, str]
    slots: dict[str, str]


class Facts(_Model):
    """The file: scenes by form, and the pools that their slots are filled from."""

    pools: dict[str, Numbers | Letters | Annotated[list[str | int], Field(min_length=2)]]
    prose: list[Scene]
    table: list[Scene]
    json_: list[Scene] = Field(alias="json")
    code: list[Scene]
    dialogue: list[Scene]
    legal: list[Scene]

    def of(self, form: FormName) -> list[Scene]:
        """List the scenes of a form."""
        scenes: list[Scene] = getattr(self, "json_" if form == "json" else form)
        return scenes


@dataclass(frozen=True)
class Question:
    """One question about a text.

    Attributes:
        kind: "words" in the text's words, "other" in other words, "joined" over two facts, "absent" about a fact that
            the text does not have.
        text: the question.
        lead: beginning of its answer; empty where the model is to say all of it.
        answer: rest of the answer; None where there is none.
    """

    kind: Kind
    text: str
    lead: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class Quiz:
    """The blocks to plant in one text, and the questions about them."""

    blocks: tuple[str, ...]
    questions: tuple[Question, ...]


@lru_cache(maxsize=1)
def load_facts() -> Facts:
    """Read the file of facts."""
    return Facts.model_validate(yaml.safe_load(_FILE.read_text(encoding="utf-8")))


def make_quiz(form: FormName, number: int, rng: random.Random, half: Half | None = None) -> Quiz:
    """Make the facts of one text: one of each scene, of which one is asked for, and a link to that one.

    The fact that the text does not have is the one that is asked for, about another key.

    Args:
        form: form of the text.
        number: number of the scene that is asked for; the scenes take turns.
        rng: source of keys and values.
        half: half of the texts; none of them names a key.
    """
    scenes = load_facts().of(form)
    *keys, source, absent = rng.sample(_unnamed_cities(form, half), len(scenes) + 2)
    used = set[str]()
    filled = [{**_spellings("key", key), **_fill(scene, rng, used)} for key, scene in zip(keys, scenes, strict=True)]
    scene, asked = scenes[number % len(scenes)], filled[number % len(scenes)]
    own = {f"link_{slot}": value for slot, value in _fill(scene, rng, used).items()}
    link = {**asked, **own, **_spellings("source", source)}
    blocks = [Template(each.fact).substitute(slots) for each, slots in zip(scenes, filled, strict=True)]
    templates: dict[Kind, tuple[str, str]] = {"words": scene.words, "other": scene.other, "joined": scene.joined}
    questions = [
        Question(kind, Template(text).substitute(link), Template(lead).substitute(link), asked["value"])
        for kind, (text, lead) in templates.items()
    ]
    missing = Template(scene.words[0]).substitute({**asked, **_spellings("key", absent)})
    return Quiz((*blocks, Template(scene.link).substitute(link)), (*questions, Question("absent", missing)))


def _fill(scene: Scene, rng: random.Random, used: set[str]) -> dict[str, str]:
    """Draw the slots of a scene. No value comes twice in a text, so that nothing else answers a question."""
    slots: dict[str, str] = {}
    for slot, name in scene.slots.items():
        pool = load_facts().pools[name]
        if isinstance(pool, list):
            slots[slot] = rng.choice([value for value in map(str, pool) if value not in used])
        else:
            while slot not in slots or slots[slot] in used:
                slots[slot] = pool.draw(rng)
        used.add(slots[slot])
    return slots


def _spellings(name: str, key: str) -> dict[str, str]:
    return {name: key, f"{name}_upper": key.upper(), f"{name}_lower": key.lower()}


@cache
def _unnamed_cities(form: FormName, half: Half | None) -> list[Any]:
    """List the cities that a form's texts do not name."""
    text = source_text(form, half).casefold()
    return [city for city in CITIES if city.casefold() not in text]
