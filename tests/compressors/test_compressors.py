"""Every method in the same cache: one matrix of what all of them must do, and how users bring their own."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from tests.compressors.definitions import DEFINITIONS
from tests.driver import EVEN, METHODS, assert_same, read, small_cache, state, tokens
from tests.tiny import FAMILIES, SMALL, random_ids, tiny_model
from wildcat_kv import CompressedCache, WildCatCache, WildCatConfig, compressors
from wildcat_kv.cache.budget import block_size, kept_tokens
from wildcat_kv.cache.sizes import stored_tokens
from wildcat_kv.compressors import (
    H2O,
    RKV,
    AdaKV,
    Compressor,
    KVBlock,
    Scorer,
    SnapKV,
    TriAttention,
    available,
    registry,
    resolve,
)
from wildcat_kv.compressors.ours import OURS
from wildcat_kv.hook.keyword import CACHE

NAMES = list(OURS)
TWICE = {"kvzip", "kvzip_plus", "rereading_matching", "rereading_wildcat"}
BUDGETS = [{"ratio": 0.25}, {"max_tokens": 90}]
FAMILY_SET = (*FAMILIES, "granite", "gpt_oss", "qwen3_next")


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def make(model, method, **settings):
    return CompressedCache(model.config, compressor=METHODS[method], **settings)


# One matrix for all methods


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILY_SET)
@pytest.mark.parametrize("budget", BUDGETS)
def test_generation_stays_within_its_budget(family, method, budget):
    model = tiny_model(family)
    cache = make(model, method, **budget)
    out = model.generate(random_ids(2, 160), **{CACHE: cache}, max_new_tokens=60, do_sample=False)
    seen = out.shape[1] - 1
    limit = budget.get("max_tokens") or kept_tokens(seen, budget["ratio"]) + block_size(cache.settings)
    assert 0.6 * kept_tokens(seen, 0.25) < stored_tokens(cache) <= limit
    assert cache.get_seq_length(first_full(cache)) == seen
    if method in EVEN:
        assert cache.stored_length() <= limit


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [{"ratio": 1.0}, {"max_tokens": 400}])
def test_within_budget_every_logit_is_the_exact_caches(llama, method, budget):
    cache, exact = make(llama, method, **budget), DynamicCache(config=llama.config)
    ids = random_ids(2, 120)
    for part in (ids[:, :80], ids[:, 80:81], ids[:, 81:]):
        assert torch.equal(*(llama(part, **{CACHE: kind}).logits for kind in (cache, exact)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_prompt_is_brought_to_its_budget_exactly(method, budget):
    keys, values = tokens(1, 300)
    cache = small_cache(method=method, **budget)
    read(cache, keys, values, 0, 300)
    even = small_cache(method="uniform", **budget)
    read(even, keys, values, 0, 300)
    assert stored_tokens(cache) == stored_tokens(even) == even.stored_length()


@pytest.mark.parametrize("method", METHODS)
def test_beams_and_returned_sequences_follow_their_rows(llama, method):
    options = {"max_new_tokens": 30, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    ids = random_ids(2, 100)
    within = llama.generate(ids, **{CACHE: make(llama, method, ratio=1.0)}, **options)
    assert torch.equal(within, llama.generate(ids, **{CACHE: DynamicCache(config=llama.config)}, **options))
    beyond = llama.generate(ids, **{CACHE: make(llama, method, ratio=0.25)}, num_return_sequences=3, **options)
    assert beyond.shape == (6, 130)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 6}, {"prefill_chunk_size": 50}], ids=lambda options: next(iter(options))
)
def test_drafts_and_prompts_in_chunks(llama, method, options):
    """Within budget as the exact cache, beyond it within its share."""
    ids = random_ids(1, 50).repeat(1, 4)
    options = {**options, "max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
    exact = llama.generate(ids, **{CACHE: DynamicCache(config=llama.config)}, **options)
    assert torch.equal(llama.generate(ids, **{CACHE: make(llama, method, ratio=1.0)}, **options), exact)
    cache = make(llama, method, ratio=0.25)
    assert llama.generate(ids, **{CACHE: cache}, **options).shape == exact.shape
    assert 50 < stored_tokens(cache) <= kept_tokens(260, 0.25) + block_size(cache.settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_padded_row_answers_as_it_does_alone(llama, method, budget):
    """Two prompts of different lengths, then a question."""
    ids, question = random_ids(2, 150), random_ids(2, 12, seed=3)
    mask = torch.ones(2, 162, dtype=torch.int64)
    mask[0, :41] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    together = make(llama, method, **budget)
    llama(ids, attention_mask=mask[:, :150], position_ids=positions[:, :150], **{CACHE: together})
    answers = llama(question, attention_mask=mask, position_ids=positions[:, 150:], **{CACHE: together}).logits
    for row, start in ((0, 41), (1, 0)):
        alone, pair = make(llama, method, **budget), slice(row, row + 1)
        llama(ids[pair, start:], **{CACHE: alone})
        expected = llama(question[pair], **{CACHE: alone}).logits
        torch.testing.assert_close(answers[pair], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_saved_and_cloned_caches_go_on_alike(method, budget, tmp_path):
    keys, values = tokens(2, 250)
    cache = small_cache(method=method, **budget)
    for at, count in ((0, 120), (120, 1), (121, 20)):
        read(cache, keys, values, at, count)
    path = tmp_path / "context.safetensors"
    cache.save(path)
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    compressor = cache.compressor if method == "wildcat" else METHODS[method]
    # A clone of it, bit for bit: where a file is mapped to, sums may differ in their last bits.
    named = {} if method in OURS else {"compressor": method}  # an installed package's is named again
    loaded, fork = CompressedCache.load(path, config, **named).clone(), cache.clone()
    assert loaded.compressor == compressor
    for at in range(141, 250):
        outputs = [read(kind, keys, values, at, 1) for kind in (cache, loaded, fork)]
        assert all(torch.equal(first, other) for first, *others in zip(*outputs, strict=True) for other in others)
    assert_same(state(cache), state(loaded))
    assert_same(state(cache), state(fork))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_nan_in_half_precision(method, budget, dtype):
    keys, values = (8 * part.to(dtype) for part in tokens(2, 260))
    cache = small_cache(method=method, **budget)
    for at, count in ((0, 150), *((at, 1) for at in range(150, 220)), (220, 40)):
        outputs = read(cache, keys, values, at, count)
        assert all(torch.isfinite(output).all() for output in outputs if output is not None)
    assert cache.layers[0].keys.dtype == dtype


@pytest.mark.parametrize("method", METHODS)
def test_equal_tokens_give_what_they_gave(method):
    """All keys alike, all values alike: whatever is kept, the answer is the value; unless a key is far away."""
    keys, values = (part[:, :, :, :1].expand(-1, -1, -1, 200, -1).clone() for part in tokens(1, 200))
    cache = small_cache(method=method, ratio=0.25)
    read(cache, keys, values, 0, 200)
    for output in read(cache, keys[:, :, :, :1], values[:, :, :, :1], 0, 1):
        expected = values[0, :, :, :1].repeat_interleave(2, 1), values[1, :, :, :1].repeat_interleave(2, 1)
        assert any(torch.allclose(output, one, rtol=1e-3, atol=1e-3) for one in expected)


def test_methods_that_need_no_queries_keep_none():
    keys, values = tokens(1, 100)
    for method in available():
        if method.reads_twice:
            continue
        cache = small_cache(method=method.name, ratio=0.25)
        read(cache, keys, values, 0, 100)
        assert (cache.layers[0].state.log is not None) == method.needs_queries


# Queries


def test_queries_are_kept_only_as_long_as_the_method_can_use_them():
    """Within a large budget nothing folds; of the queries the newest are enough."""
    keys, values = tokens(1, 900)
    cache = small_cache(method="snapkv", max_tokens=1000)
    for at in range(900):
        read(cache, keys, values, at, 1)
    log = cache.layers[0].state.log
    assert METHODS["snapkv"].window + cache.settings.window <= log.columns <= 100
    assert cache.layers[0].state.croppable >= cache.settings.window
    with pytest.raises(ValueError, match="can be taken back"):
        cache.crop(-200)


@pytest.mark.parametrize(
    "method", ["snapkv", "tova", "h2o", "expected_attention", "attention_matching", "query_wildcat"]
)
def test_what_is_taken_back_was_never_learnt_from(method):
    keys, values = tokens(1, 400)
    cache, other = (small_cache(method=method, max_tokens=300) for _ in range(2))
    for at in range(290):
        read(cache, keys, values, at, 1)
        read(other, keys, values, at, 1)
    read(cache, 9 * keys, values, 290, 6)
    cache.crop(-6)
    for at in range(290, 330):
        read(cache, keys, values, at, 1)
        read(other, keys, values, at, 1)
    assert_same(state(cache), state(other))
    assert cache.stored_length() < 300


@pytest.mark.parametrize("method", ["attention_matching", "query_wildcat"])
def test_the_queries_of_a_prompt_are_let_go_after_its_fold(llama, method):
    cache = make(llama, method, ratio=0.25)
    llama(random_ids(1, 600), **{CACHE: cache})
    carried = METHODS[method].carried
    for layer in cache.layers:
        held = sum(tensor.untyped_storage().nbytes() for tensor in layer.state.log.tensors())
        assert held == carried * 4 * 16 * 4


# The context is compressed before there is a question


@pytest.mark.parametrize("method", METHODS)
def test_no_method_reads_the_question(llama, method):
    """Whatever is asked later, the context's cache is the same; no block that was compressed held a later token."""
    blocks = []

    class Witness(type(METHODS[method])):
        def compress(self, block, rank):
            blocks.append(block.seen)
            return super().compress(block, rank)

        def survey(self, block):  # of layers that compress together
            blocks.append(block.seen)
            return super().survey(block)

    method = METHODS[method]
    witness = Witness(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})
    context = random_ids(1, 300)
    kept = []
    for seed in (1, 2):
        cache = CompressedCache(llama.config, compressor=witness, ratio=0.25)
        llama(context, **{CACHE: cache})
        kept.append(state(cache))
        llama(random_ids(1, 20, seed=seed), **{CACHE: cache.clone()})
        assert_same(state(cache), kept[-1])
    assert_same(*kept)
    assert set(blocks) == {300}


