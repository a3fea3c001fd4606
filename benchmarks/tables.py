"""The tables of each benchmark, made from its records alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import figures
from benchmarks.caches import DYNAMIC
from benchmarks.figures import Figure
from benchmarks.prefill import ONE_BIN
from benchmarks.records import Record, Run, select
from eval.markdown import escape_markdown, markdown_table

LIMITS = "Limits that the project set itself"
ABOUT_LIMITS = (
    "The project set these limits before it measured anything, to be told where the cache costs more than it should. "
    "Beyond one of them nothing is broken."
)
_MIB, _MILLI = 2**20, 1e3


@dataclass(frozen=True)
class Table:
    """A table to read.

    Attributes:
        title: heading.
        notes: units, and how to read it.
        header: one cell a column.
        rows: texts of the cells.
    """

    title: str
    notes: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """Write the table as Markdown: words stand on the left, figures on the right."""
        right = [any(cell[:1].isdigit() for cell in column) for column in zip(*self.rows, strict=True)]
        rows = [[escape_markdown(cell) for cell in row] for row in self.rows]
        return markdown_table(self.title, self.notes, self.header, rows, right=right)


def make_tables(run: Run) -> list[Table]:
    """Make all tables of a benchmark that has measured something."""
    tables = {
        "prefill": prefill_tables,
        "scaling": scaling_tables,
        "decode": decode_tables,
        "memory": memory_tables,
        "generation": generation_tables,
        "calls": call_tables,
        "choices": choice_tables,
    }[run.benchmark](run)
    return [table for table in tables if table.rows]


def limit_table(runs: Sequence[Run]) -> Table:
    """Put every figure that has a limit beside it."""
    rows = [
        (figure.what, spread_of(figure), limit_text(figure), verdict(figure))
        for run in runs
        for figure in figures.limited(run)
    ]
    notes = "Measured: median (least to most of the turns); for an exponent the fit's 95 % interval, for the time of a "
    notes += "generation the extremes of its tenths. The median decides."
    return Table(LIMITS, f"{ABOUT_LIMITS} {notes}", ("figure", "measured", "limit", "the median is"), rows)


def prefill_tables(run: Run) -> list[Table]:
    """Make tables of every method's share, and of one bin's operations at a matrix product's rate."""
    found = {_key(figure.labels): figure for figure in figures.prefill_shares(run)}
    rows: list[tuple[str, ...]] = []
    limits: list[tuple[str, ...]] = []
    for seconds in select(run.records, "seconds"):
        labels = seconds.labels
        (folds,) = select(run.records, "fold_seconds", **labels)
        exact = select(run.records, "seconds", **labels | {"contender": DYNAMIC})
        figure = found.get(_key(labels))
        rows.append(
            (
                str(labels["contender"]),
                str(labels["dtype"]),
                f"{labels['tokens']:,}",
                spread(seconds.samples),
                spread(folds.samples) if figure else "",
                f"{spread_of(figure)}" if figure else "",
                spread(figures.ratios(seconds, exact[0])) if figure and exact else "",
                limit_text(figure) if figure else "",
                verdict(figure) if figure else "",
            )
        )
    for factor in select(run.records, "factor_flops"):
        (gemm,) = select(run.records, "gemm_rate")
        labels = factor.labels
        place = {name: labels[name] for name in ("dtype", "tokens", "contender")}
        (folds,) = select(run.records, "fold_seconds", **place)
        rate, seconds_taken = statistics.median(gemm.samples), statistics.median(folds.samples)
        whole = sum(select(run.records, name, **labels)[0].samples[0] for name in _FLOPS)
        limits.append(
            (
                str(labels["dtype"]),
                f"{labels['points']:,}",
                f"{labels['rank']:,}",
                f"{labels['heads']:,}",
                f"{factor.samples[0] / 1e9:,.0f}",
                f"{whole / 1e9:,.0f}",
                f"{rate / 1e9:,.0f}",
                number(factor.samples[0] / rate),
                number(whole / rate),
                number(seconds_taken),
                number(seconds_taken * rate / whole),
            )
        )
    return [
        Table(
            "Folding as a share of the prefill",
            f"The share: seconds inside the folds over the rest of the same prefill. Median (least to most) of the "
            f"turns, a quarter of the tokens kept, {ONE_BIN}: one bin of the whole budget. A method that reads the "
            "context twice (kvzip) has its second reading counted as folding.",
            (
                "method",
                "dtype",
                "tokens",
                "prefill, s",
                "folding, s",
                "share",
                f"prefill over {DYNAMIC}'s",
                "limit",
                "median",
            ),
            rows,
        ),
        Table(
            "One bin: operations, and the time they take at the rate of a float32 matrix product",
            "n points, r slots, for each head of each layer: n r^2 operations for the Cholesky factor, n r^2 for the "
            "Nyström weights (a triangular solve), 2 n r d for the kernel and as many for the new values. The rate "
            "is that of a product of two "
            "2,048 x 2,048 matrices on the same threads.",
            (
                "dtype",
                "n",
                "r",
                "heads x layers",
                "n r^2, GFLOP",
                "all, GFLOP",
                "rate, GFLOP/s",
                "n r^2 at the rate, s",
                "all at the rate, s",
                "measured, s",
                "measured over all at the rate",
            ),
            limits,
        ),
    ]


