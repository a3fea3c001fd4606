"""Runs that are made anew in part: what agrees is noted, what does not is named and left as it was."""

import gzip
import json

import pytest
import torch
import yaml

from eval import code
from eval.__main__ import main
from eval.archive import archive_run
from eval.attention.config import read_config as read_attention_config
from eval.attention.run import run as run_attention
from eval.cells import make_cells
from eval.config import read_config
from eval.run import run
from wildcat_kv.compressors import AdaKV, QueryWildCat, SnapKV, WildCat

pytest_plugins = ["tests.eval_fixtures"]

CONFIG = {
    "methods": ["wildcat", "snapkv", "kvzip"],
    "ratios": [0.5],
    "device": "cpu",
    "tasks": [
        {"task": "needle", "lengths": [150], "depths": [0.2], "needles": 2, "repeats": 3},
        {"task": "drift", "lengths": [120], "tokens": 10, "repeats": 1},
    ],
}
ATTENTION = {
    "tasks": [{"task": "layers", "sources": [{"source": "gaussian", "n": [64], "d": 8, "heads": 2, "inputs": 2}]}],
    "methods": [{"method": "uniform", "rank": 8}, "exact"],
    "seeds": [3, 4],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder):
    """A run of compressors, packed as those in results are."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    file = folder.parent / "small.yaml"
    file.write_text(yaml.safe_dump({"model": str(tiny_folder), **CONFIG}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.run.write_report", lambda manifest, records, folder: None)
        torch.set_num_threads(1)
        run(read_config(file), folder, command="python -m eval run", resume=False)
    archive_run(folder)
    return folder


@pytest.fixture
def outdated(finished, tmp_path):
    """Makes a copy of the run with other fingerprints, and records that `change` has changed."""

    def make(change=lambda record: record):
        folder = tmp_path / "outdated"
        folder.mkdir()
        manifest = json.loads((finished / "run.json").read_text())
        manifest["code"] = dict.fromkeys(manifest["code"], "of another day")
        (folder / "run.json").write_text(json.dumps(manifest))
        lines = gzip.decompress((finished / "samples.jsonl.gz").read_bytes()).decode().splitlines()
        changed = "".join(json.dumps(change(json.loads(line))) + "\n" for line in lines)
        (folder / "samples.jsonl.gz").write_bytes(gzip.compress(changed.encode()))
        return folder

    return make


@pytest.fixture
def verified(monkeypatch, capsys):
    """Runs the command; returns the exit status and the printed text."""

    def verify(*arguments):
        monkeypatch.setattr("sys.argv", ["eval", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, capsys.readouterr().out

    return verify


def manifest_of(folder):
    return json.loads((folder / "run.json").read_text())


def with_score(method, **scores):
    """Change the scores of a method's records."""

    def change(record):
        own = {name: value for name, value in scores.items() if name in record["scores"]}
        return record if record["method"] != method else {**record, "scores": {**record["scores"], **own}}

    return change


# A fingerprint


def test_a_method_is_made_of_its_own_files_not_of_what_all_share():
    own = code.files_of("wildcat_kv.compressors.query_wildcat.method")
    assert {"wildcat_kv.compressors.query_wildcat.survey", "wildcat_kv.compressors.wildcat"} <= own
    assert {"wildcat_kv.coreset.rpnys", "wildcat_kv.coreset.temperature"} <= own
    assert not {"wildcat_kv.compressors.base", "wildcat_kv.coreset.kernels.device", "wildcat_kv.cache.layer"} & own
    assert code.files_of("wildcat_kv.compressors.snapkv") == {"wildcat_kv.compressors.snapkv"}


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ('"""SnapKV', '"""Another first line', False),
        ("from __future__", "# A comment.\n\nfrom __future__", False),
        ("must be", "has to be", False),
        ("kernel: int = 5", "kernel: int = 7", True),
        ("padding=self.kernel // 2", "padding=self.kernel // 3", True),
    ],
    ids=["docstring", "comment", "error", "default", "arithmetic"],
)
def test_a_fingerprint_changes_with_the_code_and_not_with_its_prose(monkeypatch, old, new, changes):
    before, original = code.compressor_code(SnapKV()), code.read_source
    source = original(SnapKV.__module__)
    assert old in source
    monkeypatch.setattr(
        code,
        "read_source",
        lambda module: source.replace(old, new) if module == SnapKV.__module__ else original(module),
    )
    assert (code.compressor_code(SnapKV()) != before) == changes


