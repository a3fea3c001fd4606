"""The task `arithmetic`: problems and their solutions, and how they are scored while a cache compresses on."""

import random
import re

import pytest
import torch
from pydantic import ValidationError

from eval.cells import EXACT, Cell
from eval.tasks.arithmetic import Arithmetic, number_of_each
from eval.tasks.asking import Asked
from eval.tasks.word_problems import make_problem

pytest_plugins = ["tests.eval_fixtures"]

TASK = Arithmetic(steps=6, examples=1, repeats=2)
EXACT_CELL = Cell(EXACT, None)
SMALL = Cell("wildcat", "wildcat", max_tokens=70, settings={"sink": 4, "window": 16})
each_seed = pytest.mark.parametrize("seed", range(8))
each_protocol = pytest.mark.parametrize("protocol", ["context-only", "full-prompt"])


def numbers_in(text):
    return [int(number) for number in re.findall(r"\d+", text)]


# Problems


@each_seed
def test_a_solution_follows_from_its_problem(seed):
    problem = make_problem(random.Random(seed), 10)
    start, *days = numbers_in(problem.question)
    changes = days[1::2]
    first, *lines, last = problem.solution.split("\n")
    assert numbers_in(first) == [start] and days[::2] == list(range(1, 11)) and len(lines) == 10
    total = start
    for day, (line, change) in enumerate(zip(lines, changes, strict=True), 1):
        event, worked = line.split(": ")
        assert event.startswith(f"On day {day} it ") and f" {event}." in problem.question
        before, operator, after = re.fullmatch(rf"(\d+) ([+-]) {change} = (\d+)\.", worked).groups()
        assert int(before) == total
        total += change if operator == "+" else -change
        assert int(after) == total and 10 <= total <= 99
    assert numbers_in(last) == [total] == [problem.answer]


@each_seed
def test_the_same_word_always_means_more(seed):
    problem = make_problem(random.Random(seed), 10)
    verbs = re.findall(r"On day \d+ it (.+?) \d+", problem.question)
    signs = re.findall(r" ([+-]) ", problem.solution)
    assert len(set(verbs)) == len(set(signs)) == len(set(zip(verbs, signs, strict=True)))


@each_seed
def test_numbers_are_known_by_where_they_come_from(seed):
    problem = make_problem(random.Random(seed), 10)
    numbers = numbers_in(problem.solution)
    assert len(numbers) == len(problem.given) == len(problem.days)
    assert [number for number, day in zip(numbers, problem.days, strict=True) if day] == list(range(1, 11))
    start, *days = numbers_in(problem.question)
    assert [number for number, given in zip(numbers, problem.given, strict=True) if given] == [start, *days[1::2]]


def test_a_text_solves_a_problem_by_its_answer():
    problem = make_problem(random.Random(0), 3)
    assert problem.solved_by(problem.solution)
    wrong = problem.solution.replace(f"is {problem.answer}", f"is {problem.answer}0")
    assert not any(problem.solved_by(text) for text in (wrong, "", str(problem.answer)))


# Samples


def test_samples_are_the_same_with_the_same_seed(setting):
    hashes = [[sample.prompt_hash for sample in TASK.samples(setting(seed=seed))] for seed in (3, 3, 4)]
    assert hashes[0] == hashes[1] and len({*hashes[0], *hashes[2]}) == 4
    assert [sample.index for sample in TASK.samples(setting())] == [0, 1]
    assert len(TASK.samples(setting(limit=1))) == 1
    halves = [{sample.prompt_hash for sample in TASK.samples(setting(half=half))} for half in ("develop", "report")]
    assert not halves[0] & halves[1]


def test_examples_come_first_and_the_problem_after_them(setting, tokenizer):
    for sample in Arithmetic(steps=6, examples=3, repeats=2).samples(setting()):
        context, question = (tokenizer.decode(part) for part in (sample.asked.context, sample.asked.question))
        assert context.count("Problem: ") == context.count("Solution: ") == context.count("The answer is") == 3
        assert question.startswith(f"Problem: {sample.problem.question}") and question.endswith("Solution:")
        assert sample.problem.question not in context
        assert tokenizer.decode(sample.answer) == f" {sample.problem.solution}"
        assert sample.tokens >= len(sample.asked) + len(sample.answer)


