"""The task `lookup`: what is planted, what is asked, and how the answers are scored."""

import ast
import json
import random
import re
from dataclasses import replace
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from eval.cells import EXACT, Cell
from eval.tasks.lookup import INSTRUCTION, Lookup
from eval.tasks.lookup_facts import load_facts, make_quiz
from eval.tasks.lookup_texts import FORMS, FormName, compose, source_text
from wildcat_kv.data.haystack import CITIES

pytest_plugins = ["tests.eval_fixtures"]

LENGTH = 700
SCENES = [(form, number) for form in FORMS for number in range(len(load_facts().of(form)))]
EXACT_CELL = Cell(EXACT, None)
each_form = pytest.mark.parametrize("form", FORMS)
each_scene = pytest.mark.parametrize(("form", "number"), SCENES)


def quiz_of(form, number, seed=0):
    quiz = make_quiz(form, number, random.Random(seed))
    return quiz, {question.kind: question for question in quiz.questions}


def words_of(text):
    return set(re.findall(r"[a-z]{3,}", text.lower()))


def cities_of(text):
    text = text.lower()
    return {city for city in CITIES if city.lower() in text}


# Facts


def test_every_form_has_scenes_of_its_own():
    assert set(FORMS) == set(get_args(FormName))
    assert all(len(load_facts().of(form)) == 4 for form in FORMS)


@each_scene
def test_a_question_asks_for_its_fact(form, number):
    quiz, questions = quiz_of(form, number)
    fact, link, answer = quiz.blocks[number], quiz.blocks[-1], questions["words"].answer
    assert not re.search(r"\$", "".join([*quiz.blocks, *(question.text for question in quiz.questions)]))
    [key] = cities_of(fact)
    assert answer in fact and answer not in link
    assert all(answer not in f"{question.text} {question.lead}" for question in quiz.questions)
    assert all(questions[kind].answer == answer for kind in ("other", "joined"))
    for kind in ("words", "other"):
        assert cities_of(questions[kind].text) == {key}


@each_scene
def test_a_joined_question_names_what_the_link_alone_names(form, number):
    for seed in range(10):
        quiz, questions = quiz_of(form, number, seed)
        *facts, link = quiz.blocks
        [source] = cities_of(questions["joined"].text)
        assert source in cities_of(link) and not any(source in cities_of(fact) for fact in facts)
        # What leads from the link to the fact stands in no other fact.
        bridges = [word for word in re.findall(r"[\w.-]{2,}", link.lower()) if word in facts[number].lower()]
        others = " ".join(fact.lower() for fact in facts if fact != facts[number])
        assert any(word not in others for word in bridges)
        assert questions["words"].answer not in others


@each_scene
def test_other_words_are_other_words(form, number):
    quiz, questions = quiz_of(form, number)
    fact = words_of(FORMS[form].write([quiz.blocks[number]]))
    same, other = (words_of(f"{questions[kind].text} {questions[kind].lead}") & fact for kind in ("words", "other"))
    assert len(other) < len(same)


@each_scene
def test_what_is_not_there_is_asked_for_as_what_is(form, number):
    quiz, questions = quiz_of(form, number)
    [absent], [key] = (cities_of(questions[kind].text) for kind in ("absent", "words"))
    assert not any(absent in cities_of(block) for block in quiz.blocks)
    swapped = re.sub(key, absent, questions["words"].text, flags=re.IGNORECASE)
    assert swapped.lower() == questions["absent"].text.lower()
    assert questions["absent"].answer is None and not questions["absent"].lead


@each_form
def test_no_key_is_in_the_texts(form):
    named = cities_of(source_text(form, "develop"))
    for seed in range(20):
        quiz = make_quiz(form, seed, random.Random(seed), "develop")
        assert not cities_of("".join(quiz.blocks)) & named


# Texts


@each_form
def test_blocks_are_planted_in_a_text_of_its_length(form, tokenizer):
    lengths = []
    for seed in range(5):
        quiz, rng = make_quiz(form, seed, random.Random(seed)), random.Random(seed)
        text = compose(tokenizer, form, LENGTH, quiz.blocks, rng)
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        for block in quiz.blocks:
            assert all(text.count(line) == 1 for line in block.split("\n") if cities_of(line))
    assert max(lengths) < 1.03 * LENGTH and sum(lengths) / 5 > 0.75 * LENGTH  # a clause has up to 300 tokens


