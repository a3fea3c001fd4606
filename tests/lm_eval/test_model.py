"""The model of lm-eval: with the exact cache what lm-eval's own says, and the same in rows as alone."""

import json
import os
import random
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.tiny import tiny_config
from tests.words import PARTS
from wildcat_kv.lm_eval.model import WildCatLM
from wildcat_kv.models import default_model_path

COMPRESSED = ("wildcat", "snapkv", "tova")
TEXT = "the cat sat on a mat and looked at 17 red birds, which sang: 'never, ever again!' Then it slept."
LENGTH = 500


def prose(words, seed=0):
    return " ".join(random.Random(seed).choices(TEXT.split(), k=words))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random Llama with the tokenizer of the default model."""
    path = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(default_model_path())
    torch.manual_seed(1)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    LlamaForCausalLM(tiny_config("llama", vocab_size=len(tokenizer), **ids)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path.as_posix()


@pytest.fixture(scope="module")
def make(folder):
    """A model of lm-eval, made once for the same options."""
    made = {}

    def get(method, protocol="full-prompt", **options):
        key = (method, protocol, *sorted(options.items()))
        if key not in made:
            budget = {} if method == "exact" else {"ratio": 0.5, "sink": 4, "window": 8}
            shared = {"device": "cpu", "max_length": LENGTH}
            made[key] = WildCatLM(folder, method=method, protocol=protocol, **{**shared, **budget, **options})
        return made[key]

    return get


@pytest.fixture(scope="module")
def theirs(folder):
    return HFLM(folder, device="cpu", max_length=LENGTH)


def generation(text, options, doc=None, task="mine"):
    instance = Instance("generate_until", doc or {}, (text, options), 0)
    instance.task_name = task
    return instance


def choice(text, continuation, doc=None, task="mine"):
    instance = Instance("loglikelihood", doc or {}, (text, continuation), 0)
    instance.task_name = task
    return instance


def rolling(text):
    return Instance("loglikelihood_rolling", {}, (text,), 0)


def asked(words, seed, question):
    """A text and a question, and the document that says which is which."""
    context = prose(words, seed)
    return f"{context}\n\n{question}", {"context": context}


def near(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4, rel=1e-5)


# How it is found


def test_it_is_registered_in_the_installed_package_and_in_lm_eval():
    (entry,) = entry_points(group="lm_eval.models", name="wildcat")
    assert entry.load() is WildCatLM and get_model("wildcat") is WildCatLM


def test_it_is_made_from_an_argument_string(folder):
    text = f"pretrained={folder},method=snapkv,protocol=full-prompt,max_tokens=64,sink=0,window=16,dtype=float32"
    made = WildCatLM.create_from_arg_string(text, {"batch_size": "2", "max_batch_size": None, "device": "cpu"})
    info = made.get_model_info()
    assert (made.batch_size, info["method"], info["protocol"]) == (2, "snapkv", "full-prompt")
    assert (info["cache"]["max_tokens"], info["cache"]["window"]) == (64, 16)
    floored = WildCatLM.create_from_arg_string(f"pretrained={folder},ratio=0.25,min_tokens=64", {"device": "cpu"})
    assert floored.get_model_info()["cache"]["min_tokens"] == 64
    assert info["model_num_parameters"] == made.model.num_parameters()


def test_a_template_that_takes_parts_loses_no_text(make, monkeypatch):
    lm = make("exact")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    monkeypatch.setattr(lm.tokenizer, "chat_template", PARTS)
    assert lm.apply_chat_template(messages) == "<system> Be brief. <end> <user> Why? <end> <assistant> "
    answered = [*messages, {"role": "assistant", "content": "So"}]
    assert lm.apply_chat_template(answered, add_generation_prompt=False).endswith("<end> <assistant> So")


# As lm-eval's own model


@pytest.mark.parametrize("rows", [1, 3])
def test_exact_answers_are_those_of_lm_evals_own_model(make, theirs, rows):
    short, long = {"max_gen_toks": 12, "until": []}, {"max_new_tokens": 25, "until": "zzzz", "temperature": 0.0}
    [free] = theirs.generate_until([generation(prose(30), long)], disable_tqdm=True)
    stops = {"max_gen_toks": 25, "until": [free[len(free) // 2 :][:5], "\n\n"], "do_sample": False, "temperature": 1}
    other = {"max_gen_toks": 12, "repetition_penalty": 1.7, "until": ["<|endoftext|>"]}
    kinds = [short, long, stops, other, short, stops, short]
    texts = [prose(30), prose(9, 1), prose(30), prose(20, 2), prose(50, 3) + " ", prose(1, 4), prose(2 * LENGTH, 5)]
    requests = [generation(text, options) for text, options in zip(texts, kinds, strict=True)]
    found = make("exact", batch_size=rows).generate_until(requests, disable_tqdm=True)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert found == expected and len(set(found)) > 4
    assert found[2] and free.startswith(found[2]) and len(found[2]) < len(free)


@pytest.mark.parametrize("rows", [1, 3])
def test_exact_likelihoods_are_those_of_lm_evals_own_model(make, theirs, rows):
    requests = [choice(prose(20), f" {word}") for word in ("cat", "and a longer choice of words", "birds")]
    requests += [choice(f"{prose(9, 1)} \n ", word) for word in ("cat", "mat.")]
    requests += [choice("", "Some text without a prompt."), choice("", "<|im_start|>A text that begins")]
    requests += [choice(prose(2 * LENGTH, 2), word) for word in (" yes", " no, and never again", " no")]
    requests += [choice(f"<|im_start|>{prose(5, 3)}", " end"), requests[0]]
    [greedy] = theirs.generate_until([generation(prose(40, 9), {"max_gen_toks": 3, "until": []})], disable_tqdm=True)
    requests.append(choice(prose(40, 9), greedy))
    found = make("exact", batch_size=rows).loglikelihood(requests, disable_tqdm=True)
    near(found, theirs.loglikelihood(requests, disable_tqdm=True))
    assert found[-1][1] and not found[0][1]


def test_exact_likelihoods_of_whole_texts_are_those_of_lm_evals_own_model(make, theirs):
    requests = [rolling(prose(words, words)) for words in (40, 1, 3 * LENGTH)]
    found = make("exact", batch_size=3, chunk=50).loglikelihood_rolling(requests, disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_chunk_of_a_text_changes_nothing_with_the_exact_cache_and_something_with_another(make):
    text = [rolling(prose(300))]
    exact = [make("exact", chunk=chunk).loglikelihood_rolling(text, disable_tqdm=True)[0] for chunk in (7, 64)]
    close = [make("wildcat", chunk=chunk).loglikelihood_rolling(text, disable_tqdm=True)[0] for chunk in (7, 64)]
    assert exact[0] == pytest.approx(exact[1], rel=1e-5)
    assert abs(close[0] - exact[0]) > 1e-3 and abs(close[0] - close[1]) > 1e-3


def test_a_ratio_of_one_is_the_exact_cache(make):
    texts = [asked(60, seed, f"Who {seed}?") for seed in range(2)]
    requests = [choice(text, " cat", doc) for text, doc in texts]
    for protocol in ("context-only", "full-prompt"):
        found, expected = (
            make(method, protocol, **budget).loglikelihood(requests, disable_tqdm=True)
            for method, budget in (("wildcat", {"ratio": 1.0}), ("exact", {}))
        )
        near(found, expected)


# In rows


@pytest.mark.parametrize("protocol", ["context-only", "full-prompt"])
@pytest.mark.parametrize("method", [*COMPRESSED, "exact"])
def test_rows_of_different_lengths_are_answered_as_alone(make, method, protocol):
    texts = [asked(60 + 25 * seed, seed, "Who? " * (1 + 3 * (seed % 2))) for seed in range(4)]
    options = {"max_gen_toks": 8, "until": []}
    requests = [generation(text, options, doc) for text, doc in texts]
    one, three = (make(method, protocol, batch_size=rows) for rows in (1, 3))
    found = three.generate_until(requests, disable_tqdm=True)
    assert found == one.generate_until(requests, disable_tqdm=True) and len(set(found)) == 4
    assert found == [one.generate_until([request], disable_tqdm=True)[0] for request in requests]
    choices = [choice(text, word, doc) for text, doc in texts for word in (" cat", " a red bird", " mat")]
    choices.insert(5, choice("", " nothing before"))
    random.Random(0).shuffle(choices)
    near(three.loglikelihood(choices, disable_tqdm=True), one.loglikelihood(choices, disable_tqdm=True))


@pytest.mark.parametrize("protocol", ["context-only", "full-prompt"])
def test_choices_of_one_prompt_are_as_likely_together_as_alone(make, protocol):
    model = make("snapkv", protocol)
    text, doc = asked(100, 0, "Who? ")
    choices = [choice(text, word, doc) for word in ("cat", "a red bird", "the mat")]
    together = model.loglikelihood(choices, disable_tqdm=True)
    near(together, [model.loglikelihood([one], disable_tqdm=True)[0] for one in choices])


def test_the_compressed_context_does_not_depend_on_the_question(make, monkeypatch):
    """Of two questions about one context the first token of an answer differs; what they are asked of does not."""
    model = make("snapkv", "context-only")
    stored = []
    read = model._reader.read

    def keep(contexts):
        cache, *others = read(contexts)
        stored.append([layer.state.storage.entries.keys.clone() for layer in cache.layers])
        return cache, *others

    monkeypatch.setattr(model._reader, "read", keep)
    context = prose(120)
    doc = {"context": context}
    requests = [choice(f"{context} {question}", " cat", doc) for question in ("Who?", "Where is the mat?")]
    found = model.loglikelihood(requests, disable_tqdm=True)
    assert found[0] != found[1] and len(stored) == 2
    assert all(map(torch.equal, *stored))
    assert 0.4 < stored[0][0].shape[-2] / len(model.tok_encode(context)) < 0.7


def test_question_and_answer_get_no_second_first_token(make, folder):
    """As with Llama's tokenizers, which begin every text with a special token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = tokenizer.bos_token_id
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, first)]
    )
    assert tokenizer("cat").input_ids[0] == first
    for protocol in ("context-only", "full-prompt"):
        model = WildCatLM(folder, method="exact", protocol=protocol, tokenizer=tokenizer, device="cpu")
        text, doc = asked(20, 0, "Who?")
        for prompt in (text, f"{tokenizer.bos_token}{text}"):  # as a chat template has it
            context, question, answer = model._pair(prompt, " cat", choice(prompt, " cat", doc))
            ids = torch.cat((context, question, answer)).tolist()
            assert ids.count(first) == 1 and ids[0] == first and ids[-1:] == tokenizer.encode(" cat")[1:]
            assert ids == model.tok_encode(f"{text} cat")


