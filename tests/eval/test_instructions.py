"""The task `instructions`: which rules are given, where they stand, and how answers are scored."""

import random
from dataclasses import replace
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from eval.cells import EXACT, Cell
from eval.tasks.instructions import REMINDER, SYSTEM, Instructions, Place, encode_with_system
from eval.tasks.rules import RuleName, make_rules
from wildcat_kv.contexts.prompts import encode_context

pytest_plugins = ["tests.eval_fixtures"]

TASK = Instructions(lengths=[400], repeats=2)
NAMES = get_args(RuleName)
EXACT_CELL = Cell(EXACT, None)
each_name = pytest.mark.parametrize("name", NAMES)
SYSTEM_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM_TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + SYSTEM_TEMPLATE
)


def rules_of(seed=0):
    return {rule.name: rule for rule in make_rules(random.Random(seed))}


# Rules


@each_name
def test_a_question_does_not_say_what_the_rule_says(name):
    for seed in range(20):
        rule = rules_of(seed)[name]
        assert rule.answer not in f"{rule.question} {rule.lead}"
        assert (rule.answer in rule.sentence) == (name != "cities")


@each_name
def test_an_answer_that_keeps_a_rule_is_known(name):
    rule = rules_of()[name]
    assert rule.kept(f"{rule.lead} {rule.answer}.") and not rule.kept(rule.lead) and not rule.kept("")
    assert not any(rule.kept(f"{other.lead} {other.answer}.") for other in rules_of().values() if other != rule)


def test_a_city_in_small_letters_breaks_its_rule():
    rule = rules_of()["cities"]
    assert not rule.kept(f"{rule.lead} {rule.answer.capitalize()}.")


def test_a_signature_stands_at_the_end():
    rule = rules_of()["signature"]
    assert not rule.kept(f"{rule.answer} says: {rule.lead}")


def test_rules_have_other_words_and_another_order_with_another_seed():
    made = [tuple(rule.sentence for rule in make_rules(random.Random(seed))) for seed in (3, 3, 4)]
    assert made[0] == made[1] and set(made[0]) != set(made[2])
    assert len({tuple(rules_of(seed)) for seed in range(10)}) > 5
    assert all(sorted(rules_of(seed)) == sorted(NAMES) for seed in range(3))


# Samples


def test_samples_go_by_length_and_place(setting):
    samples = Instructions(lengths=[400, 500], repeats=2).samples(setting())
    assert [sample.index for sample in samples] == list(range(8))
    assert [tuple(sample.facets.values()) for sample in samples[::2]] == [
        (400, "system"),
        (400, "text"),
        (500, "system"),
        (500, "text"),
    ]
    assert len(TASK.samples(setting(limit=1))) == 2
    hashes = [[sample.prompt_hash for sample in TASK.samples(setting(seed=seed))] for seed in (3, 3, 4)]
    assert hashes[0] == hashes[1] and len({*hashes[0], *hashes[2]}) == 8


@pytest.mark.parametrize("place", get_args(Place))
def test_rules_stand_in_their_place_and_questions_after_the_text(place, setting, tokenizer):
    task = TASK.model_copy(update={"places": [place]})
    for index, sample in enumerate(task.samples(setting())):
        assert sorted(sample.asked) == sorted(NAMES)
        rules = rules_of(setting().seed_of(index))
        contexts = [prompt.context for asked in sample.asked.values() for prompt in (asked.alone, asked.begun)]
        assert all(torch.equal(contexts[0], other) for other in contexts)
        text = tokenizer.decode(contexts[0])
        system, _, message = text.partition("<|im_end|>")
        assert system.startswith(f"<|im_start|>system\n{SYSTEM}") and REMINDER not in text
        for name, asked in sample.asked.items():
            given, elsewhere = (system, message) if place == "system" else (message, system)
            assert given.count(rules[name].sentence) == 1 and rules[name].sentence not in elsewhere
            begun, alone = (tokenizer.decode(prompt.question) for prompt in (asked.begun, asked.alone))
            assert begun == f"{alone}{rules[name].lead}" and alone.startswith(f"{rules[name].question} {REMINDER}")
            assert tokenizer.decode(asked.answer) == f" {rules[name].answer}"
            assert max(len(asked.alone) + 24, len(asked.begun) + len(asked.answer)) <= sample.tokens


