"""Layers in bands: quantised slots, and heads that hold unequally much."""

from contextlib import nullcontext

import pytest
import torch
import transformers as tf

from tests.driver import METHODS, SCALE, assert_same, read, small_cache, state, tokens
from tests.tiny import SMALL, random_ids, tiny_model
from tests.words import tokenizer
from wildcat_kv import CompressedCache, Context, WildCatCache, weighted_attention
from wildcat_kv.cache.bands import BandedStorage
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.joining import join_caches
from wildcat_kv.cache.packed import Segment
from wildcat_kv.compressors import H2O, AdaKV, Compressed, Compressor, KNorm
from wildcat_kv.compressors.scorer import keep_best_by_head
from wildcat_kv.hook.keyword import CACHE


class Slanted(Compressor):
    """Give the first head a tenth of a layer's slots, and the others the rest."""

    def compress(self, block, rank):
        rows, heads = block.keys.shape[:2]
        counts = torch.full((rows, heads), rank + (rank - rank // 10) // (heads - 1))
        counts[:, 0] = rank // 10
        scores = -block.keys.norm(dim=-1)
        found = keep_best_by_head(block, scores, counts.clamp(max=block.items))
        return Compressed(found.coreset, found.columns)


def storages(cache):
    return [layer.state.storage for layer in cache.layers if hasattr(layer, "announce")]


def columns(cache):
    """Entries of all heads that take memory, padding included, and those that are valid."""
    held = storages(cache)
    taken = sum(band.columns * len(band.places) for storage in held for band in storage.bands)
    return taken, sum(int(storage.entries.valid.sum()) for storage in held)


def check_attention(cache, queries, tolerance=1e-4):
    """Every layer attends to all that it holds."""
    for layer in cache.layers:
        held, box = layer.state.storage.entries, layer.state.value_range
        found = layer.attend(queries, *layer.state.storage.view(), SCALE, {})
        numbers = (held.keys, held.numerators(), held.weights)
        own = {"scale": SCALE, "valid": held.valid, "causal": True, "value_range": box and box.tensors()}
        expected = weighted_attention(queries, *numbers, **own)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# Storage


@pytest.mark.parametrize(
    ("method", "bits", "group"), [("wildcat", 8, 8), ("keydiff", 4, 64), ("adakv", 3, 16), ("h2o", 2, 8)]
)
def test_what_is_quantised_is_never_written_again_under_a_ratio(method, bits, group):
    cache, (keys, values) = small_cache(method=method, ratio=0.3, bits=bits, group=group), tokens(2, 400)
    read(cache, keys, values, 0, 250)
    held = {}
    for step in range(250, 400):
        for number, storage in enumerate(storages(cache)):
            for band in storage.bands:
                for segment in band.packed:
                    key = (number, tuple(band.places), segment.keys.size)
                    for side, tensors in (("k", segment.keys.tensors()), ("v", segment.values.tensors())):
                        for part, tensor in enumerate(tensors):
                            before = held.get((key, side, part), tensor)
                            assert torch.equal(tensor[:, : before.shape[1]], before)
                            held[key, side, part] = tensor
        read(cache, keys, values, step, 1)
    assert cache.stored_length() > 100


@pytest.mark.parametrize(
    ("bits", "length"), [*((8, length) for length in (2, 11, 12, 20, 75, 76)), (4, 300), (3, 90), (2, 90)]
)
def test_at_ratio_1_all_tokens_are_kept(bits, length):
    """Prompts shorter than sink and window, than a group, and longer; then token by token."""
    cache, (keys, values) = small_cache(ratio=1.0, bits=bits), tokens(2, length + 80)
    read(cache, keys, values, 0, length)
    for step in range(length, length + 80):
        read(cache, keys, values, step, 1)
    for number, layer in enumerate(cache.layers):
        held = layer.state.storage.entries
        assert (held.valid.sum(-1) == length + 80).all() and (held.weights[held.valid] == 1).all()
        assert layer.state.progress.rows[0].exact + layer.state.progress.since_fold < 8 + 2 * 64
        for b in range(2):
            for h in range(2):
                order = held.keys[b, h][held.valid[b, h]], keys[number, b, h]
                # Half a step of numbers between -4 and 4, of which some are still exact.
                error = torch.stack([(order[0] - key).abs().amax(-1).amin() for key in order[1]])
                assert error.max() <= 9 / (2**bits - 1) / 2
    check_attention(cache, keys[0][:, :, -1:].repeat_interleave(2, 1))


@pytest.mark.parametrize("ratio", [0.1, 0.5])
@pytest.mark.parametrize("group", [8, 16, 64])
def test_generated_text_keeps_to_its_ratio_whatever_the_group(ratio, group):
    """Tokens become slots as they are only where nothing is to be dropped."""
    caches, (keys, values) = [small_cache(ratio=ratio, bits=bits, group=group) for bits in (None, 4)], tokens(1, 300)
    for cache in caches:
        read(cache, keys, values, 0, 100)
        for step in range(100, 300):
            read(cache, keys, values, step, 1)
    plain, quantised = (cache.layers[0].state.progress.rows[0] for cache in caches)
    assert (quantised.sink, quantised.slots, quantised.exact) == (plain.sink, plain.slots, plain.exact)


def expected_bytes(cache, slots, exact, *, d=16, bits=4, group=64):
    """Count by hand the bytes of a layer of two heads: numbers, scales, weights and flags."""
    slot = 2 * d * bits / 8 + 2 * 2 * d / group + 2 * 2 * (d // group if d % group == 0 else 1) + 2 + 1
    entry = 2 * d * 4 + 4 + 1
    return sum(2 * (slots * slot + exact * entry) for _ in cache.layers)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_memory_is_what_the_formula_says(bits):
    cache, (keys, values) = small_cache(ratio=0.25, bits=bits), tokens(1, 8000)
    read(cache, keys, values, 0, 8000)
    assert cache.stored_length() == pytest.approx(2000, abs=8)
    # With eight free columns, as a band has.
    assert cache.memory_bytes() == pytest.approx(expected_bytes(cache, 2000 - 11, 11 + 8, bits=bits), rel=0.03)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.15), (4, 0.085), (3, 0.07), (2, 0.055)])
