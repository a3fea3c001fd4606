"""Libraries of extras: the package imports without them, and says in one line which extra is missing."""

import re
import sys

import pytest
import torch

from benchmarks.structure import ROOT, Structure
from tests.cli.test_cli import run
from wildcat_kv.attention import Exact, diffusers
from wildcat_kv.extras import MissingExtraError, import_extra
from wildcat_kv.models import load_model
from wildcat_kv.models.shipped import SMOLLM2

tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 reads no TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Modules that need more than the package requires, and are imported only where that is asked for.
OPTIONAL = {
    "cli.prompting": {"prompt_toolkit"},
    "coreset.kernels.decode": {"triton"},  # comes with torch where it works
    "coreset.kernels.noise": {"triton"},
    "coreset.kernels.slots": {"triton"},
    "coreset.kernels.steps": {"triton"},
    "integrations.vllm.backend": {"vllm"},
    "integrations.vllm.connector": {"vllm"},
    "integrations.vllm.plugin": {"vllm"},
    "integrations.vllm.serve": {"vllm"},
    "lm_eval.model": {"lm_eval", "tqdm"},
}
# Names of distributions, where modules have others; Transformers has the tokenizers.
DISTRIBUTIONS = {"yaml": "pyyaml", "pydantic_core": "pydantic", "tokenizers": "transformers"}


def names(requirements):
    return {re.match(r"[\w-]+", one)[0] for one in requirements}


def test_what_the_package_imports_is_what_it_requires():
    found = {}
    for module, others in Structure().outside.items():
        own = others - sys.stdlib_module_names - OPTIONAL.get(module, set())
        found |= {DISTRIBUTIONS.get(name, name): module for name in own}
    required = names(PROJECT["dependencies"])
    assert {name: module for name, module in found.items() if name not in required} == {}
    assert required == set(found)


@pytest.mark.parametrize("extra", ["attention", "chat", "demo", "eval", "vllm"])
def test_extras_that_messages_name_are_there(extra):
    assert PROJECT["optional-dependencies"][extra]
    with pytest.raises(MissingExtraError, match=rf"No module named 'nowhere'; pip install 'wildcat-kv\[{extra}\]'"):
        import_extra("nowhere", extra)


def test_a_missing_library_is_named_before_any_work(monkeypatch, capsys, tmp_path):
    for module in ("gguf", "prompt_toolkit", "vllm", "lm_eval.__main__", "diffusers.models.attention_processor"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("WILDCAT_KV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(MissingExtraError, match=r"wildcat-kv\[demo\]"):
        load_model(str(tmp_path / "model.gguf"))
    with pytest.raises(MissingExtraError, match=r"wildcat-kv\[demo\]"):
        SMOLLM2.path()
    assert not (tmp_path / "cache").exists()  # nothing was fetched
    with pytest.raises(MissingExtraError, match=r"wildcat-kv\[attention\]"):
        diffusers.enable(torch.nn.Linear(2, 2), Exact())
    commands = {
        "demo": ("check",),
        "chat": ("chat", "--context", "nowhere.txt"),
        "vllm": ("serve", "model", "--contexts", tmp_path),
        "eval": ("lm-eval", "--help"),
    }
    for extra, arguments in commands.items():
        status, out, err = run(monkeypatch, capsys, *arguments)
        assert (status, out, err.count("\n")) == (1, "", 1) and f"pip install 'wildcat-kv[{extra}]'" in err, arguments