# What does not fit


def test_prompts_of_longbench_lose_their_middle_and_others_their_beginning(make):
    text, doc = asked(LENGTH, 0, "Who did it, and why?")
    model = make("exact")
    ids = model.tok_encode(text)
    half = (LENGTH - 20) // 2
    for protocol in ("full-prompt", "context-only"):
        model = make("exact", protocol)
        for task, expected in (("longbench_qasper_e", ids[:half] + ids[-half:]), ("mine", ids[-2 * half :])):
            request = generation(text, {}, doc, task)
            parts = model._cut(*model._split(text, request), request, room=20)
            assert torch.cat(parts).tolist() == expected
            [answer] = model.generate_until([generation(text, {"max_gen_toks": 20, "until": []}, doc, task)], True)
            short = model.tok_decode(expected)
            assert model.tok_encode(short) == expected
            assert [answer] == make("exact").generate_until(
                [generation(short, {"max_gen_toks": 20, "until": []})], True
            )


@pytest.mark.parametrize(("protocol", "room"), [("full-prompt", LENGTH), ("context-only", LENGTH - 3)])
def test_a_question_that_leaves_no_room_for_a_context_is_refused(make, protocol, room):
    text, doc = asked(30, 0, "Who did it, and why?")
    with pytest.raises(
        ValueError, match=rf"task='mine': .*max_length={LENGTH}; raise max_length or lower max_gen_toks"
    ):
        make("wildcat", protocol).generate_until([generation(text, {"max_gen_toks": room}, doc)], True)