def test_a_quarter_of_the_slots_takes_this_share_of_the_exact_cache(bits, most):
    """Shapes of the default model, the published sink and window, 8,000 tokens in bfloat16."""
    small = {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64}
    cache = WildCatCache(tf.LlamaConfig(**{**small, "hidden_size": 192}), compressor="wildcat", ratio=0.25, bits=bits)
    keys, values = (side.to(torch.bfloat16) for side in tokens(1, 8000, heads=3, channels=64))
    read_alone(cache, keys, values, 0, 8000)
    assert cache.stored_length() == pytest.approx(2000, abs=8)
    assert cache.memory_bytes() <= most * (keys.nbytes + values.nbytes)


def test_the_default_dtype_of_the_program_does_not_matter():
    caches = []
    for dtype in (torch.float32, torch.bfloat16):
        cache, (keys, values) = small_cache(ratio=0.3, bits=4, group=8), tokens(1, 150)
        torch.set_default_dtype(dtype)
        try:
            read(cache, keys, values, 0, 100)
            outputs = [read(cache, keys, values, step, 1) for step in range(100, 150)]
        finally:
            torch.set_default_dtype(torch.float32)
        caches.append((state(cache), outputs))
    assert_same(caches[0][0], caches[1][0])
    for ours, theirs in zip(caches[0][1][-1], caches[1][1][-1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", [Slanted(), AdaKV(KNorm()), AdaKV(H2O(recent=0.1))])
@pytest.mark.parametrize("chunk", [4000, 500])
def test_unequal_heads_store_what_is_counted(method, bits, chunk):
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 4})
    cache = CompressedCache(config, compressor=method, ratio=0.25, sink=3, window=8, bits=bits, group=16)
    keys, values = tokens(1, 4000, heads=4)
    keys[:, :, 1] *= 0.3
    keys[:, :, 2] *= 0.6
    for start in range(0, 4000, chunk):
        read_alone(cache, keys, values, start, chunk)
    taken, valid = columns(cache)
    assert valid == pytest.approx(1000 * 4 * 2, rel=0.02)
    # Heads that share packed groups stay together: of a text in chunks, some are filled up with padding.
    slack = 1.02 if bits is None or chunk == 4000 else 1.06
    assert taken <= valid * slack
    assert cache.stored_length(0) <= 1000 * slack


