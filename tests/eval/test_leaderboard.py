"""RULER's results in the reference library's files."""

import csv
import json

import pytest
import yaml

from eval.leaderboard import write_leaderboard
from eval.records import Folder
from tests.eval.test_report import SHARE, record, run

METRICS = {task: {"score": SHARE} for task in ("niah_single_1", "ruler_vt", "ruler_qa_squad", "needle")}


@pytest.fixture
def folder(tmp_path):
    """Makes a run with records, which may be none."""

    def make(records, **fields):
        made = Folder(tmp_path / "run")
        made.begin(run(metrics=METRICS, model={"name": "Qwen/Qwen3-8B"}, **fields))
        for entry in records:
            made.append(entry)
        return made.path

    return make


def ruler(task, score, method="wildcat", length=4096, sample=0, **fields):
    facets = {"length": length}
    return record(
        task, sample, method, scores={"score": score}, facets=facets, prediction="7, 8", reference="7", **fields
    )


def test_a_folder_for_each_cell(folder, tmp_path):
    records = [ruler("ruler_vt", 0.5), ruler("ruler_vt", 1.0, ratio=0.125), ruler("ruler_vt", 1.0, "exact")]
    records += [ruler("ruler_vt", 0.5, "snapkv", length=8192), record("needle", scores={"score": 1.0})]
    records += [ruler("ruler_vt", 0.5, max_tokens=300)]
    written = write_leaderboard(folder(records), tmp_path / "lb")
    assert sorted(path.name for path in written) == [
        "ruler__4096__Qwen--Qwen3-8B__no_press__0.00",
        "ruler__4096__Qwen--Qwen3-8B__wildcat__0.75",
        "ruler__4096__Qwen--Qwen3-8B__wildcat__0.88",
        "ruler__8192__Qwen--Qwen3-8B__snapkv__0.75",
    ]


def test_scores_are_points_of_100_under_the_librarys_names(folder, tmp_path):
    records = [ruler("ruler_qa_squad", score, sample=at) for at, score in enumerate((1.0, 0.0, 1.0))]
    records += [ruler("niah_single_1", 0.25), ruler("ruler_vt", 0.2)]
    [place] = write_leaderboard(folder(records), tmp_path / "lb")
    found = json.loads((place / "metrics.json").read_text())
    assert found == {
        task: {"string_match": score} for task, score in (("niah_single_1", 25), ("qa_1", 66.67), ("vt", 20))
    }
    with (place / "predictions.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["task"] for line in lines] == ["qa_1"] * 3 + ["niah_single_1", "vt"]
    assert all((line["answer"], line["predicted_answer"]) == ("7", "7, 8") for line in lines)


@pytest.mark.parametrize(("protocol", "aware"), [("context-only", False), ("full-prompt", True)])
def test_the_protocol_is_told(folder, tmp_path, protocol, aware):
    path = folder([ruler("ruler_vt", 1.0, ratio=0.5)], protocol=protocol)
    [place] = write_leaderboard(path, tmp_path / "lb")
    config = yaml.safe_load((place / "config.yaml").read_text())
    assert config["query_aware"] == aware == place.name.endswith("__query_aware")
    assert (config["dataset"], config["data_dir"], config["press_name"]) == ("ruler", "4096", "wildcat")
    assert config["compression_ratio"] == 0.5 and config["model"] == "Qwen/Qwen3-8B"


def test_a_run_without_ruler_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no task of RULER at a ratio; run configs/eval/leaderboard.yaml"):
        write_leaderboard(folder([record("needle", scores={"score": 1.0})]), tmp_path / "lb")
    assert not (tmp_path / "lb").exists()
