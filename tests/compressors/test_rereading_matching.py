"""Attention Matching with the queries of a repetition: whose they are, and when they are asked for."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.compressors.blocks import HEADS, Size, make
from tests.contexts.test_context import Letters
from tests.tiny import random_ids, tiny_model
from wildcat_kv import CompressedCache, Context, WildCatCache
from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.compressors import AttentionMatching, RereadingMatching
from wildcat_kv.hook.keyword import CACHE


@pytest.fixture
def llama():
    return tiny_model("llama")


def watched_queries(model):
    """Record the queries of the attention modules from now on, by pass and layer."""
    asked = []

    def note(module, args, kwargs):
        queries = module.q_proj(kwargs["hidden_states"]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        asked.append(apply_rotary_pos_emb(queries, queries, *kwargs["position_embeddings"])[0])

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    return asked


@torch.no_grad()
@pytest.mark.parametrize("chunk", [2048, 40])
def test_its_queries_are_those_of_the_repeated_tokens(llama, chunk, monkeypatch):
    monkeypatch.setattr("wildcat_kv.contexts.context._CHUNK", chunk)
    context, blocks, compress = Context(llama, random_ids(2, 90)), [], RereadingMatching.compress
    asked = watched_queries(llama)
    monkeypatch.setattr(
        RereadingMatching, "compress", lambda self, block, rank: blocks.append(block) or compress(self, block, rank)
    )
    cache = context.compress(compressor="rereading_matching", tokenizer=Letters(), ratio=0.25)
    assert len(blocks) == 3 and cache.compressor == RereadingMatching()
    parts = [min(chunk, 90 - start) for start in range(0, 90, chunk)]
    for place, block in enumerate(blocks):
        each = [asked[3 * number + place][:, :, -length:] for number, length in enumerate(parts)]
        torch.testing.assert_close(block.queries, torch.cat(each, 2), rtol=1e-4, atol=1e-4)
        assert block.queries.shape == (2, 4, 90, 16)
    plain = context.compress(compressor="attention_matching", ratio=0.25)
    assert not torch.equal(plain.layers[0].values, cache.layers[0].values)


def test_it_compresses_as_attention_matching_does():
    block = make(Size(recent=20), state=1)
    ours, theirs = (kind(queries=4).compress(block, 5) for kind in (RereadingMatching, AttentionMatching))
    assert torch.equal(ours.coreset.values, theirs.coreset.values)


@torch.no_grad()
def test_what_comes_later_is_compressed_by_its_own_queries(llama):
    context = Context(llama, random_ids(1, 100))
    cache = context.compress(compressor="rereading_matching", tokenizer=Letters(), max_tokens=60)
    for seed in range(8):
        llama(random_ids(1, 10, seed), **{CACHE: cache})
    assert cache.get_seq_length() == 180 and stored_tokens(cache) <= 60


@torch.no_grad()
def test_a_saved_context_goes_on(llama, tmp_path):
    context = Context(llama, random_ids(1, 100))
    cache = context.compress(compressor="rereading_matching", tokenizer=Letters(), max_tokens=60)
    cache.save(tmp_path / "context.safetensors")
    loaded = CompressedCache.load(tmp_path / "context.safetensors", llama.config).clone()
    for seed in range(6):
        logits = [llama(random_ids(1, 10, seed), **{CACHE: kind}).logits for kind in (cache, loaded)]
        assert torch.equal(*logits)
    assert stored_tokens(cache) <= 60


def test_a_text_read_once_is_refused(llama):
    with pytest.raises(ValueError, match=r"RereadingMatching has no queries of a repetition; .*compress_context"):
        RereadingMatching().compress(make(Size(), carried_state=torch.zeros(1, HEADS, Size().held, 1)), 4)
    with pytest.raises(ValueError, match="compressor='rereading_matching' reads the context a second time"):
        WildCatCache(llama.config, compressor="rereading_matching", ratio=0.5)
    cache = CompressedCache(llama.config, compressor=RereadingMatching(), ratio=0.25)
    with pytest.raises(ValueError, match="RereadingMatching has no queries of a repetition"):
        llama(random_ids(1, 100), **{CACHE: cache})