# Names and plugins


def test_all_methods_are_listed_with_what_they_need():
    methods = {method.name: method for method in available()}
    assert list(methods)[: len(NAMES)] == NAMES
    assert all(method.summary.endswith(".") for method in methods.values())
    # An arXiv number, this library for a method of its own, or nothing.
    assert all(method.paper.startswith("arXiv 2") or method.paper in ("wildcat_kv", "") for method in methods.values())
    assert methods["query_wildcat"].paper == "wildcat_kv" and methods["wildcat"].paper == "arXiv 2602.10056"
    assert {name for name, method in methods.items() if not method.decodes} == {"kvzip", "kvzip_plus"}
    assert {name for name, method in methods.items() if method.reads_twice} == TWICE
    queries = {name for name in NAMES if DEFINITIONS[name].queries}
    assert {name for name in NAMES if methods[name].needs_queries} == queries


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TWICE])
def test_a_name_gives_the_method_as_it_is_by_default(llama, name):
    cache = CompressedCache(llama.config, compressor=name, ratio=0.25, seed=5)
    assert cache.compressor == resolve(name, WildCatConfig(ratio=0.25, seed=5))
    assert getattr(cache.compressor, "seed", 5) == 5


def test_a_method_by_name_takes_the_settings(llama):
    ids = random_ids(1, 200)
    first = CompressedCache(llama.config, compressor="wildcat", ratio=0.25, weights="clipped")
    second = WildCatCache(llama.config, compressor=compressors.WildCat(weights="clipped"), ratio=0.25)
    for cache in (first, second):
        llama(ids, **{CACHE: cache})
    assert_same(state(first), state(second))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"compressor": "snap", "ratio": 0.25}, ValueError, "compressor='snap': no such method; did you mean 'snapkv'"),
        (
            {"compressor": "nosuch", "ratio": 0.25},
            ValueError,
            "compressor='nosuch': no such method; there are auto, wildcat",
        ),
        ({"compressor": SnapKV, "ratio": 0.25}, TypeError, "is no method; pass an instance"),
        ({"compressor": 3, "ratio": 0.25}, TypeError, "compressor=3 is no method"),
        ({"compressor": "kvzip", "ratio": 0.25}, ValueError, r"compress_context\(model, tokenizer, text"),
        ({"compressor": "snapkv", "ratio": None}, ValueError, "neither of them given"),
    ],
)
def test_wrong_methods_are_named_and_change_nothing(llama, arguments, error, message):
    before = llama.config._attn_implementation
    with pytest.raises(error, match=message):
        CompressedCache(llama.config, **arguments)
    assert llama.config._attn_implementation == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(window=0), "window=0"),
        (lambda: SnapKV(kernel=4), "kernel=4 must be odd"),
        (lambda: H2O(recent=1.0), "recent=1.0"),
        (lambda: RKV(window=0), "window=0"),
        (lambda: RKV(kernel=4), "kernel=4 must be odd"),
        (lambda: RKV(importance=1.5), "importance=1.5"),
        (lambda: RKV(alike=2), "alike=2"),
        (lambda: TriAttention(future=0), "future=0"),
        (lambda: TriAttention(carried=0), "carried=0"),
        (lambda: AdaKV("snapkv"), "scorer='snapkv' gives no scores"),
        (lambda: AdaKV(safeguard=1.5), "safeguard=1.5"),
    ],
)
def test_wrong_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@dataclass(frozen=True)
class LongestValues(Scorer):
    """Keep the tokens with the longest values."""

    def score(self, block: KVBlock):
        return block.values.float().norm(dim=-1)