def read_alone(cache, keys, values, start, count):
    """As `read`, with one query head a key head."""
    cache.layers[0].announce(keys.shape[1], count, None)
    for index, layer in enumerate(cache.layers):
        part = slice(start, start + count)
        cache.update(keys[index][:, :, part], values[index][:, :, part], index)
        layer.after_attention(keys[index][:, :, part] + 0.5, SCALE)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("budget", [{"ratio": 0.4}, {"max_tokens": 60}, {"ratio": 1.0}])
def test_every_method_takes_bits(method, budget):
    """Rows that fold at different times, an exact layer, groups larger than all slots."""
    exact = {} if "max_tokens" in budget else {"exact_layers": [0]}
    cache, (keys, values) = small_cache(method=method, bits=4, **budget, **exact), tokens(3, 200)
    mask = torch.ones(3, 200, dtype=torch.bool)
    mask[0, :50], mask[1, 30:44], mask[2, 101:109] = False, False, False
    for start, stop in ((0, 70), (70, 110), *((at, at + 1) for at in range(110, 200))):
        read(cache, keys, values, start, stop - start, mask)
    check_attention(cache, keys[1][:, :, -1:].repeat_interleave(2, 1))
    first, second = storages(cache)
    assert isinstance(second, BandedStorage) and isinstance(first, BandedStorage) == (not exact)
    if budget == {"ratio": 1.0}:
        assert [int(count) for count in second.entries.valid[:, 0].sum(-1)] == [150, 186, 192]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inference", [False, True])
def test_models_of_any_dtype_and_modes_of_torch(dtype, inference):
    model = tiny_model("llama").to(dtype)
    exact = tf.DynamicCache(config=model.config)
    texts = random_ids(2, 120), random_ids(2, 9, 5)
    expected = [model(ids, **{CACHE: exact}).logits for ids in texts]
    for autocast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        if not isinstance(autocast, nullcontext) and (dtype != torch.float32 or inference):
            continue
        cache = WildCatCache(model.config, compressor="wildcat", ratio=1.0, bits=8, sink=4, window=4, group=8)
        with torch.enable_grad(), torch.inference_mode(inference), autocast:
            found = [model(ids, **{CACHE: cache}).logits for ids in texts]
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).abs().mean() < 0.1 * theirs.abs().mean()
        if isinstance(autocast, nullcontext):  # out of the mode that it was filled in
            model(random_ids(2, 1), **{CACHE: cache})


def test_a_tolerance_goes_with_bits():
    model = tiny_model("llama")
    cache = WildCatCache(model.config, compressor="query_wildcat", ratio="auto", tolerance=0.2, bits=4, window=8)
    model.generate(random_ids(1, 200), **{CACHE: cache}, max_new_tokens=60, min_new_tokens=60)
    assert all(isinstance(storage, BandedStorage) for storage in storages(cache))
    assert cache.error_report() is not None and cache.get_seq_length() == 259


def test_kvzip_takes_bits():
    model = tiny_model("llama")
    plain, quantised = (
        Context(model, random_ids(1, 400)).compress(compressor="kvzip", tokenizer=tokenizer(), ratio=0.25, bits=bits)
        for bits in (None, 4)
    )
    counts = [[int(storage.entries.valid.sum()) for storage in storages(cache)] for cache in (plain, quantised)]
    assert counts[0] == counts[1]
    assert quantised.memory_bytes() < plain.memory_bytes()
    assert model(random_ids(1, 9), **{CACHE: quantised}).logits.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 4, 20), (4, 8, 24)])
