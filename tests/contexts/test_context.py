"""Contexts that are read once: compressed by any method as if each had read them, and read twice where one must."""

import pytest
import torch
from transformers import DynamicCache

from tests.driver import METHODS, assert_same, state
from tests.tiny import random_ids, tiny_model
from wildcat_kv import CompressedCache, Context, patch_config
from wildcat_kv.cache.budget import kept_tokens
from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.cache.state import LayerState
from wildcat_kv.compressors import KVzip, Scorer
from wildcat_kv.hook.keyword import CACHE


class Letters:
    """A tokenizer whose tokens are letters."""

    chat_template = None

    def __call__(self, text, **_):
        return type("Encoded", (), {"input_ids": torch.tensor([[1 + ord(letter) % 100 for letter in text]])})


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [{"ratio": 0.25}, {"max_tokens": 90}, {"ratio": 1.0}])
def test_a_context_is_compressed_as_if_the_cache_had_read_it(llama, method, budget):
    ids = random_ids(2, 200)
    direct = CompressedCache(llama.config, compressor=METHODS[method], **budget)
    llama(ids, **{CACHE: direct})
    context = Context(llama, ids)
    before = state(context.exact)
    cache = context.compress(compressor=METHODS[method], **budget)
    assert_same(state(cache), state(direct))
    assert_same(state(context.exact), before)
    question = random_ids(2, 9, seed=2)
    assert torch.equal(*(llama(question, **{CACHE: kind}).logits for kind in (cache, direct)))


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "qwen3_next", "granite4"])
def test_layers_that_are_not_compressed_come_along(family):
    model, ids, question = tiny_model(family), random_ids(2, 120), random_ids(2, 9, seed=2)
    context = Context(model, ids)
    first, second = (context.compress(compressor="snapkv", ratio=0.25) for _ in range(2))
    direct = CompressedCache(model.config, compressor="snapkv", ratio=0.25)
    model(ids, **{CACHE: direct})
    expected = model(question, **{CACHE: direct}).logits
    for cache in (first, second):  # one is not disturbed by what the other reads
        assert torch.equal(model(question, **{CACHE: cache}).logits, expected)


def test_padding_stays_padding(llama):
    ids, mask = random_ids(2, 150), torch.ones(2, 150, dtype=torch.int64)
    mask[0, :60] = 0
    cache = Context(llama, ids, mask).compress(compressor="h2o", ratio=0.25)
    direct = CompressedCache(llama.config, compressor="h2o", ratio=0.25)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    llama(ids, attention_mask=mask, position_ids=positions, **{CACHE: direct})
    assert_same(state(cache), state(direct))


@pytest.mark.parametrize("compressor", ["wildcat", "expected_attention"])
def test_a_padded_context_goes_on_as_the_row_alone(llama, compressor):
    """generate() counts positions from the first shown token, and so does a context."""
    ids, mask = random_ids(2, 150), torch.ones(2, 150, dtype=torch.int64)
    mask[0, :60] = 0
    both = Context(llama, ids, mask).compress(compressor=compressor, ratio=0.5)
    alone = Context(llama, ids[:1, 60:]).compress(compressor=compressor, ratio=0.5)
    question = random_ids(2, 6, seed=3)
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    full = torch.cat((mask, torch.ones_like(question)), 1)
    first = llama.generate(torch.cat((ids, question), 1), attention_mask=full, **{CACHE: both}, **options)
    second = llama.generate(torch.cat((ids[:1, 60:], question[:1]), 1), **{CACHE: alone}, **options)
    for padded, expected in zip(first.logits, second.logits, strict=True):
        torch.testing.assert_close(padded[:1], expected, rtol=2e-3, atol=2e-3)


def test_the_method_is_the_best_one_unless_another_is_named(llama):
    context = Context(llama, random_ids(1, 200))
    found = [context.compress(ratio=0.25), context.compress(compressor="wildcat", ratio=0.25)]
    assert [type(cache.compressor).__name__ for cache in found] == ["QueryWildCat", "WildCat"]
    assert [stored_tokens(cache) for cache in found] == [50, 50]


# KVzip


