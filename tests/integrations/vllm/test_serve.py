"""The commands `export` and `serve`, as far as they go without an engine."""

import json
import subprocess
import sys

import pytest

from tests.cli.test_cli import run
from tests.tiny import tiny_model
from tests.words import tokenizer, words
from wildcat_kv import WildCatCache, compress_context
from wildcat_kv.hook.keyword import CACHE
from wildcat_kv.integrations.vllm.folder import read_context
from wildcat_kv.integrations.vllm.serve import option_of, server_arguments

SETTINGS = {"ratio": 0.5, "sink": 4, "window": 4, "bin_rank": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a model, and a context of it."""
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    file = tmp_path_factory.mktemp("saved") / "context.safetensors"
    compress_context(model, tokenizer(), words(150), **SETTINGS).save(file)
    return folder, file


def test_export_writes_a_folder_and_says_what_it_costs(monkeypatch, capsys, saved, tmp_path):
    model, file = saved
    status, out, _ = run(monkeypatch, capsys, "export", file, "--model", model, "--output", tmp_path / "context")
    assert status == 0 and "as a prefix of 96" in out and "weights in value channels" in out
    assert read_context(tmp_path / "context").header.slots == 96
    status, out, _ = run(
        monkeypatch, capsys, "export", file, "--stock", "--model", model, "--output", tmp_path / "stock"
    )
    assert status == 0 and "weights folded into keys" in out and "Folding changes attention" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "output is missing"),
        (["--output", "x", "--for", "sglang"], "for='sglang' must be vllm"),
        (["--output", "a.b"], "is no name of a context"),
        (["--output", "nowhere/x"], "there is no folder 'nowhere'"),
    ],
)
def test_export_refuses_before_a_model_is_loaded(monkeypatch, capsys, saved, arguments, message):
    status, _, err = run(monkeypatch, capsys, "export", saved[1], "--model", "nowhere", *arguments)
    assert status == 1 and message in err and err.count("\n") == 1


def test_export_refuses_a_cache_without_its_text(monkeypatch, capsys, saved, tmp_path):
    model = tiny_model("llama")
    cache = WildCatCache(model.config, compressor="keydiff", **SETTINGS)
    model(tokenizer()(words(60), return_tensors="pt").input_ids, **{CACHE: cache})
    cache.save(tmp_path / "cache.safetensors")
    for file, message in ((tmp_path / "cache.safetensors", "without its text"), (tmp_path / "none", "is no file")):
        status, _, err = run(monkeypatch, capsys, "export", file, "--output", tmp_path / "context")
        assert status == 1 and message in err


def test_serve_sets_the_plugin_up(tmp_path):
    arguments = server_arguments("model", tmp_path, more=["--port", "8001"])
    transfer = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    assert arguments[0] == "model" and arguments[-2:] == ["--port", "8001"]
    assert transfer["kv_connector_extra_config"] == {"contexts": str(tmp_path), "weighted": True}
    assert transfer["kv_load_failure_policy"] == "fail"
    assert arguments[arguments.index("--block-size") + 1] == "32"
    assert "--block-size" not in server_arguments("model", tmp_path, more=["--block-size=64"])[:-1]
    for own in ("--kv-transfer-config", "--no-enable-prefix-caching", "--no_enable_prefix_caching"):
        with pytest.raises(ValueError, match="is set by `wildcat-kv serve` itself"):
            server_arguments("model", tmp_path, more=[own])


def test_options_of_the_server_are_found():
    assert option_of(["--port", "1", "--revision", "main"], "--revision") == "main"
    assert option_of(["--revision=main", "--port"], "--revision") == "main"
    assert option_of(["--revision"], "--revision") is None and option_of([], "--revision") is None


def test_serve_needs_contexts(monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, "serve", "model")
    assert status == 1 and "contexts is missing" in err


def test_nothing_imports_vllm_before_it_is_asked_for():
    modules = "export, middleware, serve, prompts, contexts, identity, heads, versions, plugin"
    code = (
        f"import sys, wildcat_kv; from wildcat_kv.integrations.vllm import {modules}; assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