def test_a_users_own_method_is_passed_as_an_object(llama):
    cache = CompressedCache(llama.config, compressor=LongestValues(), ratio=0.25, sink=0, window=0)
    exact = DynamicCache(config=llama.config)
    for kind in (cache, exact):
        llama(random_ids(1, 200), **{CACHE: kind})
    for layer, whole in zip(cache.layers, exact.layers, strict=True):
        assert torch.equal(
            layer.values.norm(dim=-1).sort(descending=True).values, whole.values.norm(dim=-1).topk(50).values
        )


def test_a_method_of_an_installed_package_is_found_by_its_name(tmp_path):
    """In a process of its own, which sees a package that offers an entry point."""
    (tmp_path / "longest.py").write_text(
        "from wildcat_kv.compressors import Scorer\n"
        "class LongestValues(Scorer):\n"
        '    """Keep the tokens with the longest values."""\n'
        '    paper = "none yet"\n'
        "    def score(self, block):\n"
        "        return block.values.float().norm(dim=-1)\n"
    )
    info = tmp_path / "longest-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: longest\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\nlongest = longest:LongestValues\n")
    script = (
        "import json, tests.tiny as tiny\n"
        "from wildcat_kv import CompressedCache\n"
        "from wildcat_kv.hook.keyword import CACHE\n"
        "from wildcat_kv.compressors import available\n"
        "model = tiny.tiny_model('llama')\n"
        "cache = CompressedCache(model.config, compressor='longest', ratio=0.25)\n"
        "model(tiny.random_ids(1, 200), **{CACHE: cache})\n"
        "last = available()[-1]\n"
        "print(json.dumps([cache.stored_length(), last.name, last.summary, last.needs_queries, last.decodes]))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path.cwd())])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [50, "longest", "Keep the tokens with the longest values.", False, True]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("value", ["json:loads", "json:nothing", "no.such.package:Method"])
def test_a_broken_package_is_named_and_breaks_no_other(monkeypatch, llama, value):
    point = importlib.metadata.EntryPoint("odd", value, registry.GROUP)
    monkeypatch.setattr(registry.plugins, "entry_points", lambda group: [point])
    with pytest.warns(UserWarning, match=f"compressor='odd': the entry point {value}"):
        assert [method.name for method in available()] == NAMES
    with pytest.raises(ValueError, match=f"compressor='odd': the entry point {value}"):
        CompressedCache(llama.config, compressor="odd", ratio=0.25)
    assert CompressedCache(llama.config, compressor="snapkv", ratio=0.25).compressor == SnapKV()


# Files


@dataclass(frozen=True)
class ByPlace(Scorer):
    """Keep every so many tokens."""

    step: int = 2

    def score(self, block: KVBlock):
        return (torch.arange(block.keys.shape[2]) % self.step == 0).expand(block.valid.shape)


class Plain(Scorer):
    """Not a dataclass."""

    def __init__(self, power):
        self.power = power

    def score(self, block: KVBlock):
        return block.values.float().norm(dim=-1) ** self.power


@pytest.mark.parametrize(
    ("saved", "same", "other"),
    [
        (ByPlace(3), ByPlace(3), ByPlace(4)),
        (Plain(1), Plain(1), Plain(2)),
        (AdaKV(ByPlace(3)), AdaKV(ByPlace(3)), AdaKV(ByPlace(4))),
        (AdaKV(SnapKV(window=9)), "adakv", AdaKV(SnapKV(window=8))),
    ],
)
def test_a_file_is_loaded_with_the_method_that_saved_it(llama, tmp_path, saved, same, other):
    cache = CompressedCache(llama.config, compressor=saved, ratio=0.5)
    llama(random_ids(1, 100), **{CACHE: cache})
    path = tmp_path / "context.safetensors"
    cache.save(path)
    assert_same(state(CompressedCache.load(path, llama.config, compressor=same)), state(cache))
    with pytest.raises(ValueError, match="was compressed by"):
        CompressedCache.load(path, llama.config, compressor=other)
    with pytest.raises(ValueError, match="was compressed by"):
        WildCatCache.load(path, llama.config, compressor="wildcat")
    if same == "adakv":
        assert CompressedCache.load(path, llama.config).compressor == saved
    else:
        with pytest.raises(ValueError, match="is no method of this library; pass it as compressor"):
            CompressedCache.load(path, llama.config)


def test_parameters_that_cannot_be_written_are_named(llama, tmp_path):
    cache = CompressedCache(llama.config, compressor=Plain(torch.ones(1)), ratio=0.5)
    llama(random_ids(1, 100), **{CACHE: cache})
    with pytest.raises(ValueError, match="compressor=Plain: its parameter power is a Tensor"):
        cache.save(tmp_path / "context.safetensors")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("h2o", lambda own: own.update({"layers.0.memory": own["layers.0.memory"][..., :1]}), "remembers"),
        ("h2o", lambda own: own.pop("layers.0.memory"), "remembers"),
        ("snapkv", lambda own: own.update({"layers.0.memory": torch.zeros(1, 2, 25, 2)}), "remembers"),
        ("knorm", lambda own: own.update({"layers.0.queries.recent": torch.zeros(1, 4, 5, 16)}), "queries"),
        ("h2o", lambda own: own.pop("layers.1.queries.recent"), "queries are missing"),
        ("snapkv", lambda own: own["layers.1.queries.carried"].fill_(float("nan")), "queries do not fit"),
        ("snapkv", lambda own: own.update({"layers.0.queries.carried": torch.zeros(1, 3, 5, 16)}), "do not fit"),
        ("snapkv", lambda own: own.pop("layers.0.queries.carried"), "do not fit"),
    ],
)
def test_damage_to_what_a_method_needs_is_found(llama, method, change, message, tmp_path):
    path = tmp_path / "context.safetensors"
    cache = small_cache(method=method, ratio=0.25)
    keys, values = tokens(1, 105)
    read(cache, keys, values, 0, 100)
    read(cache, keys, values, 100, 5)
    cache.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    own = load_file(path)
    change(own)
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, path, metadata)
    config = tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    with pytest.raises(ValueError, match=f"is damaged.*{message}"):
        CompressedCache.load(path, config)