@pytest.mark.parametrize("fields", [{"steps": 0}, {"examples": 0}, {"repeats": 0}, {"lengths": [100]}])
def test_a_wrong_option_is_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Arithmetic(**fields)


def test_tokens_are_counted_to_their_numbers(tokenizer):
    tokens = tokenizer("On day 1: 23 + 105 = 128.", add_special_tokens=False)["input_ids"]
    numbers = number_of_each(tokenizer, tokens)
    parts = [
        "".join(tokenizer.decode([token]) for token, at in zip(tokens, numbers, strict=True) if at == number)
        for number in range(4)
    ]
    assert [part.strip() for part in parts] == ["1", "23", "105", "128"] and max(filter(None, numbers)) == 3
    assert number_of_each(tokenizer, tokenizer("none at all")["input_ids"]) == [None] * 3


# Scores


def losses(plain, sample):
    """Loss of each token of the right solution, by one forward pass without a cache."""
    ids = torch.cat((sample.asked.context, sample.asked.question, sample.answer))[None]
    logits = plain(ids).logits[0, -len(sample.answer) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, sample.answer, reduction="none")


@each_protocol
def test_numbers_are_scored_as_in_one_forward_pass(protocol, model, plain, tokenizer, setting):
    sample = TASK.samples(setting(protocol=protocol))[0]
    scores = sample.open(model, tokenizer)(EXACT_CELL).scores
    each, kept = losses(plain, sample), {"nll": [], "nll_given": []}
    for loss, token, number in zip(each, sample.answer, number_of_each(tokenizer, sample.answer), strict=True):
        if number is None:
            assert not re.search(r"\d", tokenizer.decode([token]))
            continue
        if not sample.problem.days[number]:
            kept["nll"].append(loss.item())
        if sample.problem.given[number]:
            kept["nll_given"].append(loss.item())
    for name, of in kept.items():
        assert scores[name] == pytest.approx(sum(of) / len(of), rel=1e-4)
    assert TASK.metrics.keys() == scores.keys()


def test_the_cache_compresses_while_the_solution_is_read(model, tokenizer, setting):
    sample = TASK.samples(setting())[0]
    small, exact = map(sample.open(model, tokenizer), (SMALL, EXACT_CELL))
    assert small.seen_tokens == exact.seen_tokens == len(sample.asked) + len(sample.answer) - 1
    assert exact.stored_tokens == exact.seen_tokens and 20 < small.stored_tokens <= 70
    # The end of a solution is scored after folds. One pass over all of it has none.
    asked = Asked(model, tokenizer, sample.asked)
    steps, once = (
        asked.losses(SMALL.compress(asked.context, tokenizer), sample.answer, chunk=chunk) for chunk in (1, None)
    )
    assert torch.allclose(steps[:2], once[:2], atol=1e-4) and not torch.allclose(steps[-20:], once[-20:], atol=1e-2)


@each_protocol
def test_what_the_model_writes_is_read_for_the_answer(protocol, model, plain, tokenizer, setting):
    sample = TASK.samples(setting(protocol=protocol))[0]
    ids = torch.cat((sample.asked.context, sample.asked.question))[None]
    count = len(sample.answer) + 16
    written = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    text = re.split(r"\n\n|Problem:", tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))[0]
    outcome = sample.open(model, tokenizer)(EXACT_CELL)
    assert (outcome.prediction, outcome.reference) == (text, sample.problem.solution)
    assert outcome.scores["exact_match"] == 0


@pytest.mark.parametrize("solved", [True, False])
def test_a_solved_problem_counts(solved, model, tokenizer, setting, monkeypatch):
    sample = TASK.samples(setting())[0]
    text = sample.problem.solution if solved else "It is hard."
    monkeypatch.setattr(Asked, "generate", lambda *_, **__: text)
    assert sample.open(model, tokenizer)(EXACT_CELL).scores["exact_match"] == float(solved)
