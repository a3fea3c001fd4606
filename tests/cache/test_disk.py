"""Saved contexts: what comes back is what was saved, in another process too, and nothing else is let in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.driver import assert_same, read, small_cache, state, tokens
from tests.tiny import random_ids, tiny_model
from wildcat_kv import CompressedCache, WildCatCache
from wildcat_kv.compressors import Uniform
from wildcat_kv.hook.keyword import CACHE


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def context(model, tmp_path, rows=1, **settings):
    """A saved context of 150 tokens, and the cache."""
    cache = WildCatCache(model.config, **(settings or {"ratio": 0.25}))
    model(random_ids(rows, 150), **{CACHE: cache})
    path = tmp_path / "context.safetensors"
    cache.save(path)
    return cache, path


def ask(model, cache, seed=3, steps=70):
    """Logits of a question and of greedy tokens after it: long enough for folds."""
    ids, logits = random_ids(len(cache.layers[-1].keys), 9, seed), []
    for _ in range(steps):
        logits.append(model(ids, **{CACHE: cache}).logits[:, -1:])
        ids = logits[-1].argmax(-1)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "settings", [{"ratio": 0.25}, {"ratio": 0.1, "min_tokens": 90}, {"max_tokens": 90}, {"ratio": 1.0}]
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "qwen3_next", "lfm2"])
def test_a_loaded_context_answers_as_the_saved_one(family, settings, tmp_path):
    model = tiny_model(family)
    cache, path = context(model, tmp_path, rows=2, **settings)
    loaded = WildCatCache.load(path, model.config)
    assert loaded.settings == cache.settings
    assert_same(state(loaded), state(cache), ignore=("fold_from",))
    loaded = loaded.clone()
    assert torch.equal(ask(model, loaded), ask(model, cache))
    assert_same(state(loaded), state(cache), ignore=("fold_from",))


def test_read_in_place_it_answers_alike_too(llama, tmp_path):
    """To float tolerance: some processors' kernels sum in another order where memory is not aligned."""
    cache, path = context(llama, tmp_path)
    loaded = WildCatCache.load(path, llama.config)
    torch.testing.assert_close(ask(llama, loaded, steps=20), ask(llama, cache, steps=20), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_file_is_mapped_and_neither_copied_nor_written_to(llama, tmp_path):
    _, path = context(llama, tmp_path)
    content = path.read_bytes()
    loaded = WildCatCache.load(path, llama.config)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    spans = [line.split()[0].split("-") for line in maps if line.endswith(str(path))]
    places = [tensor.data_ptr() for tensor in loaded.layers[1].state.storage.allocated.tensors()[:4]]
    for place in places:
        assert any(int(start, 16) <= place < int(stop, 16) for start, stop in spans)
    llama(random_ids(1, 9, 5), **{CACHE: loaded})  # there is room for them
    assert places == [tensor.data_ptr() for tensor in loaded.layers[1].state.storage.allocated.tensors()[:4]]
    assert path.read_bytes() == content


def test_padded_rows_and_half_precision_survive(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    mask = torch.ones(2, 151, dtype=torch.int64)
    mask[0, :40] = 0
    cache = WildCatCache(model.config, ratio=0.25)
    model(random_ids(2, 150), attention_mask=mask[:, :150], **{CACHE: cache})
    cache.save(tmp_path / "context.safetensors")
    loaded = WildCatCache.load(tmp_path / "context.safetensors", model.config)
    assert loaded.layers[0].keys.dtype == torch.bfloat16
    pair = (cache, loaded.clone())
    logits = [model(random_ids(2, 1), attention_mask=mask, **{CACHE: kind}).logits for kind in pair]
    assert torch.equal(*logits)


def test_a_recording_cache_can_still_be_rolled_back_after_loading(llama, tmp_path):
    keys, values = tokens(1, 80)
    cache = small_cache(ratio=0.25)
    cache.activate_past_recording()
    read(cache, keys, values, 0, 60)
    cache.save(tmp_path / "context.safetensors")
    loaded = WildCatCache.load(tmp_path / "context.safetensors", small_cache_config())
    for kind in (cache, loaded):
        kind.crop(-7)
    assert_same(state(cache), state(loaded), ignore=("fold_from",))


def small_cache_config():
    import transformers as tf

    from tests.tiny import SMALL

    return tf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_another_process_gives_the_very_same_answers(family, tmp_path):
    """Three questions of one context, here and there."""
    model = tiny_model(family)
    cache, path = context(model, tmp_path)
    model.save_pretrained(tmp_path / "model")
    here = [ask(model, cache.clone(), seed).argmax(-1).tolist() for seed in (3, 4, 5)]
    code = f"""
import json, torch, transformers
from tests.cache.test_disk import ask
from wildcat_kv import WildCatCache
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}).eval()
cache = WildCatCache.load({str(path)!r}, model.config)
with torch.no_grad():
    print(json.dumps([ask(model, cache.clone(), seed).argmax(-1).tolist() for seed in (3, 4, 5)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == here


def test_clones_are_independent(llama):
    cache = WildCatCache(llama.config, ratio=0.25)
    llama(random_ids(1, 150), **{CACHE: cache})
    before = state(cache)
    fork = cache.clone()
    assert fork.compressor is cache.compressor and fork.settings == cache.settings
    answer = ask(llama, fork)
    assert_same(before, state(cache), ignore=("fold_from",))
    assert torch.equal(ask(llama, cache), answer)


def test_other_methods_are_saved_and_loaded_with_their_compressor(llama, tmp_path):
    cache = CompressedCache(llama.config, compressor=Uniform(seed=3), ratio=0.25)
    llama(random_ids(1, 150), **{CACHE: cache})
    path = tmp_path / "context.safetensors"
    cache.save(path)
    loaded = CompressedCache.load(path, llama.config, compressor=Uniform(seed=3))
    assert torch.equal(ask(llama, loaded.clone()), ask(llama, cache))
    with pytest.raises(ValueError, match=r"compressed by .*Uniform.*compresses by .*WildCat"):
        WildCatCache.load(path, llama.config, compressor="wildcat")
    assert WildCatCache.load(path, llama.config).compressor == Uniform(seed=3)
    with pytest.raises(ValueError, match=r"'seed': 3.*'seed': 4"):
        CompressedCache.load(path, llama.config, compressor=Uniform(seed=4))


def contents(path):
    """The metadata, the header and the names of the tensors of a file."""
    with safe_open(path, "pt") as file:
        return file.metadata(), json.loads(file.metadata()["header"]), set(file.keys())


@pytest.mark.parametrize("method", ["wildcat", "snapkv", "h2o"])
def test_the_format_is_that_of_its_version(method, tmp_path):
    """Files of earlier releases must load: whoever changes a name here must raise the version."""
    model, path = tiny_model("gemma3"), tmp_path / "context.safetensors"
    cache = CompressedCache(model.config, compressor=method, ratio=0.25)
    model(random_ids(1, 150), **{CACHE: cache})
    cache.save(path)
    metadata, header, names = contents(path)
    assert metadata.keys() == {"format", "version", "header"}
    assert (metadata["format"], metadata["version"]) == ("wildcat_kv context", "5")
    assert header.keys() == {"model", "settings", "compressor", "layers", "positions", "text"}
    kinds = [layer["kind"] for layer in header["layers"]]
    assert set(kinds) == {"WildCatLayer", "DynamicSlidingWindowLayer"}
    entries = {"keys", "values", "weights", "valid", "folded.lowest", "folded.highest"}
    own = {"wildcat": set(), "snapkv": {"queries.carried"}, "h2o": {"memory"}}[method]
    for index, layer in enumerate(header["layers"]):
        assert layer.keys() == {"kind", "progress", "length", "bands", "attributes"}
        held = {name.removeprefix(f"layers.{index}.") for name in names if name.startswith(f"layers.{index}.")}
        if layer["kind"] == "WildCatLayer":
            assert layer["progress"]["seen"] == 150 and layer["attributes"] is None and layer["bands"] == []
            assert held == entries | own
        else:
            assert {"keys", "values"} <= held and layer["progress"] is None


# What is refused


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers is 3"),
        ({"head_dim": 32}, "head_dim is 16"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 2"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
    ],
)
def test_another_model_is_refused(changes, field, llama, tmp_path):
    _, path = context(llama, tmp_path)
    other = tiny_model("llama", **changes)
    with pytest.raises(ValueError, match=f"another model than config=LlamaConfig: {field}"):
        WildCatCache.load(path, other.config)
    assert other.config._attn_implementation == "sdpa"


def test_another_architecture_is_refused(llama, tmp_path):
    _, path = context(llama, tmp_path)
    with pytest.raises(ValueError, match="model_type is 'llama' in the one and 'qwen3' in the other"):
        WildCatCache.load(path, tiny_model("qwen3").config)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_refused(share, llama, tmp_path):
    _, path = context(llama, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        WildCatCache.load(path, llama.config)


def test_foreign_files_are_refused(llama, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no compressed context"):
        WildCatCache.load(path, llama.config)
    path.write_bytes(b"\x80\x04K\x01." * 50)  # a pickle, for example
    with pytest.raises(ValueError, match="no whole safetensors file"):
        WildCatCache.load(path, llama.config)
    with pytest.raises(FileNotFoundError, match="is no file"):
        WildCatCache.load(tmp_path / "missing.safetensors", llama.config)
    with pytest.raises(FileNotFoundError, match="is no file"):
        WildCatCache.load(tmp_path, llama.config)


def rewrite(path, change):
    """Write the file again with `change(metadata, tensors)` applied."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def header_change(change):
    def apply(metadata, tensors):
        header = json.loads(metadata["header"])
        change(header)
        metadata["header"] = json.dumps(header)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metadata, tensors: metadata.update(version="99"), "format version 99"),
        (lambda metadata, tensors: metadata.update(header="{"), "header does not fit"),
        (lambda metadata, tensors: metadata.pop("header"), "header does not fit"),
        (header_change(lambda header: header.update(surprise=1)), "surprise"),
        (header_change(lambda header: header["settings"].update(ratio=7)), "ratio"),
        (header_change(lambda header: header["layers"].pop()), "has layers"),
        (header_change(lambda header: header["layers"][1]["progress"].update(seen=9)), "have not read the same tokens"),
        (header_change(lambda header: header["layers"][1]["progress"]["rows"].clear()), "not read the same tokens"),
        (header_change(lambda header: header["layers"][0]["progress"].update(folded_at=-400)), "numbers do not fit"),
        (header_change(lambda header: header["layers"][0].update(length=9999)), "numbers do not fit"),
        (header_change(lambda header: header["layers"][0].update(length=None)), "numbers do not fit"),
        (lambda metadata, tensors: tensors.pop("layers.2.values"), "layer 2: values is missing"),
        (lambda metadata, tensors: tensors.update({"layers.0.keys": torch.zeros(1, 2, 3, 16)}), "layer 0: the shapes"),
        (lambda metadata, tensors: tensors.update({"layers.0.weights": torch.zeros(2)}), "layer 0: the shapes"),
        (lambda metadata, tensors: tensors.pop("layers.0.folded.lowest"), "layer 0: its value range"),
    ],
)
def test_damaged_files_are_refused(change, message, tmp_path):
    model = tiny_model("llama")
    _, path = context(model, tmp_path)
    fresh = tiny_model("llama")
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        WildCatCache.load(path, fresh.config)
    assert fresh.config._attn_implementation == "sdpa"


