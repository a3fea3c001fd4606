"""One method against others over several runs."""

import json

import pytest
from typer.testing import CliRunner

from eval.__main__ import app
from eval.compare import compare

METRICS = {"drift": {"kl": {"higher_is_better": False, "unit": "", "digits": 3}}}


def run_folder(path, scores, model="tiny", metrics=METRICS, length=100):
    """A finished run: `scores` are the kl of samples by method."""
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"model": {"name": model}, "metrics": metrics}))
    task, metric = next((task, next(iter(names))) for task, names in metrics.items())
    lines = [
        {
            "task": task,
            "sample": index,
            "method": method,
            "ratio": None if method == "exact" else 0.25,
            "max_tokens": None,
            "seed": 0,
            "prompt_hash": f"text {index}",
            "scores": {metric: score},
            "facets": {"length": length},
        }
        for method, found in scores.items()
        for index, score in enumerate(found)
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_pairs_samples_of_several_runs_by_their_prompts(tmp_path):
    first = run_folder(tmp_path / "a", {"exact": [0.0] * 6, "old": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})
    second = run_folder(tmp_path / "b", {"new": [0.5, 1.4, 2.6, 3.5, 4.4]})
    [row] = compare("new", [first, second]).to_dict("records")
    assert (row["other"], row["pairs"], row["budget"], row["length"]) == ("old", 5, "ratio 0.25", 100)
    assert row["mean"] == pytest.approx(2.48) and row["other mean"] == 3.0  # of the five that both have
    assert row["difference"] == pytest.approx(-0.52) and row["low"] <= row["difference"] <= row["high"] < 0
    assert row["verdict"] == "better"


@pytest.mark.parametrize("higher, verdict", [(True, "better"), (False, "worse")])
def test_says_which_way_is_better(tmp_path, higher, verdict):
    metrics = {"found": {"share": {"higher_is_better": higher, "unit": "", "digits": 3}}}
    folder = run_folder(tmp_path / "a", {"new": [2.0, 3.1, 4.2], "old": [1.0, 2.0, 3.0]}, metrics=metrics)
    assert compare("new", [folder])["verdict"].tolist() == [verdict]


def test_a_tie_is_a_tie_and_two_pairs_are_neither(tmp_path):
    folder = run_folder(tmp_path / "a", {"new": [1.0, 2.0, 3.0, 4.0], "old": [2.0, 1.0, 4.0, 3.0], "few": [9.0, 9.0]})
    assert dict(compare("new", [folder])[["other", "verdict"]].values) == {"old": "tie", "few": ""}


def test_bytes_are_over_the_exact_caches_on_the_same_samples(tmp_path):
    folder = run_folder(tmp_path / "a", {"exact": [0.0] * 4, "new": [1.0, 2.0, 3.0, 4.0], "old": [2.0] * 3})
    path = folder / "samples.jsonl"
    held = {"exact": 100, "new": 30, "old": 10}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{**line, "memory_bytes": held[line["method"]] * (1 + line["sample"])} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [row] = compare("new", [folder]).to_dict("records")
    assert (row["bytes"], row["other bytes"]) == pytest.approx((0.3, 0.1))
    [row] = compare("new", [run_folder(tmp_path / "b", {"new": [1.0] * 3, "old": [2.0] * 3})]).to_dict("records")
    assert row["bytes"] != row["bytes"]  # not measured


def test_refuses_what_cannot_be_compared(tmp_path):
    one = run_folder(tmp_path / "a", {"new": [1.0, 2.0], "old": [1.0, 2.0]})
    other = run_folder(tmp_path / "b", {"new": [1.0]}, model="large")
    with pytest.raises(ValueError, match="folders: runs of several models"):
        compare("new", [one, other])
    with pytest.raises(ValueError, match="method='knew' was not measured in these runs; there are new, old"):
        compare("knew", [one])
    with pytest.raises(ValueError, match="shares no samples"):
        compare("new", [other])
    with pytest.raises(ValueError, match="holds no run"):
        compare("new", [tmp_path / "nothing"])


def test_the_command_prints_a_table(tmp_path):
    folder = run_folder(tmp_path / "a", {"new": [2.0, 3.1, 4.2], "old": [1.0, 2.0, 3.0]})
    result = CliRunner().invoke(app, ["compare", "new", str(folder)])
    assert result.exit_code == 0 and "| drift" in result.stdout and "worse" in result.stdout
