"""vLLM's engine in this process: tokens and log-probabilities are those of the compressed context."""

from types import SimpleNamespace

import pytest
import torch

from tests.vllm_engine.conftest import ANSWER, METHODS, QUESTIONS, start_engine
from wildcat_kv.integrations.vllm.contexts import ContextFolder
from wildcat_kv.integrations.vllm.identity import ServedModel
from wildcat_kv.integrations.vllm.placeholders import placeholder_ids
from wildcat_kv.integrations.vllm.prompts import Turns, prompt_ids, question_ids


@pytest.fixture(scope="module")
def engine(exports):
    made = start_engine(exports)
    yield made
    made.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def folder(exports):
    return ContextFolder(exports.root, ServedModel.of(exports.model))


def answers(engine, prompts, **options):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, logprobs=1, **options)
    return engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)


def check(found, expected):
    output = found.outputs[0]
    assert list(output.token_ids) == expected.tokens
    for token, told, score in zip(output.token_ids, output.logprobs, expected.logprobs, strict=True):
        assert abs(told[token].logprob - score) < 1e-3


@pytest.mark.parametrize("name", [*METHODS, "keydiff-stock"])
def test_a_batch_of_ten_is_answered_as_by_the_compressed_context(engine, exports, folder, name):
    context = folder.get(name)
    prompts = [prompt_ids(context, question_ids(exports.tokenizer, Turns([asked], []))) for asked in QUESTIONS]
    for found, expected in zip(answers(engine, prompts), exports.references[name], strict=True):
        check(found, expected)
    again = answers(engine, prompts[:1])[0]
    check(again, exports.references[name][0])
    # Whole blocks are shared by the requests.
    assert again.num_cached_tokens >= context.header.slots // 32 * 32


def test_one_question_alone_is_answered_alike(engine, exports, folder):
    context = folder.get("wildcat")
    for asked, expected in zip(QUESTIONS[:4], exports.references["wildcat"], strict=False):
        check(answers(engine, [prompt_ids(context, question_ids(exports.tokenizer, Turns([asked], [])))])[0], expected)


def test_contexts_in_one_batch_do_not_mix(engine, exports, folder):
    names = list(exports.facts)
    asked = question_ids(
        exports.tokenizer, Turns(["What is the door of the harbour office made of? Answer in one word."], [])
    )
    found = answers(engine, [prompt_ids(folder.get(name), asked) for name in names] * 4)
    for name, one in zip(names * 4, found, strict=True):
        assert one.outputs[0].text == exports.facts[name]
    assert len(set(exports.facts.values())) == len(names)


@pytest.mark.parametrize("fault", ["unknown", "slots", "nothing asked"])
def test_prompts_that_cannot_be_loaded_fail_alone(engine, exports, folder, fault):
    """They fail, the engine goes on, and nothing of them stays in its cache."""
    context = folder.get("wildcat")
    asked = question_ids(exports.tokenizer, Turns([QUESTIONS[0]], []))
    vocabulary = folder.model.vocabulary
    slots = context.header.slots
    bad = {
        "unknown": [*placeholder_ids(bytes(24), slots, vocabulary), *asked],
        "slots": [*placeholder_ids(context.digest, slots - 32, vocabulary), *asked],
        "nothing asked": placeholder_ids(context.digest, slots, vocabulary),
    }[fault]
    good = prompt_ids(context, asked)
    for _ in range(2):
        failed, found = answers(engine, [bad, good])
        assert failed.outputs[0].finish_reason == "error"
        check(found, exports.references["wildcat"][0])


def test_text_is_answered_as_ever(engine):
    found = engine.generate(["The capital of France is"], use_tqdm=False)
    assert found[0].outputs[0].text


def test_a_backend_that_knows_no_weights_gets_none(folder):
    """It would answer wrongly; its request fails instead."""
    from wildcat_kv.integrations.vllm.connector import Load, _write, slots_of

    context = folder.get("wildcat")
    (found,) = context.layers([0])
    load = Load(context.digest, context.header.slots, 32, list(range(40, 60)))
    assert slots_of(load, 32)[:2].tolist() == [41 * 32, 41 * 32 + 1]
    layer = SimpleNamespace(kv_cache=torch.zeros(1), kv_cache_torch_dtype=torch.float32, impl=SimpleNamespace())
    with pytest.raises(ValueError, match="knows no weights"):
        _write(layer, found, load, 32)


def test_heads_without_room_for_weights_are_refused():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from wildcat_kv.integrations.vllm.backend import weighted, width

    assert [width(CPUAttentionBackend, size) for size in (64, 80, 128, 254)] == [80, 96, 160, 256]
    with pytest.raises(ValueError, match="leaves no room for weights"):
        width(CPUAttentionBackend, 512)
    assert weighted(CPUAttentionBackend).supports_head_size(64)
    assert not weighted(CPUAttentionBackend).supports_head_size(512)