def repeated_attention(model, ids, chunk=2048):
    """KVzip's scores for rows of ids, from the model's own attention probabilities."""
    tokenizer, n = Letters(), ids.shape[1]
    eager = tiny_model("llama", attention="eager")
    eager.load_state_dict(model.state_dict())
    scores = torch.zeros(3, ids.shape[0], 2, n)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        words = "\n\nRepeat the previous context exactly."
        if start:
            words = "\n\nRepeat the part of the previous context exactly, starting with"
        ask, answer = (tokenizer(text).input_ids.expand(ids.shape[0], -1) for text in (words, "\n"))
        again = torch.cat((ask, ids[:, max(0, start - 8) : start], answer, ids[:, start:stop]), 1)
        cache = DynamicCache(config=eager.config)
        eager(ids, **{CACHE: cache})
        attentions = eager(again, **{CACHE: cache}, output_attentions=True).attentions
        seen = [*range(min(4, start)), *range(start, stop), *range(n, n + again.shape[1])]
        for layer, probabilities in enumerate(attentions):
            part = probabilities[..., seen]
            part = part / part.sum(-1, keepdim=True)
            part = part[..., min(4, start) : min(4, start) + stop - start].amax(2)
            scores[layer, ..., start:stop] = part.unflatten(1, (2, 2)).amax(2)
    return scores


@pytest.mark.parametrize("chunk", [2048, 70])
def test_the_context_is_scored_by_the_attention_of_its_repetition(llama, chunk, monkeypatch):
    monkeypatch.setattr("wildcat_kv.contexts.context._CHUNK", chunk)
    ids = random_ids(2, 150)
    scores = torch.stack(Context(llama, ids).reread(KVzip(), Letters())).squeeze(-1)
    torch.testing.assert_close(scores, repeated_attention(llama, ids, chunk), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layerwise", [False, True])
def test_layers_and_heads_share_the_slots_of_a_context(llama, layerwise):
    ids = random_ids(2, 300)
    context = Context(llama, ids)
    scores = torch.stack(context.reread(KVzip(), Letters())).squeeze(-1)
    cache = context.compress(compressor=KVzip(layerwise=layerwise), tokenizer=Letters(), ratio=0.5, sink=32)
    assert cache.compressor == KVzip(layerwise=layerwise)
    held = torch.stack([layer.state.storage.entries.valid.sum(-1) for layer in cache.layers])
    assert stored_tokens(cache) == kept_tokens(300, 0.5)
    assert (held.sum(-1) == 2 * 150).all() == layerwise
    assert cache.get_seq_length() == 300
    for number, (layer, own) in enumerate(zip(cache.layers, scores, strict=True)):
        entries = layer.state.storage.entries
        for row, head in ((row, head) for row in range(2) for head in range(2)):
            best = own[row, head, 32:268].topk(int(held[number, row, head]) - 64).indices.sort().values + 32
            exact = context.exact.layers[number].keys[row, head]
            assert torch.equal(entries.keys[row, head][entries.valid[row, head]][32:-32], exact[best])


def test_a_zipped_context_generates_and_can_be_saved(llama, tmp_path):
    ids = random_ids(1, 200)
    cache = Context(llama, ids).compress(compressor="kvzip", tokenizer=Letters(), ratio=0.25)
    cache.save(tmp_path / "zipped.safetensors")
    loaded = CompressedCache.load(tmp_path / "zipped.safetensors", llama.config)
    prompt = torch.cat((ids, random_ids(1, 5, seed=4)), 1)
    options = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None}
    first, second = (llama.generate(prompt, **{CACHE: kind}, **options) for kind in (cache.clone(), loaded))
    assert torch.equal(first, second) and first.shape[1] == 305


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compressor": "kvzip", "ratio": 0.25}, "tokenizer=None"),
        (
            {"compressor": "kvzip", "max_tokens": 100, "tokenizer": Letters()},
            "max_tokens=100: KVzip compresses the prompt",
        ),
        ({"compressor": "zip", "ratio": 0.25}, "compressor='zip': no such method"),
        ({"compressor": "snapkv", "ratio": 2.0}, "ratio=2.0"),
    ],
)
def test_what_cannot_be_done_is_said(llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        Context(llama, random_ids(1, 60)).compress(**arguments)


def test_hidden_tokens_cannot_be_repeated(llama):
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, :9] = 0
    with pytest.raises(ValueError, match="attention_mask hides tokens"):
        Context(llama, random_ids(2, 60), mask).compress(compressor="kvzip", tokenizer=Letters(), ratio=0.25)


