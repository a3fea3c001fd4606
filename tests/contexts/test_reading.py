"""Reading in rows and chunks, answers, likelihoods and losses: the same whatever way a text comes to a cache."""

import pytest
import torch
from transformers import DynamicCache

from tests.tiny import random_ids, tiny_model
from wildcat_kv import WildCatCache
from wildcat_kv.contexts.reading import generate, join, loglikelihood, pad_left, read, token_losses
from wildcat_kv.hook.keyword import CACHE

pytest_plugins = ["tests.eval_fixtures"]

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def words(rows, length, seed=0):
    """Random token ids, none of them special."""
    return torch.randint(100, 49000, (rows, length), generator=torch.Generator().manual_seed(seed))


def row(length, seed=0):
    return words(1, length, seed)[0]


def empty(model):
    return DynamicCache(config=model.config)


def compressed(model):
    return WildCatCache(model.config, ratio=0.25)


# Blocks of rows


def test_rows_are_padded_at_the_left():
    ids, mask = pad_left([torch.tensor([5, 6]), torch.tensor([7, 8, 9, 1]), torch.tensor([3])], pad=2)
    assert ids.tolist() == [[2, 2, 5, 6], [7, 8, 9, 1], [2, 2, 2, 3]]
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_one_length_need_no_mask(rows):
    ids, mask = pad_left(list(words(rows, 4)))
    assert torch.equal(ids, words(rows, 4)) and mask is None


def test_the_masks_of_two_blocks_stand_side_by_side():
    left, right = words(2, 3), words(2, 2)
    hidden = torch.tensor([[0, 1, 1], [1, 1, 1]])
    late = torch.tensor([[1, 1], [0, 1]])
    assert join(None, None, left, right) is None
    assert join(hidden, None, left, right).tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert join(None, late, left, right).tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 1]]
    assert join(hidden, late.bool(), left, right).tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 1]]


# Reading


@pytest.mark.parametrize("last", [1, 6, 40])
def test_the_logits_of_the_last_tokens_are_those_of_a_plain_forward_pass(model, plain, last):
    ids, cache = words(2, 40), empty(model)
    logits = read(model, cache, ids, last=last)
    assert logits.shape == (2, last, 49152) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, plain(ids).logits[:, -last:], **CLOSE)
    assert cache.get_seq_length() == 40


def test_reading_goes_on_where_the_cache_ends(model, plain):
    ids, cache = words(2, 40), empty(model)
    read(model, cache, ids[:, :23])
    logits = read(model, cache, ids, last=12)
    torch.testing.assert_close(logits, plain(ids).logits[:, -12:], **CLOSE)


def test_no_more_logits_than_tokens_are_read(model, plain):
    ids, cache = words(1, 30), empty(model)
    read(model, cache, ids[:, :25])
    torch.testing.assert_close(read(model, cache, ids, last=100), plain(ids).logits[:, -5:], **CLOSE)


def test_padded_rows_are_read_as_each_alone(model, plain):
    rows = [row(31, 1), row(9, 2), row(20, 3)]
    ids, mask = pad_left(rows, 2)
    logits = read(model, empty(model), ids, mask, last=8)
    for found, alone in zip(logits, rows, strict=True):
        torch.testing.assert_close(found, plain(alone[None]).logits[0, -8:], **CLOSE)


def test_padding_may_come_again_after_the_cache(model, plain):
    """Contexts of unequal length, then questions of unequal length."""
    contexts, questions = [row(31, 1), row(9, 2)], [row(4, 3), row(11, 4)]
    ids, mask = pad_left(contexts, 2)
    after, after_mask = pad_left(questions, 2)
    cache = empty(model)
    read(model, cache, ids, mask)
    text, shown = torch.cat((ids, after), 1), join(mask, after_mask, ids, after)
    logits = read(model, cache, text, shown, last=4)
    for found, context, question in zip(logits, contexts, questions, strict=True):
        torch.testing.assert_close(found, plain(torch.cat((context, question))[None]).logits[0, -4:], **CLOSE)


# Answers


def greedy(plain, ids, count):
    """The new tokens of generate() for one row, without a cache of ours."""
    options = {"attention_mask": torch.ones_like(ids[None]), "eos_token_id": None, "pad_token_id": 2}
    return plain.generate(ids[None], max_new_tokens=count, do_sample=False, **options)[0, ids.shape[0] :].tolist()


def answer(model, tokenizer, cache, ids, mask=None, *, known, **options):
    """`generate`, after the prompt was read if its next logits are to be known."""
    after = read(model, cache, ids, mask)[:, -1] if known else None
    return generate(model, tokenizer, cache, ids, mask, next_logits=after, **options)


both_ways = pytest.mark.parametrize("known", [False, True], ids=["prompt unread", "prompt read"])


@both_ways
@pytest.mark.parametrize("count", [1, 2, 12])
def test_an_answer_is_what_generate_writes(model, plain, tokenizer, known, count):
    ids = words(1, 25)
    expected = tokenizer.decode(greedy(plain, ids[0], count), skip_special_tokens=True)
    assert answer(model, tokenizer, empty(model), ids, known=known, max_new_tokens=count) == [expected]


