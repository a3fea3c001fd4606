"""The frontier: bytes over the exact cache's, the best cell at each number of bytes, and the figure."""

import re

import pytest

from eval.frontier import best_at_bytes, differ_in_bytes, frontier_points, frontier_tables
from eval.frontier_plot import frontier_plot
from eval.report import write_report
from eval.style import house_style, save
from tests.eval.test_report import METRICS, cell, line, run

MANIFEST = run(metrics={name: METRICS[name] for name in ("needle", "drift", "niah_single_1", "niah_single_2")})
# The bytes of the exact cache differ by sample: shares are of the same sample.
WHOLE = (1000, 2000, 4000, 1000, 2000, 4000)


def cells(values, share, method="query_wildcat", bits=4, ratio=0.25, task="needle", metric="nll", family=None):
    """A cell's records with these scores, each of this share of its sample's exact bytes."""
    exact = method == "exact"
    compressor = None if exact else "wildcat" if method.startswith("quantised") else method.removesuffix("_3bit")
    more = {"family": family or method, "compressor": compressor, "bits": None if exact else bits}
    made = cell(values, metric, task=task, method=method, ratio=None if exact else ratio, **more)
    return [{**entry, "memory_bytes": int(share * whole)} for entry, whole in zip(made, WHOLE, strict=False)]


def exact(values=(0.1,) * 6, **fields):
    return cells(values, 1, "exact", **fields)


def point(points, method, task="needle"):
    [found] = [point for point in points if (point.method, point.measure.task) == (method, task)]
    return found


def test_bytes_are_shares_of_the_same_samples():
    short = cells([0.5] * 2, 0.25, "kvzip")  # two samples of six: the mean of all exact ones would be another
    points = frontier_points(MANIFEST, [*exact(), *cells([0.3] * 6, 0.1), *short])
    assert point(points, "query_wildcat").share == pytest.approx(0.1)
    assert point(points, "kvzip").share == pytest.approx(0.25)
    assert point(points, "exact").share == 1 and point(points, "exact").compressor is None


def test_points_say_what_they_are_and_how_sure():
    values = [0.2, 0.3, 0.5, 0.2, 0.3, 0.6]
    points = frontier_points(MANIFEST, [*cells(values, 0.1), *exact()])
    assert [found.method for found in points] == ["exact", "query_wildcat"]
    found = point(points, "query_wildcat")
    assert (found.family, found.bits, found.ratio, found.plain) == ("query_wildcat", 4, 0.25, False)
    assert found.label == "query_wildcat, ratio 0.25"
    assert found.mean == pytest.approx(0.35) and 0.2 < found.low < 0.35 < found.high < 0.6
    assert point(points, "exact").low is None


def test_an_average_of_tasks_stands_for_them():
    records = [
        record
        for task, values in (("niah_single_1", [1.0] * 6), ("niah_single_2", [0.0] * 6))
        for record in (*exact([1.0] * 6, task=task, metric="recall"), *cells(values, 0.1, task=task, metric="recall"))
    ]
    points = frontier_points(MANIFEST, records)
    assert {found.measure.task for found in points} == {"ruler average"}
    found = point(points, "query_wildcat", "ruler average")
    assert found.mean == 50 and found.measure.higher_is_better and len(found.scores) == 2


def test_an_average_is_of_likelihoods_where_all_tasks_have_them():
    tasks = ("niah_single_1", "niah_single_2")
    more = {task: {"recall": METRICS[task]["recall"], "nll": METRICS["needle"]["nll"]} for task in tasks}
    records = [
        {**record, "scores": {"recall": 0.0, "nll": nll}}
        for task, nll in zip(tasks, (0.2, 0.6), strict=True)
        for record in (*exact(task=task), *cells([0.0] * 6, 0.1, task=task))
    ]
    points = frontier_points(run(metrics=more), records)
    found = point(points, "query_wildcat", "ruler average")
    assert (found.measure.metric, found.measure.higher_is_better, found.measure.scale) == ("nll", False, 1)
    assert found.mean == pytest.approx(0.4)
    points = frontier_points(run(metrics={**more, tasks[1]: METRICS[tasks[1]]}), records)
    assert point(points, "query_wildcat", "ruler average").measure.metric == "average"