# Unequal heads


@pytest.mark.parametrize("method", ["adakv", "pyramidkv", "query_wildcat"])
@pytest.mark.parametrize("seed", range(6))
def test_rows_with_unequal_heads_move_with_all_that_is_theirs(method, seed):
    """In some layers rows hold as much as each other, in others not."""
    keys, values = tokens(2, 300, seed)
    moved, fresh = (small_cache(method=method, ratio=0.25) for _ in range(2))
    index = torch.tensor([1, 0, 1])
    read(moved, keys, values, 0, 40)
    moved.reorder_cache(index)
    read(fresh, keys[:, index], values[:, index], 0, 40)
    for at, count in ((40, 30), (70, 1), (71, 60)):
        for cache in (moved, fresh):
            read(cache, keys[:, index], values[:, index], at, count)
        for ours, theirs in zip(moved.layers, fresh.layers, strict=True):
            assert ours.state.progress.rows == theirs.state.progress.rows
            for row in range(3):
                first, second = (layer.state.storage.entries for layer in (ours, theirs))
                for head in range(2):
                    kept = [one.keys[row, head][one.valid[row, head]] for one in (first, second)]
                    assert torch.equal(*kept)


def test_a_method_that_only_compresses_prompts_bounds_no_generation(llama):
    class Once(LongestValues):
        decodes = False

    with pytest.raises(ValueError, match="max_tokens=90: Once compresses the prompt alone"):
        CompressedCache(llama.config, compressor=Once(), max_tokens=90)
    cache = CompressedCache(llama.config, compressor=Once(), ratio=0.25)
    llama.generate(random_ids(1, 200), **{CACHE: cache}, max_new_tokens=101, do_sample=False, eos_token_id=None)
    assert cache.stored_length() == 150  # a quarter of the prompt, and all that came later


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda found: changed(found, keys=found.coreset.keys[..., :3]), "its coreset has shapes"),
        (lambda found: changed(found, values=found.coreset.values.double()), "its coreset has shapes"),
        (lambda found: dataclasses.replace(found, columns=[1000, 1]), r"the 2 rows take \[1000, 1\]"),
        (lambda found: dataclasses.replace(found, columns=[5]), r"the 2 rows take \[5\]"),
        (lambda found: found.coreset, r"compress returned a Coreset; return a wildcat_kv\.compressors\.Compressed"),
    ],
)
def test_what_a_method_should_not_return_is_refused_and_nothing_is_lost(wrong, message):
    class Wrong(LongestValues):
        def compress(self, block, rank):
            return wrong(super().compress(block, rank))

    keys, values = tokens(2, 100)
    cache = CompressedCache(tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2}), compressor=Wrong(), ratio=0.25)
    with pytest.raises(ValueError, match=f"compressor=Wrong: .*{message}|{message}"):
        read(cache, keys, values, 0, 100)
    assert torch.equal(cache.layers[0].keys, keys[0]) and cache.layers[0].state.progress.folded_at == 0


def test_scores_of_the_wrong_shape_are_refused(llama):
    class Wrong(Scorer):
        def score(self, block):
            return block.values

    cache = CompressedCache(llama.config, compressor=Wrong(), ratio=0.25)
    with pytest.raises(ValueError, match=r"compressor=Wrong: its scores have shape \(1, 2, 100, 16\)"):
        llama(random_ids(1, 100), **{CACHE: cache})


def test_compressors_must_say_how_they_compress():
    with pytest.raises(TypeError):
        Compressor()


def changed(found, **tensors):
    """Replace tensors in the coreset that a method made."""
    return dataclasses.replace(found, coreset=dataclasses.replace(found.coreset, **tensors))


def first_full(cache):
    return next(index for index, layer in enumerate(cache.layers) if hasattr(layer, "announce"))


def test_a_contributor_needs_one_import():
    assert {kind.__name__ for kind in OURS.values()} <= set(compressors.__all__)
    needed = {"Compressed", "KVBlock", "Observation", "attention_probabilities", "keyed_noise", "take_columns"}
    assert needed <= set(compressors.__all__) and all(hasattr(compressors, name) for name in compressors.__all__)