_FLOPS = ("kernel_flops", "factor_flops", "weight_flops", "value_flops")


def scaling_tables(run: Run) -> list[Table]:
    """Make tables of a fold's seconds by tokens and by rank, with exponents, and of its error."""
    tables = []
    for quantity, size, unit in (("fold_seconds", "tokens", "token"), ("fold_seconds_by_rank", "rank", "slot")):
        rows: list[tuple[str, ...]] = []
        before = None
        for record in select(run.records, quantity):
            median, count = statistics.median(record.samples), float(record.labels[size])
            local = ""
            if before is not None and before[0] == record.labels["dtype"]:
                local = f"{math.log(median / before[2]) / math.log(count / before[1]):.2f}"
            row = (str(record.labels["dtype"]), f"{count:,.0f}", spread(record.samples, _MILLI), local)
            rows.append((*row, number(1e6 * median / count)))
            before = record.labels["dtype"], count, median
        fits = [figure for figure in figures.scaling_exponents(run) if figure.labels["size"] == size]
        notes = " ".join(f"{figure.what}: {spread_of(figure)}." for figure in fits)
        tables.append(
            Table(
                f"Compression by {size}",
                f"One layer of 8 heads, d = 128, a quarter kept. Median (least to most). {notes}",
                ("dtype", size, "fold, ms", "exponent from the row before", f"µs a {unit}"),
                rows,
            )
        )
    errors = select(run.records, "relative_error")
    ranks = list(dict.fromkeys(record.labels["rank"] for record in errors))
    by_tokens: list[tuple[str, ...]] = []
    for tokens in dict.fromkeys(record.labels["tokens"] for record in errors):
        own = [record for record in errors if record.labels["tokens"] == tokens]
        by_tokens.append((f"{tokens:,}", *(f"{statistics.median(record.samples):.1e}" for record in own)))
    notes = "Relative error of the outputs, float32, one bin, median over seeds: keys, values and queries are smooth "
    notes += "functions of places on a square."
    header = ("tokens", *(f"r = {rank}" for rank in ranks))
    return [*tables, Table("Error of attention on smooth data", notes, header, by_tokens)]