@each_form
def test_a_text_keeps_its_form(form, tokenizer):
    quiz = make_quiz(form, 2, random.Random(0))
    text = compose(tokenizer, form, LENGTH, quiz.blocks, random.Random(0))
    if form == "table":
        head, rule, *rows = text.split("\n")
        assert {row.count(" | ") for row in (head, rule, *rows)} == {5} and len(rows) > 10
    if form == "json":
        records = json.loads(text)
        assert len(records) > 5 and all(isinstance(record["Name"], str) for record in records)
    if form == "code":
        assert all(ast.parse(block.replace("(JakartaStore)", "")) for block in quiz.blocks)
    if form == "dialogue":
        speakers = [line.partition(": ")[0] for line in text.split("\n")]
        assert speakers == ["Host", "Guest"] * (len(speakers) // 2)


@each_form
def test_places_and_halves_differ(form, tokenizer):
    quiz = make_quiz(form, 0, random.Random(0))
    texts = {
        compose(tokenizer, form, LENGTH, quiz.blocks, random.Random(seed), half)
        for half in (None, "develop", "report")
        for seed in (0, 0, 1)
    }
    assert len(texts) == 6
    develop, report = (set(FORMS[form].units(half)) for half in ("develop", "report"))
    both = {unit for unit in develop & report if len(unit) > 60}
    assert len(both) < 0.05 * len(develop)


@pytest.mark.parametrize("length", [10, 10**7])
def test_a_length_without_room_or_text_is_refused(tokenizer, length):
    quiz = make_quiz("legal", 0, random.Random(0))
    with pytest.raises(ValueError, match=f"lengths={length}: a text of the form 'legal'"):
        compose(tokenizer, "legal", length, quiz.blocks, random.Random(0))


# Samples

TASK = Lookup(lengths=[400], forms=["prose", "table"], repeats=2)


def test_samples_go_by_length_and_form(setting):
    task = Lookup(lengths=[400, 500], forms=["table", "prose"], repeats=2)
    samples = task.samples(setting())
    assert [sample.index for sample in samples] == list(range(8))
    assert [tuple(sample.facets.values()) for sample in samples[::2]] == [
        (400, "table"),
        (400, "prose"),
        (500, "table"),
        (500, "prose"),
    ]
    assert len(task.samples(setting(limit=1))) == 4
    hashes = [[sample.prompt_hash for sample in task.samples(setting(seed=seed))] for seed in (3, 3, 4)]
    assert hashes[0] == hashes[1] and len({*hashes[0], *hashes[2]}) == 16


def test_halves_have_samples_of_their_own(setting):
    halves = [{sample.prompt_hash for sample in TASK.samples(setting(half=half))} for half in ("develop", "report")]
    assert not halves[0] & halves[1]


def test_all_forms_by_default():
    assert Lookup().forms == list(FORMS) and 3 * Lookup().repeats >= 24


@pytest.mark.parametrize("fields", [{"forms": []}, {"forms": ["poem"]}, {"repeats": 0}, {"lengths": [0]}, {"form": 1}])
def test_a_wrong_option_is_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Lookup(**fields)


def test_the_other_protocol_is_refused(setting):
    with pytest.raises(ValueError, match="protocol='full-prompt': four questions"):
        TASK.samples(setting(protocol="full-prompt"))


def test_one_context_and_four_questions(setting, tokenizer):
    for sample in TASK.samples(setting()):
        assert list(sample.asked) == ["words", "other", "joined", "absent"]
        (context, *contexts) = (prompt.context for prompt, _ in sample.asked.values())
        assert all(torch.equal(context, other) for other in contexts)
        text = tokenizer.decode(context)
        for kind, (prompt, answer) in sample.asked.items():
            asked = tokenizer.decode(prompt.question)
            assert INSTRUCTION in asked and INSTRUCTION not in text
            assert len(prompt) + len(answer) <= sample.tokens
            if kind != "absent":
                assert tokenizer.decode(answer) == f" {sample.reference}" and sample.reference in text


# Scores


def losses(plain, prompt, answer):
    """Loss of each token of an answer, by one forward pass without a cache."""
    ids = torch.cat((prompt.context, prompt.question, answer))[None]
    logits = plain(ids).logits[0, -len(answer) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, answer, reduction="none")


def test_answers_are_scored_as_in_one_forward_pass(model, plain, tokenizer, setting):
    sample = TASK.samples(setting(limit=1))[1]
    outcome = sample.open(model, tokenizer)(EXACT_CELL)
    expected = {kind: losses(plain, *sample.asked[kind]).mean().item() for kind in ("words", "other", "joined")}
    for kind, loss in expected.items():
        assert outcome.scores[f"nll_{kind}"] == pytest.approx(loss, rel=1e-4)
    assert outcome.scores["nll"] == pytest.approx(sum(expected.values()) / 3, rel=1e-4)
    assert outcome.seen_tokens == len(sample.asked["words"][0].context) and outcome.reference == sample.reference
    assert TASK.metrics.keys() <= outcome.scores.keys()


def test_what_is_not_there_is_scored_by_what_the_exact_cache_writes(model, plain, tokenizer, setting):
    sample = TASK.samples(setting(limit=1))[0]
    prompt, room = sample.asked["absent"]
    ids = torch.cat((prompt.context, prompt.question))[None]
    written = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(room), do_sample=False)
    written = written[0, ids.shape[1] :]
    written = written[: written.tolist().index(2)] if 2 in written.tolist() else written
    measure = sample.open(model, tokenizer)
    exact = measure(EXACT_CELL).scores["absent"]
    assert exact == pytest.approx(losses(plain, prompt, written).mean().item(), rel=1e-4)
    assert measure(Cell("uniform", "uniform", ratio=0.1)).scores["absent"] > exact


def test_an_answer_that_is_found_counts_by_its_question(model, plain, tokenizer, setting):
    sample = TASK.samples(setting(limit=1))[0]
    prompt, _ = sample.asked["other"]
    ids = torch.cat((prompt.context, prompt.question))[None]
    likeliest = plain(ids).logits[0, -1:].argmax(-1)
    right = replace(sample, asked={**sample.asked, "other": (prompt, likeliest)})
    scores = right.open(model, tokenizer)(EXACT_CELL).scores
    assert [scores[f"exact_match_{kind}"] for kind in ("words", "other", "joined")] == [0, 1, 0]
    assert scores["exact_match"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("method", ["wildcat", "query_wildcat", "kvzip"])
def test_a_question_changes_nothing_for_the_next(method, model, tokenizer, setting):
    sample = TASK.samples(setting(limit=1))[0]
    cell = Cell(method, method, ratio=0.5)
    measure = sample.open(model, tokenizer)
    first, again = measure(cell).scores, measure(cell).scores
    turned = replace(sample, asked=dict(reversed(sample.asked.items()))).open(model, tokenizer)(cell).scores
    assert first == again == pytest.approx(turned, rel=1e-5)