def foreign(change):
    """A change of the first layer, one of Transformers'."""
    return header_change(lambda header: change(header["layers"][0]["attributes"]))


WRONG_KEYS = {"layers.0.keys": torch.zeros(1, 2, 23, 16, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gemma3", foreign(lambda layer: layer.clear()), "layer 0: its attributes"),
        ("gemma3", foreign(lambda layer: layer.update(update="x")), "layer 0: its attributes"),
        ("gemma3", foreign(lambda layer: layer.update(sliding_window=9)), "sliding_window is 9"),
        ("gemma3", foreign(lambda layer: layer.update(cumulative_length=9)), "cumulative_length is 9"),
        ("gemma3", foreign(lambda layer: layer.update(record_past="yes")), "record_past"),
        ("gemma3", foreign(lambda layer: layer.update(dtype={"dtype": "load"})), "dtype 'load' cannot be read"),
        ("gemma3", foreign(lambda layer: layer.update(keys={"tensor": "gone"})), "tensor 'gone' cannot be read"),
        ("gemma3", foreign(lambda layer: layer.update(keys={"code": "x"})), "code 'x' cannot be read"),
        ("gemma3", foreign(lambda layer: layer.update(keys=None)), "its window is missing"),
        ("gemma3", lambda metadata, tensors: tensors.update(WRONG_KEYS), "do not fit the other layers"),
        ("gemma3", lambda metadata, tensors: tensors.pop("layers.0.keys"), "tensor 'keys' cannot be read"),
        ("gemma3", lambda metadata, tensors: tensors.update(stranger=torch.zeros(1)), "stranger belongs to no layer"),
        ("gemma3", header_change(lambda header: header["layers"][1].update(progress=None)), "not read the same"),
        ("gemma3", header_change(lambda header: header["layers"][1].update(kind="Other")), "has layers"),
        ("qwen3_next", foreign(lambda layer: layer.pop("conv_states")), "layer 0: its attributes"),
        ("qwen3_next", foreign(lambda layer: layer.update(conv_states={"by_number": {}})), "conv_states does not fit"),
    ],
)
def test_damage_to_layers_of_other_kinds_is_found(family, change, message, tmp_path):
    model = tiny_model(family)
    _, path = context(model, tmp_path)
    fresh = tiny_model(family)
    before = fresh.config._attn_implementation
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        WildCatCache.load(path, fresh.config)
    assert fresh.config._attn_implementation == before


