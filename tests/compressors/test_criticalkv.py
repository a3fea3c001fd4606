"""CriticalKV: scores times what a value changes behind the model's own output projection."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compressors.blocks import GROUP, HEADS, Head, Size, half, heads, kept_entries, make, sizes
from tests.compressors.definitions import by_leverage
from tests.driver import read, small_cache, state, tokens
from tests.tiny import random_ids, tiny_model
from wildcat_kv import CompressedCache, WildCatCache
from wildcat_kv.compressors import CUR, AdaKV, CriticalKV, KNorm, SnapKV
from wildcat_kv.compressors.adakv import compete
from wildcat_kv.compressors.output_norms import output_norms
from wildcat_kv.contexts.context import Context
from wildcat_kv.hook.keyword import CACHE

SCORER = CUR(sink=1, window=4)  # positive scores


@pytest.fixture
def llama():
    return tiny_model("llama")


def projected(block, b, h, entry):
    """The mean over the query heads of the sum of sizes of what the value becomes."""
    value, total = block.values[b, h, entry].double(), 0.0
    for g in range(GROUP):
        weights = block.output_projection[h * GROUP + g].double()
        for channel in range(weights.shape[1]):
            total += abs(sum(float(value[i] * weights[i, channel]) for i in range(len(value)))) / GROUP
    return total


def by_two_stages(block, b, h, scores, slots, sure):
    """Entries that one head keeps, and whether rounding may choose others."""
    head = Head(block, b, h)
    there = [entry for entry in head.items if head.valid[entry]]
    by_score = sorted(there, key=lambda entry: -scores[entry])
    kept, rest = by_score[:sure][:slots], by_score[sure:]
    weighed = {entry: (scores[entry] + 1e-4) * projected(block, b, h, entry) for entry in rest}
    kept += sorted(rest, key=lambda entry: -weighed[entry])[: slots - len(kept)]
    numbers = sorted(scores[entry] for entry in there if math.isfinite(scores[entry]))
    numbers = [numbers, sorted(value for value in weighed.values() if math.isfinite(value))]
    near = any(abs(y - x) <= 1e-5 * abs(y) for each in numbers for x, y in itertools.pairwise(each))
    return sorted(kept), near


@pytest.mark.parametrize("first", [0.0, 0.5, 1.0])
@settings(max_examples=20)
@given(size=sizes(), rows=st.integers(1, 2), seed=st.integers(0, 1000))
def test_the_best_scores_come_first_and_then_the_scores_times_projected_values(first, size, rows, seed):
    block, rank = make(size, seed, rows=rows), half(make(size, seed))
    found = CriticalKV(SCORER, first=first).compress(block, rank)
    sure = max(1, int(rank * first)) if first else 0
    for b, h, head in heads(block):
        expected, near = by_two_stages(block, b, h, by_leverage(head, 1, 4), rank, sure)
        ours = kept_entries(block, found, b, h)
        assert len(ours) == len(expected)
        assert near or ours == expected


@settings(max_examples=20)
@given(size=sizes(), seed=st.integers(0, 1000))
def test_heads_that_compete_share_as_adakv_and_keep_in_two_stages(size, seed):
    block, rank = make(size, seed), half(make(size, seed))
    found = CriticalKV(SCORER, safeguard=0.3).compress(block, rank)
    safe = max(1, int(rank * 0.3))
    slots = compete(block, SCORER.scores(block), rank, safe)[0].tolist()
    assert AdaKV(SCORER, safeguard=0.3).compress(block, rank).coreset.valid.sum(-1).tolist() == [slots]
    assert found.columns == [max(slots)]
    for b, h, head in heads(block):
        sure = max(safe, int(slots[h] * 0.5))
        expected, near = by_two_stages(block, b, h, by_leverage(head, 1, 4), slots[h], sure)
        assert near or kept_entries(block, found, b, h) == expected


def test_values_decide_where_scores_do_not():
    block = make(Size(sink=0, recent=10, window=0), weights=None)
    block.values[:, :, :] = 0.01
    block.values[:, :, 4], block.values[:, :, 7] = 10.0, -10.0
    found = CriticalKV(SnapKV(), first=0.0, epsilon=1e6).compress(block, 2)
    assert kept_entries(block, found, 0, 0) == kept_entries(block, found, 0, 1) == [4, 7]


@pytest.mark.parametrize("order", [1, 2])
def test_norms_in_parts_are_the_norms(order, monkeypatch):
    monkeypatch.setattr("wildcat_kv.compressors.output_norms._CHANNELS_AT_ONCE", 40)
    values, weights = torch.randn(2, HEADS, 9, 5), torch.randn(HEADS * GROUP, 5, 7)
    whole = torch.einsum("bhnd,hgdc->bhgnc", values.double(), weights.double().unflatten(0, (HEADS, GROUP)))
    expected = whole.norm(order, dim=-1).float()
    torch.testing.assert_close(output_norms(values, weights, order), expected, rtol=1e-5, atol=1e-6)


# The weights


def watch(monkeypatch):
    blocks, compress = [], CriticalKV.compress

    def spy(self, block, rank):
        blocks.append(block)
        return compress(self, block, rank)

    monkeypatch.setattr(CriticalKV, "compress", spy)
    return blocks


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "opt", "gpt_neox"])
def test_each_layer_gets_the_weights_of_its_own_output_projection(family, monkeypatch):
    model, blocks, outputs = tiny_model(family), watch(monkeypatch), {}
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".out_proj", "attention.dense")):
            module.register_forward_hook(lambda layer, args, out: outputs.update({layer: (args[0], out)}))
    cache = CompressedCache(model.config, compressor=CriticalKV(SCORER), ratio=0.25)
    model(random_ids(2, 150), **{CACHE: cache})
    full = [place for place, layer in enumerate(cache.layers) if hasattr(layer, "announce")]
    assert len(blocks) == len(full) > 0
    for block, place in zip(blocks, full, strict=True):
        layer, (heads_out, out) = list(outputs.items())[place]
        projection = block.output_projection
        each = heads_out.unflatten(-1, projection.shape[:2])
        summed = torch.einsum("bnhd,hdc->bnc", each, projection) + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(summed, out, rtol=1e-4, atol=1e-4)


def test_a_context_compresses_as_a_cache_that_reads(llama):
    ids = random_ids(2, 200)
    cache = CompressedCache(llama.config, compressor="criticalkv", ratio=0.25)
    llama(ids, **{CACHE: cache})
    found = Context(llama, ids).compress(compressor="criticalkv", ratio=0.25)
    for (ours, _, numbers), (theirs, _, others) in zip(state(cache), state(found), strict=True):
        assert numbers["rows"] == others["rows"]
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_copies_share_the_models_weights_and_new_texts_meet_the_model_again(llama):
    cache = CompressedCache(llama.config, compressor="criticalkv", max_tokens=60)
    llama(random_ids(1, 100), **{CACHE: cache})
    fork = cache.clone()
    attention = cache.layers[0].state.model.attention
    assert fork.layers[0].state.model.attention is attention
    assert attention.module is llama.model.layers[0].self_attn
    assert attention.output_projection().data_ptr() == llama.model.layers[0].self_attn.o_proj.weight.data_ptr()
    cache.reset()
    assert cache.layers[0].needs_module and cache.layers[0].state.model.attention is None
    other = tiny_model("llama")
    other.config._attn_implementation = llama.config._attn_implementation
    other(random_ids(1, 100), **{CACHE: cache})
    assert cache.layers[0].state.model.attention.module is other.model.layers[0].self_attn


def test_a_saved_cache_meets_the_model_when_it_goes_on(llama, tmp_path):
    cache = CompressedCache(llama.config, compressor="criticalkv", max_tokens=60)
    llama(random_ids(1, 100), **{CACHE: cache})
    cache.save(tmp_path / "context.safetensors")
    loaded = CompressedCache.load(tmp_path / "context.safetensors", llama.config).clone()
    for kind in (cache, loaded):
        for seed in range(12):
            llama(random_ids(1, 10, seed), **{CACHE: kind})
    for (ours, _, _), (theirs, _, _) in zip(state(cache), state(loaded), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert cache.stored_length() <= 60


class Adapted(nn.Linear):
    """As a quantised layer or an adapter: other weights than it shows."""


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (None, "LlamaAttention, and it has no o_proj, out_proj, dense or wo"),
        (Adapted(64, 64), r"its o_proj is a .*Adapted of 64 inputs"),
        (nn.Linear(32, 64), r"its o_proj is a .*Linear of 32 inputs; it must be a plain torch.nn.Linear of 64 inputs"),
        (nn.Linear(64, 64, device="meta"), "of 64 inputs on no device"),
    ],
)
def test_a_projection_that_cannot_be_read_is_refused_in_the_first_layer(llama, layer, message):
    for each in llama.model.layers:
        each.self_attn.o_proj = layer
    cache = CompressedCache(llama.config, compressor="criticalkv", ratio=0.25)
    with pytest.raises(ValueError, match=f"compressor=CriticalKV .*{message}.* such as adakv"):
        llama(random_ids(1, 20), **{CACHE: cache})
    assert cache.layers[1].get_seq_length() == 0
    with pytest.raises(ValueError, match=message):  # a context can be read, and not be compressed so
        context = Context(tiny_model("llama"), random_ids(1, 20))
        context.model = llama
        context.compress(compressor="criticalkv", ratio=0.25)


def test_gpt2_keeps_its_weights_the_other_way_round():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="GPT2Attention, and it has no o_proj"):
        model(random_ids(1, 20), **{CACHE: CompressedCache(model.config, compressor="criticalkv", ratio=0.25)})


def test_keys_that_came_from_no_model_are_refused():
    cache = small_cache(method="criticalkv", ratio=0.25)
    for layer in cache.layers:
        layer.needs_module = False
    with pytest.raises(ValueError, match=r"compressor=CriticalKV needs the model's output projections.*compress_conte"):
        read(cache, *tokens(1, 100), 0, 100)


def test_a_static_cache_is_refused(llama):
    with pytest.raises(ValueError, match="static=True: CriticalKV reads weights of the model's layers"):
        WildCatCache(llama.config, compressor=CriticalKV(KNorm()), max_tokens=100, static=True)


def test_layers_that_stay_exact_ask_for_nothing(llama):
    cache = CompressedCache(llama.config, compressor="criticalkv", ratio=0.25, exact_layers=[0])
    llama(random_ids(1, 100), **{CACHE: cache})
    assert cache.layers[0].state.model.attention is None
    assert cache.layers[1].state.model.attention.module is llama.model.layers[1].self_attn


def test_it_needs_what_its_scorer_needs():
    assert AdaKV(SnapKV()).needs_output_projection is False and CriticalKV(KNorm()).needs_output_projection
    assert not CriticalKV(KNorm()).needs_queries and CriticalKV().observation == SnapKV().observation


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scorer": "snapkv"}, "scorer='snapkv' gives no scores"),
        ({"first": 1.5}, r"first=1.5 must be in \[0, 1\]"),
        ({"epsilon": -1.0}, r"epsilon=-1.0 must be at least 0"),
        ({"safeguard": 2.0}, r"safeguard=2.0 must be in \[0, 1\]"),
    ],
)
def test_parameters_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        CriticalKV(**fields)