def test_a_fingerprint_follows_parameters_parts_and_profiles():
    prints = [
        code.compressor_code(method)
        for method in (
            SnapKV(),
            SnapKV(window=8),
            AdaKV(),
            AdaKV(scorer=SnapKV(window=8)),
            QueryWildCat(),
            QueryWildCat(profile="smollm2-135m"),
            QueryWildCat(profile="qwen2.5-coder-0.5b"),
        )
    ]
    assert len(set(prints)) == len(prints) and None not in prints


def test_a_foreign_method_and_the_exact_cache_have_none():
    foreign = type("Foreign", (SnapKV,), {"__module__": "foreign.package"})
    assert code.compressor_code(foreign()) is None
    assert [cell.code() for cell in make_cells([], [], [], {})] == [None]


# A verification


def test_a_run_writes_the_fingerprints_of_its_methods(finished):
    prints = manifest_of(finished)["code"]
    assert set(prints) == {"wildcat", "snapkv", "kvzip"}
    assert prints["wildcat"] == code.compressor_code(WildCat())


def test_what_agrees_is_noted_with_todays_fingerprints(outdated, finished, verified):
    folder = outdated()
    status, printed = verified(folder, "--samples", 2)
    assert status == 0 and "all agree" in printed
    noted = manifest_of(folder)
    assert noted["code"] == manifest_of(finished)["code"]
    assert noted["verified"]["samples"] == 3  # two of three needles, one drift
    assert noted["verified"]["largest_difference"] < 1e-4
    rest = {name: value for name, value in noted.items() if name not in ("code", "verified")}
    assert rest == {name: value for name, value in manifest_of(finished).items() if name != "code"}


def test_what_does_not_agree_is_named_and_nothing_is_written(outdated, verified):
    folder = outdated(with_score("snapkv", nll=1.0))
    before = (folder / "run.json").read_bytes()
    status, printed = verified(folder)
    assert status == 1 and "do not agree" in printed
    rows = {line.split(" | ")[0].strip("| "): line for line in printed.splitlines() if line.startswith("| ")}
    assert "1 was recorded" in rows["snapkv"] and rows["wildcat"].split(" | ")[2] == "0"
    assert (folder / "run.json").read_bytes() == before


def test_a_tie_of_greedy_decoding_is_no_difference(outdated, verified):
    assert verified(outdated(with_score("kvzip", exact_match=0.5, agreement=0.5)))[0] == 0


def test_bytes_count(outdated, verified):
    status, printed = verified(outdated(lambda record: {**record, "memory_bytes": 2 * record["memory_bytes"]}))
    assert status == 1 and "memory_bytes" in printed


def test_a_run_that_cannot_be_made_again_does_not_stop_the_others(outdated, verified, tmp_path):
    folder = outdated()
    lost = tmp_path / "lost"
    lost.mkdir()
    manifest = manifest_of(folder)
    config = {**manifest["config"], "model": "lost.gguf"}
    (lost / "run.json").write_text(json.dumps({**manifest, "config": config}))
    status, printed = verified(lost, folder)
    assert status == 1
    assert f"{lost}: not verified: lost.gguf" in printed and "all agree" in printed


def test_another_prompt_is_refused(outdated, verified):
    status, printed = verified(outdated(lambda record: {**record, "prompt_hash": "0"}))
    assert status == 1 and "not verified: task='needle_2', sample 0: the record has another prompt" in printed


def test_attention_runs_are_verified_too(tmp_path, verified):
    file, folder = tmp_path / "layers.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(ATTENTION))
    run_attention(read_attention_config(file), folder, command="x", resume=False)
    whole = manifest_of(folder)
    assert set(whole["code"]) == {"uniform rank 8", "exact"}
    (folder / "run.json").write_text(json.dumps({**whole, "code": {}}))
    assert verified(folder)[0] == 0
    assert manifest_of(folder)["code"] == whole["code"] and manifest_of(folder)["verified"]["samples"] == 2
