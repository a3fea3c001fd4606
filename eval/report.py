"""The report of a run: one HTML file that needs no other, tables as Markdown, plots."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml

from eval.cells import EXACT
from eval.conclusion import conclude
from eval.frontier import frontier_points, frontier_tables
from eval.markdown import escape_markdown
from eval.plots import FRONTIER, file_name, save_plots
from eval.summary import EVERY, Budget, baseline_of, find_budgets, find_methods, summarise
from eval.tables import Table, make_tables, markdown

REPORT, SUMMARY = "report.html", "summary.md"
SHOWN_SAMPLES = 3  # of a task, the first ones
SHOWN_CHARACTERS = 400  # of a prediction

_COMPARED = (
    "Differences to {baseline} are means over the samples that both methods have, at the same budget, with paired "
    "bootstrap 95 % intervals. better (▲), worse (▼): than {baseline}, the interval excludes 0. tie (=): the interval "
    "contains 0. There is no interval with fewer than three pairs, and no verdict on a difference that rounds to 0. "
    "Where two methods do not differ, one interval in twenty excludes 0 all the same, and there are many in a table. "
    "With few samples intervals are too narrow: about one in ten does with 10 samples, one in four with 3."
)
_BEST = "Bold: the best of the compressed methods, and all that print the same."
# Control characters would end or hide text, and half of a surrogate pair cannot be written at all.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def write_report(manifest: dict[str, Any], records: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Write `report.html`, `summary.md` and the plots; the same bytes for the same run.

    Args:
        manifest: description of the run; one that is not finished says so.
        records: records of the run.
        folder: folder to write to; made if it is not there.

    Returns:
        Path of the report.

    Raises:
        ValueError: no records, or a task that the manifest does not describe.
    """
    summary, baseline = summarise(manifest, records), baseline_of(manifest)
    tables, plots = make_tables(manifest, summary), save_plots(manifest, records, folder)
    points = frontier_points(manifest, records)
    page = {
        "title": f"{manifest['name']}: {manifest['model']['name']}",
        "facts": _facts(manifest),
        "warnings": _warnings(manifest, summary),
        "conclusion": conclude(manifest, summary),
        "reading": [*([_COMPARED.format(baseline=baseline)] if summary["difference"].notna().any() else []), _BEST],
        "sections": _sections(manifest, records, tables, plots, frontier_tables(manifest, points)),
    }
    (folder / SUMMARY).write_text(_summary(page), encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    config = yaml.safe_dump(manifest.get("config") or {}, sort_keys=False, allow_unicode=True)
    html = environment.get_template("report.html.jinja").render(page, config=config, baseline=baseline, embed=_embed)
    (folder / REPORT).write_text(html, encoding="utf-8")
    return folder / REPORT


def visible(text: str) -> str:
    """Write control characters as symbols or escapes; line ends and tabs stay."""
    return _INVISIBLE.sub(lambda found: _symbol(ord(found[0])), text)


def _symbol(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"\\u{code:04x}"


def _facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """List what was run, where and when."""
    model, machine = manifest["model"], manifest.get("machine") or {}
    parts = [model["name"]]
    if model.get("parameters"):
        parts.append(f"{model['parameters']:,} parameters")
    if model.get("dtype"):
        parts.append(str(model["dtype"]))
    hardware = [str(machine["processor"])] if machine.get("processor") else []
    hardware += [f"{machine['cores']} cores"] if machine.get("cores") else []
    hardware += [f"{machine['memory_gib']:g} GiB of memory"] if machine.get("memory_gib") else []
    hardware += [f"{machine['processes']} processes"] if machine.get("processes", 1) > 1 else []
    hardware += [str(device) for device in machine.get("devices") or []] or ["no accelerator"]
    return [
        ("model", ", ".join(parts)),
        ("protocol", manifest["protocol"]),
        ("command", manifest.get("command") or ""),
        ("commit", manifest.get("commit") or ""),
        ("started", manifest.get("started") or ""),
        ("finished", manifest.get("finished") or "not yet"),
        ("machine", ", ".join(hardware)),
        ("versions", ", ".join(f"{name} {version}" for name, version in (manifest.get("versions") or {}).items())),
    ]


def _warnings(manifest: dict[str, Any], summary: pd.DataFrame) -> list[str]:
    """List warnings that belong before all numbers."""
    warnings = []
    if not manifest.get("finished"):
        warnings.append("This run has not finished: the numbers are those of the samples measured so far.")
    whole = summary[summary["group"] == EVERY]
    cells = (whole["n"] + whole["not_finite"]).groupby([whole["task"], whole["metric"]])
    if (cells.max() != cells.min()).any():
        warnings.append(
            "Some methods have fewer samples than others. Their means are over different samples; the differences are "
            "over those that both have."
        )
    if left_out := int(whole["not_finite"].sum()):
        warnings.append(f"{left_out:,} scores are NaN or infinite, and left out where a table says so.")
    return warnings


def _sections(
    manifest: dict[str, Any],
    records: Sequence[dict[str, Any]],
    tables: list[Table],
    plots: list[Path],
    frontier: list[Table],
) -> list[dict[str, Any]]:
    """Make the sections: overview, frontier, each task, plots of none; with tables, plots and samples."""
    budgets = find_budgets(records) or [Budget()]
    left = {path.name: path for path in plots}
    sections = []
    for task in dict.fromkeys(table.task for table in tables):
        names = [f"accuracy-{task}", *(f"{task}-{budget.slug}" for budget in budgets)]
        sections.append(
            {
                "title": task or "Overview",
                "tables": [table for table in tables if table.task == task],
                "plots": [left.pop(name) for name in map(file_name, names) if name in left],
                "samples": _samples(manifest, records, task),
            }
        )
        if task is None and (figure := left.pop(file_name(FRONTIER), None)):
            sections.append({"title": "Frontier", "tables": frontier, "plots": [figure], "samples": []})
    if left:
        sections.append({"title": "Layers", "tables": [], "plots": list(left.values()), "samples": []})
    return sections


def _samples(manifest: dict[str, Any], records: Sequence[dict[str, Any]], task: str | None) -> list[dict[str, Any]]:
    """Collect the methods' texts for the first samples of a task."""
    written = [record for record in records if record["task"] == task and record["prediction"] is not None]
    by_sample: dict[Any, list[dict[str, Any]]] = {}
    for record in written:
        by_sample.setdefault((record["seed"], record["sample"], record["prompt_hash"]), []).append(record)
    budgets = find_budgets(written)
    samples = []
    for (_, number, prompt), own in list(by_sample.items())[:SHOWN_SAMPLES]:
        found = {(record["method"], Budget(record["ratio"], record["max_tokens"])): record for record in own}
        rows = []
        for method in find_methods(manifest, own):
            # The exact cache has no budget: one cell across all of them.
            columns = [Budget()] if method == EXACT else budgets
            rows.append((method, [_prediction(found.get((method, budget))) for budget in columns]))
        facets = [f"{name} {value}" for name, value in (own[0].get("facets") or {}).items()]
        samples.append(
            {
                "title": ", ".join([f"sample {number}", *facets]),
                "prompt": prompt,
                "reference": _shortened(own[0]["reference"]),
                "budgets": [str(budget) for budget in budgets],
                "rows": rows,
            }
        )
    return samples


def _prediction(record: dict[str, Any] | None) -> tuple[str, str] | None:
    """Write a prediction and its scores."""
    if record is None:
        return None
    scores = (f"{name} {'–' if score is None else f'{score:.3g}'}" for name, score in record["scores"].items())
    return _shortened(record["prediction"]) or "", ", ".join(scores)


def _shortened(text: str | None) -> str | None:
    if text is None or len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]}… ({len(text):,} characters)"


def _summary(page: dict[str, Any]) -> str:
    """Write the report as Markdown, without samples."""
    parts = [f"# {escape_markdown(page['title'])}"]
    parts += [f"**{warning}**" for warning in page["warnings"]]
    parts += [escape_markdown(page["conclusion"])] if page["conclusion"] else []
    parts.append("\n".join(f"- {name}: {escape_markdown(value)}" for name, value in page["facts"] if value))
    parts += page["reading"]
    for section in page["sections"]:
        parts.append(f"## {escape_markdown(section['title'])}")
        parts += [f"![{path.stem}]({path.name})" for path in section["plots"]]
        parts += [markdown(table).strip() for table in section["tables"]]
    return visible("\n\n".join(parts)) + "\n"


def _embed(path: Path) -> str:
    """Make a data URI of a plot."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
