"""The tables, plots and the report of an evaluation, from records made up here."""

import math
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pytest

from eval import report, statistics
from eval.conclusion import conclude
from eval.plots import save_plots
from eval.statistics import average_difference, paired_difference
from eval.summary import summarise
from eval.tables import make_tables, markdown

NLL = {"higher_is_better": False, "digits": 2, "unit": "nats a digit"}
SHARE = {"higher_is_better": True, "digits": 2, "unit": "share"}
METRICS = {
    "needle": {"nll": NLL, "exact_match": SHARE},
    "drift": {"kl": {**NLL, "digits": 3, "unit": "nats a token"}},
    "attention_error": {"error": {**NLL, "unit": "relative"}},
    **{f"niah_single_{n}": {"recall": SHARE} for n in (1, 2)},
    **{f"longbench_{name}": {"f1": SHARE} for name in ("qasper_e", "trec_e")},
}


def run(**fields):
    """A manifest."""
    return {
        "name": "made up",
        "command": "python -m eval run",
        "started": "2026-11-22T15:00:00",
        "finished": "2026-11-22T15:30:00",
        "model": {"name": "tiny", "parameters": 1000, "dtype": "float32"},
        "versions": {"torch": "2.13.0"},
        "machine": {"processor": "abacus", "cores": 2, "memory_gib": 23.4, "devices": []},
        "protocol": "context-only",
        "config": {"ratios": [0.25]},
        "metrics": METRICS,
        "methods": ["exact", "wildcat", "snapkv", "uniform"],
        **fields,
    }


def record(task="needle", sample=0, method="wildcat", ratio=0.25, scores=None, **fields):
    """One record; the exact cache's where the method is exact."""
    exact = method == "exact"
    max_tokens = fields.pop("max_tokens", None)
    ratio = None if exact or max_tokens else ratio
    return {
        "task": task,
        "sample": sample,
        "method": method,
        "ratio": ratio,
        "max_tokens": max_tokens,
        "protocol": "context-only",
        "seed": 0,
        "prompt_hash": f"{sample:016x}",
        "prediction": None,
        "reference": None,
        "scores": scores or {"nll": 1.0},
        "seen_tokens": 1000,
        "stored_tokens": 1000.0 if exact else float(max_tokens or 1000 * ratio),
        "facets": {},
        "layers": None,
        "seconds": {"answer": 0.5} if exact else {"compress": 0.25, "answer": 0.5},
        **fields,
    }


def cell(values, metric="nll", **fields):
    """One record a value."""
    return [record(sample=at, scores={metric: value}, **fields) for at, value in enumerate(values)]


def row(summary, **fields):
    """The one row with these fields."""
    for field, value in {"group": "all", **fields}.items():
        summary = summary[summary[field] == value]
    assert len(summary) == 1
    return summary.iloc[0]


def line(table, method):
    """A table's row as the texts of its cells, by column; the differences get the name of what stands before."""
    names = [
        f"{table.header[at - 1]}, difference" if name.endswith("(95 %)") else name
        for at, name in enumerate(table.header)
    ]
    found = next(cells for cells in table.rows if cells[0].text == method)
    return dict(zip(names, found, strict=True))


def png_size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


# Intervals


def scores(values):
    return dict(enumerate(values))


def test_interval_is_the_bootstrap_of_all_resamples():
    """Of three pairs all 27 resamples can be listed: 0 is in the interval of (-1, 0, 4), and its ends are means."""
    found = paired_difference(scores([0, 1, 5]), scores([1, 1, 1]))
    means = {sum(resample) / 3 for resample in np.array(np.meshgrid(*[[-1, 0, 4]] * 3)).reshape(3, -1).T}
    assert found.mean == 1 and found.n == 3 and found.tie and not found.finding
    assert any(math.isclose(found.low, mean) for mean in means)
    assert any(math.isclose(found.high, mean) for mean in means)


def test_interval_covers_the_mean_about_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.3, 1, size=(100, 40))
    nothing = scores([0] * 40)
    found = [paired_difference(scores(draw), nothing) for draw in draws]
    covered = sum(one.low <= 0.3 <= one.high for one in found)
    assert 0.88 <= covered / 100 <= 0.99