def test_cells_whose_bytes_are_not_known_are_no_points():
    unknown = [{**record, "memory_bytes": None} for record in cells([0.3] * 6, 0.1)]
    assert [found.method for found in frontier_points(MANIFEST, [*exact(), *unknown])] == ["exact"]
    assert frontier_points(MANIFEST, cells([0.3] * 6, 0.1)) == []


# The best at each number of bytes


SPREAD = (-0.02, 0.01, 0.03, -0.01, 0.02, -0.03)


def around(mean):
    return [mean + step for step in SPREAD]


def verdicts(records, levels=(0.2,)):
    return [found.verdict for found in best_at_bytes(frontier_points(MANIFEST, [*exact(), *records]), levels)]


@pytest.mark.parametrize(("ours", "verdict"), [(0.3, "first"), (0.9, "behind")])
def test_ours_is_first_or_behind_by_the_paired_interval(ours, verdict):
    assert verdicts([*cells(around(ours), 0.1), *cells(around(0.6), 0.1, "kvzip")]) == [verdict]


def test_ours_is_tied_where_the_interval_holds_0():
    other = [0.5 + step for step in (0.1, -0.1, 0.2, -0.2, 0.15, -0.1)]
    assert verdicts([*cells([0.5] * 6, 0.1), *cells(other, 0.1, "kvzip")]) == ["tied"]


def test_two_samples_decide_nothing():
    assert verdicts([*cells([0.3, 0.3], 0.1), *cells([0.6, 0.7], 0.1, "kvzip")]) == [""]


def test_higher_may_be_better():
    given = {"task": "niah_single_1", "metric": "recall"}
    records = [*exact([1.0] * 6, **given), *cells(around(0.9), 0.1, **given)]
    records += cells(around(0.4), 0.1, "kvzip", **given)
    [best] = best_at_bytes(frontier_points(MANIFEST, records), [0.2])
    assert best.verdict == "first" and best.difference.mean == pytest.approx(0.5)


def test_only_cells_within_the_bytes_count():
    records = [
        *cells(around(0.2), 0.16, ratio=0.5),
        *cells(around(0.5), 0.08, ratio=0.25),
        *cells(around(0.3), 0.18, "kvzip", ratio=0.5),
        *cells(around(0.4), 0.04, "kvzip", ratio=0.125),
    ]
    levels = (0.2, 0.17, 0.1, 0.05, 0.03)
    found = best_at_bytes(frontier_points(MANIFEST, [*exact(), *records]), levels)
    assert [best.level for best in found] == list(levels)
    assert [best.ours and best.ours.ratio for best in found] == [0.5, 0.5, 0.25, None, None]
    assert [best.other and best.other.ratio for best in found] == [0.5, 0.125, 0.125, 0.125, None]
    assert [best.verdict for best in found] == ["first", "first", "behind", "behind", ""]


def test_plain_quantisation_is_never_ours():
    plain = cells(around(0.2), 0.18, "quantised_2bit", 2, 1.0, family="quantised")
    found = best_at_bytes(frontier_points(MANIFEST, [*exact(), *plain, *cells(around(0.5), 0.1)]), [0.2])
    assert [(best.ours.method, best.other.method) for best in found] == [("query_wildcat", "quantised_2bit")]
    assert found[0].other.plain and found[0].verdict == "behind"


def test_the_table_has_a_row_for_each_task_and_level():
    records = [*exact(), *cells(around(0.3), 0.1), *cells(around(0.6), 0.1, "kvzip")]
    best, every = frontier_tables(MANIFEST, frontier_points(MANIFEST, records))
    assert [row[0].text for row in best.rows] == ["20 %", "15 %", "10 %", "7.5 %", "5 %", "4 %", "3 %"]
    assert [row[-1].text for row in best.rows] == ["first", "first", "first", "–", "–", "–", "–"]
    ten = [cell.text for cell in best.rows[2]]
    assert ten[1:6] == [
        "needle",
        *("query_wildcat, ratio 0.25 (10.0 %)", "0.30"),
        *("kvzip, ratio 0.25 (10.0 %)", "0.60"),
    ]
    assert ten[6].startswith("-0.30 (")
    assert line(every, "kvzip, ratio 0.25")["bytes of exact"].text == "10.0 %"
    assert every.rows[0][0].text == "exact" and "float32" in every.notes


