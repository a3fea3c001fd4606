"""The task `long_answer`: what is written over a compressed text, and how the exact cache scores it."""

import pytest
import torch
from pydantic import ValidationError

from eval.cells import EXACT, Cell
from eval.tasks.asking import Asked
from eval.tasks.long_answer import NGRAM, REQUEST, LongAnswer, share_repeated

pytest_plugins = ["tests.eval_fixtures"]

TOKENS = 120
TASK = LongAnswer(lengths=[150, 170], tokens=TOKENS, repeats=2)
SAMPLED = TASK.model_copy(update={"temperature": 0.8})
EXACT_CELL = Cell(EXACT, None)
SMALL_BUDGET = {"max_tokens": 70}
SMALL = Cell("wildcat", "wildcat", **SMALL_BUDGET, settings={"sink": 4, "window": 16})
each_protocol = pytest.mark.parametrize("protocol", ["context-only", "full-prompt"])


def losses(plain, prompt, answer):
    """Loss of each token of an answer, by one forward pass without a cache."""
    ids = torch.cat((prompt.context, prompt.question, torch.tensor(answer)))[None]
    logits = plain(ids).logits[0, -len(answer) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, ids[0, -len(answer) :], reduction="none")


# Samples


@pytest.mark.parametrize("task", [TASK, SAMPLED], ids=["greedy", "sampled"])
def test_samples_go_by_length(task, setting):
    samples = task.samples(setting())
    assert [sample.index for sample in samples] == [0, 1, 2, 3]
    assert [sample.facets["length"] for sample in samples] == [150, 150, 170, 170]
    assert len(task.samples(setting(limit=1))) == 2
    hashes = [[sample.prompt_hash for sample in task.samples(setting(seed=seed))] for seed in (3, 3, 4)]
    assert hashes[0] == hashes[1] and len({*hashes[0], *hashes[2]}) == 8
    assert [task.name for task in (TASK, SAMPLED)] == ["long_answer", "long_answer_sampled"]


@each_protocol
def test_the_request_comes_after_the_text(protocol, setting, tokenizer):
    for sample in TASK.samples(setting(protocol=protocol)):
        context, question = (tokenizer.decode(part) for part in (sample.asked.context, sample.asked.question))
        assert (REQUEST in context, REQUEST in question) == (protocol == "full-prompt", protocol == "context-only")
        assert sample.tokens == len(sample.asked) + TOKENS
        bare = tokenizer.decode(torch.cat((sample.bare.context, sample.bare.question)))
        text = sample.prompt.removesuffix(f"\n\n{REQUEST}")
        assert tokenizer.decode(torch.cat((sample.asked.context, sample.asked.question))).replace(text, "") == bare


@pytest.mark.parametrize("fields", [{"tokens": NGRAM}, {"temperature": -1}, {"repeats": 0}, {"lengths": []}])
def test_a_wrong_option_is_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        LongAnswer(**fields)


# Answers


@each_protocol
def test_an_answer_never_ends_early(protocol, model, plain, tokenizer, setting, monkeypatch):
    sample = TASK.samples(setting(protocol=protocol))[0]
    ids = torch.cat((sample.asked.context, sample.asked.question))[None]
    likeliest = int(plain(ids).logits[0, -1].argmax())
    monkeypatch.setattr(model.generation_config, "eos_token_id", likeliest)
    asked = Asked(model, tokenizer, sample.asked)
    assert likeliest in asked.ends
    assert asked.write(EXACT_CELL.compress(asked.context, tokenizer), TOKENS) == []
    written = asked.write(EXACT_CELL.compress(asked.context, tokenizer), TOKENS, suppress_tokens=asked.ends)
    assert len(written) == TOKENS and likeliest not in written


@each_protocol
def test_the_exact_cache_s_own_answer_is_what_greedy_decoding_writes(protocol, model, plain, tokenizer, setting):
    sample = TASK.samples(setting(protocol=protocol))[0]
    ids = torch.cat((sample.asked.context, sample.asked.question))[None]
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "suppress_tokens": [2]}
    written = plain.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **options)[0, ids.shape[1] :]
    outcome = sample.open(model, tokenizer)(EXACT_CELL)
    assert outcome.prediction == tokenizer.decode(written)
    assert outcome.scores["nll"] == pytest.approx(losses(plain, sample.asked, written.tolist()).mean().item(), rel=1e-4)