@both_ways
def test_padded_prompts_are_answered_as_each_alone(model, plain, tokenizer, known):
    rows = [row(31, 1), row(9, 2), row(20, 3)]
    ids, mask = pad_left(rows, 2)
    expected = [tokenizer.decode(greedy(plain, alone, 10)) for alone in rows]
    assert answer(model, tokenizer, empty(model), ids, mask, known=known, max_new_tokens=10) == expected


@both_ways
def test_questions_of_unequal_length_are_answered_as_each_alone(model, plain, tokenizer, known):
    contexts, questions = [row(31, 1), row(9, 2)], [row(4, 3), row(11, 4)]
    ids, mask = pad_left(contexts, 2)
    after, after_mask = pad_left(questions, 2)
    cache = empty(model)
    read(model, cache, ids, mask)
    text, shown = torch.cat((ids, after), 1), join(mask, after_mask, ids, after)
    expected = [tokenizer.decode(greedy(plain, torch.cat(pair), 10)) for pair in zip(contexts, questions, strict=True)]
    assert answer(model, tokenizer, cache, text, shown, known=known, max_new_tokens=10) == expected


@both_ways
@pytest.mark.parametrize("place", [0, 1, 5])
def test_an_answer_ends_at_the_end_token(model, plain, tokenizer, known, place, monkeypatch):
    ids = words(1, 25)
    tokens = greedy(plain, ids[0], 12)
    assert tokens.index(tokens[place]) == place, "choose another prompt: a token came before"
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, tokens[place]])
    expected = tokenizer.decode(tokens[:place], skip_special_tokens=True)
    assert answer(model, tokenizer, empty(model), ids, known=known, max_new_tokens=12) == [expected]


@both_ways
def test_a_row_that_ends_does_not_end_the_others(model, plain, tokenizer, known, monkeypatch):
    rows = [row(31, 1), row(9, 2)]
    ids, mask = pad_left(rows, 2)
    first, second = (greedy(plain, alone, 12) for alone in rows)
    assert first[0] not in second, "choose other prompts"
    monkeypatch.setattr(model.generation_config, "eos_token_id", first[0])
    expected = ["", tokenizer.decode(second)]
    assert answer(model, tokenizer, empty(model), ids, mask, known=known, max_new_tokens=12) == expected


@both_ways
@pytest.mark.parametrize("place", [0, 5])
def test_an_answer_is_cut_before_a_stop_text(model, plain, tokenizer, known, place):
    ids = words(1, 25)
    tokens = greedy(plain, ids[0], 12)
    text, stop = tokenizer.decode(tokens), tokenizer.decode(tokens[place : place + 2]).strip()
    assert len(stop) > 3
    found = answer(model, tokenizer, empty(model), ids, known=known, max_new_tokens=12, until=["nowhere at all", stop])
    assert found == [text.split(stop)[0]]


@both_ways
def test_a_stop_text_ends_each_row_for_itself(model, plain, tokenizer, known):
    rows = [row(31, 1), row(9, 2)]
    ids, mask = pad_left(rows, 2)
    texts = [tokenizer.decode(greedy(plain, alone, 12)) for alone in rows]
    stop = tokenizer.decode(greedy(plain, rows[0], 12)[2:4]).strip()
    expected = [text.split(stop)[0] for text in texts]
    assert answer(model, tokenizer, empty(model), ids, mask, known=known, max_new_tokens=12, until=[stop]) == expected


@both_ways
def test_a_stop_text_is_looked_for_in_the_answer_alone(model, plain, tokenizer, known):
    """Not where it begins in the prompt: lm-eval cuts what the model wrote."""
    ids = words(1, 25)
    tokens = greedy(plain, ids[0], 12)
    stop = tokenizer.decode([int(ids[0, -1]), tokens[0]])
    assert stop not in tokenizer.decode(tokens)
    found = answer(model, tokenizer, empty(model), ids, known=known, max_new_tokens=12, until=[stop])
    assert found == [tokenizer.decode(tokens)]


@pytest.mark.parametrize("count", [1, 20])
def test_a_compressed_prompt_is_answered_as_generate_answers_it(model, tokenizer, count):
    ids = words(1, 300)
    options = {"max_new_tokens": count, "do_sample": False}
    direct = model.generate(ids, **{CACHE: compressed(model)}, **options)[0, 300:]
    cache = compressed(model)
    logits = read(model, cache, ids)[:, -1]
    assert cache.stored_length() < 100
    found = generate(model, tokenizer, cache, ids, max_new_tokens=count, next_logits=logits)
    assert found == [tokenizer.decode(direct, skip_special_tokens=True)]
    assert tokenizer(found[0], add_special_tokens=False).input_ids or count == 1


