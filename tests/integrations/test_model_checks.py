"""The checks of a given model: they pass where all is well, and each of them can fail."""

import copy
import sys

import pytest
import torch
import transformers as tf

from tests import zoo
from tests.tiny import tiny_model
from tests.words import tokenizer
from wildcat_kv import WildCatCache, cli, enable
from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.hook.marks import Forward
from wildcat_kv.integrations.model_checks import checks, names, run_checks


def statuses(model, **options):
    return {result.name: result.status for result in run_checks(model, **options)}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_all_pass_with_a_model_that_works(family):
    assert statuses(tiny_model(family)) == dict.fromkeys(names(), "passed")


def test_all_pass_with_a_model_that_masks_every_text_in_blocks():
    assert statuses(zoo.tiny("gemma4_unified").model) == dict.fromkeys(names(), "passed")


def test_what_transformers_own_cache_cannot_do_is_not_applicable():
    found = {result.name: result for result in run_checks(tiny_model("qwen3_5"))}
    lookup = found["prompt lookup is exact at ratio 1"]
    assert lookup.status == "not applicable" and lookup.reason.startswith("fails with DynamicCache too")
    assert "failed" not in {result.status for result in found.values()}


def test_a_model_that_counts_anew_is_told_the_positions():
    found = {result.name: result for result in run_checks(tiny_model("bamba"))}
    chunks = found["reading in chunks is exact at ratio 1"]
    assert chunks.status == "passed" and chunks.reason.startswith("with position_ids")
    assert "failed" not in {result.status for result in found.values()}


def test_a_family_whose_positions_are_not_understood_is_told_the_methods_that_remain(monkeypatch):
    def refused(config, index):
        raise ValueError("not understood")

    monkeypatch.setattr(checks, "rotations_of", refused)
    result = list(run_checks(tiny_model("llama")))[-1]
    assert result.status == "not applicable"
    assert "methods that need none: wildcat, streaming_llm, snapkv" in result.reason and "kvzip" not in result.reason


def test_a_refusal_is_the_first_checks_reason_and_the_others_do_not_apply():
    results = list(run_checks(zoo.tiny("bloom").model))
    assert results[0].status == "failed" and "config=BloomConfig" in results[0].reason
    assert {result.status for result in results[1:]} == {"not applicable"}


def test_a_model_that_keeps_its_attention_out_of_reach_fails():
    """Its attention modules have a config of their own, which no cache switches."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(model.config)
    found = {result.name: result for result in run_checks(model)}
    read = found["reading a prompt is exact at ratio 1"]
    assert read.status == "failed" and "'wildcat' attention" in read.reason
    assert found["a saved cache goes on as before"].status == "failed"


def other_values(monkeypatch):
    update = WildCatLayer.update

    def flipped(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        return keys, values.flip(-1)

    monkeypatch.setattr(WildCatLayer, "update", flipped)


def larger_outputs(monkeypatch):
    attend = WildCatLayer.attend
    monkeypatch.setattr(WildCatLayer, "attend", lambda self, *args: 1.1 * attend(self, *args))


def no_folds(monkeypatch):
    monkeypatch.setattr(WildCatLayer, "after_attention", lambda self, query, scale: None)


def padding_as_text(monkeypatch):
    monkeypatch.setattr(Forward, "new_valid", lambda self, device: None)


def damaged_file(monkeypatch):
    load = WildCatCache.load

    def damaged(*args, **kwargs):
        cache = load(*args, **kwargs).clone()
        cache.layers[0].values.neg_()
        return cache

    monkeypatch.setattr(WildCatCache, "load", damaged)


def nothing_taken_back(monkeypatch):
    monkeypatch.setattr(WildCatCache, "crop", lambda self, tokens: None)


def another_method(monkeypatch):
    monkeypatch.setattr(checks, "enable", lambda model, *_, **__: enable(model, ratio=0.05, compressor="streaming_llm"))


def unknown_rotation(monkeypatch):
    monkeypatch.setattr(checks, "rotations_of", lambda config, index: 1 / 0)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("reading a prompt is exact at ratio 1", other_values),
        ("reading in chunks is exact at ratio 1", other_values),
        ("generate() is exact at ratio 1", other_values),
        ("weights of one change nothing", larger_outputs),
        ("generate() stays within its budget", no_folds),
        ("a padded row answers as the row alone", padding_as_text),
        ("beams are exact at ratio 1", other_values),
        ("prompt lookup is exact at ratio 1", other_values),
        ("a saved cache goes on as before", damaged_file),
        ("tokens taken back leave no trace", nothing_taken_back),
        ("enable() answers as the explicit cache", another_method),
        ("the cache is smaller", no_folds),
        ("rotary positions are understood", unknown_rotation),
    ],
)
def test_each_check_fails_where_its_matter_is_broken(monkeypatch, name, broken):
    model = tiny_model("llama")
    broken(monkeypatch)
    assert statuses(model)[name] == "failed"


@pytest.mark.parametrize("all_of_them", [True, False])
def test_the_model_is_left_as_it_was(all_of_them):
    model = tiny_model("llama", attention="eager").train()
    model.lm_head.eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    results = run_checks(model)
    for _ in results if all_of_them else range(3):
        next(results, None)
    results.close()
    assert type(model.config._attn_implementation) is str and model.config._attn_implementation == "eager"
    assert model.training and not model.lm_head.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_prompt_with_an_image_is_checked_too():
    tiny = zoo.tiny("qwen2_vl", image=True)
    tiny.model.model.rope_deltas = before = torch.tensor([[-3]])
    assert set(statuses(tiny.model, prompt=tiny.inputs(160)).values()) == {"passed"}
    assert tiny.model.model.rope_deltas is before


def run(monkeypatch, capsys, *arguments):
    """Exit status, stdout and stderr of `wildcat-kv check ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["wildcat-kv", "check", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    return exit_.value.code or 0, captured.out, captured.err


def folder(path, model):
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def test_the_command_prints_a_line_a_check(monkeypatch, capsys, tmp_path):
    status, out, _ = run(monkeypatch, capsys, folder(tmp_path, tiny_model("gemma3")))
    assert status == 0 and "1 of 3 layers" not in out and "2 of 3 layers are compressed" in out
    assert all(f"{name} " in out for name in names()) and "No check failed" in out


def test_the_command_says_how_many_failed(monkeypatch, capsys, tmp_path):
    no_folds(monkeypatch)
    status, out, _ = run(monkeypatch, capsys, folder(tmp_path, tiny_model("llama")), "--dtype", "bfloat16")
    assert status == 1 and f"of {len(names())} checks failed" in out


def test_the_command_refuses_in_one_sentence(monkeypatch, capsys, tmp_path):
    status, out, err = run(monkeypatch, capsys, folder(tmp_path, zoo.tiny("bloom").model))
    assert status == 1 and not out and err.startswith("wildcat-kv: config=BloomConfig") and err.count("\n") == 1


def test_a_model_in_half_precision_passes():
    model = tf.LlamaForCausalLM(tiny_model("llama").config).to(torch.bfloat16).eval()
    assert "failed" not in statuses(model).values()
