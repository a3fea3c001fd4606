"""Where a prompt is split: on the tokens of chat templates, whatever the question."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.words import CHAT, PARTS, Processor
from tests.words import tokenizer as words_tokenizer
from wildcat_kv.contexts.prompts import (
    encode_context,
    encode_follow_up,
    encode_prompt,
    encode_question,
    messages_for,
    repeat_request,
    text_tokenizer,
)
from wildcat_kv.models import default_model_path

# As the families have them, cut down to what matters here: where they put text, spaces and line ends.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
        " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ '<bos>' }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else"
        " m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "thinking": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
    ),
    "system": (
        "{{ '<|system|>\nYou are helpful.<|end|>\n' }}{% for m in messages %}"
        "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
CONTEXT, QUESTIONS = "The sun rises in the east.\nIt sets  in the west.", ("Where does it rise?", "And why? ", "?")


@pytest.fixture(scope="module")
def smol():
    return AutoTokenizer.from_pretrained(default_model_path(), local_files_only=True)


@pytest.fixture(params=[*TEMPLATES, "own", "none"])
def templated(request, smol):
    own = smol.chat_template
    smol.chat_template = {"own": own, "none": None}.get(request.param, TEMPLATES.get(request.param))
    yield smol
    smol.chat_template = own


def rendered(tokenizer, *messages):
    roles = ("user", "assistant")
    turns = [{"role": roles[place % 2], "content": text} for place, text in enumerate(messages)]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@pytest.mark.real
@pytest.mark.parametrize("question", QUESTIONS)
def test_context_and_question_make_the_template_s_prompt(templated, question):
    before, after = encode_question(templated, CONTEXT, question)
    text = templated.decode(torch.cat((before, after), dim=1)[0])
    if templated.chat_template is None:
        assert text == f"{CONTEXT}\n\n{question}\n"
    else:
        assert text.replace(" ", "") == rendered(templated, f"{CONTEXT}\n\n{question}").replace(" ", "")
        assert text.startswith(rendered(templated, f"{CONTEXT}\n\nX").split("\n\nX")[0])


@pytest.mark.real
def test_the_context_is_read_the_same_whatever_is_asked(templated):
    befores = [encode_question(templated, CONTEXT, question)[0] for question in QUESTIONS]
    assert all(torch.equal(before, befores[0]) for before in befores)
    head, body = encode_context(templated, CONTEXT)
    assert torch.equal(torch.cat((head, body), dim=1), befores[0])
    assert "sun" not in templated.decode(head[0]) and "sun" in templated.decode(body[0, :4])


@pytest.mark.real
def test_a_follow_up_makes_the_template_s_conversation(templated):
    """The model's answer as it was generated, without its end token, stands between the two."""
    before, after = encode_question(templated, CONTEXT, "Where?")
    answer = templated("In the east.", return_tensors="pt", add_special_tokens=False).input_ids
    text = templated.decode(torch.cat((before, after, answer, encode_follow_up(templated, "Why?", first=False)), 1)[0])
    if templated.chat_template is None:
        assert text == f"{CONTEXT}\n\nWhere?\nIn the east.\n\nWhy?\n"
    else:
        expected = rendered(templated, f"{CONTEXT}\n\nWhere?", "In the east.", "Why?")
        # What an answer began with, templates leave out afterwards; spaces may differ around an answer.
        unlike = (" ", "<think>\n\n</think>\n\n")
        for piece in unlike:
            text, expected = text.replace(piece, ""), expected.replace(piece, "")
        assert text == expected


def test_words_of_sentencepiece_get_no_space_of_their_own():
    """Such tokenizers begin every text with a space; a question is no beginning."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    inner.train_from_iterator(["the sun rises in the east"], trainers.BpeTrainer(initial_alphabet=list("▁\n?")))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    before, after = encode_question(tokenizer, "the sun", "rises")
    assert tokenizer.decode(torch.cat((before, after), 1)[0]) == "the sun\n\nrises\n"


def test_a_token_that_ends_texts_does_not_end_the_context():
    """Some tokenizers put one before and one behind every text."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    head, rest = encode_context(PreTrainedTokenizerFast(tokenizer_object=inner), "a b")
    assert head.tolist() == [[0]] and rest.tolist() == [[2, 3]]


@pytest.mark.real
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('a system message first') }}", "a system message first"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_line(smol, template, reason):
    own, smol.chat_template = smol.chat_template, template
    try:
        with pytest.raises(ValueError, match=f"takes no messages of user and assistant alone .*{reason}") as error:
            encode_context(smol, CONTEXT)
        assert "\n" not in str(error.value)
    finally:
        smol.chat_template = own


@pytest.mark.real
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'always the same' }}",
        "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}",
        "{{ messages[-1].content }}",
    ],
)
def test_a_template_that_loses_text_is_refused(smol, template):
    own, smol.chat_template = smol.chat_template, template
    try:
        with pytest.raises(ValueError, match=r"its chat template changes or leaves out .*tokenizer.chat_template"):
            encode_context(smol, CONTEXT)
    finally:
        smol.chat_template = own


# Templates of models for images and text

STRICT = (
    "{% for m in messages %}{% if m['content'] is string %}{{ raise_exception('parts only') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [PARTS, STRICT + PARTS], ids=["silent", "strict"])
def test_a_template_that_takes_parts_gives_what_one_that_takes_strings_gives(template):
    plain, parts = words_tokenizer(CHAT), words_tokenizer(template)
    for encode in (
        lambda tokenizer: encode_prompt(tokenizer, "w5 w6"),
        lambda tokenizer: torch.cat(encode_context(tokenizer, "w5 w6"), dim=1),
        lambda tokenizer: encode_follow_up(tokenizer, "w7"),
        lambda tokenizer: encode_follow_up(tokenizer, "w7", first=False),
        lambda tokenizer: torch.cat(encode_question(tokenizer, "w5 w6", "w7", "w8"), dim=1),
        lambda tokenizer: torch.cat(repeat_request(tokenizer, first=True), dim=1),
    ):
        wanted = encode(plain)
        assert torch.equal(encode(parts), wanted) and wanted.numel()


def test_a_template_that_loses_a_prompt_is_refused():
    for template in ("{{ 'always the same' }}", "{% for m in messages %}{{ m.content[:5] }}{% endfor %}"):
        with pytest.raises(ValueError, match=r"its chat template changes or leaves out .*tokenizer.chat_template"):
            encode_prompt(words_tokenizer(template), "w5 w6")


def test_messages_of_parts_stay_as_they_are():
    parts = [{"role": "user", "content": [{"type": "text", "text": "w5"}]}, {"role": "assistant", "content": "w6"}]
    assert messages_for(words_tokenizer(CHAT), parts) == parts
    wanted = [parts[0], {"role": "assistant", "content": [{"type": "text", "text": "w6"}]}]
    assert messages_for(words_tokenizer(PARTS), parts) == wanted


def test_a_processor_is_taken_for_its_tokenizer_with_its_own_template():
    inner = words_tokenizer(None)
    found = text_tokenizer(Processor(inner, chat_template=PARTS))
    assert found.chat_template == PARTS and inner.chat_template is None
    assert torch.equal(encode_prompt(found, "w5 w6"), encode_prompt(words_tokenizer(CHAT), "w5 w6"))
    assert text_tokenizer(Processor(inner)) is inner
    assert text_tokenizer(inner) is inner
