"""Markdown of a folder, made from its JSON alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import figures
from benchmarks.gpu.figures import Row, pick
from eval.markdown import escape_markdown, markdown_table

FILE, SUMMARY = "gpu.json", "gpu.md"
RANDOM = "Random weights: honest for time and memory, worthless for quality."
_NOT_MEASURED = "kvpress is not measured: it needs an older Transformers than this project."


def write_report(folder: Path, *, plots: bool = True) -> None:
    """Write `gpu.md` and the plots of a folder.

    Raises:
        ValueError: there is no `gpu.json`, or it is damaged.
    """
    try:
        record = json.loads((folder / FILE).read_text(encoding="utf-8"))
        text = _markdown(record)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / FILE} is missing or damaged: {error}; run the benchmark again") from None
    pictures: list[Path] = []
    if plots:
        from benchmarks.gpu.plots import save_plots  # matplotlib takes seconds to load

        pictures = save_plots(record, folder)
    shown = "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)
    (folder / SUMMARY).write_text(f"{text}{shown}", encoding="utf-8")


def layers_of(record: dict[str, Any]) -> int:
    """Give the number of layers that were built."""
    return int(record["options"]["built"])


def _markdown(record: dict[str, Any]) -> str:
    rows, layers = record["rows"], layers_of(record)
    weights = f"The weights are those of {record['options']['model']}." if record["options"]["model"] else RANDOM
    parts = ["# On a GPU\n", _facts(record), f"**{weights}** {_built(record, layers)} {_NOT_MEASURED}\n"]
    if record["finished"] is None:
        parts.append("**The run has not finished: the figures are of what was measured so far.**\n")
    for make in (_goals, _prefill, _decoding):
        parts.append(make(rows, layers))
    for make_plain in (_kernels, _folds, _attention, _batches, _correctness, _checks, _errors):
        parts.append(make_plain(rows))
    parts.append(_skipped(record["cases"]))
    return "\n".join(part for part in parts if part)


def _built(record: dict[str, Any], layers: int) -> str:
    """Say how the figure of a whole model was come by."""
    if record["options"]["model"]:
        return "All its layers were run."
    return (
        f"Models have {layers} of the shape's layers; *whole model* is reckoned by layer, what does not grow with the "
        "layers (embeddings, logits) counted once."
    )


def _facts(record: dict[str, Any]) -> str:
    machine = record["machine"]
    facts = {
        "command": f"`{record['command']}`",
        "commit": record["commit"] or "",
        "when": f"{record['started']} to {record['finished'] or '?'}",
        "device": record["device"],
        "machine": f"{machine['processor']}, {machine['cores']} cores",
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }
    return "\n".join(f"- {name}: {escape_markdown(str(fact))}" for name, fact in facts.items() if fact) + "\n"


def _table(title: str, notes: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table, figures on the right; nothing where it has no rows."""
    if not rows:
        return ""
    right = [all(cell[:1] in "0123456789-–" for cell in column) for column in zip(*rows, strict=True)]
    cells = [[escape_markdown(cell) for cell in row] for row in rows]
    return markdown_table(title, notes, header, cells, right=right)


def _goals(rows: Sequence[Row], layers: int) -> str:
    lines = []
    for goal in figures.goals(rows, layers):
        sign = "at most" if goal.most else "at least"
        over = f"{goal.ratio:.2f}" if goal.limit else "–"
        told = "met" if goal.met else "**missed**"
        lines.append((goal.what, f"{goal.value:.3g}{goal.unit}", f"{sign} {goal.limit:g}{goal.unit}", over, told))
    return _table("Goals", "", ("figure", "measured", "limit", "over the limit", ""), lines)


def _prefill(rows: Sequence[Row], layers: int) -> str:
    lines = [
        (
            each.row["shape"],
            f"{each.row['tokens']:,}",
            each.row["cache"],
            _time(each.seconds),
            "–" if each.row["cache"] == figures.EXACT else f"{100 * each.share:.2f} %",
            "–" if each.over_exact is None else f"{each.over_exact:.3f}",
            _time(each.row["first_seconds"]),
            _bytes(each.row.get("peak_bytes")),
            _bytes(each.row["held_bytes"]),
            _time(each.whole),
        )
        for each in figures.prefills(rows, layers)
    ]
    header = ("shape", "tokens", "cache", "seconds", "folds over the rest", "over exact", "first", "peak", "held")
    notes = "Folds: seconds within folds over the rest of the same prefill. Kept: 25 %. First: the turn that warms up."
    stalls = [
        (row["shape"], f"{row['tokens']:,}", row["cache"], str(row["stalls"]), _places(row["places"]))
        for row in pick(rows, part="prefill", counts="stalls")
    ]
    waits = _table("Waits of the host in a prefill", "", ("shape", "tokens", "cache", "waits", "where"), stalls)
    return _table("Prefill", notes, (*header, "whole model"), lines) + ("\n" + waits if waits else "")