@pytest.mark.parametrize(
    "numbers",
    [{"settled": 10**9}, {"ends": [10**9]}, {"ends": [3, 2]}, {"scale": -1.0}, {"seen": 10**9}, {"folded_at": 0}],
)
def test_numbers_that_contradict_each_other_are_refused(numbers, tmp_path):
    model = tiny_model("llama")
    _, path = context(model, tmp_path)
    rewrite(path, header_change(lambda header: [layer["progress"].update(numbers) for layer in header["layers"]]))
    with pytest.raises(ValueError, match="layer 0: its numbers do not fit"):
        WildCatCache.load(path, model.config)


@pytest.mark.parametrize("field", ["sink", "slots", "exact", "seen"])
def test_negative_counts_are_refused(field, tmp_path):
    model = tiny_model("llama")
    _, path = context(model, tmp_path)
    rewrite(path, header_change(lambda header: header["layers"][0]["progress"]["rows"][0].update({field: -5})))
    with pytest.raises(ValueError, match="layer 0: its numbers do not fit"):
        WildCatCache.load(path, model.config)


def test_a_fold_cannot_be_put_off_for_ever(tmp_path):
    model = tiny_model("llama")
    _, path = context(model, tmp_path)
    rewrite(
        path, header_change(lambda header: [layer["progress"].update(fold_from=10**9) for layer in header["layers"]])
    )
    cache = WildCatCache.load(path, model.config)
    model(random_ids(1, 300), **{CACHE: cache})
    assert cache.stored_length() < 170


def test_a_device_that_is_not_there_is_named(llama, tmp_path):
    _, path = context(llama, tmp_path)
    with pytest.raises(ValueError, match="device='gpu' cannot be used"):
        WildCatCache.load(path, llama.config, device="gpu")


def test_nothing_is_saved_of_an_empty_or_broken_cache(llama, tmp_path):
    cache = WildCatCache(llama.config, ratio=0.25)
    with pytest.raises(ValueError, match="the cache is empty"):
        cache.save(tmp_path / "context.safetensors")
    keys, values = torch.randn(2, 1, 2, 20, 16)
    cache.layers[0].announce(1, 20, None)
    cache.update(keys, values, 0)
    with pytest.raises(RuntimeError, match="failed half-way"):
        cache.save(tmp_path / "context.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(llama, tmp_path):
    cache, path = context(llama, tmp_path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="missing"):
        cache.save(tmp_path / "missing" / "context.safetensors")
    cache.layers[0].state.progress.seen += 1
    with pytest.raises(RuntimeError, match="failed half-way"):
        cache.save(path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_saved_files_have_ordinary_permissions(llama, tmp_path):
    _, path = context(llama, tmp_path)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