# KVzip


@pytest.mark.parametrize("protocol", ["context-only", "full-prompt"])
def test_kvzip_answers_by_both_protocols(make, protocol):
    model = make("kvzip", protocol)
    texts = [asked(60, seed, "Who?") for seed in range(2)]
    requests = [generation(text, {"max_gen_toks": 6, "until": [], "top_p": 0.9}, doc) for text, doc in texts]
    answers = model.generate_until(requests, disable_tqdm=True)
    assert len(set(answers)) == 2 and all(answers)
    choices = [choice(text, word, doc) for text, doc in texts for word in (" cat", " a red bird")]
    text, doc = asked(2 * LENGTH, 3, "Who?")
    choices += [choice(text, word, doc) for word in (" cat", " a red bird")]  # which leave it less room
    together = model.loglikelihood(choices, disable_tqdm=True)
    near(together, [model.loglikelihood([one], disable_tqdm=True)[0] for one in choices])


@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 0.7}, {"repetition_penalty": 1.2}])
def test_kvzip_is_measured_by_greedy_decoding(make, options):
    request = generation(prose(60), {"max_gen_toks": 4, **options})
    with pytest.raises(ValueError, match=rf"{next(iter(options))}=.*'kvzip' is measured by greedy decoding only"):
        make("kvzip").generate_until([request], disable_tqdm=True)