def test_one_key_head_values_of_other_widths_and_many_rows(shape):
    heads, rows, d_v = shape
    small = {**SMALL, "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = tf.LlamaConfig(**small)
    cache = WildCatCache(config, compressor="wildcat", ratio=0.5, sink=3, window=8, bin_rank=4, bits=4, group=8)
    keys, values = tokens(rows, 120, heads=heads)[0], tokens(rows, 120, seed=1, heads=heads, channels=d_v)[1]
    for start, count in ((0, 60), (60, 50), *((at, 1) for at in range(110, 120))):
        read_alone(cache, keys, values, start, count)
    check_attention(cache, keys[0][:, :, -1:])


def test_a_weight_that_divides_nothing_stays_one():
    """Half precision must not round a weight up to where numerators are divided by it."""
    weights = torch.tensor([2**-7 - 2**-20, 2**-7, -3.0, 0.001, 1.0, 7e4, 0.5, 0.25]).view(1, 1, 8)
    like = Entries(torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4), weights, weights != 0, torch.zeros(1, 1, 8, 0))
    back = Segment.of(like, 8, 8, 4).entries(torch.float32, torch.float32)
    close = torch.isclose(back.numerators(), like.numerators(), rtol=0.05, atol=0.05)
    assert close[:, :, :5].all() and close[:, :, 6:].all() and torch.isfinite(back.numerators()).all()


# Operations


def filled(method="adakv", rows=2, **settings):
    cache = small_cache(method=method, **{"ratio": 0.3, "bits": 4, "group": 16, **settings})
    keys, values = tokens(rows, 300)
    keys[:, :, 1] *= 0.3
    read(cache, keys, values, 0, 200)
    for step in range(200, 230):
        read(cache, keys, values, step, 1)
    assert all(isinstance(storage, BandedStorage) for storage in storages(cache))
    return cache, keys, values


@pytest.mark.parametrize("bits", [None, 3])
def test_moved_and_offloaded_it_goes_on_alike(bits):
    cache, keys, values = filled(bits=bits)
    other, before = cache.clone(), state(cache)
    for layer in other.layers:
        layer.state.move(torch.device("cpu"))
        layer.state.storage.offload()
        layer.state.storage.to(torch.device("cpu"))
    assert_same(state(other), before)
    for step in range(230, 300):
        ours, theirs = read(other, keys, values, step, 1), read(cache, keys, values, step, 1)
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert_same(state(other), state(cache))


@pytest.mark.parametrize("method", ["wildcat", "adakv", "h2o", "snapkv", "query_wildcat"])
@pytest.mark.parametrize("budget", [{"ratio": 0.3}, {"max_tokens": 50}])
def test_a_saved_cache_goes_on_bit_for_bit(method, budget, tmp_path):
    settings = {"ratio": None, **budget, "bits": 4}
    cache, keys, values = filled(method, **settings)
    path = tmp_path / "context.safetensors"
    cache.save(path)
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    loaded = CompressedCache.load(path, config, compressor=cache.compressor).clone()
    assert_same(state(loaded), state(cache))
    packed = [[tensor for storage in storages(each) for tensor in storage.tensors()] for each in (cache, loaded)]
    assert len(packed[0]) == len(packed[1])
    assert loaded.stored_length() == cache.stored_length()
    for step in range(230, 300):
        ours, theirs = read(loaded, keys, values, step, 1), read(cache, keys, values, step, 1)
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert_same(state(loaded), state(cache))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("budget", [{"ratio": 0.3}, {"max_tokens": 60}])
@pytest.mark.parametrize("index", [[0, 1, 0], [0, 0], [1, 1, 1, 1], [2, 0]])
def test_rows_chosen_of_unlike_ones_go_on_alike_in_all_layers(index, budget, bits, tmp_path):
    """The fullest row of a layer may leave; layers must fold together all the same."""
    cache, (keys, values) = small_cache(method="adakv", bits=bits, group=8, **budget), tokens(3, 300)
    keys[0, :, 1] *= 0.2
    mask = torch.ones(3, 300, dtype=torch.bool)
    mask[0, :150], mask[1, :60] = False, False
    read(cache, keys, values, 0, 200, mask)
    cache.reorder_cache(torch.tensor(index))
    keys, values, mask = keys[:, index], values[:, index], mask[index]
    cache.save(tmp_path / "context.safetensors")
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    loaded = CompressedCache.load(tmp_path / "context.safetensors", config, compressor=cache.compressor)
    assert_same(state(loaded), state(cache))
    for step in range(200, 300):
        read(cache, keys, values, step, 1, mask)
        numbers = [layer.state.progress for layer in cache.layers]
        assert numbers[0].folded_at == numbers[1].folded_at
        counted = [layer.state.stored - layer.state.progress.spare for layer in cache.layers]
        assert counted[0] == counted[1]
    check_attention(cache, keys[1][:, :, -1:].repeat_interleave(2, 1))