def decode_tables(run: Run) -> list[Table]:
    """Make tables of every cache's milliseconds a step, and of the time to read its bytes."""
    main: list[tuple[str, ...]] = []
    methods: list[tuple[str, ...]] = []
    for record in select(run.records, "seconds_per_step"):
        labels = record.labels
        (exact,) = _alike(run, record, DYNAMIC)
        (held,) = _exactly(run, "cache_bytes", record)
        (weights,) = _exactly(run, "weight_bytes", record)
        (read,) = select(run.records, "read_rate")
        milliseconds = [_MILLI * sample for sample in record.samples]
        whole = held.samples[0] + weights.samples[0]
        least = _MILLI * whole / statistics.median(read.samples)
        row = (
            str(labels["contender"]),
            str(labels["dtype"]),
            f"{labels['tokens']:,}",
            f"{labels['rows']}",
            spread(milliseconds),
            number(int(labels["rows"]) / statistics.median(record.samples)),
            spread(figures.ratios(exact, record)),
            number(held.samples[0] / _MIB),
            number(whole / _MIB),
            number(least),
            number(statistics.median(milliseconds) / least),
        )
        (methods if "group" in labels else main).append(row)
    header = (
        "cache",
        "dtype",
        "context",
        "rows",
        "step, ms",
        "tokens/s",
        f"over {DYNAMIC}'s tokens/s",
        "cache, MiB",
        "read a step, MiB",
        "at the read rate, ms",
        "measured over that",
    )
    (read,) = select(run.records, "read_rate")
    notes = (
        "Median (least to most) of the turns, folds included. Read a step: all weights and the whole cache, once; the "
        f"read rate, {statistics.median(read.samples) / 1e9:.1f} GB/s, is that of summing 512 MiB on the same threads."
    )
    return [
        Table("Decoding", " ".join([notes, *run.notes]), header, main),
        Table("Decoding with every method", notes, header, methods),
    ]


def memory_tables(run: Run) -> list[Table]:
    """Make a table of bytes, held and at the peak."""
    ratios = {_key(figure.labels): figure for figure in figures.memory_ratios(run)}
    rows = []
    for held in select(run.records, "held_bytes"):
        (peak,) = select(run.records, "peak_bytes", **held.labels)
        over = [ratios[_key(held.labels | {"quantity": name})] for name in ("held_bytes", "peak_bytes")]
        rows.append(
            (
                str(held.labels["contender"]),
                str(held.labels["dtype"]),
                f"{held.labels['tokens']:,}",
                number(statistics.median(held.samples) / _MIB),
                f"{over[0].value:.3f}",
                spread(peak.samples, 1 / _MIB),
                spread_of(over[1]),
                limit_text(over[0]),
                verdict(over[0]),
            )
        )
    notes = (
        "Held: all tensors of the cache after the prefill, free room included. Peak: the most memory of the process "
        "during the prefill above what it had just before, each prefill in a fresh process that has read 16 tokens; "
        "on CUDA what torch allocated. It includes the cache itself. The allocator gives back at once what is freed."
    )
    header = ("cache", "dtype", "tokens", "held, MiB", f"over {DYNAMIC}'s", "peak, MiB", f"over {DYNAMIC}'s")
    return [Table("Memory", notes, (*header, "limit (held)", "median"), rows)]


def generation_tables(run: Run) -> list[Table]:
    """Make a table of seconds and bytes by eighths."""
    rows = []
    for seconds in select(run.records, "seconds_per_token"):
        (held,) = select(run.records, "held_bytes", **seconds.labels)
        (stored,) = select(run.records, "stored_tokens", **seconds.labels)
        rows.append(
            (
                str(seconds.labels["dtype"]),
                f"{seconds.labels['generated']:,}",
                spread(seconds.samples, _MILLI),
                number(1 / statistics.median(seconds.samples)),
                f"{max(held.samples) / _MIB:.1f}",
                f"{max(stored.samples):,.0f}",
            )
        )
    records = select(run.records, "seconds_per_token")
    limit, prompt = (records[0].labels[name] for name in ("max_tokens", "prompt_tokens")) if records else (0, 0)
    notes = f"max_tokens={limit}, a prompt of {prompt:,} tokens, sampling. Median (least to most) of ten pieces each."
    header = ("dtype", "generated", "token, ms", "tokens/s", "held, MiB", "most stored in a layer")
    return [Table("A long generation", notes, header, rows)]


