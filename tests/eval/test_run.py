"""Runs of the evaluation: what they write, how they go on after an interruption, and what they refuse."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

import eval.run
from eval.__main__ import main
from eval.archive import archive_run
from eval.config import RunConfig, read_config
from eval.progress import _Log
from eval.records import Folder

pytest_plugins = ["tests.eval_fixtures"]

ROOT = Path(__file__).parents[2]
CONFIG = {
    "methods": ["wildcat", "snapkv", "kvzip"],
    "ratios": [0.5, 0.3],
    "device": "cpu",
    "tasks": [
        {"task": "needle", "lengths": [150], "depths": [0.2, 0.8], "needles": 2, "repeats": 2},
        {"task": "drift", "lengths": [120], "tokens": 10, "repeats": 2},
    ],
}
CELLS = [("exact", None, None), *((name, ratio, None) for name in CONFIG["methods"] for ratio in CONFIG["ratios"])]
KEYS = [
    (task, index, *cell) for task, count in (("needle_2", 4), ("drift", 2)) for index in range(count) for cell in CELLS
]
FIELDS = [
    *("task", "sample", "method", "family", "compressor", "bits", "ratio", "max_tokens", "protocol", "seed"),
    *("prompt_hash", "prediction", "reference"),
    *("scores", "seen_tokens", "stored_tokens", "memory_bytes", "facets", "layers", "seconds"),
]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, tiny_folder):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny_folder), **CONFIG}))
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory, config_file):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "reference"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.run.write_report", lambda manifest, records, folder: None)
        torch.set_num_threads(1)
        measure(config_file, folder)
    return folder


@pytest.fixture
def reported(monkeypatch):
    """Reports are long and tested elsewhere: what they would be made of."""
    calls = []
    monkeypatch.setattr("eval.run.write_report", lambda manifest, records, folder: calls.append((manifest, records)))
    return calls


@pytest.fixture
def interrupted(reference, tmp_path):
    """Makes a copy of the run that was stopped: a number of lines, and characters of the next."""

    def make(lines, characters=0):
        folder = tmp_path / "interrupted"
        shutil.copytree(reference, folder)
        text = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
        (folder / "samples.jsonl").write_text("".join(text[:lines]) + "".join(text[lines:])[:characters])
        manifest = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**manifest, "finished": None}, indent=2) + "\n")
        return folder

    return make


def measure(config_file, folder, *, resume=False, **changes):
    eval.run.run(read_config(config_file, **changes), folder, command="python -m eval run", resume=resume)


def records(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = (folder / "samples.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def keys(folder):
    return [
        tuple(record[name] for name in ("task", "sample", "method", "ratio", "max_tokens"))
        for record in records(folder)
    ]


def timeless(folder):
    """The lines of a run as text, without how long they took."""
    text = (folder / "samples.jsonl").read_text()
    return re.sub(r'"seconds": \{[^}]*\}', "", text).splitlines()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(*arguments, processes=None):
    """The command line of a run, on one process or several."""
    launch = [sys.executable]
    if processes:
        # As `accelerate launch` does for GPUs; for CPUs it starts one process, whatever --num_processes says.
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launch, "-m", "eval", "run", *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def kill_after(arguments, enough):
    """Start a run, and kill it and its children without warning as soon as `enough()`."""
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    try:
        while not enough():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end, "the run wrote nothing"
            time.sleep(0.002)
    finally:
        started = [process] if process.poll() is None else []
        started += psutil.Process(process.pid).children(recursive=True) if started else []
        for each in started:
            each.kill()
        process.communicate()


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


# What a run writes


def test_every_measurement_is_written_once_and_in_order(reference):
    assert keys(reference) == KEYS
    assert sorted(contents(reference)) == ["run.json", "samples.jsonl"]


def test_samples_are_measured_by_turns(config_file, reference, reported, monkeypatch, tmp_path):
    """An interrupted run has something of every task and depth."""
    appended = []
    append = Folder.append
    monkeypatch.setattr(Folder, "append", lambda self, record: (appended.append(record), append(self, record))[1])
    measure(config_file, tmp_path / "new", methods=["snapkv"], ratios=[0.5])
    order = [(record["task"], record["sample"]) for record in appended if record["method"] == "exact"]
    needle, drift = [("needle_2", at) for at in (0, 2, 1, 3)], [("drift", at) for at in (0, 1)]
    assert order == [needle[0], drift[0], needle[1], needle[2], drift[1], needle[3]]
    assert [len(set(keys(tmp_path / "new"))), keys(tmp_path / "new")[0]] == [12, KEYS[0]]
    assert keys(tmp_path / "new") == [key for key in KEYS if key[2:] in (("exact", None, None), ("snapkv", 0.5, None))]


def test_a_line_says_all_there_is_to_know(reference):
    for record in records(reference):
        assert list(record) == FIELDS
        assert record["protocol"] == "context-only" and record["seed"] == 0
        assert re.fullmatch("[0-9a-f]{16}", record["prompt_hash"])
        assert record["prediction"] is None and record["layers"] is None
        assert record["seconds"].keys() == {"compress", "answer"}
        share = record["ratio"] or 1
        assert record["stored_tokens"] == pytest.approx(share * record["seen_tokens"], abs=1)
        # A key and a value of 16 numbers of 4 bytes, for each of 2 heads in 3 layers, is the least that a token takes.
        assert record["memory_bytes"] >= record["stored_tokens"] * 2 * 3 * 2 * 16 * 4
        if record["task"] == "drift":
            assert record["scores"].keys() == {"kl", "nll", "agreement"} and record["facets"] == {"length": 120}
            assert record["seen_tokens"] == 120 and record["reference"] is None
            assert (record["scores"]["kl"] == 0) == (record["method"] == "exact")
        else:
            assert record["scores"].keys() == {"nll", "exact_match"} and re.fullmatch("[0-9]{5}", record["reference"])
            assert record["facets"] == {"length": 150, "depth": 0.2 if record["sample"] < 2 else 0.8}
            assert record["seen_tokens"] > 140


def test_cells_of_a_sample_have_its_prompt(reference):
    prompts = {}
    for record in records(reference):
        prompts.setdefault((record["task"], record["sample"]), set()).add(record["prompt_hash"])
    assert all(len(hashes) == 1 for hashes in prompts.values())
    assert len(set.union(*prompts.values())) == 6


def test_a_run_says_what_it_is(reference, tiny_folder, config_file):
    manifest = json.loads((reference / "run.json").read_text())
    assert manifest["name"] == "small" and manifest["command"] == "python -m eval run"
    assert manifest["started"] <= manifest["finished"] and manifest["started"].endswith("+00:00")
    assert manifest["protocol"] == "context-only"
    assert manifest["model"]["name"] == str(tiny_folder) and manifest["model"]["dtype"] == "float32"
    assert manifest["model"]["parameters"] > 6_000_000
    assert manifest["methods"] == ["exact", "wildcat", "snapkv", "kvzip"]
    assert list(manifest["metrics"]) == ["needle_2", "drift"]
    assert manifest["metrics"]["drift"]["kl"] == {"higher_is_better": False, "unit": "nats a token", "digits": 3}
    assert manifest["versions"].keys() >= {"python", "wildcat-kv", "torch", "transformers", "lm-eval"}
    assert manifest["machine"]["processor"] and manifest["machine"]["cores"] >= 1
    assert manifest["machine"]["memory_gib"] > 0 and isinstance(manifest["machine"]["devices"], list)
    assert read_config(config_file).model_dump(mode="json") == manifest["config"]


def test_the_report_is_made_of_what_was_written(config_file, reference, reported, tmp_path):
    measure(config_file, tmp_path / "again", tasks=["drift"], limit=1)
    [(manifest, found)] = reported
    assert manifest["finished"] and manifest == json.loads((tmp_path / "again" / "run.json").read_text())
    assert found == records(tmp_path / "again") and len(found) == 7


def test_the_same_run_gives_the_same_lines(config_file, reference, reported, tmp_path):
    (tmp_path / "again").mkdir()  # an empty folder is as good as none
    measure(config_file, tmp_path / "again")
    assert timeless(tmp_path / "again") == timeless(reference)


def test_a_budget_in_tokens_and_the_other_protocol_are_told_apart(config_file, reported, tmp_path):
    changes = {"tasks": ["needle"], "methods": ["snapkv"], "ratios": [0.5], "max_tokens": [100], "limit": 1}
    for protocol in ("context-only", "full-prompt"):
        measure(config_file, tmp_path / protocol, protocol=protocol, **changes)
        assert [key[2:] for key in keys(tmp_path / protocol)] == 2 * [
            ("exact", None, None),
            ("snapkv", 0.5, None),
            ("snapkv", None, 100),
        ]
    apart, together = (records(tmp_path / protocol) for protocol in ("context-only", "full-prompt"))
    assert all(record["protocol"] == "full-prompt" for record in together)
    for before, after in zip(apart, together, strict=True):
        assert before["prompt_hash"] == after["prompt_hash"] and before["seen_tokens"] < after["seen_tokens"]


# Interrupted runs


@pytest.mark.parametrize(
    ("lines", "characters"),
    [(7, 0), (10, 200), (30, 0), (41, 0)],
    ids=lambda number: str(number),
)
def test_a_run_goes_on_where_it_was_stopped(config_file, interrupted, reference, reported, lines, characters):
    folder = interrupted(lines, characters)
    kept = (folder / "samples.jsonl").read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    measure(config_file, folder, resume=True)
    assert (folder / "samples.jsonl").read_bytes().startswith(kept)
    assert timeless(folder) == timeless(reference)
    assert sorted(contents(folder)) == ["run.json", "samples.jsonl"]
    before, after = (json.loads((run / "run.json").read_text()) for run in (reference, folder))
    assert after.pop("finished") >= before.pop("finished") and after == before


def test_a_last_line_without_its_end_is_measured_again(config_file, interrupted, reference, reported):
    folder = interrupted(12)
    (folder / "samples.jsonl").write_bytes((folder / "samples.jsonl").read_bytes()[:-1])
    measure(config_file, folder, resume=True)
    assert timeless(folder) == timeless(reference)


def test_a_run_that_was_stopped_before_its_first_line_goes_on(config_file, interrupted, reference, reported):
    folder = interrupted(0)
    (folder / "samples.jsonl").unlink()
    measure(config_file, folder, resume=True)
    assert timeless(folder) == timeless(reference)


def test_a_killed_run_goes_on(config_file, reference, reported, tmp_path):
    folder = tmp_path / "killed"
    kill_after(command(config_file, "--output", folder), lambda: count_lines(folder / "samples.jsonl") >= 9)
    written = (folder / "samples.jsonl").read_bytes()
    assert 9 <= written.count(b"\n") < 42
    assert json.loads((folder / "run.json").read_text())["finished"] is None
    measure(config_file, folder, resume=True)
    whole = written[: written.rfind(b"\n") + 1].splitlines()
    assert set(whole) <= set((folder / "samples.jsonl").read_bytes().splitlines())  # seconds and all: kept as they were
    assert timeless(folder) == timeless(reference)


def test_a_finished_run_has_nothing_to_go_on_with(config_file, interrupted, reported, monkeypatch):
    folder = interrupted(42)
    before = contents(folder)["samples.jsonl"]
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", lambda *_, **__: pytest.fail("a sample was read"))
    measure(config_file, folder, resume=True)
    assert contents(folder)["samples.jsonl"] == before and len(reported) == 1


def test_there_need_be_no_run_to_go_on_with(config_file, reported, tmp_path):
    measure(config_file, tmp_path / "new", resume=True, tasks=["drift"], limit=1)
    assert len(keys(tmp_path / "new")) == 7


@pytest.mark.parametrize("lost", ["a line in the middle", "the second process's lines"])
def test_lines_are_in_order_whatever_was_missing(config_file, interrupted, reference, reported, lost):
    folder = interrupted(42)
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    if lost == "a line in the middle":
        del lines[9]
    else:  # which was slower, and had written none when both were stopped
        lines = lines[:7] + lines[14:21]
    (folder / "samples.jsonl").write_text("".join(lines))
    measure(config_file, folder, resume=True)
    assert sorted(timeless(folder)) == sorted(timeless(reference))
    assert keys(folder) == KEYS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": [0.5, 0.2]}, "config.ratios was [0.5, 0.3] and is [0.5, 0.2]"),
        ({"methods": ["wildcat", "snapkv"]}, "methods was"),
        ({"seed": 5}, "config.seed was 0 and is 5"),
        ({"limit": 1}, "config.limit was None and is 1"),
        ({"protocol": "full-prompt"}, "protocol was 'context-only' and is 'full-prompt'"),
        ({"tasks": ["drift"]}, "metrics.needle_2 was"),
        ({"settings": {"sink": 4}}, "config.settings was {} and is {'sink': 4}"),
        ({"name": "other"}, "name was 'small' and is 'other'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_not_gone_on_with(config_file, interrupted, reported, changes, message):
    folder = interrupted(10, 50)
    before = contents(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(config_file, folder, resume=True, **changes)
    assert contents(folder) == before and not reported


def test_a_run_of_other_versions_is_not_gone_on_with(config_file, interrupted, reported):
    folder = interrupted(10)
    manifest = json.loads((folder / "run.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    (folder / "run.json").write_text(json.dumps(manifest))
    before = contents(folder)
    with pytest.raises(ValueError, match=r"versions.torch was '1.0' and is"):
        measure(config_file, folder, resume=True)
    assert contents(folder) == before


def test_a_run_from_before_an_option_was_there_goes_on(config_file, interrupted, reference, reported):
    folder = interrupted(30)
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["config"].pop("half") is None
    (folder / "run.json").write_text(json.dumps(manifest))
    measure(config_file, folder, resume=True)
    assert timeless(folder) == timeless(reference)


@pytest.mark.parametrize("characters", [0, 50])
def test_a_run_of_other_prompts_is_not_gone_on_with(config_file, interrupted, reported, characters):
    folder = interrupted(10, characters)
    text = (folder / "samples.jsonl").read_text()
    changed = json.loads(text.split("\n")[8])["prompt_hash"]
    (folder / "samples.jsonl").write_text(text.replace(changed, "0" * 16))
    before = contents(folder)
    with pytest.raises(ValueError, match=r"task='needle_2', sample 1: the folder has it with another prompt"):
        measure(config_file, folder, resume=True)
    after = contents(folder)
    assert after["samples.jsonl"] == before["samples.jsonl"] and not reported
    assert json.loads(after["run.json"]) == json.loads(before["run.json"])


@pytest.mark.parametrize("damage", ["run.json", "samples.jsonl"])
def test_a_damaged_run_is_not_gone_on_with(config_file, interrupted, reported, damage):
    folder = interrupted(10)
    (folder / damage).write_text("{nonsense\n" + (folder / damage).read_text())
    before = contents(folder)
    with pytest.raises(ValueError, match=r"holds no run|is damaged"):
        measure(config_file, folder, resume=True)
    assert contents(folder)[damage] == before[damage]


# What a run says while it runs


def test_a_log_has_a_line_now_and_then():
    seconds, lines = [0.0], []
    log = _Log(168, lines.append, lambda: seconds[0])
    log.skip(10)
    for task in ["needle"] * 4 + ["drift"] * 2:
        seconds[0] += 3.1
        log.advance(task, "wildcat 0.25")
    assert lines == [
        "needle wildcat 0.25: 11 of 168, 3.1 s each, about 8 min left",
        "drift wildcat 0.25: 15 of 168, 3.1 s each, about 8 min left",
    ]
    seconds[0] += 10
    log.advance("drift", "snapkv 0.1")
    log.skip(150)
    log.advance("drift", "kvzip 0.1")
    assert [line.partition(":")[0] for line in lines[2:]] == ["drift snapkv 0.1", "drift kvzip 0.1"]
    assert lines[-1].endswith("168 of 168, 3.6 s each")


def test_a_run_without_a_terminal_writes_plain_lines(config_file, reported, tmp_path, capsys):
    measure(config_file, tmp_path / "new", tasks=["drift"], limit=1)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"drift exact: 1 of 7, \d+\.\d s each, about \d+ s left", lines[0])
    assert re.fullmatch(r"drift kvzip 0\.3: 7 of 7, \d+\.\d s each", lines[1])
    assert not any("\x1b" in line for line in lines)


def test_an_estimate_leaves_out_what_is_there_already(config_file, interrupted, reported, capsys):
    measure(config_file, interrupted(35), resume=True)
    assert capsys.readouterr().err.startswith("drift exact: 36 of 42, ")


# The command


def test_a_limit_of_the_command_wins_over_the_files_own(config_file, tmp_path):
    fields = yaml.safe_load(config_file.read_text())
    fields["tasks"] = [{"task": "niah_single_1", "limit": 10}, "drift"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**fields, "limit": 7}))
    by_file = read_config(tmp_path / "own.yaml")
    by_command = read_config(tmp_path / "own.yaml", limit=2)
    chosen = read_config(tmp_path / "own.yaml", limit=2, tasks=["niah_single_1"])
    assert by_file.limit == 7 and by_file.tasks[0]["limit"] == 10
    assert by_command.limit == 2 and by_command.tasks == [{"task": "niah_single_1"}, "drift"]
    assert chosen.tasks == [{"task": "niah_single_1"}]


def test_ratios_of_the_command_choose_among_a_methods_own(tmp_path):
    path = tmp_path / "config.yaml"
    own = [{"name": "plain", "compressor": "wildcat", "bits": [4], "ratios": [1]}, "snapkv"]
    own += [{"name": "wildcat", "bits": [4], "ratios": [0.5, 0.25]}]
    path.write_text(yaml.safe_dump({"tasks": ["drift"], "ratios": [0.5], "methods": own}))
    assert [str(cell) for cell in read_config(path).cells()[1:]] == [
        *("plain_4bit 1", "snapkv 0.5", "wildcat_4bit 0.5", "wildcat_4bit 0.25")
    ]
    chosen = read_config(path, ratios=[0.25, 0.1]).cells()[1:]
    assert [str(cell) for cell in chosen] == ["snapkv 0.25", "snapkv 0.1", "wildcat_4bit 0.25"]


def test_a_report_says_where_it_is_and_takes_a_baseline(reference, monkeypatch, capsys, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    for baseline, said in (("exact", None), ("snapvk", "baseline='snapvk' is no method of this run; did you mean")):
        monkeypatch.setattr(sys, "argv", ["eval", "report", str(folder), "--baseline", baseline])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        if said is None:
            assert not exit_.value.code and captured.out == f"{folder}/report.html\n"
            assert "nll, to exact (95 %)" in (folder / "summary.md").read_text()
        else:
            assert exit_.value.code == 1 and said in captured.err


# Runs to keep


@pytest.fixture
def archived(reference, tmp_path):
    """Makes an archive of the first lines of the run."""

    def make(lines):
        folder = tmp_path / "archived"
        shutil.copytree(reference, folder)
        text = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
        (folder / "samples.jsonl").write_text("".join(text[:lines]))
        archive_run(folder)
        return folder

    return make


def test_an_archive_holds_the_same_samples(reference, archived):
    folder = archived(42)
    assert sorted(contents(folder)) == ["run.json", "samples.jsonl.gz"]
    assert Folder(folder).records() == records(reference)
    before = contents(folder)
    assert archive_run(folder) == sum(map(len, before.values())) and contents(folder) == before


@pytest.mark.parametrize("lines", [9, 42])
def test_an_archive_goes_on(config_file, reference, archived, reported, lines):
    folder = archived(lines)
    measure(config_file, folder, resume=True)
    assert timeless(folder) == timeless(reference)
    assert sorted(contents(folder)) == ["run.json", "samples.jsonl"]


def test_an_unpacking_that_was_interrupted_loses_nothing(config_file, reference, archived, reported):
    """The plain file is whole, the packed one is still beside it."""
    folder = archived(9)
    shutil.copy(reference / "samples.jsonl", folder)
    assert len(Folder(folder).records()) == 42
    measure(config_file, folder, resume=True)
    assert (folder / "samples.jsonl").read_bytes() == (reference / "samples.jsonl").read_bytes()
    assert sorted(contents(folder)) == ["run.json", "samples.jsonl"]


def test_an_unfinished_run_is_not_archived(interrupted):
    folder = interrupted(10)
    before = contents(folder)
    with pytest.raises(ValueError, match="has not finished"):
        archive_run(folder)
    assert contents(folder) == before


def test_a_damaged_archive_is_refused(archived):
    folder = archived(42)
    packed = folder / "samples.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        Folder(folder).records()


# Folders that hold something else


def test_a_run_is_not_begun_on_top_of_another(config_file, interrupted, reported, monkeypatch):
    folder = interrupted(10)
    before = contents(folder)
    monkeypatch.setattr("eval.run.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"output=.*holds a run already; go on with it \(--resume\)"):
        measure(config_file, folder)
    assert contents(folder) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_run_is_left_alone(config_file, reported, monkeypatch, tmp_path, kind, resume):
    path = tmp_path / "results"
    if kind == "folder":
        path.mkdir()
    kept = path / "thesis.txt" if kind == "folder" else path
    kept.write_text("years of work")
    monkeypatch.setattr("eval.run.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"output=.*is there and holds no run"):
        measure(config_file, path, resume=resume)
    assert kept.read_text() == "years of work" and len(list(tmp_path.rglob("*.*"))) == (kind == "folder")


# Several processes


def numbers(value):
    """All numbers of a record, in order, and what else there is."""
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, list):
        parts = [numbers(item) for item in value]
        return [number for part in parts for number in part[0]], [item for part in parts for item in part[1]]
    return ([value], []) if isinstance(value, float) else ([], [value])


def assert_same_but_for_noise(folder, reference):
    assert keys(folder) == KEYS
    for found, expected in zip(records(folder), records(reference), strict=True):
        found.pop("seconds"), expected.pop("seconds")
        (values, rest), (expected_values, expected_rest) = numbers(found), numbers(expected)
        assert rest == expected_rest and values == pytest.approx(expected_values, rel=1e-4, abs=1e-5)


def test_two_processes_measure_what_one_does(config_file, reference, tmp_path):
    folder = tmp_path / "two"
    done = subprocess.run(
        command(config_file, "--output", folder, processes=2),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and not done.stdout, done.stderr
    assert_same_but_for_noise(folder, reference)
    assert [path.name for path in folder.glob("samples*")] == ["samples.jsonl"]
    assert (folder / "report.html").exists() and not list(folder.glob("*.partial"))
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["finished"]
    assert manifest["command"] == f"python -m eval run {config_file} --output {folder}"
    assert done.stderr.count("report.html") == 1, "every process says where the report is"


def test_one_process_goes_on_where_two_were_killed(config_file, reference, reported, tmp_path):
    folder = tmp_path / "two"
    shards = folder / "samples.jsonl", folder / "samples.1.jsonl"
    kill_after(
        command(config_file, "--output", folder, processes=2), lambda: min(count_lines(shard) for shard in shards) >= 4
    )
    assert sum(map(count_lines, shards)) < 42
    measure(config_file, folder, resume=True)
    assert_same_but_for_noise(folder, reference)
    assert sorted(contents(folder)) == ["run.json", "samples.jsonl"]


def test_a_merge_that_was_interrupted_is_done_again(config_file, interrupted, reference, reported):
    """The whole file is there, a shard is still beside it."""
    folder = interrupted(42)
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.1.jsonl").write_text("".join(lines[7:14]))
    (folder / ".samples.jsonl.1.partial").write_text("".join(lines[:5]))
    measure(config_file, folder, resume=True)
    assert (folder / "samples.jsonl").read_text() == "".join(lines)
    assert sorted(contents(folder)) == ["run.json", "samples.jsonl"]


# Wrong input


def refused(monkeypatch, capsys, *arguments):
    """What `python -m eval run ARGUMENTS` says, which must be one line, and a failure."""
    monkeypatch.setattr(sys, "argv", ["eval", "run", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    assert exit_.value.code == 1 and not captured.out
    assert captured.err.startswith("python -m eval: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def no_model(monkeypatch):
    monkeypatch.setattr("eval.run.load_model", lambda *_: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "neddle"], "tasks='neddle'"),
        (["--methods", "snapvk"], "methods='snapvk'"),
        (["--methods", "snapkv,snapkv"], "'snapkv' is there twice"),
        (["--ratios", "0"], "ratios.0=0.0"),
        (["--ratios", "1.5"], "ratios.0=1.5"),
        (["--ratios", "0.5,abc"], "ratios='0.5,abc'"),
        (["--ratios", "nan"], "ratios.0=nan"),
        (["--ratios", ""], "ratios=[]"),
        (["--protocol", "foo"], "protocol='foo'"),
        (["--limit", "-3"], "--limit"),
        (["--baseline", "snapvk"], "baseline='snapvk' is no method of this run; did you mean 'snapkv'?"),
        (["--limit", "many"], "--limit"),
        (["--data-dir", "no/such/folder"], "data_dir='no/such/folder'"),
        (["--tasks", ""], "tasks"),
        (["--nonsense", "1"], "--nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_line_and_makes_no_folder(monkeypatch, capsys, config_file, tmp_path, arguments, message):
    no_model(monkeypatch)
    assert message in refused(monkeypatch, capsys, config_file, "--output", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [needle", "no readable YAML file"),
        ("- needle\n- drift\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("ratios: [0.5]\n", "tasks"),
        ("tasks: [needle]\nratio: 0.5\n", "ratio=0.5"),
        ("tasks: needle\nratios: [0.5]\n", "tasks='needle'"),
        ("tasks: [{task: needle, length: [100]}]\nmethods: [snapkv]\nratios: [0.5]\n", "task='needle': length"),
        ("tasks: [{task: drift, tokens: 0}]\nmethods: [snapkv]\nratios: [0.5]\n", "task='drift': tokens=0"),
        ("tasks: [{lengths: [100]}]\nmethods: [snapkv]\nratios: [0.5]\n", "tasks={'lengths': [100]}"),
        ("tasks: [drift, drift]\nmethods: [snapkv]\nratios: [0.5]\n", "tasks: 'drift' is there twice"),
        ("tasks: [drift]\nmethods: [snapkv]\n", "ratios=[]"),
        ("tasks: [drift]\nmethods: [snapkv]\nlimit: -1\nratios: [0.5]\n", "limit=-1"),
        ("tasks: [drift]\nmethods: [snapkv]\nmax_tokens: [20]\n", "max_tokens=20"),
        ("tasks: [drift]\nmethods: [snapkv]\nratios: [abc]\n", "ratios.0='abc'"),
        ("tasks: [drift]\nmethods: [snapkv]\nratios: [0.5]\nsettings: {sinks: 3}\n", "settings='sinks'"),
        ("tasks: [drift]\nmethods: [snapkv]\nratios: [0.5]\nsettings: {sink: -3}\n", "sink=-3"),
        ("tasks: [drift]\nmethods: [snapkv]\nratios: [0.5]\ndtype: int8\n", "dtype='int8'"),
        ("tasks: [drift]\nmethods: [snapkv]\nratios: [0.5]\nseed: -1\n", "seed=-1"),
        ("tasks: [drift]\nmethods: [snapkv]\nratios: [0.5]\n5: 3\n", "5"),
        ("tasks: [{task: drift, 5: 3}]\nmethods: [snapkv]\nratios: [0.5]\n", "5"),
    ],
    ids=lambda value: value.replace("\n", " ")[:50] if value.endswith("\n") else "",
)
def test_a_wrong_file_is_one_line_and_makes_no_folder(monkeypatch, capsys, tmp_path, text, message):
    no_model(monkeypatch)
    (tmp_path / "wrong.yaml").write_text(text)
    assert message in refused(monkeypatch, capsys, tmp_path / "wrong.yaml", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tasks_of_the_command_need_no_list_in_the_file(monkeypatch, capsys, tmp_path):
    (tmp_path / "wrong.yaml").write_text("tasks: 5\nratios: [0.5]\nmethods: [snapkv]\n")
    arguments = ["--tasks", "needle,nonsense", "--output", tmp_path / "out"]
    assert "tasks" in refused(monkeypatch, capsys, tmp_path / "wrong.yaml", *arguments)


@pytest.mark.parametrize("kind", ["missing", "folder", "not text"])
def test_a_file_that_cannot_be_read_is_one_line(monkeypatch, capsys, tmp_path, kind):
    no_model(monkeypatch)
    path = tmp_path / "config.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "not text":
        path.write_bytes(b"\xff\xfe\x00\x80")
    assert f"config='{path}' is no readable YAML file" in refused(monkeypatch, capsys, path)


@pytest.mark.parametrize(
    ("task", "budget"),
    [
        ("perplexity", {"ratios": [0.5]}),
        ("decoding", {"ratios": [0.5]}),
        ("drift", {"ratios": [], "max_tokens": [100]}),
        ("wikitext", {"ratios": [0.5]}),
    ],
)
def test_a_method_that_reads_twice_is_one_line_where_it_cannot(
    monkeypatch, capsys, config_file, tmp_path, task, budget
):
    data = {"data_dir": str(tmp_path)}
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext/test.jsonl").write_text('{"page": "Foxes are red. Hens are not."}\n')
    fields = {**yaml.safe_load(config_file.read_text()), "methods": ["kvzip"], "tasks": [task], **budget, **data}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**fields, "limit": 1}))
    said = refused(monkeypatch, capsys, tmp_path / "config.yaml", "--output", tmp_path / "out")
    assert "methods='kvzip' reads a text twice" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["no/such/folder/at/all", "missing.gguf"])
def test_an_unknown_model_is_one_line_and_makes_no_folder(monkeypatch, capsys, config_file, tmp_path, name):
    assert name in refused(monkeypatch, capsys, config_file, "--output", tmp_path / "out", "--model", name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"task": "needle", "lengths": [5000]}, "task='needle', sample 0: it needs 50"),
        ({"task": "drift", "lengths": [4000], "tokens": 97}, "task='drift', sample 0: it needs 4097 tokens"),
        ({"task": "needle", "lengths": [30], "needles": 8}, "length"),
        ({"task": "needle", "lengths": [300], "depths": [1.5]}, "depths"),
        ({"task": "perplexity", "lengths": [200]}, "lengths=200"),
    ],
    ids=["needle too long", "drift too long", "needle too short", "depth", "perplexity too short"],
)
def test_samples_that_cannot_be_made_are_one_line_and_make_no_folder(
    monkeypatch, capsys, config_file, tmp_path, task, message
):
    fields = {**yaml.safe_load(config_file.read_text()), "methods": ["snapkv"], "tasks": ["drift", task]}
    if task["task"] == "drift":
        fields["tasks"] = [task]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**fields, "limit": 1}))
    assert message in refused(monkeypatch, capsys, tmp_path / "config.yaml", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sample_of_all_positions_fits(config_file, reported, tmp_path):
    fields = {**yaml.safe_load(config_file.read_text()), "methods": ["streaming_llm"], "ratios": [0.1]}
    fields["tasks"] = [{"task": "drift", "lengths": [4000], "tokens": 96, "repeats": 1}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    measure(tmp_path / "config.yaml", tmp_path / "out")
    assert [record["stored_tokens"] for record in records(tmp_path / "out")] == [4000, 400]


def test_an_unknown_device_is_one_line(monkeypatch, capsys, config_file, tmp_path):
    said = refused(monkeypatch, capsys, config_file, "--output", tmp_path / "out", "--device", "abacus")
    assert "abacus" in said and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch, capsys, config_file, tmp_path):
    no_model(monkeypatch)
    (tmp_path / "file").write_text("no folder")
    assert "output" in refused(monkeypatch, capsys, config_file, "--output", tmp_path / "file" / "out")


def test_attention_that_cannot_be_compared_is_refused_before_anything_is_written(
    config_file, reported, tmp_path, monkeypatch
):
    load = eval.run.load_model

    def capped(*arguments):
        model, tokenizer = load(*arguments)
        model.config.attn_logit_softcapping = 50.0
        return model, tokenizer

    monkeypatch.setattr("eval.run.load_model", capped)
    fields = {**yaml.safe_load(config_file.read_text()), "methods": ["streaming_llm"], "limit": 1}
    fields["tasks"] = ["drift", {"task": "attention_error", "lengths": [100], "tokens": 5}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(ValueError, match="task='attention_error' compares plain attention"):
        measure(tmp_path / "config.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The files that come with the project


@pytest.mark.parametrize("path", sorted((ROOT / "configs/eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_projects_own_files_can_be_run(path):
    config = read_config(path)
    tasks = config.make_tasks()
    for cell in config.cells():
        cell.check_tasks(streams=any(task.streams for task in tasks))


def test_the_papers_table_is_longbench_e():
    names = {task.name for task in read_config(ROOT / "configs/eval/paper_longbench_e.yaml").make_tasks()}
    assert len(names) == 13 and all(re.fullmatch(r"longbench_.*_e", name) for name in names)


# Stopped for time. Samples go by turns through depths and tasks, and what is committed are whole samples of everything.
STOPPED = ("frontier_attention_matching",)


@pytest.mark.parametrize("folder", sorted((ROOT / "results/eval").glob("*/")), ids=lambda folder: folder.name)
def test_committed_results_are_those_of_the_files(folder):
    manifest = json.loads((folder / "run.json").read_text())
    config = read_config(ROOT / f"configs/eval/{folder.name}.yaml")
    assert bool(manifest["finished"]) == (folder.name not in STOPPED)
    assert RunConfig(**manifest["config"]) == config
    samples = Folder(folder).records()
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".gz", ".md"}  # the rest is drawn anew from these
    per_task = {task: sum(sample["task"] == task for sample in samples) for task in manifest["metrics"]}
    cells = len(config.cells())
    assert all(count and count % cells == 0 for count in per_task.values())