@pytest.mark.parametrize("lengths", [(100, 100), (100, 9), (9, 100), (100, 15, 100), (300, 40)])
def test_joined_caches_keep_all_tokens(lengths):
    """At ratio 1 none is lost, whichever parts were too short to be quantised, then and later."""
    parts = []
    for seed, length in enumerate(lengths):
        cache, (keys, values) = small_cache(ratio=1.0, bits=8, group=8), tokens(1, length, seed)
        read(cache, keys, values, 0, length)
        parts.append(cache)
    joined, (keys, values) = join_caches(parts), tokens(1, 400, seed=9)
    for step in range(lengths[-1], lengths[-1] + 60):
        read(joined, keys, values, step, 1)
    for storage in storages(joined):
        assert (storage.entries.valid.sum(-1) == sum(lengths) + 60).all()
    check_attention(joined, keys[0][:, :, -1:].repeat_interleave(2, 1))


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"bits": 4.0}, None),
        ({"bits": 4, "group": 12}, "group"),
        ({"bits": 4, "group": 0}, "group"),
        ({"bits": 4, "group": -8}, "group"),
        ({"bits": 4, "group": "64"}, "group"),
        ({"bits": 4, "static": True, "ratio": None, "max_tokens": 100}, "static=True with bits=4"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    config = tf.LlamaConfig(**SMALL)
    if message is None:
        assert WildCatCache(config, compressor="wildcat", **{"ratio": 0.5, **settings}).settings.bits == 4
        return
    with pytest.raises(ValueError, match=message) as error:
        WildCatCache(config, compressor="wildcat", **{"ratio": 0.5, **settings})
    assert "\n" not in str(error.value)


def test_a_method_that_takes_no_bits_is_refused():
    class Delicate(Slanted):
        takes_bits = False

    with pytest.raises(ValueError, match="bits=4: the slots of Delicate must not be quantised") as error:
        CompressedCache(tf.LlamaConfig(**SMALL), compressor=Delicate(), ratio=0.5, bits=4)
    assert "\n" not in str(error.value)


def test_keys_too_large_are_refused_before_anything_changes():
    cache, (keys, values) = small_cache(ratio=1.0, bits=4), tokens(1, 100)
    keys[1, 0, 1, 50, 3] = 7e4
    with pytest.raises(ValueError, match="layer 1: keys beyond 65504, too large for bits=4") as error:
        read(cache, keys, values, 0, 100)
    assert "\n" not in str(error.value)
    assert cache.layers[1].state.stored == 100


def test_values_may_be_of_any_size():
    cache, (keys, values) = small_cache(ratio=1.0, bits=8), tokens(1, 100)
    values[:, :, :, 50] *= 1e30
    read(cache, keys, values, 0, 100)
    check_attention(cache, keys[0][:, :, -1:].repeat_interleave(2, 1))
    for layer in cache.layers:
        largest = layer.state.storage.entries.values.abs().amax(2)
        assert torch.isfinite(largest).all() and (largest > 1e28).any()