@pytest.mark.parametrize("fields", [{"places": []}, {"places": ["end"]}, {"repeats": 0}, {"lengths": [0]}])
def test_a_wrong_option_is_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Instructions(**fields)


def test_the_other_protocol_is_refused(setting):
    with pytest.raises(ValueError, match="protocol='full-prompt': six questions"):
        TASK.samples(setting(protocol="full-prompt"))


# System prompts


def test_a_template_with_a_system_role_takes_the_system_prompt(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", SYSTEM_TEMPLATE)
    assert tokenizer.decode(encode_with_system(tokenizer, "Be brief.", "It rains.")) == (
        "<system>Be brief.</system><user>It rains.\n\n"
    )


@pytest.mark.parametrize("template", [None, NO_SYSTEM_TEMPLATE], ids=["no template", "no system role"])
def test_elsewhere_it_stands_before_the_text(template, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    expected = torch.cat(encode_context(tokenizer, "Be brief.\n\nIt rains."), dim=1)[0]
    assert torch.equal(encode_with_system(tokenizer, "Be brief.", "It rains."), expected)


# Scores


def logits_of(plain, prompt, answer):
    ids = torch.cat((prompt.context, prompt.question, answer))[None]
    return plain(ids).logits[0, -len(answer) - 1 : -1]


def test_answers_are_scored_as_in_one_forward_pass(model, plain, tokenizer, setting):
    sample = TASK.samples(setting(limit=1))[0]
    likeliest = logits_of(plain, sample.asked["name"].begun, torch.tensor([0])).argmax(-1)
    asked = {**sample.asked, "name": replace(sample.asked["name"], answer=likeliest)}
    outcome = replace(sample, asked=asked).open(model, tokenizer)(EXACT_CELL)
    losses = {
        name: torch.nn.functional.cross_entropy(logits_of(plain, each.begun, each.answer), each.answer).item()
        for name, each in asked.items()
    }
    assert {name: outcome.scores[f"nll_{name}"] for name in losses} == pytest.approx(losses, rel=1e-4)
    assert outcome.scores["nll"] == pytest.approx(sum(losses.values()) / 6, rel=1e-4)
    assert [outcome.scores[f"exact_match_{name}"] for name in NAMES] == [float(name == "name") for name in NAMES]
    assert outcome.scores["exact_match"] == pytest.approx(1 / 6)
    assert outcome.seen_tokens == len(sample.asked["name"].alone.context)
    assert TASK.metrics.keys() <= outcome.scores.keys()


def test_a_rule_is_kept_in_what_greedy_decoding_writes(model, plain, tokenizer, setting):
    sample = TASK.samples(setting(limit=1))[0]
    prompt = sample.asked["name"].alone
    ids = torch.cat((prompt.context, prompt.question))[None]
    written = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    rule = replace(sample.asked["name"].rule, answer=text.split()[1])
    asked = {**sample.asked, "name": replace(sample.asked["name"], rule=rule)}
    assert rule.kept(text)
    outcome = replace(sample, asked=asked).open(model, tokenizer)(EXACT_CELL)
    assert outcome.scores["kept_name"] == 1 and outcome.scores["kept"] == pytest.approx(1 / 6)
    assert text in outcome.prediction


@pytest.mark.parametrize("method", ["wildcat", "query_wildcat", "kvzip"])
def test_a_question_changes_nothing_for_the_next(method, model, tokenizer, setting):
    sample = TASK.samples(setting(limit=1))[0]
    cell = Cell(method, method, ratio=0.5)
    measure = sample.open(model, tokenizer)
    first, again = measure(cell).scores, measure(cell).scores
    turned = replace(sample, asked=dict(reversed(sample.asked.items()))).open(model, tokenizer)(cell).scores
    assert first == again == pytest.approx(turned, rel=1e-5)


def test_what_is_counted_is_held_after_the_compression(model, tokenizer, setting):
    sample = TASK.samples(setting(limit=1))[0]
    small, exact = map(sample.open(model, tokenizer), (Cell("snapkv", "snapkv", ratio=0.25), EXACT_CELL))
    assert small.stored_tokens == pytest.approx(0.25 * small.seen_tokens, abs=1)
    assert small.memory_bytes < exact.memory_bytes and small.scores["nll"] != exact.scores["nll"]