def test_kvzip_has_no_likelihood_of_a_text_read_once(make):
    with pytest.raises(ValueError, match="method='kvzip' reads a text twice"):
        make("kvzip").loglikelihood_rolling([rolling(prose(60))], disable_tqdm=True)


# Options


def test_answers_can_be_sampled(make):
    options = {"max_gen_toks": 12, "until": [], "do_sample": True, "temperature": 2.0, "top_p": 0.9}
    requests = [generation(prose(60), options), generation(prose(60), {"max_gen_toks": 12, "until": []})]
    first, greedy = make("wildcat").generate_until(requests, disable_tqdm=True)
    torch.manual_seed(1)
    second, again = make("wildcat").generate_until(requests, disable_tqdm=True)
    assert greedy == again and len({first, second, greedy}) == 3


def test_a_continuation_without_a_token_is_refused(make):
    with pytest.raises(ValueError, match="task='mine': the continuation '' adds no token to its prompt"):
        make("exact").loglikelihood([choice("Who?", "")], disable_tqdm=True)


def test_a_task_without_a_context_needs_the_other_protocol(make):
    request = generation(prose(60), {"max_gen_toks": 4}, {"question": "Who?"})
    with pytest.raises(ValueError, match=r"task='mine'.*use protocol='full-prompt'"):
        make("wildcat", "context-only").generate_until([request], disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "zip", "ratio": 0.5}, "method='zip': there are exact, auto, wildcat, .*snapkv"),
        ({}, "pass exactly one, for example ratio=0.25"),
        ({"ratio": 0.5, "max_tokens": 100}, "both of them given"),
        ({"ratio": 0}, "ratio=0: "),
        ({"ratio": 0.5, "window": -1}, "window=-1: "),
        ({"method": "exact", "ratio": 0.5}, "ratio=0.5: method='exact' compresses nothing"),
        ({"ratio": 0.5, "protocol": "context_only"}, "protocol='context_only' must be context-only or full-prompt"),
        ({"ratio": 0.5, "batch_size": "auto"}, "batch_size='auto' must be a number"),
        ({"ratio": 0.5, "batch_size": 0}, "batch_size=0 must be a number, at least 1"),
        ({"ratio": 0.5, "chunk": 0}, "chunk=0 must be a number of tokens"),
        ({"method": "kvzip", "ratio": 0.5, "batch_size": 2}, "batch_size=2: method='kvzip'.*use batch_size=1"),
        ({"ratio": 0.5, "think_end_token": "</think>"}, "think_end_token='</think>' is an option of lm-eval's hf"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        WildCatLM("no-such-model", **options)


# From end to end


@pytest.mark.parametrize("method", ["exact", "wildcat"])
def test_a_task_of_ruler_runs_in_lm_eval(folder, method, ruler):
    budget = "" if method == "exact" else ",ratio=0.25"
    found = lm_eval.simple_evaluate(
        model="wildcat",
        model_args=f"pretrained={folder},method={method}{budget}",
        tasks=["niah_multikey_2"],
        metadata={"max_seq_lengths": [512], "pretrained": folder},
        limit=2,
        device="cpu",
        task_manager=ruler,
        bootstrap_iters=0,
    )
    assert found["results"]["niah_multikey_2"]["512,none"] == 0.0  # the model is random
    assert found["config"]["method"] == method and found["config"]["protocol"] == "context-only"
    first, second = found["samples"]["niah_multikey_2"]
    assert first["resps"] != second["resps"] and first["doc"]["max_length"] == 512


@pytest.fixture(scope="module")
def ruler(folder):
    """RULER's tasks alone, which are found sooner."""
    path = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    return TaskManager(
        include_path=path, include_defaults=False, metadata={"max_seq_lengths": [512], "pretrained": folder}
    )


def test_the_command_line_of_lm_eval_knows_the_model(folder, tmp_path):
    command = "run --model wildcat --tasks niah_multikey_2 --limit 1 --device cpu --batch_size 1 --log_samples"
    subprocess.run(
        [
            *(Path(sys.executable).with_name("wildcat-kv"), "lm-eval", *command.split()),
            *("--model_args", f"pretrained={folder},ratio=0.25,max_length=1024"),
            *("--metadata", json.dumps({"max_seq_lengths": [512]}), "--output_path", tmp_path.as_posix()),
        ],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    (results,) = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["results"]["niah_multikey_2"]["512,none"] in (0.0, 1.0)
    assert found["config"]["cache"]["ratio"] == 0.25 and found["config"]["model"] == "wildcat"
