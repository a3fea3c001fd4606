"""Rules for a model's answers: how they are said, asked for, and checked."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal, get_args

RuleName = Literal["greeting", "signature", "cities", "name", "number", "prices"]

_PEOPLE = ("Nadia", "Tobias", "Ingrid", "Marcel", "Yusuf", "Paulina", "Henrik", "Olga", "Rashid", "Beatrice")
_SIGNERS = ("Morton", "Langley", "Whitlock", "Barrow", "Crane", "Holloway", "Pike", "Sterling", "Ashby", "Thorne")
_BOTS = ("Orion", "Juniper", "Falcon", "Pebble", "Saffron", "Comet", "Willow", "Maestro", "Clover", "Domino")
_MONEY = ("pesos", "rupees", "francs", "crowns", "rubles", "yen", "shillings", "drachmas", "florins", "zlotys")
_CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Greece": "Athens",
    "Japan": "Tokyo",
    "Germany": "Berlin",
    "Egypt": "Cairo",
    "Russia": "Moscow",
}
# Things that have one colour, so that the answer before the signature is known.
_COLOURS = {"snow": "white", "grass": "green", "coal": "black", "the sky": "blue", "blood": "red"}


@dataclass(frozen=True)
class Rule:
    """A rule, and a question whose answer shows whether it is kept.

    Attributes:
        name: what the rule is about.
        sentence: the rule, as it is said to the model.
        question: question whose answer it bears on.
        lead: words that the answer may begin with.
        answer: words that follow there if the rule is kept.
    """

    name: RuleName
    sentence: str
    question: str
    lead: str
    answer: str

    def kept(self, text: str) -> bool:
        """Tell whether an answer keeps the rule."""
        if self.name == "signature":
            return re.findall(r"\w+", text)[-1:] == [self.answer]
        return re.search(rf"\b{re.escape(self.answer)}\b", text) is not None


def make_rules(rng: random.Random) -> list[Rule]:
    """Make one rule of each name, in random order, with random words."""
    person, signer, bot, money = (rng.choice(pool) for pool in (_PEOPLE, _SIGNERS, _BOTS, _MONEY))
    country, city = rng.choice(list(_CAPITALS.items()))
    thing, colour = rng.choice(list(_COLOURS.items()))
    number = str(rng.randint(1013, 9987))
    said: dict[RuleName, tuple[str, str, str, str]] = {
        "greeting": (f"Greet the user by the name {person}.", "Good morning!", "Good morning,", person),
        "signature": (
            f"Sign every answer as Inspector {signer}.",
            f"What colour is {thing}?",
            f"{thing[0].upper()}{thing[1:]} is {colour}. Signed, Inspector",
            signer,
        ),
        "cities": (
            "Write the names of cities in capital letters.",
            f"What is the capital of {country}?",
            f"The capital of {country} is",
            city.upper(),
        ),
        "name": (f"Say that your name is {bot}.", "What is your name?", "My name is", bot),
        "number": (
            f"Tell people who ask about the weather to call the number {number}.",
            "How will the weather be tomorrow?",
            "Please call the number",
            number,
        ),
        "prices": (
            f"Give all prices in {money}.",
            "How much is a loaf of bread?",
            "A loaf of bread is about three",
            money,
        ),
    }
    rules = [Rule(name, *said[name]) for name in get_args(RuleName)]
    rng.shuffle(rules)
    return rules
