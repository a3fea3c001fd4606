"""Runs whose old and present code compute the same are noted; others are named and left as they were."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch

from eval import code, probe
from eval.__main__ import main
from eval.cells import code_of, make_cells
from eval.probe_script import attention_outputs

pytest_plugins = ["tests.eval_fixtures"]

RUNS = {
    "same": ["streaming_llm", {"name": "adakv, knorm", "compressor": "adakv", "parameters": {"scorer": "knorm"}}],
    "changed": ["streaming_llm", {"name": "snap", "compressor": "snapkv"}],
    "unknown": [{"compressor": "streaming_llm", "parameters": {"lost": 1}}],
}


def manifest_of(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def then(tmp_path_factory):
    """A checkout in which one constant of SnapKV is another."""
    tree = tmp_path_factory.mktemp("then")
    shutil.copytree(code.ROOT / "wildcat_kv", tree / "wildcat_kv", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "eval").symlink_to(code.ROOT / "eval")
    file = tree / "wildcat_kv" / "compressors" / "snapkv.py"
    source = file.read_text()
    assert "kernel: int = 5" in source
    file.write_text(source.replace("kernel: int = 5", "kernel: int = 7"))
    return tree


@pytest.fixture(scope="module")
def probed(tmp_path_factory, tiny_folder, then):
    """The runs, and the line that a probe of all prints about each."""

    @contextmanager
    def checkout(commit):
        assert commit == "abc1234+"
        yield then

    folders = {name: tmp_path_factory.mktemp("runs") / name for name in RUNS}
    for name, methods in RUNS.items():
        budgets = {"ratios": [0.5, 0.25, 0.125], "max_tokens": [], "settings": {"sink": 4}, "seed": 0}
        write(folders[name], {"model": str(tiny_folder), "methods": methods, **budgets})
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "checkout", checkout)
        assert not probe.probe_all(folders.values(), lines.append)
    return folders, {name: line for name, folder in folders.items() for line in lines if line.startswith(f"{folder}:")}


def write(folder, config, **fields):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"commit": "abc1234+", "config": config, "finished": "then", **fields}))


def test_code_that_computes_the_same_is_noted_with_todays_fingerprints(probed):
    folders, lines = probed
    assert lines["same"].endswith(": 5 cells agree with abc1234+, largest difference 0")  # two budgets, and exact
    noted, config = manifest_of(folders["same"]), manifest_of(folders["same"])["config"]
    assert noted["code"] == code_of(make_cells(config["methods"], [0.5], [], {"sink": 4, "seed": 0}))
    note = {name: noted["verified"][name] for name in ("by", "record_commit", "cells", "largest_difference")}
    assert note == {"by": "probe", "record_commit": "abc1234+", "cells": 5, "largest_difference": 0.0}
    assert noted["finished"] == "then"


def test_a_constant_that_changed_is_seen_and_nothing_is_noted(probed):
    folders, lines = probed
    assert "2 of 5 cells since abc1234+: snap 0.5 differs by " in lines["changed"]
    assert "snap 0.125 differs by " in lines["changed"] and "streaming_llm" not in lines["changed"]
    assert not {"code", "verified"} & manifest_of(folders["changed"]).keys()


def test_a_method_that_cannot_be_built_is_not_verified(probed):
    folders, lines = probed
    assert "cannot be computed (ValueError: methods=" in lines["unknown"] and "no such parameter" in lines["unknown"]
    assert "verified" not in manifest_of(folders["unknown"])


def test_methods_of_attention_are_compared_on_random_tensors(tmp_path):
    folder = tmp_path / "run"
    methods = [{"method": "uniform", "settings": {"rank": 64}}, {"method": "exact", "settings": {}}]
    layers = {"task": "layers", "sources": [{"source": "gaussian", "n": [64], "d": 8}]}
    write(folder, {"methods": methods, "seeds": [3, 4], "tasks": [layers]}, tasks={"layers": {}})
    drawn, drawn_again, other = (
        dict(attention_outputs({"methods": methods, "seeds": seeds})) for seeds in ([3, 4], [3], [4])
    )
    differs = probe.judge(folder, other, drawn)
    assert not differs.agrees and "1 of 2 cells since abc1234+: uniform rank 64 differs by" in differs.text
    assert probe.judge(folder, drawn_again, drawn).agrees
    assert set(manifest_of(folder)["code"]) == {"uniform rank 64", "exact"}


def test_a_difference_counts_in_parts_of_the_outputs_size():
    output = torch.tensor([3.0, -3.0, 3.0])
    assert probe.distance(output, output + torch.tensor([0.0, 0.3, 0.0])) == pytest.approx(0.1)
    assert probe.distance(output, output[:2]) == probe.distance(output, output * torch.nan) == float("inf")


@pytest.mark.parametrize(
    ("commit", "named"), [(None, "its record names no commit"), ("0000000+", "commit='0000000+': ")]
)
def test_a_commit_that_git_does_not_know_is_refused(commit, named):
    with pytest.raises(ValueError, match="^" + named.replace("+", r"\+")), probe.checkout(commit):
        pass


def test_the_command_refuses_what_is_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["eval", "verify", "--probe", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and f"{tmp_path}: not verified: output=" in capsys.readouterr().out
