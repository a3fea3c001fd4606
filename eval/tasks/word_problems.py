"""Word problems about a running total, with their solutions worked out step by step."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

_LEAST, _MOST = 10, 99  # of a total, so that all have two digits
_LARGEST_STEP = 20

# Who has what, how it becomes more, and how less.
_SCENES = (
    ("A library", "books", "buys", "gives away"),
    ("A shop", "apples", "gets", "sells"),
    ("A farm", "hens", "buys", "sells"),
    ("A museum", "paintings", "is given", "lends out"),
    ("A school", "chairs", "orders", "throws away"),
    ("A garage", "cars", "takes in", "sends out"),
    ("A bakery", "loaves", "bakes", "sells"),
    ("A garden", "roses", "plants", "loses"),
)
_FINAL = "The answer is"


@dataclass(frozen=True)
class WordProblem:
    """A problem and its solution.

    Attributes:
        question: text of the problem.
        solution: one line a step, and the answer in the last one.
        answer: the last total.
        given: for each number of the solution, True where it comes from the problem first.
        days: for each number of the solution, True if it is the number of a day.
    """

    question: str
    solution: str
    answer: int
    given: tuple[bool, ...]
    days: tuple[bool, ...]

    def solved_by(self, text: str) -> bool:
        """Tell whether a text gives the right answer, in the words of the solution."""
        found = re.search(rf"{_FINAL} (\d+)", text)
        return found is not None and int(found[1]) == self.answer


def make_problem(rng: random.Random, steps: int) -> WordProblem:
    """Make a problem in which a total changes once a day.

    Args:
        rng: source of the scene and of the numbers.
        steps: number of days, at least 1.
    """
    owner, things, more, less = rng.choice(_SCENES)
    total = start = rng.randint(_LEAST + _LARGEST_STEP, _MOST - _LARGEST_STEP)
    told, worked = [f"{owner} has {start} {things}."], [f"It has {start} {things} at first."]
    for day in range(1, steps + 1):
        change = rng.randint(2, _LARGEST_STEP) * rng.choice((-1, 1))
        if not _LEAST <= total + change <= _MOST:
            change = -change
        event = f"On day {day} it {more if change > 0 else less} {abs(change)} {things}"
        told.append(f"{event}.")
        # In the problem's words, so that a small model finds the number again.
        worked.append(f"{event}: {total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}.")
        total += change
    told.append(f"How many {things} does it have then?")
    # In a line: the day, the change, the total before, the change again, the total after.
    return WordProblem(
        question=" ".join(told),
        solution="\n".join([*worked, f"{_FINAL} {total}."]),
        answer=total,
        given=(True, *(False, True, False, False, False) * steps, False),
        days=(False, *(True, False, False, False, False) * steps, False),
    )