def call_tables(run: Run) -> list[Table]:
    """Make a table of calls and milliseconds of a token."""
    ratios = {_key(figure.labels): figure for figure in figures.call_ratios(run)}
    rows = []
    for record in select(run.records, "seconds_per_step"):
        counts = [select(run.records, name, **record.labels) for name in ("calls_per_layer", "calls_per_pass")]
        rows.append(
            (
                str(record.labels["contender"]),
                str(record.labels["dtype"]),
                f"{record.labels['tokens']:,}",
                *(number(found[0].samples[0]) if found else "" for found in counts),
                spread(record.samples, _MILLI),
                spread_of(ratios[_key(record.labels)]),
            )
        )
    depth = next((record.labels["layers"] for record in run.records), "")
    notes = (
        "Calls of the cache's own functions (in wildcat_kv, or Transformers' cache_utils) for one decoded token in "
        "which nothing folds, by every layer and once a pass. Milliseconds: median (least to most) of the turns, "
        f"folds included, on a random Llama of {depth} layers that computes next to nothing."
    )
    header = ("cache", "dtype", "context", "calls a layer", "calls a pass", "token, ms", f"over {DYNAMIC}'s")
    return [Table("The cache's own Python", notes, header, rows)]


def choice_tables(run: Run) -> list[Table]:
    """Make a table of every choice's prefill, speed and bytes."""
    rows = []
    for reading in select(run.records, "prefill_seconds"):
        (step,), (held,) = (_exactly(run, quantity, reading) for quantity in ("seconds_per_step", "cache_bytes"))
        (exact,) = _alike(run, held, DYNAMIC)
        place = (str(reading.labels["contender"]), str(reading.labels["dtype"]), f"{reading.labels['tokens']:,}")
        speed = spread([1 / seconds for seconds in step.samples])
        share = f"{100 * held.samples[0] / exact.samples[0]:.1f} %"
        rows.append((*place, spread(reading.samples), speed, number(held.samples[0] / _MIB), share))
    notes = "One prompt read into an empty cache, then tokens one by one, folds included; median (least to most)."
    header = ("choice", "dtype", "tokens", "prefill, s", "tokens/s", "MiB", f"over {DYNAMIC}'s")
    return [Table("Choices", notes, header, rows)]


def spread(samples: Sequence[float], factor: float = 1.0) -> str:
    """Write the median, with the smallest and largest in brackets."""
    least, most = number(factor * min(samples)), number(factor * max(samples))
    median = number(factor * statistics.median(samples))
    return median if least == most else f"{median} ({least} to {most})"


def spread_of(figure: Figure) -> str:
    """Write a figure with its extremes and unit."""
    unit = f" {figure.unit}" if figure.unit else ""
    value, low, high = (number(x) for x in (figure.value, figure.low, figure.high))
    return f"{value}{unit}" if low == high or math.isnan(figure.low) else f"{value}{unit} ({low} to {high})"


def limit_text(figure: Figure) -> str:
    """Write a figure's limit in words; empty without one."""
    if figure.limit is None:
        return ""
    unit = f" {figure.unit}" if figure.unit else ""
    return f"{'at least' if figure.limit.at_least else 'at most'} {figure.limit.bound:g}{unit}"


def verdict(figure: Figure) -> str:
    """Say whether a figure is within its limit; empty without one."""
    if figure.limit is None:
        return ""
    return "within" if figure.limit.kept_by(figure.value) else "**beyond**"


def number(value: float) -> str:
    """Write a number with three digits that count, and no power of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = abs(float(f"{value:.3g}"))  # 0.9996 becomes 1, which has fewer places
    digits = 2 - math.floor(math.log10(rounded))
    return f"{value:,.{min(max(digits, 0), 6)}f}"


def _alike(run: Run, record: Record, contender: str) -> list[Record]:
    """Find the record that differs from another in nothing but the contender."""
    wanted = record.labels | {"contender": contender}
    return [other for other in select(run.records, record.quantity, **wanted) if other.labels == wanted]


def _exactly(run: Run, quantity: str, record: Record) -> list[Record]:
    """Find another quantity of the same thing."""
    return [other for other in select(run.records, quantity, **record.labels) if other.labels == record.labels]


def _key(labels: dict[str, str | int | float]) -> tuple[tuple[str, str | int | float], ...]:
    return tuple(sorted(labels.items()))