def _decoding(rows: Sequence[Row], layers: int) -> str:
    lines = []
    for each in figures.decodings(rows, layers):
        row = each.row
        of_bytes = None if each.speed is None or each.bytes_ratio is None else each.speed / each.bytes_ratio
        lines.append(
            (
                row["shape"],
                f"{row['tokens']:,}",
                f"{100 * row['kept']:g} %",
                str(row["rows"]),
                row["cache"],
                f"{row['tokens_per_second']:,.1f}",
                _time(row["median_seconds"]),
                _time(row["slowest_seconds"]),
                _time(max(row["first_seconds"])),
                _bytes(row["cache_bytes"]),
                _time(each.whole),
                _number(each.speed),
                _number(each.bytes_ratio),
                _number(of_bytes),
                f"{row['stalls']}; {row['all_stalls']} in {row['all_steps']}" if "stalls" in row else "–",
            )
        )
    header = ("shape", "context", "kept", "rows", "cache", "tokens/s", "median step", "slowest step", "first steps")
    more = ("bytes", "whole model, a step", "speed", "fewer bytes", "speed over bytes", "waits")
    notes = (
        "Tokens a second of the layers that were built, folds included. Speed and fewer bytes: the whole model's over "
        "those of DynamicCache, weights counted. Slowest step: a fold. Waits: of the host for the device, in a step "
        "without a fold; in all steps of a turn."
    )
    return _table("Decoding", notes, (*header, *more), lines)


def _kernels(rows: Sequence[Row]) -> str:
    rate = figures.bandwidth(rows)
    lines = []
    for row in pick(rows, part="kernels"):
        moved = row["bytes"] / figures.own_seconds(row)
        lines.append(
            (
                row["shape"],
                str(row.get("rows", "–")),
                f"{row['stored']:,}" if "stored" in row else "–",
                row["kernel"],
                _time(row["seconds"]),
                _time(row.get("graph_seconds")),
                _bytes(row["bytes"]),
                f"{moved / 1e12:.3f} TB/s",
                _number(moved / rate if rate else None),
            )
        )
    header = ("shape", "rows", "entries", "kernel", "a call", "as a graph", "bytes", "rate", "of a copy")
    notes = "Bytes that it must read, over the device's own time (as a graph, where it can be one), over a copy's rate."
    return _table("One token's attention", notes, header, lines)


def _folds(rows: Sequence[Row]) -> str:
    rate = figures.bandwidth(rows)
    lines = [
        (
            row["shape"],
            f"{row['tokens']:,}",
            row["cache"],
            _time(row["seconds"]),
            _time(row["first_seconds"]),
            _bytes(row.get("peak_bytes")),
            _number(row["bytes"] / row["seconds"] / rate if rate else None),
        )
        for row in pick(rows, part="fold")
    ]
    header = ("shape", "tokens", "method", "seconds", "first", "peak", "bytes of keys and values over a copy's rate")
    return _table("The fold of one layer", "One row, a quarter kept.", header, lines)


def _attention(rows: Sequence[Row]) -> str:
    lines = []
    for row in pick(rows, part="attention"):
        exact = pick(rows, part="attention", shape=row["shape"], tokens=row["tokens"], attention="torch")
        over = exact[0]["seconds"] / row["seconds"] if exact else None
        lines.append(
            (
                row["shape"],
                f"{row['tokens']:,}",
                row["attention"],
                _time(row["seconds"]),
                _number(over),
                _bytes(row.get("peak_bytes")),
            )
        )
    header = ("shape", "tokens", "attention", "seconds", "speed over torch", "peak")
    notes = "All to all, not causal; torch is its FlashAttention where the device has it. No figure of quality here."
    return _table("Attention without a cache", notes, header, lines)


def _batches(rows: Sequence[Row]) -> str:
    lines = [
        (row["shape"], f"{row['tokens']:,}", row["cache"], str(row["rows"]), row["ended_by"], str(row["layers_held"]))
        for row in pick(rows, part="batch")
    ]
    header = ("shape", "tokens", "cache", "rows", "ended by", "layers")
    return _table("The largest batch", "Rows that can decode, with so many layers; a quarter kept.", header, lines)


def _correctness(rows: Sequence[Row]) -> str:
    lines = []
    for row in pick(rows, part="correctness"):
        if "equal" in row:
            lines.append((row["check"], "equal" if row["equal"] else "**not equal**", "–"))
        else:
            same = f"; {row['same_keys']:.1%} of the slots have the same key" if "same_keys" in row else ""
            lines.append((row["check"], f"{row['largest']:.1e}{same}", f"{row['scale']:.2g}"))
    notes = "Largest difference from the reference, beside the reference's largest number."
    return _table("Correctness", notes, ("check", "difference", "of"), lines)


def _checks(rows: Sequence[Row]) -> str:
    names = ("part", "file", "at")
    lines = [
        (row["file"], ", ".join(f"{name}: {value}" for name, value in row.items() if name not in names)[:600])
        for row in pick(rows, part="checks")
    ]
    return _table("Checks of kernels", "", ("script", "found"), lines)


def _errors(rows: Sequence[Row]) -> str:
    names = ("part", "shape", "tokens", "rows", "cache", "file", "check")
    lines = [
        (
            ", ".join(str(row[name]) for name in names if name in row),
            str(row["error"])[:400],
        )
        for row in rows
        if "error" in row
    ]
    return _table("What failed", "", ("case", "error"), lines)


def _skipped(cases: Sequence[Row]) -> str:
    lines = [
        ", ".join(f"{value}" for name, value in case.items() if name not in ("state", "seconds"))
        for case in cases
        if case["state"].startswith("skipped")
    ]
    return f"Skipped for time: {'; '.join(lines)}.\n" if lines else ""


def _time(seconds: float | None) -> str:
    """Write seconds, thousandths or millionths of them."""
    if seconds is None:
        return "–"
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _bytes(number: float | None) -> str:
    return "–" if number is None else f"{number / 2**30:.3f} GiB" if number >= 2**28 else f"{number / 2**20:.1f} MiB"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _places(places: dict[str, int]) -> str:
    return ", ".join(f"{place} ({count})" for place, count in places.items())
