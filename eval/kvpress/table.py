"""The tables of a comparison, made from its records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from eval.kvpress.budgets import EXACT, NAMES, OURS, QUANTISED, THEIRS, TITLES, Ours, Theirs
from eval.kvpress.texts import LOOKUPS, NEEDLES
from eval.markdown import escape_markdown, markdown_table
from eval.statistics import paired_difference

Record = Mapping[str, Any]
Place = tuple[str, int]
_UNITS = {NEEDLES: "nats a digit", LOOKUPS: "nats a token"}
ABOUT = (
    "kept: bytes of the entries that a cache attends to, over the exact cache's. held: bytes of all its tensors; a "
    "press with unequal heads masks what it drops and holds it all the same. nats: loss of the right answer, less is "
    "better, with the paired 95 % interval of the difference to the first row (bootstrap over texts): better, worse, "
    "or = where it contains 0. found: answers that greedy decoding writes. seconds: of the processor, to read and "
    "compress a text."
)


def summary(manifest: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Write the tables of a run as Markdown."""
    facts = [
        f"model: {manifest['model']['name']}, {manifest['model']['parameters']:,} parameters, "
        f"{manifest['model']['dtype']}, the same files on both sides",
        f"command: {manifest['command']}",
        f"commit: {manifest['commit']}",
        f"started: {manifest['started']}",
        f"finished: {manifest['finished']}",
        f"here: {_listed(manifest['versions'])}",
        f"there: {_listed(manifest['reference_versions'])}",
        f"machine: {manifest['machine']['processor']}, {manifest['config']['threads']} thread(s)",
    ]
    head = "\n".join(f"- {escape_markdown(fact)}" for fact in facts)
    return f"# {escape_markdown(manifest['name'])}\n\n{head}\n\n{escape_markdown(ABOUT)}\n\n{tables(records)}"


def tables(records: Sequence[Record]) -> str:
    """Write a table a budget, over the texts on which all cells were measured."""
    done, parts = whole(records), []
    latest = {(place_of(record), record["method"]): record for record in records}  # a text may have been begun twice
    records = [record for (place, _), record in latest.items() if place in done]
    for budget, title in TITLES.items():
        budgets = (EXACT, QUANTISED) if budget == EXACT else (budget,)
        cells: list[Ours | Theirs] = [*(cell for cell in OURS if cell.budget in budgets)]
        cells += [cell for cell in THEIRS if cell.budget in budgets]
        parts.append(_table(title, cells, records))
    return "\n".join(parts)


def whole(records: Iterable[Record]) -> set[Place]:
    """List the texts on which all cells of both sides were measured."""
    found: dict[Place, set[str]] = {}
    for record in records:
        found.setdefault(place_of(record), set()).add(record["method"])
    return {place for place, names in found.items() if names >= set(NAMES)}


def place_of(record: Record) -> Place:
    """Name the text of a record."""
    return record["task"], record["sample"]


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())


def _table(title: str, cells: Sequence[Ours | Theirs], records: Sequence[Record]) -> str:
    """Write the table of one budget; its first cell is what the others are compared with."""
    of = {cell.name: [record for record in records if record["method"] == cell.name] for cell in (*OURS, *cells)}
    exact, first = of[OURS[0].name], of[cells[0].name]
    tasks = [task for task in _UNITS if any(record["task"] == task for record in first)]
    header = ["cache", "kept", "held"]
    header += [f"{task}: {what}" for task in tasks for what in (_UNITS[task], "found")] + ["seconds"]
    rows = []
    for cell in cells:
        own = of[cell.name]
        row = [_name(cell), _share(own, exact, "memory_bytes"), _share(own, exact, "held_bytes")]
        for task in tasks:
            row += [_nats(own, first, task), _found(own, task)]
        rows.append([*row, f"{mean(record['seconds']['compress'] for record in own):.1f}"])
    counts = ", ".join(f"{sum(record['task'] == task for record in first)} of {task}" for task in tasks)
    return markdown_table(title, f"Texts: {counts}.", header, rows, right=[False, *(True for _ in header[1:])])


def _name(cell: Ours | Theirs) -> str:
    side = "wildcat_kv" if isinstance(cell, Ours) else "kvpress"
    name = cell.name if isinstance(cell, Ours) else cell.name.split(",")[0]
    return f"{side}: {escape_markdown(name)}"


def _share(own: Iterable[Record], exact: Iterable[Record], what: str) -> str:
    full = _by_text(exact, lambda record: record["memory_bytes"])
    shares = [count / full[place] for place, count in _by_text(own, lambda record: record[what]).items()]
    return f"{100 * mean(shares):.1f} %"


def _nats(own: Iterable[Record], first: Iterable[Record], task: str) -> str:
    """Write the mean loss, and how it compares with the first row's."""
    ours, theirs = (_by_text(records, lambda record: record["scores"]["nll"], task) for records in (own, first))
    difference = paired_difference(ours, theirs)
    if own is first or difference.low is None:
        verdict = ""
    elif difference.tie:
        verdict = " ="
    else:
        verdict = " worse" if difference.mean > 0 else " better"
    return f"{mean(ours.values()):.2f}{verdict}"


def _found(own: Iterable[Record], task: str) -> str:
    answers = [answer["found"] for record in own if record["task"] == task for answer in record["answers"]]
    return f"{sum(answers)} of {len(answers)}"


def _by_text(records: Iterable[Record], value: Callable[[Record], Any], task: str | None = None) -> dict[Any, Any]:
    return {place_of(record): value(record) for record in records if task in (None, record["task"])}