@pytest.mark.parametrize("ids", [torch.zeros(5, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64), [[1, 2]]])
def test_ids_of_the_wrong_shape_are_refused(llama, ids):
    with pytest.raises(ValueError, match="input_ids="):
        Context(llama, ids)


def test_a_zipped_cache_compresses_no_other_text(llama):
    cache = Context(llama, random_ids(1, 100)).compress(compressor="kvzip", tokenizer=Letters(), ratio=0.5)
    cache.reset()
    with pytest.raises(ValueError, match=r"KVzip has no scores; call wildcat_kv.compress_context"):
        llama(random_ids(1, 100, seed=2), **{CACHE: cache})


def test_nothing_is_looked_at_again_where_nothing_will_fold(llama, monkeypatch):
    cache = Context(llama, random_ids(1, 100)).compress(compressor="kvzip", tokenizer=Letters(), ratio=0.5)
    monkeypatch.setattr(LayerState, "count_rows", lambda *_: pytest.fail("rows were counted"))
    for token in range(100):
        llama(random_ids(1, 1, seed=token), **{CACHE: cache})


class Newest(Scorer):
    """A third party's method that compresses prompts alone."""

    decodes = False

    def score(self, block):
        return torch.arange(block.keys.shape[2]).expand(block.valid.shape)


def test_a_method_for_prompts_alone_reads_them_once(llama):
    ids = random_ids(1, 200)
    cache, direct = Context(llama, ids).compress(compressor=Newest(), ratio=0.5), None
    direct = CompressedCache(llama.config, compressor=Newest(), ratio=0.5)
    llama(ids, **{CACHE: direct})
    assert_same(state(cache), state(direct))


class Repeated(Scorer):
    """A third party's method that keeps what looks like its repetition."""

    decodes, reads_twice, state_size = False, True, 1

    def reread(self, repetition):
        text, again = repetition.keys[:, :, repetition.start : repetition.stop], repetition.keys
        return -(text - again[:, :, -text.shape[2] :]).float().norm(dim=-1, keepdim=True)

    def score(self, block):
        return block.carried_state[..., 0]


def test_a_second_reading_is_for_every_method_that_asks_for_one(llama):
    ids = random_ids(2, 100)
    context = Context(llama, ids)
    cache = context.compress(compressor=Repeated(), tokenizer=Letters(), ratio=0.5, sink=0, window=0)
    [wanted] = {tensor.shape for tensor in context.reread(Repeated(), Letters())}
    assert wanted == (2, 2, 100, 1)
    for layer, scores, exact in zip(
        cache.layers, context.reread(Repeated(), Letters()), context.exact.layers, strict=True
    ):
        best = scores[0, 0, :, 0].topk(50).indices.sort().values
        assert torch.equal(layer.keys[0, 0], exact.keys[0, 0][best])
    with pytest.raises(ValueError, match=r"tokenizer=None: compressor=.*Repeated"):
        context.compress(compressor=Repeated(), ratio=0.5)


@pytest.mark.parametrize("compressor", ["snapkv", "kvzip"])
def test_a_section_in_the_config_has_no_part_in_a_context(compressor):
    """Its exact cache logs the queries of every layer, whatever layers a preset leaves exact."""
    plain, patched = tiny_model("llama"), tiny_model("llama")
    patch_config(patched.config, ratio=0.5, exact_layers=(0,), sink=2, window=8, compressor="tova")
    found = []
    for model in (plain, patched):
        context = Context(model, random_ids(1, 150))
        cache = context.compress(compressor=compressor, tokenizer=Letters(), ratio=0.3, sink=4, window=4)
        found.append((cache.settings, cache.compressor, state(cache)))
    assert found[0][:2] == found[1][:2]
    assert_same(found[0][2], found[1][2])
