"""The default model: what random weights cannot show."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from eval.config import RunConfig
from eval.records import Folder
from eval.run import run
from tests.coreset.mass import token_mass
from wildcat_kv import WildCatCache
from wildcat_kv.contexts.prompts import encode_question
from wildcat_kv.data.haystack import build_context
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.models import default_model

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def default():
    return default_model()


@pytest.fixture(scope="module")
def essay_ids(default):
    text = build_context(default[1], 900, [], seed=3)
    return default[1](text, return_tensors="pt", add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A small evaluation run, from configuration to report."""
    methods = ["wildcat", "uniform", "keydiff", "h2o", "expected_attention", "attention_matching", "kvzip"]
    config = RunConfig(
        methods=methods,
        ratios=[0.25],
        tasks=[
            {"task": "needle", "lengths": [700], "depths": [0.2, 0.5, 0.8], "repeats": 2},
            {"task": "drift", "lengths": [700], "repeats": 3},
            {"task": "attention_error", "lengths": [500], "repeats": 1},
        ],
    )
    folder = tmp_path_factory.mktemp("runs") / "real"
    run(config, folder, command="pytest", resume=False)
    return folder


@pytest.fixture(scope="module")
def scores(run_folder):
    """Mean of each task's first metric, by task and method."""
    found = {}
    for record in Folder(run_folder).records():
        first = next(iter(record["scores"].values()))
        found.setdefault(record["task"], {}).setdefault(record["method"], []).append(first)
    return {task: {method: np.mean(values) for method, values in by.items()} for task, by in found.items()}


def test_wildcat_keeps_more_of_the_needles_than_chance(scores):
    needle = scores["needle"]
    assert needle["exact"] < 0.6 < needle["wildcat"] < needle["uniform"] - 0.3


def test_methods_are_what_they_are_known_for(scores):
    """Reading twice finds the needles; learning from queries drifts least; chance is worse than all of these."""
    needle, drift = scores["needle"], scores["drift"]
    assert needle["kvzip"] < 0.9 < min(needle["wildcat"], needle["keydiff"])
    assert max(needle["keydiff"], needle["wildcat"]) < needle["uniform"]
    assert max(drift["h2o"], drift["attention_matching"], drift["expected_attention"]) < drift["uniform"]
    assert drift["exact"] < 1e-6 < min(value for name, value in drift.items() if name != "exact")
    assert scores["attention_error"]["exact"] == 0 < scores["attention_error"]["attention_matching"]


def test_a_run_leaves_records_tables_plots_and_a_report(run_folder):
    records = Folder(run_folder).records()
    assert len(records) == 10 * 8
    kept = {r["stored_tokens"] for r in records if r["task"] == "drift" and r["method"] != "exact"}
    assert kept == {175.0}
    report = (run_folder / "report.html").read_text(encoding="utf-8")
    assert "context-only" in report and "data:image/png;base64," in report
    assert "wildcat" in (run_folder / "summary.md").read_text(encoding="utf-8")
    assert {"accuracy-needle.png", "needle-0.25.png"} <= {path.name for path in run_folder.glob("*.png")}


def test_within_budget_the_answer_is_the_exact_one(default, essay_ids):
    model, _ = default
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(essay_ids, **{CACHE: DynamicCache(config=model.config)}, **options)
    ours = model.generate(essay_ids, **{CACHE: WildCatCache(model.config, max_tokens=2000)}, **options)
    assert torch.equal(ours, expected)


def test_budget_is_exact_in_every_layer(default, essay_ids):
    model, _ = default
    cache = WildCatCache(model.config, compressor="wildcat", ratio=0.25)
    model(essay_ids, **{CACHE: cache}, logits_to_keep=1)
    kept = int(essay_ids.shape[1] * 0.25 + 0.5)
    assert {cache.stored_length(layer) for layer in range(30)} == {kept}
    assert not any((layer.state.storage.entries.valid == 0).any() for layer in cache.layers)


def test_a_saved_context_answers_another_process_as_it_does_here(default, tmp_path):
    """Read and compressed once, asked three questions there and here."""
    model, tokenizer = default
    text = build_context(tokenizer, 700, [], seed=3)
    questions = ("What is this text about?", "Who wrote it?", "Name one person in it.")
    pairs = [encode_question(tokenizer, text, question) for question in questions]
    cache = WildCatCache(model.config, ratio=0.25)
    model(pairs[0][0], **{CACHE: cache}, logits_to_keep=1)
    cache.save(tmp_path / "context.safetensors")
    prompts = [torch.cat(pair, dim=1).tolist() for pair in pairs]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    code = f"""
import json
from pathlib import Path
from tests.test_real_model import answers
from wildcat_kv import WildCatCache
from wildcat_kv.models import default_model
folder = Path({str(tmp_path)!r})
model, _ = default_model()
cache = WildCatCache.load(folder / "context.safetensors", model.config)
print(json.dumps(answers(model, cache, json.loads((folder / "prompts.json").read_text()))))
"""
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = answers(model, cache, prompts)
    assert json.loads(there.splitlines()[-1]) == here
    assert len({tuple(answer) for answer in here}) > 1


def answers(model, cache, prompts):
    """Greedy answers to prompts (1, n) of which the cache has read the beginning."""
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    ids = [torch.tensor(prompt) for prompt in prompts]
    out = [model.generate(prompt, **{CACHE: cache.clone()}, **options) for prompt in ids]
    return [answer[0, prompt.shape[1] :].tolist() for answer, prompt in zip(out, ids, strict=True)]


def test_real_keys_are_spread_so_that_part_of_the_tokens_lives_on(default, essay_ids):
    """The diagnostic of design 2: between nothing and everything on a real model's keys."""
    model, _ = default
    cache = DynamicCache(config=model.config)
    model(essay_ids, **{CACHE: cache}, logits_to_keep=1)
    n = essay_ids.shape[1]
    mass = torch.stack([token_mass(layer.keys[0], rank=n // 4, bins=n // 48).median() for layer in cache.layers[::6]])
    assert (mass > 0.005).all() and (mass < 1.05).all()