def test_compressed_prompts_of_unequal_length_are_answered_as_generate_answers_them(model, tokenizer):
    ids, mask = pad_left([row(300, 1), row(190, 2)], 2)
    options = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 2}
    direct = model.generate(ids, attention_mask=mask, **{CACHE: compressed(model)}, **options)[:, 300:]
    found = answer(model, tokenizer, compressed(model), ids, mask, known=True, max_new_tokens=15)
    assert found == tokenizer.batch_decode(direct, skip_special_tokens=True)


# Likelihoods


def likelihood(plain, prompt, expected):
    """One full forward pass in float64, no cache."""
    logits = plain(torch.cat((prompt, expected))[None]).logits[0, prompt.shape[0] - 1 : -1].double()
    own = logits.log_softmax(-1).gather(-1, expected[:, None])
    return float(own.sum()), bool((logits.argmax(-1) == expected).all())


def check(found, plain, prompts, answers):
    for own, prompt, expected in zip(found, prompts, answers, strict=True):
        total, is_greedy = likelihood(plain, prompt, expected)
        assert own.total == pytest.approx(total, rel=1e-5) and own.greedy == is_greedy
        assert own.tokens == len(expected)


ANSWERS = {
    "unequal": [row(5, 7), row(1, 8), row(3, 9)],
    "one token each": [row(1, 7), row(1, 8), row(1, 9)],
    "equal": [row(4, 7), row(4, 8), row(4, 9)],
}


@both_ways
@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_answers_are_as_likely_as_in_one_forward_pass(model, plain, known, answers):
    ids, cache = words(1, 25).expand(3, -1), empty(model)
    after = read(model, cache, ids)[:, -1] if known else None
    found = loglikelihood(model, cache, ids, None, answers, after)
    check(found, plain, ids, answers)
    assert not any(own.greedy for own in found)


@both_ways
@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_padding_changes_no_likelihood(model, plain, known, answers):
    rows = [row(31, 1), row(9, 2), row(20, 3)]
    ids, mask = pad_left(rows, 2)
    cache = empty(model)
    after = read(model, cache, ids, mask)[:, -1] if known else None
    check(loglikelihood(model, cache, ids, mask, answers, after), plain, rows, answers)


def test_questions_of_unequal_length_change_no_likelihood(model, plain):
    contexts, questions = [row(31, 1), row(9, 2)], [row(4, 3), row(11, 4)]
    ids, mask = pad_left(contexts, 2)
    after, after_mask = pad_left(questions, 2)
    cache, answers = empty(model), ANSWERS["unequal"][:2]
    read(model, cache, ids, mask)
    text, shown = torch.cat((ids, after), 1), join(mask, after_mask, ids, after)
    whole = [torch.cat(pair) for pair in zip(contexts, questions, strict=True)]
    check(loglikelihood(model, cache, text, shown, answers), plain, whole, answers)


@both_ways
@pytest.mark.parametrize("count", [1, 4])
def test_what_greedy_decoding_writes_is_called_greedy(model, plain, known, count):
    ids, cache = words(1, 25).expand(2, -1), empty(model)
    written = torch.tensor(greedy(plain, ids[0], count))
    other = written.clone()
    other[-1] = (other[-1] + 1) % 49152
    after = read(model, cache, ids)[:, -1] if known else None
    found = loglikelihood(model, cache, ids, None, [written, other], after)
    assert [own.greedy for own in found] == [True, False]
    check(found, plain, ids, [written, other])


@both_ways
def test_answers_after_a_compressed_context_are_read_from_it(model, known):
    """Token by token and all at once: nothing is compressed between."""
    ids, expected = words(1, 320), row(4, 5)
    cut = 320 if known else 300
    cache = compressed(model)
    after = read(model, cache, ids[:, :cut])[:, -1]
    copy = cache.clone()
    [found] = loglikelihood(model, cache, ids, None, [expected], after if known else None)
    text, total = torch.cat((ids[0], expected))[None], 0.0
    if not known:
        after = model(ids[:, cut:], **{CACHE: copy}).logits[:, -1]
    for place, token in enumerate(expected):
        total += float(after[0].log_softmax(-1)[token])
        after = model(text[:, 320 + place : 321 + place], **{CACHE: copy}).logits[:, -1]
    assert found.total == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 49, 50, 1000])
def test_the_losses_of_a_text_are_those_of_one_forward_pass(model, plain, chunk):
    ids = words(1, 50)
    expected = torch.nn.functional.cross_entropy(plain(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")
    losses = token_losses(model, empty(model), ids, chunk=chunk)
    assert losses.shape == (49,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "bamba", "gpt2", "gemma3"])
def test_a_text_may_be_read_in_several_passes(family):
    """Whatever the family makes of positions that it is not given."""
    model, ids = tiny_model(family), random_ids(1, 40)
    whole = read(model, WildCatCache(model.config, ratio=1.0), ids, last=8)
    cache = WildCatCache(model.config, ratio=1.0)
    for stop in (12, 32):
        read(model, cache, ids[:, :stop])
    torch.testing.assert_close(read(model, cache, ids, last=8), whole, rtol=1e-3, atol=1e-3)
