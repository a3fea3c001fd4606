"""KVzip+: KVzip's probabilities times what each value adds to what the model reads."""

import math

import pytest
import torch
from transformers import DynamicCache

from tests.compressors.blocks import DV, GROUP, HEADS, SCALE, D, Size, make
from tests.contexts.test_context import Letters
from tests.tiny import random_ids, tiny_model
from wildcat_kv import Context, WildCatCache
from wildcat_kv.compressors import KVzip, KVzipPlus, Repetition
from wildcat_kv.compressors.kvzip import SINK
from wildcat_kv.hook.keyword import CACHE


def uneven(**options):
    """A model whose attention reads hidden states of many sizes."""
    model, generator = tiny_model("llama", **options), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.copy_(3 * torch.rand(64, generator=generator).square())
    return model


@pytest.fixture(scope="module")
def llama():
    return uneven()


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (5, 12), (2, 12)])
def test_scores_are_the_largest_normalised_probabilities(start, stop, monkeypatch):
    monkeypatch.setattr("wildcat_kv.compressors.kvzip._QUERIES_AT_ONCE", 4)
    n, again, hidden = 12, 10, 7
    keys, queries, values = (torch.randn(2, h, m, d) for h, m, d in _shapes(n, again))
    weights, norms = torch.randn(HEADS * GROUP, DV, hidden), 0.5 + torch.rand(2, again)
    repetition = Repetition(queries, keys, values, start, stop, SCALE, weights, norms)
    found = KVzipPlus().reread(repetition)
    assert found.shape == (2, HEADS, stop - start, 1)
    for b in range(2):
        for h in range(HEADS):
            best = [0.0] * (stop - start)
            for g in range(GROUP):
                for i in range(again):
                    seen = [*range(min(SINK, start)), *range(start, stop), *range(n, n + i + 1)]
                    query = queries[b, h * GROUP + g, i].double()
                    scores = {entry: math.exp(SCALE * float(query @ keys[b, h, entry].double())) for entry in seen}
                    for entry in range(start, stop):
                        added = float((values[b, h, entry].double() @ weights[h * GROUP + g].double()).norm())
                        score = scores[entry] / sum(scores.values()) * added / float(norms[b, i])
                        best[entry - start] = max(best[entry - start], score)
            torch.testing.assert_close(found[b, h, :, 0], torch.tensor(best), rtol=1e-4, atol=1e-6)


def _shapes(n, again):
    return (HEADS, n + again, D), (HEADS * GROUP, again, D), (HEADS, n + again, DV)


def normalised_attention(ids):
    """The scores of rows of ids from the model's own probabilities, hidden states and projections."""
    model, tokenizer, n, read = uneven(attention="eager"), Letters(), ids.shape[1], []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(kwargs["hidden_states"]), with_kwargs=True
        )
    ask, answer = (
        tokenizer(text).input_ids.expand(ids.shape[0], -1)
        for text in ("\n\nRepeat the previous context exactly.", "\n")
    )
    cache = DynamicCache(config=model.config)
    model(ids, **{CACHE: cache})
    read.clear()
    attentions = model(torch.cat((ask, answer, ids), 1), **{CACHE: cache}, output_attentions=True).attentions
    scores = []
    for layer, probabilities in enumerate(attentions):
        added = torch.zeros(*probabilities.shape[:2], n)
        for head in range(4):
            alone = torch.zeros(ids.shape[0], n, 4, 16)
            alone[:, :, head] = cache.layers[layer].values[:, head // 2, :n]
            added[:, head] = model.model.layers[layer].self_attn.o_proj(alone.flatten(2)).norm(dim=-1)
        asking = read[layer].norm(dim=-1)[:, None, :, None]
        scores.append((probabilities[..., :n] / asking * added.unsqueeze(2)).amax(2).unflatten(1, (2, 2)).amax(2))
    return torch.stack(scores)


@torch.no_grad()
def test_a_context_is_scored_by_its_models_weights_and_hidden_states(llama):
    ids = random_ids(2, 90)
    context = Context(llama, ids)
    scores = torch.stack(context.reread(KVzipPlus(), Letters()))[..., 0]
    torch.testing.assert_close(scores, normalised_attention(ids), rtol=1e-3, atol=1e-6)
    plain = torch.stack(context.reread(KVzip(), Letters()))[..., 0]
    assert not torch.equal(plain.flatten(1).argsort(), scores.flatten(1).argsort())
    assert not any(layer.self_attn._forward_pre_hooks for layer in llama.model.layers)


def test_a_context_of_parts_is_scored_part_by_part(llama, monkeypatch):
    monkeypatch.setattr("wildcat_kv.contexts.context._CHUNK", 40)
    context, parts = Context(llama, random_ids(2, 90)), []
    monkeypatch.setattr(KVzipPlus, "reread", lambda self, part: parts.append(part) or part.values[:, :, :1, :1])
    context.reread(KVzipPlus(), Letters())
    assert [(part.start, part.stop) for part in parts[::3]] == [(0, 40), (40, 80), (80, 90)]
    for number, part in enumerate(parts):
        weight = llama.model.layers[number % 3].self_attn.o_proj.weight
        assert torch.equal(part.output_projection.flatten(0, 1), weight.mT)
        assert part.input_norms.shape == (2, part.queries.shape[2])
    assert len({float(part.input_norms.sum()) for part in parts}) == 9


def test_the_slots_of_all_layers_go_to_the_highest_scores(llama):
    context = Context(llama, random_ids(1, 100))
    scores = torch.stack(context.reread(KVzipPlus(), Letters()))[..., 0]
    cache = context.compress(compressor="kvzip_plus", tokenizer=Letters(), ratio=0.5, sink=0, window=0)
    least = scores.flatten().topk(3 * 2 * 50).values[-1]
    for layer, own in zip(cache.layers, scores, strict=True):
        held = layer.state.storage.entries.valid.sum(-1)
        assert torch.equal(held[0], (own[0] >= least).sum(-1))


def test_a_model_whose_projections_cannot_be_read_is_refused():
    context = Context(tiny_model("gpt2"), random_ids(1, 50))
    with pytest.raises(ValueError, match=r"compressor=KVzipPlus weighs values .*GPT2Attention, and it has no o_proj"):
        context.compress(compressor="kvzip_plus", tokenizer=Letters(), ratio=0.5)


def test_a_text_read_once_is_refused(llama):
    with pytest.raises(ValueError, match=r"KVzipPlus has no scores; .*compressor=KVzipPlus\(layerwise=False\)"):
        KVzipPlus().compress(make(Size(), carried_state=torch.zeros(1, HEADS, Size().held, 1)), 4)
    with pytest.raises(ValueError, match="compressor='kvzip_plus' reads the context a second time"):
        WildCatCache(llama.config, compressor="kvzip_plus", ratio=0.5)
