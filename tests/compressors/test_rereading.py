"""Query WildCat after a second reading: its scores decide, and are gone once they are used up."""

from dataclasses import replace

import pytest
import torch

from tests.compressors.blocks import HEADS, Size, make
from tests.contexts.test_context import Letters
from tests.tiny import random_ids, tiny_model
from wildcat_kv import Context, WildCatCache
from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.compressors import KVzip, QueryWildCat, RereadingWildCat
from wildcat_kv.hook.keyword import CACHE

PARAMETERS = {"bin_rank": 3, "queries": 6, "ahead": 5}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


SIZE = Size(sink=4, recent=56, window=6, queried=50)


def block(state, size=SIZE, **fields):
    return make(size, carried_state=state, **fields)


def test_the_scores_take_the_place_of_the_estimate():
    scores = torch.rand(1, HEADS, SIZE.held, 1)
    given, size = block(scores), SIZE.items
    found = RereadingWildCat(**PARAMETERS).survey(given)
    expected = given.slice_items(scores)[..., 0].masked_fill(~given.slice_items(given.valid), -torch.inf)
    assert torch.equal(found.recall, expected) and found.recall.shape[-1] == size
    plain = QueryWildCat(**PARAMETERS).survey(given)
    assert torch.equal(found.attention, plain.attention) and not torch.equal(found.recall, plain.recall)


@pytest.mark.parametrize("padding", [-90, 7])  # a head that keeps nearly all makes rows of more columns than tokens
def test_text_that_comes_later_is_compressed_by_the_estimate(padding):
    folded = replace(SIZE, slots=9)
    state = torch.rand(1, HEADS, folded.held, 1)  # the window still has its scores
    later = block(state, folded, seen=folded.held - padding)
    ours, plain = (kind(**PARAMETERS).survey(later) for kind in (RereadingWildCat, QueryWildCat))
    assert torch.equal(ours.recall, plain.recall)


def test_a_text_read_once_is_refused():
    with pytest.raises(ValueError, match=r"RereadingWildCat has no scores; .*compressor='rereading_wildcat'"):
        RereadingWildCat(**PARAMETERS).survey(block(torch.zeros(1, HEADS, SIZE.held, 1)))
    with pytest.raises(ValueError, match="compressor='rereading_wildcat' reads the context a second time"):
        WildCatCache(tiny_model("llama").config, compressor="rereading_wildcat", ratio=0.5)


def test_it_keeps_what_kvzip_scores_highest_and_goes_on(llama):
    context = Context(llama, random_ids(1, 200))
    scores = torch.stack(context.reread(KVzip(), Letters()))[..., 0]
    method = RereadingWildCat(bin_rank=4, attended=0.0, recalled=1.0)
    cache = context.compress(compressor=method, tokenizer=Letters(), ratio=0.3, sink=4, window=8)
    items = scores[..., 4:-8].flatten()
    best = items.topk(items.numel()).values
    kept = sum(int(layer.state.entries.valid.sum()) for layer in cache.layers) - 12 * scores[..., 0].numel()
    assert 0 < kept <= int(0.3 * 200) * scores[..., 0].numel()
    least = best[kept - 1]
    for layer, own in zip(cache.layers, scores, strict=True):
        entries = layer.state.entries
        for head in range(own.shape[1]):
            held = entries.keys[0, head][entries.valid[0, head]]
            whole = context.exact.layers[layer._index].state.entries.keys[0, head]
            there = (whole.unsqueeze(1) == held).all(-1).any(-1)
            assert there[own[0, head] > least].all()
    with torch.no_grad():
        for _ in range(60):
            llama(random_ids(1, 1), **{CACHE: cache})
    assert stored_tokens(cache) < 110  # what comes later is compressed, too