@pytest.mark.parametrize("task", [TASK, SAMPLED], ids=["greedy", "sampled"])
def test_the_exact_cache_scores_what_a_compressed_one_wrote(task, model, plain, tokenizer, setting):
    sample = task.samples(setting())[0]
    outcome = sample.open(model, tokenizer)(SMALL)
    asked = Asked(model, tokenizer, sample.asked)
    cache = SMALL.compress(asked.context, tokenizer)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0} if task.temperature else {}
    torch.manual_seed(setting().seed_of(sample.index))
    written = asked.write(cache, TOKENS, suppress_tokens=asked.ends, **options)
    assert outcome.prediction == tokenizer.decode(written)
    with_text, without = (losses(plain, prompt, written).mean().item() for prompt in (sample.asked, sample.bare))
    assert outcome.scores["nll"] == pytest.approx(with_text, rel=1e-4)
    assert outcome.scores["gain"] == pytest.approx(without - with_text, abs=1e-3)
    assert task.metrics.keys() == outcome.scores.keys()


def test_the_cache_compresses_while_it_writes(model, tokenizer, setting):
    sample = TASK.samples(setting())[0]
    small, exact = map(sample.open(model, tokenizer), (SMALL, EXACT_CELL))
    assert exact.seen_tokens == small.seen_tokens == len(sample.asked) + TOKENS - 1
    assert exact.stored_tokens == exact.seen_tokens and small.stored_tokens <= 70
    # A key and a value of 16 numbers of 4 bytes, for each of 2 heads in 3 layers.
    assert exact.memory_bytes == exact.seen_tokens * 2 * 3 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("method", "budget", "least", "most"),
    [
        ("kvzip", {"ratio": 0.25}, 183, 184),  # a quarter of the text, and all that follows
        ("rereading_wildcat", {"ratio": 0.25}, 70, 70 + 48),  # a fold every 48 tokens
        ("rereading_wildcat", SMALL_BUDGET, 40, 70),
    ],
)
def test_of_methods_that_read_twice_kvzip_alone_keeps_the_answer(
    method, budget, least, most, model, tokenizer, setting
):
    cell = Cell(method, method, settings=SMALL.settings, **budget)
    cell.check_tasks(streams=TASK.streams)
    outcome = TASK.samples(setting())[0].open(model, tokenizer)(cell)
    assert least <= outcome.stored_tokens <= most


def test_samples_have_the_same_random_numbers_for_all_methods(model, tokenizer, setting):
    first, second = SAMPLED.samples(setting())[:2]
    measure = first.open(model, tokenizer)
    before = torch.random.get_rng_state()
    exact, everything = measure(EXACT_CELL), measure(Cell("snapkv", "snapkv", ratio=1.0))
    assert torch.equal(before, torch.random.get_rng_state())
    assert exact.prediction == everything.prediction and exact.scores == pytest.approx(everything.scores, rel=1e-4)
    greedy = TASK.samples(setting())[0].open(model, tokenizer)(EXACT_CELL)
    other = second.open(model, tokenizer)(EXACT_CELL)
    assert len({exact.prediction, greedy.prediction, other.prediction}) == 3


# Repeats


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        (list(range(20)), 0),
        ([7] * 20, 12 / 13),
        ([*range(10), *range(10)], 3 / 13),  # phrases of 8 from 0 to 7, 1 to 8 and 2 to 9
        ([*range(7), 50, *range(7)], 0),
        (list(range(NGRAM)), 0),
    ],
)
def test_a_phrase_that_was_there_counts(tokens, share):
    assert share_repeated(tokens) == pytest.approx(share)


def test_a_loop_shows(model, tokenizer, setting, monkeypatch):
    sample = TASK.samples(setting())[0]
    monkeypatch.setattr(Asked, "write", lambda *_, **__: [5, 6, 7] * (TOKENS // 3))
    scores = sample.open(model, tokenizer)(EXACT_CELL).scores
    assert scores["repeated"] == pytest.approx(110 / 113)  # 3 of the 113 phrases are new
