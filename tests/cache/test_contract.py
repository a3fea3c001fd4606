"""What `generate` and the models ask of a dynamic cache, asked of ours: a DynamicCache is the reference.

These are the behaviours that Transformers' own generation tests check, put in our words; `tests/upstream` runs
those themselves. Rollback is in `test_rollback.py`.
"""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation import CompileConfig

from tests.tiny import random_ids, tiny_model
from wildcat_kv import WildCatCache
from wildcat_kv.hook.keyword import CACHE, returned_cache

KINDS = ["llama", "gemma2", "gpt_oss", "qwen3_next"]  # plain, softcap and sliding, sinks and sliding, linear
BUDGETS = [{"ratio": 1.0}, {"ratio": 0.3, "sink": 2, "window": 4, "bin_rank": 3}]
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "constrained": {"do_sample": False, "repetition_penalty": 1.3, "bad_words_ids": [[3]], "min_new_tokens": 8},
}


def generate(model, cache=None, *, seed=5, steps=8, **inputs):
    torch.manual_seed(seed)
    options = {"do_sample": False, "max_new_tokens": steps, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(**{CACHE: cache}, **{**options, **inputs})


def left_padded(rows=2, length=30, padding=7):
    ids = random_ids(rows, length)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def assert_same_scores(first, second):
    assert torch.equal(first.sequences, second.sequences)
    assert all(torch.equal(*pair) for pair in zip(first.scores, second.scores, strict=True))


# What comes out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", KINDS)
def test_within_budget_all_that_generate_returns_is_the_same(family, mode):
    model = tiny_model(family, "eager")
    ids, mask = left_padded()
    wanted = {"output_logits": True, "output_hidden_states": True, "output_attentions": True, **MODES[mode]}
    expected = generate(model, DynamicCache(config=model.config), input_ids=ids, attention_mask=mask, **wanted)
    cache = WildCatCache(model.config, ratio=1.0)
    found = generate(model, cache, input_ids=ids, attention_mask=mask, **wanted)
    assert returned_cache(found) is cache
    assert_same_scores(found, expected)
    for name in ("logits", "hidden_states", "attentions"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    for ours, theirs in zip(cache.layers, returned_cache(expected).layers, strict=True):
        assert ours.is_sliding == theirs.is_sliding if hasattr(theirs, "is_sliding") else type(ours) is type(theirs)
        if getattr(theirs, "keys", None) is not None:
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", KINDS)
def test_beyond_the_budget_every_mode_runs_and_counts_right(family, mode):
    model = tiny_model(family)
    ids, mask = left_padded()
    cache = WildCatCache(model.config, **BUDGETS[1])
    found = generate(model, cache, input_ids=ids, attention_mask=mask, steps=20, **MODES[mode])
    returned = MODES[mode].get("num_return_sequences", 1)
    rows = 2 * max(returned, MODES[mode].get("num_beams", 1))
    assert found.sequences.shape == (2 * returned, 50)
    assert cache.get_seq_length() == 49
    for layer in cache.layers:
        if type(layer).__name__ == "WildCatLayer":
            assert layer.keys.shape[0] == layer.values.shape[0] == rows and layer.keys.shape[2] < 49


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_cache_that_was_not_asked_for_is_not_returned(budget):
    model = tiny_model("llama")
    WildCatCache(model.config, **budget)
    assert returned_cache(generate(model, input_ids=random_ids(1, 9), use_cache=False)) is None


def test_attention_probabilities_of_a_compressed_layer_are_refused():
    model = tiny_model("llama", "eager")
    cache = WildCatCache(model.config, ratio=0.3)
    with pytest.raises(ValueError, match="output_attentions"):
        generate(model, cache, input_ids=random_ids(1, 50), output_attentions=True)


# What goes in


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", KINDS)
def test_ids_embeddings_and_explicit_positions_are_the_same_prompt(family, budget, beams):
    model = tiny_model(family)
    ids, mask = left_padded()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    embeddings = model.get_input_embeddings()(ids)
    common = {"attention_mask": mask, "num_beams": beams}

    def run(**inputs):
        return generate(model, WildCatCache(model.config, **budget), **common, **inputs)

    expected = run(input_ids=ids)
    assert_same_scores(run(input_ids=ids, position_ids=positions), expected)
    assert_same_scores(run(input_ids=ids, inputs_embeds=embeddings), expected)
    assert torch.equal(run(input_ids=ids, logits_to_keep=0).sequences, expected.sequences)
    alone = run(inputs_embeds=embeddings)
    assert torch.equal(alone.sequences, expected.sequences[:, ids.shape[1] :])


def test_other_embeddings_of_the_same_ids_give_other_scores():
    model, ids = tiny_model("llama"), random_ids(2, 12)
    embeddings = model.get_input_embeddings()(ids)
    first, second = (
        generate(model, WildCatCache(model.config, ratio=0.5), input_ids=ids, inputs_embeds=inputs)
        for inputs in (embeddings, torch.rand_like(embeddings))
    )
    assert not torch.allclose(first.scores[0], second.scores[0])


@pytest.mark.parametrize("budget", BUDGETS)
def test_generation_starts_from_one_token_or_none(budget):
    model = tiny_model("llama")
    for inputs in ({"bos_token_id": 1}, {"input_ids": torch.tensor([[1]])}):
        found = generate(model, WildCatCache(model.config, **budget), steps=30, **inputs)
        assert found.sequences.shape == (1, 31) and found.sequences[0, 0] == 1


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("family", KINDS)
def test_within_budget_a_prompt_may_be_read_in_chunks(family, chunk):
    model, ids = tiny_model(family), random_ids(1, 30)
    runs = [
        generate(model, cache, input_ids=ids, prefill_chunk_size=chunk)
        for cache in (DynamicCache(config=model.config), WildCatCache(model.config, ratio=1.0))
    ]
    assert_same_scores(*runs)


# Going on


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", KINDS)
def test_a_returned_cache_goes_on_where_generate_stopped(family, budget):
    model = tiny_model(family)
    ids, mask = left_padded()
    whole = generate(model, WildCatCache(model.config, **budget), input_ids=ids, attention_mask=mask, steps=24)
    first = generate(model, WildCatCache(model.config, **budget), input_ids=ids, attention_mask=mask, steps=15)
    longer = torch.nn.functional.pad(mask, (0, 15), value=1)
    second = generate(model, returned_cache(first), input_ids=first.sequences, attention_mask=longer, steps=9)
    assert torch.equal(second.sequences, whole.sequences)
    assert all(torch.equal(*pair) for pair in zip(first.scores + second.scores, whole.scores, strict=True))
    for ours, theirs in zip(returned_cache(second).layers, returned_cache(whole).layers, strict=True):
        if getattr(theirs, "keys", None) is not None:
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("budget", BUDGETS)
def test_embeddings_go_on_as_ids_do(budget):
    model, ids = tiny_model("llama"), random_ids(2, 20)
    embed = model.get_input_embeddings()
    whole = generate(model, WildCatCache(model.config, **budget), inputs_embeds=embed(ids), steps=12)
    first = generate(model, WildCatCache(model.config, **budget), inputs_embeds=embed(ids), steps=7)
    longer = torch.cat((embed(ids), embed(first.sequences)), dim=1)
    second = generate(model, returned_cache(first), inputs_embeds=longer, steps=5)
    assert torch.equal(torch.cat((first.sequences, second.sequences), dim=1), whole.sequences)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", KINDS)
def test_copies_of_a_context_answer_apart(family, budget):
    """A context is read once; every copy of its cache goes on by itself."""
    model, context = tiny_model(family), random_ids(1, 60)
    cache = WildCatCache(model.config, **budget)
    model(context, **{CACHE: cache})
    answers = [
        generate(model, copy.deepcopy(cache), input_ids=torch.cat((context, random_ids(1, 4, seed)), 1)).sequences
        for seed in (1, 2, 1)
    ]
    assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", KINDS)
def test_a_cache_that_was_reset_is_as_good_as_new(family, budget):
    model, cache = tiny_model(family), None
    if any(DynamicCache(config=model.config).is_sliding) and "reset" not in vars(DynamicSlidingWindowLayer.__base__):
        pytest.skip("sliding layers of this version keep their length when they are reset")
    for seed in (1, 2):
        ids = random_ids(2, 25, seed)
        fresh = generate(model, WildCatCache(model.config, **budget), input_ids=ids)
        cache = cache or WildCatCache(model.config, **budget)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_same_scores(generate(model, cache, input_ids=ids), fresh)


# Rows


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_can_be_repeated_picked_and_reordered(family, budget):
    model, ids = tiny_model(family), random_ids(3, 40)

    def logits(change, rows):
        cache = WildCatCache(model.config, **budget)
        model(ids, **{CACHE: cache})
        change(cache)
        return model(random_ids(3, 5, seed=9)[rows], **{CACHE: cache}).logits

    every = logits(lambda cache: None, [0, 1, 2])
    for change, rows in (
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ):
        torch.testing.assert_close(logits(change, rows), every[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("indices", [(0, 2), [0, 2]])
def test_rows_can_be_picked_by_any_sequence(indices):
    model = tiny_model("llama")
    cache = WildCatCache(model.config, ratio=1.0)
    model(random_ids(3, 10), **{CACHE: cache})
    cache.batch_select_indices(indices)
    assert cache.layers[0].keys.shape[0] == 2


# What a cache says of itself, and what its switch leaves alone


@pytest.mark.parametrize("family", KINDS)
def test_the_cache_describes_itself_as_a_dynamic_one(family):
    model, ids = tiny_model(family), random_ids(2, 20)
    ours, theirs = WildCatCache(model.config, ratio=0.5), DynamicCache(config=model.config)
    assert not ours.is_initialized and ours.get_seq_length() == 0
    for cache in (ours, theirs):
        model(ids, **{CACHE: cache})
    assert len(ours) == len(theirs) == model.config.num_hidden_layers
    for name in ("is_compileable", "is_croppable", "is_sliding", "is_linear", "is_dummy"):
        assert getattr(ours, name, None) == getattr(theirs, name, None), name  # older versions lack some
    assert ours.get_seq_length() == theirs.get_seq_length() == ours.get_query_offset() == 20
    assert ours.get_max_length() == theirs.get_max_length()
    for index, layer in enumerate(theirs.layers):
        if hasattr(layer, "get_mask_sizes"):
            assert ours.get_mask_sizes(3, index) == theirs.get_mask_sizes(3, index)
    assert not any(getattr(layer, "record_past", False) for layer in ours.layers)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_static_caches_and_compilation_work_after_the_switch(family):
    model = tiny_model(family)
    inputs = {"input_ids": random_ids(2, 12), "cache_implementation": "static"}
    expected = generate(model, **inputs, disable_compile=True)
    WildCatCache(model.config, ratio=0.5)
    assert_same_scores(generate(model, **inputs, disable_compile=True), expected)
    options = CompileConfig(fullgraph=True, backend="eager")
    options._compile_all_devices = True
    compiled = generate(model, **inputs, compile_config=options)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(compiled.sequences, expected.sequences)