def test_interval_is_close_to_the_normal_one_where_there_are_many_pairs():
    draw = np.random.default_rng(1).normal(0.5, 2, 400)
    found = paired_difference(scores(draw), scores([0] * 400))
    error = draw.std(ddof=1) / 20
    assert found.low == pytest.approx(draw.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(draw.mean() + 1.96 * error, abs=0.15 * error)


def test_what_samples_share_cancels_in_pairs():
    shared = np.random.default_rng(2).normal(0, 100, 10)
    found = paired_difference(scores(shared + np.linspace(0.9, 1.1, 10)), scores(shared))
    assert 0.9 < found.low < 1 < found.high < 1.1 and found.finding


@pytest.mark.parametrize("n", [3, 20])
def test_equal_scores_are_a_tie(n):
    found = paired_difference(scores([0.3] * n), scores([0.3] * n))
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert found.tie and not found.finding


def test_a_constant_difference_is_a_finding_of_no_width():
    found = paired_difference(scores([1.0] * 5), scores([0.0] * 5))
    assert (found.mean, found.low, found.high) == (1, 1, 1)
    assert found.finding and not found.tie


def test_one_hit_more_is_a_tie_and_hits_everywhere_are_not():
    few = paired_difference(scores([1] + [0] * 19), scores([0] * 20))
    assert few.low == 0 < few.high and few.tie
    assert paired_difference(scores([1] * 15 + [0] * 5), scores([0] * 20)).finding


def test_rounding_errors_make_no_finding():
    same = paired_difference(scores([0.1 + 0.2] * 5), scores([0.3] * 5))
    assert same.tie and same.low == same.high == 0
    mixed = paired_difference(scores([0.1 + 0.2, 0.1 + 0.2, 0.7, 1 / 3]), scores([0.3, 0.3, 0.7, 1 / 3]))
    assert mixed.tie and mixed.mean == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_pairs_are_neither_tie_nor_finding(n):
    found = paired_difference(scores([2.0] * n), scores([1.0] * n))
    assert (found.mean, found.n, found.low, found.high) == (1, n, None, None)
    assert not found.tie and not found.finding


def test_no_pairs_have_no_mean():
    found = paired_difference({0: 1.0}, {1: 1.0})
    assert math.isnan(found.mean) and found.n == 0 and found.low is None


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_left_out_with_their_pair_and_counted(wrong):
    found = paired_difference(scores([1, 2, wrong, 4, 5, wrong]), scores([1, 1, 1, 1, wrong, wrong]))
    assert found.mean == pytest.approx(4 / 3) and found.n == 3 and found.left_out == 3


def test_only_common_samples_are_paired():
    found = paired_difference({"a": 1, "b": 2, "c": 3, "d": 100}, {"c": 0, "b": 0, "a": 0, "e": 50})
    assert found.mean == 2 and found.n == 3


def test_order_does_not_matter():
    draw = np.random.default_rng(3).normal(size=15)
    nothing = scores([0] * 15)
    assert paired_difference(scores(draw), nothing) == paired_difference(scores(draw[::-1]), nothing)


def test_tasks_count_the_same_in_an_average():
    many, few = ([2.0] * 30, [0.0] * 30), ([1.0, 0.5, 0.0], [0.0] * 3)
    found = average_difference([tuple(map(scores, many)), tuple(map(scores, few))])
    assert found.mean == pytest.approx((2 + 0.5) / 2) and found.n == 33
    assert 1 <= found.low < 1.25 < found.high <= 1.5
    assert average_difference([tuple(map(scores, many)), (scores([1.0]), scores([0.0]))]).low is None
    with pytest.raises(ValueError, match="at least one task"):
        average_difference([])


# Summary


def test_summary_says_what_was_measured():
    records = [
        *cell([0.0, 0.0, 0.0, 0.0], method="exact"),
        *cell([1.0, 2.0, 3.0, 4.0]),
        *cell([2.0, 2.5, 4.0, 4.5], method="snapkv"),
    ]
    summary = summarise(run(), records)
    assert list(summary["method"]) == ["exact", "wildcat", "snapkv"]
    ours, theirs, exact = (row(summary, method=method) for method in ("wildcat", "snapkv", "exact"))
    assert ours["mean"] == 2.5 and ours["n"] == 4 and math.isnan(ours["difference"])
    assert (ours["lowest"], ours["highest"]) == (1, 4)
    assert theirs["difference"] == 0.75 and 0.5 <= theirs["low"] < theirs["high"] <= 1 and not theirs["tie"]
    assert exact["difference"] == -2.5 and exact["kept"] == 1 and theirs["kept"] == 0.25
    assert ours["seconds_compress"] == 0.25 and math.isnan(exact["seconds_compress"])


def test_differences_are_to_wildcat_at_the_same_budget_and_exact_is_beside_each():
    records = cell([0.0] * 3, method="exact")
    for budget, ours, theirs in (({"ratio": 0.1}, 2, 3), ({"ratio": 0.5}, 1, 5), ({"max_tokens": 1024}, 7, 8)):
        records += cell([ours] * 3, **budget) + cell([theirs] * 3, method="snapkv", **budget)
    summary = summarise(run(), records)
    assert list(summary["budget"].unique()) == ["ratio 0.5", "ratio 0.1", "1,024 tokens"]
    found = {budget: row(summary, method="snapkv", budget=budget)["difference"] for budget in summary["budget"]}
    assert found == {"ratio 0.5": 4, "ratio 0.1": 1, "1,024 tokens": 1}
    exact = summary[summary["method"] == "exact"]
    assert list(exact["difference"]) == [-1, -2, -7]


def test_a_cell_with_fewer_samples_is_paired_over_those_it_has():
    records = cell([1.0, 2.0, 3.0, 10.0, 20.0]) + cell([2.0, 3.0, 4.0], method="snapkv")
    summary = summarise(run(finished=None), records)
    theirs = row(summary, method="snapkv")
    assert theirs["difference"] == 1 and theirs["pairs"] == theirs["n"] == 3
    assert row(summary, method="wildcat")["n"] == 5
    table = make_tables(run(), summary)[1]
    assert "n = 3 to 5" in table.title
    assert line(table, "snapkv")["n"].text == "3"


@pytest.mark.parametrize(("higher", "worst"), [(False, "4.000"), (True, "1.000")])
def test_the_worst_sample_stands_beside_the_mean(higher, worst):
    manifest = run()
    task = next(iter(manifest["metrics"]))
    name, metric = next(iter(manifest["metrics"][task].items()))
    manifest["metrics"] = {**manifest["metrics"], task: {name: {**metric, "higher_is_better": higher, "digits": 3}}}
    table = make_tables(manifest, summarise(manifest, cell([1.0, math.nan, 4.0, 2.0])))[1]
    assert line(table, "wildcat")[f"worst {name}"].text == worst


def test_the_same_number_of_another_prompt_is_no_pair():
    ours = [record(sample=0, prompt_hash=f"{at:016x}", facets={"depth": at}) for at in range(4)]
    theirs = [{**one, "method": "snapkv", "scores": {"nll": 2.0}} for one in ours[1:]]
    theirs.append({**theirs[0], "prompt_hash": "other"})
    found = row(summarise(run(), ours + theirs), method="snapkv")
    assert found["pairs"] == 3 and found["n"] == 4


def test_a_sample_that_is_there_twice_counts_once():
    summary = summarise(run(), [*cell([1.0, 1.0, 1.0]), *cell([4.0])])
    assert row(summary, method="wildcat")["n"] == 3 and row(summary, method="wildcat")["mean"] == 2


def test_scores_that_are_not_finite_are_counted_and_shown():
    records = cell([1.0, 2.0, 3.0, 4.0]) + cell([2.0, math.nan, 4.0, None], method="snapkv")
    records += cell([math.inf] * 4, method="uniform")
    summary = summarise(run(), records)
    theirs = row(summary, method="snapkv")
    assert theirs["mean"] == 3 and theirs["n"] == 2 and theirs["not_finite"] == 2 and theirs["pairs_left_out"] == 2
    table = make_tables(run(), summary)[1]
    assert line(table, "snapkv")["nll ↓"].text == "3.00 (2 not finite)"
    assert line(table, "uniform")["nll ↓"].text == "– (4 not finite)"
    assert line(table, "uniform")["nll ↓, difference"].text == "no pairs"


def test_lengths_are_groups_where_there_are_several():
    records = []
    for method, extra in (("wildcat", 0), ("snapkv", 1)):
        for at in range(6):
            scores_ = {"nll": 1.0 + extra * (at // 3)}
            records.append(record(sample=at, method=method, scores=scores_, facets={"length": (500, 1000)[at // 3]}))
    summary = summarise(run(), records)
    assert list(summary["group"].unique()) == ["all", "length 500", "length 1000"]
    assert row(summary, method="snapkv", group="length 500")["tie"]
    assert row(summary, method="snapkv", group="length 1000")["difference"] == 1
    named = [
        {**entry, "facets": {"length": {500: "0-4k", 1000: "8k+"}[entry["facets"]["length"]]}} for entry in records
    ]
    assert list(summarise(run(), named)["group"].unique()) == ["all", "length 0-4k", "length 8k+"]
    one = [entry for entry in records if entry["facets"]["length"] == 500]
    assert list(summarise(run(), one)["group"].unique()) == ["all"]


def test_forms_are_groups_beside_lengths():
    facets = [{"length": length, "form": form} for length in (500, 1000) for form in ("table", "prose")]
    records = [
        record(sample=at, method=method, scores={"nll": 1.0 + (facet["form"] == "table")}, facets=facet)
        for method in ("wildcat", "snapkv")
        for at, facet in enumerate(3 * facets)
    ]
    summary = summarise(run(), records)
    assert list(summary["group"].unique()) == ["all", "length 500", "length 1000", "form prose", "form table"]
    assert row(summary, method="snapkv", group="form prose")["mean"] == 1
    assert row(summary, method="snapkv", group="form table")["mean"] == 2
    titles = [table.title for table in make_tables(run(), summary)]
    by_length, by_form = (next(title for title in titles if f" by {facet}" in title) for facet in ("length", "form"))
    assert by_length.endswith("n = 6 at each length") and by_form.endswith("n = 6 at each form")


def test_benchmarks_are_averaged_over_tasks_of_the_same_weight():
    records = []
    for method, first, second in (("wildcat", 0.5, 0.1), ("snapkv", 0.8, 0.2)):
        records += cell([first] * 9, "f1", task="longbench_qasper_e", method=method)
        records += cell([second] * 3, "f1", task="longbench_trec_e", method=method)
    records += cell([1.0] * 9, "f1", task="longbench_qasper_e", method="uniform")
    summary = summarise(run(), records)
    ours, theirs = (row(summary, task="longbench average", method=method) for method in ("wildcat", "snapkv"))
    assert ours["mean"] == pytest.approx(30) and theirs["mean"] == pytest.approx(50)
    assert theirs["difference"] == pytest.approx(20) and theirs["low"] == pytest.approx(20) and theirs["n"] == 12
    average = summary[summary["task"] == "longbench average"]
    assert list(average["method"]) == ["wildcat", "snapkv"]  # uniform lacks one of the tasks


def test_ruler_is_averaged_at_each_length_that_all_tasks_have():
    records = []
    for task, lengths in (("niah_single_1", (1024, 2048, 4096)), ("niah_single_2", (1024, 2048))):
        for length in lengths:
            hit = float(task == "niah_single_1" or length == 1024)
            records += [record(task, at + length, scores={"recall": hit}, facets={"length": length}) for at in range(3)]
    summary = summarise(run(), records)
    average = summary[summary["task"] == "ruler average"].set_index("group")["mean"]
    assert dict(average) == pytest.approx({"all": 75, "length 1024": 100, "length 2048": 50})
    alone = summarise(run(), [entry for entry in records if entry["task"] == "niah_single_1"])
    assert set(alone["task"]) == {"niah_single_1"}


def test_nothing_to_report_is_an_error():
    with pytest.raises(ValueError, match="nothing yet"):
        summarise(run(), [])
    with pytest.raises(ValueError, match="no metrics of the task 'other'"):
        summarise(run(), [record("other")])
    with pytest.raises(ValueError, match="none has a score"):
        summarise(run(), [record(scores={"other": 1.0})])


# Tables


def verdicts():
    """A run where uniform is worse than WildCat in one metric and better in the other, and snapkv ties."""
    records = []
    for method, nll, hits in (("exact", 0, 10), ("wildcat", 1, 4), ("snapkv", 1, 4), ("uniform", 2, 9)):
        for at in range(10):
            wobble = 0.1 * (-1) ** at if method == "snapkv" else 0.01 * at
            scores_ = {"nll": nll + wobble, "exact_match": float(at < hits)}
            records.append(record(sample=at, method=method, scores=scores_))
    return records


def test_headings_say_what_was_measured_and_what_is_better():
    for table in make_tables(run(), summarise(run(), verdicts())):
        for said in ("context-only", "ratio 0.25", "tiny"):
            assert said in table.title
        heading = f"{table.title} {table.notes}"
        assert "nats a digit, lower is better" in heading and "n = 10" in heading


def test_verdicts_follow_the_direction_of_the_metric():
    overview, table = make_tables(run(), summarise(run(), verdicts()))
    cells = line(table, "uniform")
    assert cells["nll ↓, difference"].mark == "worse" and "worse" in cells["nll ↓, difference"].text
    assert cells["exact_match ↑, difference"].mark == "better" and "better" in cells["exact_match ↑, difference"].text
    assert re.search(r"\(-0\.\d\d to \+0\.\d\d, tie\)", line(table, "snapkv")["nll ↓, difference"].text)
    assert line(table, "wildcat")["nll ↓, difference"].text == ""
    assert line(overview, "uniform")["needle ↓"].text.endswith("▼")
    assert line(overview, "snapkv")["to wildcat"].text == "1 ="


def test_best_of_the_compressed_methods_is_bold_and_so_is_all_that_prints_the_same():
    records = cell([0.5] * 3, method="exact") + cell([1.001] * 3) + cell([1.004] * 3, method="snapkv")
    records += cell([1.01] * 3, method="uniform")
    table = make_tables(run(), summarise(run(), records))[1]
    assert [line(table, method)["nll ↓"].best for method in run()["methods"]] == [False, True, True, False]
    # A difference of a thousandth is a finding, but nothing that two digits show.
    assert line(table, "snapkv")["nll ↓, difference"].mark == ""
    assert "**1.00**" in markdown(table) and "**0.50**" not in markdown(table)


def test_without_wildcat_there_are_no_differences():
    records = [entry for entry in verdicts() if entry["method"] != "wildcat"]
    for table in make_tables(run(), summarise(run(), records)):
        assert not any("wildcat" in name for name in table.header)
        assert not any(cell.mark for cells in table.rows for cell in cells)


def test_too_few_samples_have_a_difference_and_no_verdict():
    table = make_tables(run(), summarise(run(), cell([1.0, 1.0]) + cell([2.0, 2.0], method="snapkv")))[1]
    found = line(table, "snapkv")["nll ↓, difference"]
    assert found.text == "+1.00 (no interval)" and found.mark == ""


def test_a_method_that_a_task_lacks_is_a_gap():
    records = cell([1.0] * 3) + cell([1.0] * 3, method="snapkv") + cell([0.1] * 3, "kl", task="drift")
    overview = make_tables(run(), summarise(run(), records))[0]
    assert line(overview, "snapkv")["drift ↓"].text == "–"


def test_a_run_with_nothing_but_the_exact_cache_has_tables(tmp_path):
    records = cell([1.0] * 3, method="exact")
    table = make_tables(run(), summarise(run(), records))[1]
    assert line(table, "exact")["nll ↓"].text == "1.00"
    report.write_report(run(), records, tmp_path)


def test_markdown_tables_have_as_many_cells_in_every_line():
    name = "wild|cat <b>"
    records = [{**entry, "method": name if entry["method"] == "snapkv" else entry["method"]} for entry in verdicts()]
    for table in make_tables(run(), summarise(run(methods=["exact", name]), records)):
        lines = [entry for entry in markdown(table).splitlines() if entry.startswith("|")]
        assert len(lines) == len(table.rows) + 2
        assert {len(re.findall(r"(?<!\\)\|", entry)) for entry in lines} == {len(table.header) + 1}
        assert "<b>" not in markdown(table)


def test_rows_are_in_the_order_of_the_manifest():
    methods = ["uniform", "exact", "snapkv", "wildcat"]
    table = make_tables(run(methods=methods), summarise(run(methods=methods), verdicts()))[1]
    assert [cells[0].text for cells in table.rows] == methods


def test_no_two_columns_have_the_same_head():
    for table in make_tables(run(), summarise(run(), verdicts())):
        assert len(set(table.header)) == len(table.header)


def test_exact_can_be_the_baseline():
    manifest = run(config={"baseline": "exact"})
    overview, table = make_tables(manifest, summarise(manifest, verdicts()))
    assert "nll, to exact (95 %)" in table.header and "to exact" in overview.header
    assert line(table, "exact")["nll ↓, difference"].text == ""
    assert line(table, "wildcat")["nll ↓, difference"].mark == "worse"
    assert line(table, "wildcat")["nll ↓, difference"].text.startswith("+1.00")


def test_bytes_stand_beside_what_is_kept_where_they_were_measured():
    sizes = {"exact": 8 * 2**20, "wildcat": 2 * 2**20, "snapkv": 3 * 2**20}
    records = [{**entry, "memory_bytes": sizes.get(entry["method"])} for entry in verdicts()]
    records = [entry for entry in records if entry["memory_bytes"]] + cell([1.0] * 10, method="uniform")
    table = make_tables(run(), summarise(run(), records))[1]
    shown = {method: line(table, method)["cache, MiB"].text for method in run()["methods"]}
    assert shown == {
        "exact": "8.0 (100.0% of exact)",
        "wildcat": "2.0 (25.0% of exact)",
        "snapkv": "3.0 (37.5% of exact)",
        "uniform": "–",
    }
    assert "over the exact cache's keys and values in float32 on the same samples" in table.notes
    old = make_tables(run(), summarise(run(), verdicts()))[1]
    assert not any("MiB" in name for name in old.header) and "keys and values" not in old.notes


def test_every_table_has_bytes_over_the_exact_caches():
    records = [
        {
            **entry,
            "memory_bytes": entry["facets"]["length"] * (4 if entry["method"] == "exact" else 1) + extra,
            "prompt_hash": f"{entry['sample']}",
        }
        for entry, extra in ((entry, 120 * (entry["method"] != "exact")) for entry in needles())
    ]
    overview, table, lengths = make_tables(run(), summarise(run(), [*records, *cell([1.0] * 3, method="uniform")]))
    for each in (overview, lengths):
        shares = {row[0].text: row[-1].text for row in each.rows if each.header[-1] == "bytes of exact"}
        # 620 of 2,000 and 1,120 of 4,000 bytes; over samples of both lengths the mean is that of the shares.
        own = "28.0 to 31.0 %" if each is lengths else "29.5 %"
        assert shares.items() >= {"exact": "100.0 %", "wildcat": own}.items()
        assert "bytes of exact: all tensors that the cache holds" in each.notes
    assert "(29.5% of exact)" in line(table, "wildcat")["cache, MiB"].text
    assert line(overview, "uniform")["bytes of exact"].text == "–"


# Conclusion


def concluded(records, **fields):
    return conclude(run(**fields), summarise(run(**fields), records))


def test_the_conclusion_counts_what_was_found():
    assert concluded(verdicts()) == (
        "At ratio 0.25, uniform finds 90 % of the needles, the best of 3 methods; wildcat 40 %; "
        "the exact cache 100 % (n = 10)."
    )


def test_the_conclusion_names_a_tie_once():
    records = [entry for entry in verdicts() if entry["method"] != "uniform"]
    found = concluded(records, config={"baseline": "exact"})
    assert found == "At ratio 0.25, wildcat and 1 more find 40 % of the needles; the exact cache 100 % (n = 10)."
    facts = [{**entry, "task": "lookup"} for entry in records]
    told = concluded(facts, config={"baseline": "exact"}, metrics={"lookup": METRICS["needle"]})
    assert told == found.replace("needles", "facts")


def test_where_nothing_was_found_the_first_metric_decides():
    records = [
        record(sample=at, method=method, scores={"nll": nll, "exact_match": 0.0})
        for method, nll in (("wildcat", 2.0), ("snapkv", 3.0))
        for at in range(3)
    ]
    assert concluded(records) == "At ratio 0.25, wildcat has nll 2.00 nats a digit in needle (n = 3)."


def test_other_tasks_are_told_by_their_score():
    records = cell([1.0, 0.0], "recall", task="niah_single_1", method="snapkv")
    records += cell([0.0, 0.0], "recall", task="niah_single_1")
    assert concluded(records) == "At ratio 0.25, snapkv has recall 50 % in niah_single_1; wildcat none (n = 2)."


def test_the_exact_cache_alone_has_no_conclusion(tmp_path):
    assert concluded(cell([1.0] * 3, method="exact")) == ""


def test_the_conclusion_stands_above_the_facts(tmp_path):
    html = written(tmp_path, run(), verdicts())
    for text in (html, (tmp_path / "summary.md").read_text()):
        assert text.index("uniform finds 90 % of the needles") < text.index("python -m eval run")


# Plots


def needles(lengths=(500, 1000), depths=(0.0, 0.5, 1.0), methods=("exact", "wildcat", "snapkv"), ratios=(0.25,)):
    records = []
    for at, (length, depth) in enumerate((length, depth) for length in lengths for depth in depths):
        for method in methods:
            for ratio in ratios if method != "exact" else [None]:
                nll = 0.1 + len(method) / 10 + depth
                facets = {"length": length, "depth": depth}
                records.append(record(sample=at, method=method, ratio=ratio, scores={"nll": nll}, facets=facets))
    return records


def layered(methods=("exact", "wildcat", "snapkv"), heads=(3, 3, 3)):
    return [
        record(
            "attention_error",
            sample,
            method,
            scores={"error": 0.5},
            layers={"error": [[0.1 * (layer + head) for head in range(n)] for layer, n in enumerate(heads)]},
        )
        for method in methods
        for sample in range(2)
    ]


def test_every_plot_that_applies_is_written_under_a_stable_name(tmp_path):
    records = needles(ratios=(0.25, 0.1)) + layered() + cell([0.1] * 3, "kl", task="drift", max_tokens=1024)
    paths = save_plots(run(), records, tmp_path / "new")
    assert {path.name for path in paths} == {
        *(f"accuracy-{task}.png" for task in ("needle", "drift", "attention_error")),
        *(f"needle-{budget}.png" for budget in ("0.25", "0.1", "1024-tokens")),
        "layers-0.25.png",
    }
    assert all(path.exists() for path in paths)


def test_plots_are_the_same_bytes(tmp_path):
    records = needles() + layered()
    first, second = (save_plots(run(), records, tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first] == [path.name for path in second]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert b"tIME" not in one.read_bytes()


def test_plots_of_many_methods_are_small(tmp_path):
    methods = ["exact", "wildcat", *(f"method_{at}" for at in range(15))]
    records = needles(methods=methods) + layered(methods, heads=[9] * 30)
    assert all(path.stat().st_size < 300_000 for path in save_plots(run(methods=methods), records, tmp_path))


@pytest.mark.parametrize("given", [{"lengths": (500,)}, {"depths": (0.5,)}, {"lengths": (500,), "depths": (0.5,)}])
@pytest.mark.parametrize("methods", [("wildcat",), ("exact", "wildcat", "snapkv")])
def test_a_single_length_depth_or_method_is_plotted(given, methods, tmp_path):
    paths = save_plots(run(), needles(**given, methods=methods), tmp_path)
    assert [path.name for path in paths] == ["accuracy-needle.png", "needle-0.25.png"]
    assert all(min(png_size(path)) > 100 for path in paths)


def test_scores_that_are_not_finite_and_gaps_are_plotted(tmp_path):
    records = needles()
    records[1]["scores"]["nll"] = math.nan
    records[2]["scores"]["nll"] = math.inf
    del records[5]
    assert len(save_plots(run(), records, tmp_path)) == 2
    for entry in records:
        entry["scores"]["nll"] = math.nan
    assert save_plots(run(), records, tmp_path) == []


@pytest.mark.parametrize("methods", [("wildcat", "snapkv"), ("snapkv",)])
@pytest.mark.parametrize("heads", [(3, 3), (3, 1, 0), (1,)])
def test_layers_with_any_number_of_heads_are_plotted(methods, heads, tmp_path):
    paths = save_plots(run(), layered(methods, heads), tmp_path)
    assert [path.name for path in paths] == ["accuracy-attention_error.png", "layers-0.25.png"]


def test_names_of_tasks_are_no_paths(tmp_path):
    manifest = run(metrics={"../needle/x": {"nll": NLL}})
    (path,) = save_plots(manifest, cell([1.0] * 3, task="../needle/x"), tmp_path)
    assert path.parent == tmp_path and path.exists()


# Report


class Page(HTMLParser):
    """The texts, tags and addresses of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.texts = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.texts.append(data)


def written(tmp_path, manifest, records):
    report.write_report(manifest, records, tmp_path)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_needs_no_other_file(tmp_path):
    page = Page(written(tmp_path, run(), needles() + layered()))
    assert "link" not in page.tags and "iframe" not in page.tags
    assert page.addresses and all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert page.tags.count("img") == 4 and "table" in page.tags
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "summary.md", "needle-0.25.png"}


def test_report_says_what_was_run(tmp_path):
    html = written(tmp_path, run(), verdicts())
    for said in ("context-only", "python -m eval run", "torch 2.13.0", "abacus", "2026-11-22T15:00:00", "1,000 param"):
        assert said in html and said in (tmp_path / "summary.md").read_text()


HOSTILE = "<script>alert(1)</script>\"'&amp;\x00\x1b[2J\x7f\x85\u202edlrow\ud800</pre></td></details>\r\n{{ 7 * 7 }}"


def test_predictions_can_do_nothing_to_the_page(tmp_path):
    records = [{**entry, "prediction": HOSTILE, "reference": HOSTILE, "prompt_hash": "0123abcd"} for entry in needles()]
    page, plain = (
        Page(written(tmp_path / name, run(), given))
        for name, given in (
            ("hostile", records),
            ("plain", [{**entry, "prediction": "x", "reference": "x"} for entry in records]),
        )
    )
    assert page.tags == plain.tags
    text = "".join(page.texts)
    assert (
        "<script>alert(1)</script>\"'&amp;␀␛[2J␡\\u0085\\u202edlrow\\ud800</pre></td></details>␍\n{{ 7 * 7 }}" in text
    )
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_samples_show_prompt_reference_and_every_budget(tmp_path):
    records = [
        {**entry, "prediction": f"{entry['method']} at {entry['ratio']}", "reference": "48213"}
        for entry in needles(ratios=(0.25, 0.1))
    ]
    html = written(tmp_path, run(), records)
    for said in ("exact at None", "wildcat at 0.25", "snapkv at 0.1", "48213", records[0]["prompt_hash"]):
        assert said in html
    assert html.count("exact at None") == report.SHOWN_SAMPLES
    assert "<details" in html


def test_long_predictions_are_cut(tmp_path):
    records = [{**entry, "prediction": "word " * 1000} for entry in needles()]
    html = written(tmp_path, run(), records)
    assert "(5,000 characters)" in html and "word " * 100 not in html


def test_an_unfinished_run_says_so_first(tmp_path):
    records = cell([1.0] * 4) + cell([2.0] * 3, method="snapkv")
    html = written(tmp_path, run(finished=None), records)
    summary = (tmp_path / "summary.md").read_text()
    for text in (html, summary):
        assert text.index("has not finished") < text.index("context-only")
        assert "fewer samples than others" in text
    assert "has not finished" not in written(tmp_path, run(), cell([1.0] * 3))


def test_report_is_the_same_bytes_for_the_same_run(tmp_path):
    for name in ("first", "second"):
        report.write_report(run(), verdicts(), tmp_path / name)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_empty_records_are_an_error_and_leave_no_files(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        report.write_report(run(), [], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_intervals_are_in_the_report(tmp_path):
    html = written(tmp_path, run(), verdicts())
    found = statistics.paired_difference(
        *({at: [0, 1][at < hits] for at in range(10)} for hits in (9, 4)),  # uniform and wildcat in exact_match
    )
    assert f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f}, better)" in html
