"""`python -m benchmarks gpu`, rehearsed on the CPU with a tiny shape; its figures from rows made by hand."""

import json
import time

import pytest
import torch

from benchmarks.gpu import figures
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.plan import PARTS, Case, plan
from benchmarks.gpu.run import Journal, measure
from benchmarks.gpu.shapes import FULL, LLAMA, QWEN, SMALL, TINY
from tests.benchmarks.test_benchmarks import run


def gpu(monkeypatch, capsys, folder, *arguments):
    return run(monkeypatch, capsys, "gpu", "--output", folder, "--device", "cpu", "--shape", "tiny", *arguments)


def rows(folder, **labels):
    return figures.pick(json.loads((folder / "gpu.json").read_text())["rows"], **labels)


def test_two_parts(monkeypatch, capsys, tmp_path):
    check = tmp_path / "check.py"
    check.write_text('print(\'words\'); print(\'{"kernel": "mine", "largest": 0.5}\'); raise SystemExit(3)')
    other = tmp_path / "other.py"
    other.write_text(
        "import json, sys; json.dump({'rows': [{'kernel': 'other', 'largest': 0.25}]}, open(sys.argv[1], 'w'))"
    )
    options = ("--parts", "kernels,checks", "--check", check, "--check", other)
    status, _, err = gpu(monkeypatch, capsys, tmp_path, *options)
    assert status == 0, err
    found = rows(tmp_path, part="kernels")
    assert {row["kernel"] for row in found} >= {"copy", "wildcat", "query_wildcat", "wildcat, 4 bits"}
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in found)
    assert [row["largest"] for row in rows(tmp_path, part="checks") if "kernel" in row] == [0.5, 0.25]
    assert rows(tmp_path, part="checks", kernel="mine")[0]["file"] == "check.py"
    text = (tmp_path / "gpu.md").read_text()
    assert "worthless for quality" in text and "exit status 3" in text and "words" in text
    assert [path.name for path in tmp_path.glob("*.png")] == ["gpu-kernels.png"]
    (tmp_path / "gpu.md").unlink()
    assert run(monkeypatch, capsys, "report", tmp_path)[0] == 0
    assert (tmp_path / "gpu.md").read_text() == text


def test_what_has_no_time_is_skipped(monkeypatch, capsys, tmp_path):
    status, _, err = gpu(monkeypatch, capsys, tmp_path, "--parts", "prefill,batch", "--minutes", "0.1", "--no-plots")
    assert status == 0, err
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {case["state"] for case in record["cases"]} == {"skipped: time"} and record["finished"]
    assert "Skipped for time: prefill, tiny, 600" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "prefill,nosuch"], "parts='nosuch': no such part; there are correctness"),
        (["--shape", "huge"], "shape='huge': no such shape; there are llama"),
        (["--check", "/no/such.py"], "'/no/such.py': no such file"),
    ],
)
def test_a_wrong_argument_is_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    status, _, err = gpu(monkeypatch, capsys, tmp_path / "new", *arguments)
    assert status == 1 and message in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_case_that_fails_leaves_its_rows_and_the_others(tmp_path):
    def fails(lab):
        yield {"kernel": "first"}
        raise RuntimeError("out of luck")

    def works(lab):
        yield {"kernel": "second"}

    lab = Lab(torch.device("cpu"), SMALL, 1, time.perf_counter() + 60)
    journal = Journal(tmp_path, options={"built": 1})
    measure([Case("kernels", {}, 0, 0, fails), Case("kernels", {}, 1, 0, works)], lab, journal)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row.get("kernel", row.get("error")) for row in found["rows"]] == [
        "first",
        "RuntimeError: out of luck",
        "second",
    ]
    assert [case["state"] for case in found["cases"]] == ["failed", "done"]


def test_the_plan_begins_with_what_matters_most():
    cases = plan((LLAMA, QWEN), FULL, PARTS, [])
    assert {case.part for case in cases} == set(PARTS) - {"checks"}
    first = [(case.part, *case.labels.values()) for case in cases if case.part != "correctness"][:3]
    assert first == [
        ("prefill", "Llama-3.1-8B", 32768),
        ("decoding", "Llama-3.1-8B", 32768, 0.25, 1),
        ("kernels", "Llama-3.1-8B"),
    ]
    ranks = [case.rank for case in cases]
    assert ranks == sorted(ranks) and cases[0].part == "correctness"
    assert [case.part for case in plan((TINY,), SMALL, ["fold"], [])] == ["fold", "fold"]


def test_the_whole_model_is_reckoned_by_layer():
    """A step of 8 ms with 4 of 32 layers, 2 ms of them fixed: 2 + 6 * 8 = 50 ms."""
    place = {"shape": "Llama-3.1-8B", "tokens": 32768, "kept": 0.25, "rows": 1, "part": "decoding"}
    costs = {**place, "cache": "", "fixed_seconds": 0.002, "fixed_bytes": 1000, "layer_bytes": 400}
    exact = {**place, "cache": "DynamicCache", "step_seconds": 0.008, "cache_bytes": 4 * 800}
    ours = {**place, "cache": "wildcat", "step_seconds": 0.005, "cache_bytes": 4 * 200, "stalls": 2}
    theirs, mine = figures.decodings([costs, exact, ours], 4)
    assert theirs.whole == pytest.approx(0.050) and mine.whole == pytest.approx(0.026)
    assert mine.speed == pytest.approx(50 / 26)
    assert mine.bytes_ratio == pytest.approx((1000 + 32 * 1200) / (1000 + 32 * 600))
    speed, stalls = figures.goals([costs, exact, ours], 4)
    assert speed.value == pytest.approx(mine.speed / mine.bytes_ratio) and speed.met and not stalls.met


def test_the_share_of_the_folds_is_of_the_same_prefill():
    place = {"part": "prefill", "shape": "Llama-3.1-8B", "tokens": 32768}
    exact = {**place, "cache": "exact", "seconds": [1.0, 1.0, 1.2], "fold_seconds": [0.0, 0.0, 0.0]}
    ours = {**place, "cache": "wildcat", "seconds": [1.02, 1.04, 1.1], "fold_seconds": [0.02, 0.04, 0.1]}
    _, mine = figures.prefills([exact, ours], 4)
    assert mine.share == pytest.approx(0.04) and mine.over_exact == pytest.approx(1.04)
    assert mine.whole == pytest.approx(1.04 * 8)
    (goal,) = figures.goals([exact, ours], 4)
    assert goal.value == pytest.approx(4.0) and not goal.met and goal.ratio == pytest.approx(4 / 3)
