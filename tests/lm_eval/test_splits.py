"""Prompts of benchmarks split where their context ends."""

import pytest

from wildcat_kv.lm_eval.splits import split_prompt

NEEDLES = "A special magic number is hidden.\nOne of the special magic numbers for red-fox is: 123.\n"
RULER = {
    "niah_single_1": f"{NEEDLES}What is the special magic number for red-fox mentioned in the provided text?",
    "ruler_vt": "Track.\n\nVAR A = 1\nQuestion: Find all.\n\nTrack.\n\nVAR B = 2\nQuestion: Find all variables.",
    "ruler_cwe": "A list.\n1. one 2. two\nQuestion: What are the 10 most common words in the above list?",
    "ruler_fwe": "Read. abc ... abc\nQuestion: What are the three most frequently appeared words?",
    "ruler_qa_squad": "The documents.\n\nDocument 1:\nWho?\n\nAnswer the question now.\n\nQuestion: Who did it?",
}


@pytest.mark.parametrize("task", RULER)
@pytest.mark.parametrize("around", [("", " Answer: it is"), ("<|user|>\n", "<|end|>\n<|assistant|>\nAnswer: it is")])
def test_the_last_question_of_a_ruler_text_comes_after_the_context(task, around):
    prompt = RULER[task].join(around)
    context, question = split_prompt(prompt, task, {"input": RULER[task]})
    assert context + question == prompt
    assert question.lstrip("\n").startswith(("What is the special", "Question:"))
    assert question.count("?") + question.count("Find all") == 1
    assert not context.rstrip().endswith("?")


def test_a_ruler_text_without_a_question_is_no_context_but_its_last_letter():
    with pytest.raises(ValueError, match=r"task='niah_mine'.*use protocol='full-prompt'"):
        split_prompt("A text. Why?", "niah_mine", {"input": "A text. Why?"})


@pytest.mark.parametrize(
    ("task", "field"),
    [
        ("longbench_qasper_e", "context"),
        ("infinitebench_passkey", "context"),
        ("babilong_qa1", "input"),
        ("scrolls_qasper", "text"),
        ("scrolls_govreport", "input"),
        ("mine", "context"),
    ],
)
def test_the_context_of_a_family_is_in_its_field(task, field):
    prompt = "Read: a long story. Who did it?"
    assert split_prompt(prompt, task, {field: "\na long story.\n"}) == ("Read: a long story.", " Who did it?")


def test_scrolls_questions_before_the_text_are_not_the_context():
    document = {"input": "Who?\n\nA story.", "text": "A story.", "question": "Who?"}
    assert split_prompt("A story.\n\nQuestion: Who?", "scrolls_qasper", document) == ("A story.", "\n\nQuestion: Who?")


def test_of_examples_with_the_same_context_the_last_is_the_one():
    prompt = "A story. Who? He.\n\nA story. Why?"
    assert split_prompt(prompt, "mine", {"context": "A story."}) == (prompt[:-5], " Why?")


@pytest.mark.parametrize("document", [{}, {"context": ""}, {"context": None}, {"context": "Not there."}])
def test_a_prompt_without_a_context_names_the_way_out(document):
    with pytest.raises(ValueError, match=r"task='mine': its documents have no context.*protocol='full-prompt'"):
        split_prompt("Read: a long story. Who did it?", "mine", document)


@pytest.mark.parametrize("after", ["", " \n"])
def test_a_context_that_nothing_comes_after_is_refused(after):
    with pytest.raises(ValueError, match=r"task='mine': nothing comes after the context.*full-prompt"):
        split_prompt(f"Sum up: a story.{after}", "mine", {"context": "a story."})
