"""Prompts of benchmarks as token ids, in two parts, and contexts cut to what fits."""

import pytest
import torch

from wildcat_kv.lm_eval.prompts import PromptEncoder, cut_middle, cut_start, loses_middle, move_spaces

TEXT, DOC = "Read: a long story. Who did it?", {"context": "a long story."}


def encode(text, begins):
    """A token a letter, after one that begins the prompt."""
    return [0] * begins + [ord(letter) for letter in text]


def written(ids):
    return "".join(chr(number) for number in ids.tolist() if number)


@pytest.mark.parametrize("protocol", ["context-only", "full-prompt"])
def test_both_parts_and_the_answer_are_those_of_the_whole_prompt(protocol):
    encoder = PromptEncoder(encode, protocol)
    parts = encoder.split(TEXT, "mine", DOC)
    context, question = encoder.ids(parts)
    answer = encoder.answer(parts, " He.")
    assert torch.cat((context, question, answer)).tolist() == encode(f"{TEXT} He.", True)
    assert written(question) == ("" if protocol == "full-prompt" else " Who did it?")
    assert answer.dtype == question.dtype == torch.int64 and written(answer) == " He."


def test_the_context_does_not_depend_on_the_question():
    """Also where the edge is inside a token: the question is then encoded by itself."""
    merged = PromptEncoder(lambda text, begins: encode(text.replace(". W", "#"), begins), "context-only")
    context, question = merged.ids(merged.split(TEXT, "mine", DOC))
    assert written(context) == "Read: a long story." and written(question) == " Who did it?"


def test_spaces_belong_to_the_continuation():
    assert move_spaces("Who? \n", "He") == ("Who?", " \nHe")
    assert move_spaces("Who?", " He") == ("Who?", " He")


def test_only_longbench_loses_its_middle():
    assert [loses_middle(task) for task in ("longbench_qasper_e", "niah_single_1")] == [True, False]


def test_other_prompts_lose_their_start():
    context, question = torch.arange(80), torch.arange(80, 90)
    assert cut_start(context, question, 30).tolist() == list(range(60, 80))
    assert torch.equal(cut_start(context, question, 90), context)


@pytest.mark.parametrize("asked", [0, 1, 7, 25])
@pytest.mark.parametrize("limit", [50, 51])
def test_a_prompt_loses_its_middle_as_in_the_authors_code(asked, limit):
    prompt = torch.arange(90)
    context, question = prompt[: 90 - asked], prompt[90 - asked :]
    half = int(limit / 2)
    expected = torch.cat((prompt[:half], prompt[-half:]))
    assert torch.equal(torch.cat((cut_middle(context, question, limit), question)), expected)


@pytest.mark.parametrize("limit", [90, 1000])
def test_a_prompt_that_fits_stays_whole(limit):
    context = torch.arange(80)
    assert cut_middle(context, torch.arange(10), limit) is context


@pytest.mark.parametrize(("asked", "limit", "message"), [(26, 50, "26 tokens.*the 50.*is 25"), (1, -4, "the -4")])
def test_a_question_that_leaves_no_room_for_a_context_is_refused(asked, limit, message):
    with pytest.raises(ValueError, match=message):
        cut_middle(torch.arange(80), torch.arange(asked), limit)
