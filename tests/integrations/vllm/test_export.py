"""Exported contexts: an engine that holds them answers as the compressed context does."""

import json

import pytest
import torch

from tests.integrations.vllm.engine import next_logits
from tests.tiny import tiny_model
from tests.words import tokenizer, words
from wildcat_kv import compress_context
from wildcat_kv.compressors import QueryWildCat
from wildcat_kv.contexts.prompts import encode_follow_up
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.integrations.vllm.entries import HeadEntries
from wildcat_kv.integrations.vllm.export import export_context
from wildcat_kv.integrations.vllm.folding import direction, folded, folding_error

SETTINGS = {"ratio": 0.5, "sink": 4, "window": 4, "bin_rank": 4}
WORDS = tokenizer()
FOLLOWING = encode_follow_up(WORDS, "w9 w33 w7 w80")
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 1024},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "rope_theta": 10000.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def compressed(model, method="wildcat", **changes):
    return compress_context(model, WORDS, words(150), compressor=method, **{**SETTINGS, **changes})


def expected(context):
    ids = torch.cat((context.ids, FOLLOWING), dim=1)
    positions = torch.arange(context.ids.shape[1], ids.shape[1]).unsqueeze(0)
    mask = torch.ones_like(ids)
    cache = {CACHE: context.cache.clone()}
    return context.model(FOLLOWING, position_ids=positions, attention_mask=mask, **cache).logits[0]


def difference(context, stored):
    found = next_logits(context.model, stored, FOLLOWING).log_softmax(-1)
    return float((found - expected(context).log_softmax(-1)).abs().max())


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("method", ["wildcat", "query_wildcat", "keydiff", "attention_matching", "pyramidkv", "adakv"])
def test_an_engine_with_weights_answers_alike(llama, tmp_path, method):
    context = compressed(llama, method)
    made = export_context(context, tmp_path / "context")
    header = made.stored.header
    assert header.weighted and header.slots % 32 == 0
    assert made.padding == pytest.approx(1 - header.stored / header.slots)
    assert difference(context, made.stored) < 1e-3


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families(tmp_path, family):
    context = compressed(tiny_model(family, **({"sliding_window": None} if family == "mistral" else {})))
    assert difference(context, export_context(context, tmp_path / "context").stored) < 1e-3


@pytest.mark.parametrize("name", ROPES)
def test_scaled_rotary_positions(tmp_path, name):
    context = compressed(tiny_model("llama", rope_parameters=ROPES[name]))
    assert difference(context, export_context(context, tmp_path / "context").stored) < 1e-3


def test_equal_shares_need_no_padding(llama, tmp_path):
    context, shared = (compressed(llama, QueryWildCat(bin_rank=4, share=share)) for share in ("equal", "heads"))
    made = export_context(context, tmp_path / "equal", block_size=1)
    assert made.padding == 0 and made.stored.header.slots == context.cache.stored_length()
    assert difference(context, made.stored) < 1e-3
    assert export_context(shared, tmp_path / "shared", block_size=1).padding > 0


def test_packed_slots_are_unpacked(llama, tmp_path):
    context = compressed(llama, bits=4)
    assert difference(context, export_context(context, tmp_path / "context").stored) < 2e-3


def test_a_stock_engine_needs_nothing_of_a_method_without_weights(llama, tmp_path):
    context = compressed(llama, "keydiff")
    stored = export_context(context, tmp_path / "context", stock=True).stored
    assert not stored.header.weighted and stored.header.folding is None
    assert stored.header.slots == context.cache.stored_length()
    assert difference(context, stored) < 1e-3


def test_folding_tells_what_it_costs(llama, tmp_path):
    context = compressed(llama)
    stored = export_context(context, tmp_path / "context", stock=True).stored
    cost = stored.header.folding
    assert not stored.header.weighted and 0 < cost.error <= cost.worst
    assert difference(context, stored) > 1e-3  # it is no free lunch


def test_folding_is_exact_where_a_direction_is():
    """All queries have the same share along one axis: there the fold costs nothing, padding included."""
    queries = torch.randn(64, 8)
    queries[:, 0] = 2.0
    head = HeadEntries(torch.randn(20, 8), torch.randn(20, 5), torch.rand(20) * 3 + 0.1)
    along = torch.zeros(8)
    along[0] = 1.0
    keys, values = folded(head, along, 32)
    assert keys.shape == (32, 8) and values.shape == (32, 5)
    assert folding_error(head, keys, values, queries, scale=0.5) < 1e-5
    found = direction(queries.repeat(50, 1) + 0.0, 0.5)
    assert torch.allclose(queries @ found * 0.5, torch.ones(64), atol=0.1)


def test_weights_that_are_no_shares_cost_much():
    queries = torch.randn(64, 8) + 2
    head = HeadEntries(torch.randn(20, 8), torch.randn(20, 5), torch.tensor([1.0, -0.9] * 10))
    keys, values = folded(head, direction(queries, 0.5), 20)
    assert folding_error(head, keys, values, queries, 0.5) > 0.3


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma3", {}, "is a DynamicSlidingWindowLayer"),
        ("opt", {}, "no layer has rotary positions"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "change at 4096"),
    ],
)
def test_models_that_no_prefix_can_hold_are_refused(tmp_path, family, changes, message):
    context = compressed(tiny_model(family, **changes))
    with pytest.raises(ValueError, match=message):
        export_context(context, tmp_path / "context")
    assert not (tmp_path / "context").exists()


def test_attention_sinks_are_refused(llama, tmp_path):
    context = compressed(llama)
    llama.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    try:
        with pytest.raises(ValueError, match="attention sinks"):
            export_context(context, tmp_path / "context")
    finally:
        del llama.model.layers[0].self_attn.sinks


def test_a_small_context_is_padded_to_spell_its_digest(llama, tmp_path):
    context = compress_context(llama, WORDS, words(20), compressor="keydiff", ratio=0.5, sink=1, window=1)
    stored = export_context(context, tmp_path / "context", block_size=1).stored
    assert stored.header.slots == 38  # of the vocabulary's 120 ids
    assert difference(context, stored) < 1e-3


@pytest.mark.parametrize("name", ["a.b", "..", "-a", "a b", "ä", "a" * 101])
def test_names_with_other_characters_are_refused(llama, tmp_path, name):
    with pytest.raises(ValueError, match="is no name of a context"):
        export_context(compressed(llama), tmp_path / name)


def test_an_export_replaces_an_older_one(llama, tmp_path):
    folder = tmp_path / "context"
    first = export_context(compressed(llama), folder).stored
    second = export_context(compressed(llama, "keydiff"), folder).stored
    assert first.digest != second.digest
    assert sorted(path.name for path in folder.iterdir()) == ["context.json", second.header.tensors_name]
    assert json.loads((folder / "context.json").read_text())["method"] == "KeyDiff"
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export_context(compressed(llama), tmp_path / "nowhere" / "context")
