"""Drives a cache without a model: keys and values by position, through the calls that a forward pass makes."""

import torch
import transformers as tf
from torch import nn

from tests.tiny import SMALL
from wildcat_kv import CompressedCache, WildCatCache, WildCatConfig, compressors

SCALE = 0.25


class Projecting(nn.Module):
    """An attention module's output projection, for four query heads of `channels`."""

    def __init__(self, channels=16, device=None):
        super().__init__()
        self.o_proj = nn.Linear(4 * channels, 24, bias=False, device=device, dtype=torch.float32)
        weights = torch.arange(24 * 4 * channels, device=device, dtype=torch.float32).view(24, -1)
        self.o_proj.weight = nn.Parameter((0.7 * weights).sin(), requires_grad=False)


# Every method that compresses what a cache reads, its windows as small as the caches of these tests.
METHODS = {
    **{
        method.name: compressors.resolve(method.name, WildCatConfig(ratio=1.0, bin_rank=4))
        for method in compressors.available()
        if method.decodes and not method.reads_twice
    },
    "snapkv": compressors.SnapKV(window=5, kernel=3),
    "pyramidkv": compressors.PyramidKV(window=5, kernel=3, beta=4),
    "balancekv": compressors.BalanceKV(block=8),
    "lagkv": compressors.LagKV(sink=2, lag=6),
    "cur": compressors.CUR(sink=2, window=5),
    "leverage": compressors.Leverage(sketch=6, sink=2),
    "compactor": compressors.Compactor(chunk=8, sketch=6, sink=2),
    "rkv": compressors.RKV(window=5, kernel=3),
    "triattention": compressors.TriAttention(future=9, carried=6),
    "expected_attention": compressors.ExpectedAttention(future=9, carried=6),
    "adakv": compressors.AdaKV(compressors.H2O(recent=0.25)),
    "criticalkv": compressors.CriticalKV(compressors.SnapKV(window=5, kernel=3)),
    "attention_matching": compressors.AttentionMatching(queries=20, carried=7),
    "query_wildcat": compressors.QueryWildCat(bin_rank=4, queries=20, carried=6, ahead=5, apart=40),
}
# Methods that give all heads and layers the same number of slots.
EVEN = [name for name in METHODS if name not in ("pyramidkv", "adakv", "query_wildcat")]


def small_cache(layers=2, method="wildcat", **settings):
    """A cache for two key heads of 16 channels, whose sinks, window and bins are small."""
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": layers})
    settings = {"sink": 3, "window": 8, "bin_rank": 4, **settings}
    if method == "wildcat":
        return WildCatCache(config, compressor="wildcat", **settings)
    return CompressedCache(config, compressor=METHODS[method], **settings)


def tokens(rows, length, seed=0, heads=2, channels=16):
    """Random keys and values (layers, rows, heads, length, channels), layers = 2."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, rows, heads, length, channels, generator=generator) for _ in range(2))
    return keys, values


def read(cache, keys, values, start, count, mask=None):
    """One forward pass over columns [start, start + count); the layers' outputs for fixed queries."""
    layers = [index for index, layer in enumerate(cache.layers) if hasattr(layer, "announce")]
    forward = cache.layers[layers[0]].announce(keys.shape[1], count, None if mask is None else mask[:, : start + count])
    outputs = []
    for number, index in enumerate(layers):
        part = slice(start, start + count)
        cache.update(keys[number][:, :, part], values[number][:, :, part], index)
        layer = cache.layers[index]
        queries = keys[number][:, :, part].repeat_interleave(2, 1) + 0.5
        if layer.needs_module:
            layer.meet(Projecting(), 4, 16)
        outputs.append(None if forward.uses_fallback else layer.attend(queries, *layer.state.storage.view(), SCALE, {}))
        layer.after_attention(queries, SCALE)
    return outputs


def state(cache):
    """Everything that a cache of ours knows, to be compared bit for bit."""
    found = []
    for layer in cache.layers:
        if not hasattr(layer, "announce") or layer.stored == 0:
            continue
        entries, folded = layer.state.storage.entries, layer.state.folded_range
        log = layer.state.log
        queries = [] if log is None else [tensor for tensor in (log.carried, log.recent()) if tensor is not None]
        boxes = [box.tensors() for box in (folded, layer.state.value_range) if box is not None]
        tensors = [tensor.clone() for tensor in (*entries.tensors(), *queries)]
        found.append((tensors, boxes, vars(layer.state.progress).copy()))
    return found


def assert_same(first, second, ignore=("record_past", "fold_from", "masked")):
    """Two states are equal bit for bit; `ignore` names numbers that only say when to look again."""
    assert len(first) == len(second)
    for (entries, boxes, numbers), (entries_2, boxes_2, numbers_2) in zip(first, second, strict=True):
        for name in numbers.keys() - set(ignore):
            assert numbers[name] == numbers_2[name], name
        for tensor, tensor_2 in zip(entries, entries_2, strict=True):
            assert torch.equal(tensor, tensor_2)
        assert len(boxes) == len(boxes_2)
        for box, box_2 in zip(boxes, boxes_2, strict=True):
            assert torch.equal(box[0], box_2[0]) and torch.equal(box[1], box_2[1])


def assert_row_is_alone(together, row, alone):
    """Compare the entries of a row of a batch with those of the row read by itself."""
    for head in range(together.valid.shape[1]):
        mine, its = together.valid[row, head], alone.valid[0, head]
        assert mine.sum() == its.sum()
        for name in ("keys", "values", "weights"):
            pair = getattr(together, name)[row, head][mine], getattr(alone, name)[0, head][its]
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)