# Report and figure


def full():
    """A run with every kind of mark."""
    records = []
    for task, metric, scale in (("needle", "nll", 1.0), ("drift", "kl", 0.1)):
        given = {"task": task, "metric": metric}
        records += exact([0.1 if task == "needle" else 0.0] * 6, **given)
        for bits, level in ((8, 0.1), (4, 0.2), (2, 1.5)):
            values = [scale * score for score in around(level)]
            records += cells(values, bits / 16, f"quantised_{bits}bit", bits, 1.0, family="quantised", **given)
        for ratio, level in ((0.5, 0.15), (0.25, 0.5), (0.03125, 2.5)):
            values = [scale * score for score in around(level)]
            for method in ("query_wildcat", "wildcat", "kvzip", "adakv"):
                records += cells(values, ratio / 4 + 0.02, method, 4, ratio, **given)
        values = [scale * score for score in around(0.6)]
        records += cells(values, 0.07, "query_wildcat_3bit", 3, family="query_wildcat", **given)
    return records


def test_a_report_has_a_frontier_where_cells_differ_in_bytes(tmp_path):
    manifest = {**MANIFEST, "methods": list(dict.fromkeys(record["method"] for record in full()))}
    write_report(manifest, full(), tmp_path / "with")
    text = (tmp_path / "with" / "summary.md").read_text()
    assert text.index("## Overview") < text.index("## Frontier\n\n![frontier](frontier.png)") < text.index("## needle")
    assert "### Best at each number of bytes" in text and "### Every cell by its bytes" in text
    assert (tmp_path / "with" / "frontier.png").exists()

    alike = [*exact(), *cells(around(0.3), 0.1), *cells(around(0.6), 0.1, "kvzip")]
    assert not differ_in_bytes(frontier_points(MANIFEST, alike))
    write_report(MANIFEST, alike, tmp_path / "without")
    assert "Frontier" not in (tmp_path / "without" / "summary.md").read_text()
    assert not (tmp_path / "without" / "frontier.png").exists()


def drawn(**fields):
    with house_style():
        return frontier_plot(frontier_points(MANIFEST, full()), **fields)


def test_the_figure_has_a_panel_a_task_and_a_line_a_family():
    figure = drawn(bytes_of="bfloat16")
    first, second = figure.axes
    assert first.get_title("left").startswith("needle: nll") and first.get_yscale() == second.get_yscale() == "log"
    assert second.get_title("left").endswith("; exact cache: 0")  # a logarithmic axis has no 0
    assert second.get_xlabel() == "bytes held, of the exact cache's in bfloat16" and second.get_xscale() == "log"
    names = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert names == [
        *("quantised: all tokens", "query_wildcat, 4 bits", "wildcat, 4 bits", "kvzip, 4 bits", "adakv, 4 bits"),
        *("exact cache", "0.5", "0.25", "0.03125"),
    ]
    assert [text.get_text() for text in first.texts] == ["8 bits", "4 bits", "2 bits", "3"]


def test_the_figure_of_nothing_is_none():
    assert frontier_plot(frontier_points(MANIFEST, exact())) is None


def test_a_small_svg_says_the_same(tmp_path):
    figure = drawn(title="a model")
    with house_style():
        for name in ("first", "again"):
            save(figure, tmp_path / f"{name}.svg", small=True)
        save(figure, tmp_path / "large.svg")
    small, large = ((tmp_path / f"{name}.svg").read_text() for name in ("first", "large"))
    assert small == (tmp_path / "again.svg").read_text()
    assert len(small) < 40_000 and len(small) < len(large) / 3
    assert {"a model", "0.03125", "quantised: all tokens"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", small))
    assert small.count("<use") == large.count("<use") - large.count('<use xlink:href="#Deja')
    marks = set(re.findall(r'xlink:href="#(\w+)"', small)) | set(re.findall(r"url\(#(\w+)\)", small))
    assert marks <= set(re.findall(r'id="(\w+)"', small))
