"""Figures made of samples: shares, ratios of the same turn, exponents, and their limits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.caches import DYNAMIC, SAME_LENGTH, WILDCAT
from benchmarks.generation import PARTS
from benchmarks.prefill import ONE_BIN
from benchmarks.records import Label, Record, Run, select

_SPEED_UPS = {1: 1.8, 4: 2.5}  # limits, by rows
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Limit:
    """A limit that the project set itself before anything was measured.

    Attributes:
        bound: the most, or the least, that a figure may be.
        at_least: True if it is the least.
    """

    bound: float
    at_least: bool = False

    def kept_by(self, value: float) -> bool:
        """Tell whether a figure is within the limit."""
        return value >= self.bound if self.at_least else value <= self.bound


EXPONENT = Limit(1.1)
SLOWER = Limit(1.1)  # of a generation as it goes on


@dataclass(frozen=True)
class Figure:
    """One figure to show.

    Attributes:
        what: in words.
        labels: labels of the records it is made of.
        value: the median over the turns, or an estimate.
        low: the smallest of the turns, or an interval's end.
        high: the largest, or the other end.
        unit: unit of all three; "" for ratios.
        limit: limit of `value`, if there is one.
    """

    what: str
    labels: dict[str, Label]
    value: float
    low: float
    high: float
    unit: str = ""
    limit: Limit | None = None

    @staticmethod
    def of(
        what: str, labels: dict[str, Label], samples: Sequence[float], unit: str = "", limit: Limit | None = None
    ) -> Figure:
        """Make a figure of samples: their median, the smallest and the largest."""
        return Figure(what, labels, statistics.median(samples), min(samples), max(samples), unit, limit)


def ratios(above: Record, below: Record) -> list[float]:
    """Divide two records that shared their turns: one ratio a turn."""
    return [a / b for a, b in zip(above.samples, below.samples, strict=True)]


def shares(seconds: Record, folds: Record) -> list[float]:
    """Divide seconds of folding by the rest of the same prefill, in per cent: one a turn."""
    return [100 * fold / (whole - fold) for whole, fold in zip(seconds.samples, folds.samples, strict=True)]


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Fit seconds as a power of sizes, by least squares of logarithms: exponent and 95 % interval.

    The interval is of the fit: with fewer than three sizes there is none, and it is NaN.
    """
    fit = stats.linregress(np.log(sizes), np.log(seconds))
    freedom = len(sizes) - 2
    reach = stats.t.ppf((1 + _CONFIDENCE) / 2, freedom) * fit.stderr if freedom > 0 else math.nan
    return float(fit.slope), float(fit.slope - reach), float(fit.slope + reach)


def limited(run: Run) -> list[Figure]:
    """Pick the figures of a benchmark for which a limit was set."""
    figures = {
        "prefill": prefill_shares,
        "scaling": scaling_exponents,
        "decode": decode_ratios,
        "memory": memory_ratios,
        "generation": generation_ratios,
        "calls": call_ratios,
        "choices": lambda run: [],  # none has a limit
    }[run.benchmark](run)
    return [figure for figure in figures if figure.limit is not None]


def prefill_shares(run: Run) -> list[Figure]:
    """Compare folding with the rest of the same prefill, for every method that folds."""
    limits = {WILDCAT: Limit(3), ONE_BIN: Limit(15)}
    figures = []
    for seconds in select(run.records, "seconds"):
        (folds,) = select(run.records, "fold_seconds", **seconds.labels)
        name = str(seconds.labels["contender"])
        if name != DYNAMIC:
            what = f"{name}: folding over the rest of the prefill, {_place(seconds.labels)}"
            figures.append(Figure.of(what, seconds.labels, shares(seconds, folds), "%", limits.get(name)))
    return figures


def scaling_exponents(run: Run) -> list[Figure]:
    """Fit the exponents of the tokens (limit 1.1) and of the rank to each size's median."""
    figures = []
    for quantity, size, limit in (("fold_seconds", "tokens", EXPONENT), ("fold_seconds_by_rank", "rank", None)):
        records = select(run.records, quantity)
        for dtype in dict.fromkeys(record.labels["dtype"] for record in records):
            own = [record for record in records if record.labels["dtype"] == dtype]
            if len(own) < 2:
                continue
            sizes = [float(record.labels[size]) for record in own]
            fit = fit_exponent(sizes, [statistics.median(record.samples) for record in own])
            what = f"compression, exponent of the {size} from {min(sizes):,.0f} to {max(sizes):,.0f}, {dtype}"
            figures.append(Figure(what, {"dtype": dtype, "size": size}, *fit, limit=limit))
    return figures


def decode_ratios(run: Run) -> list[Figure]:
    """Compare WildCat's speed with DynamicCache's, and with an exact cache of its stored length."""
    figures = []
    for ours in select(run.records, "seconds_per_step", contender=WILDCAT):
        if "group" in ours.labels:
            continue
        others = ours.labels | {"contender": DYNAMIC}
        rows = int(ours.labels["rows"])
        place = f"{_place(ours.labels)}, {rows} row{'s'[: rows > 1]}"
        (exact,) = [r for r in select(run.records, "seconds_per_step", **others) if r.labels == others]
        limit = Limit(_SPEED_UPS[rows], at_least=True) if rows in _SPEED_UPS else None
        what = f"decoding: tokens per second over {DYNAMIC}'s, {place}"
        figures.append(Figure.of(what, ours.labels, ratios(exact, ours), "", limit))
        (same,) = select(run.records, "seconds_per_step", **ours.labels | {"contender": SAME_LENGTH})
        what = f"decoding: time over that of a {SAME_LENGTH}, {place}"
        figures.append(Figure.of(what, ours.labels, ratios(ours, same), "", Limit(1.1)))
    return figures


def memory_ratios(run: Run) -> list[Figure]:
    """Divide the bytes of every cache, held and at the peak, by DynamicCache's."""
    figures = []
    for quantity, what in (("held_bytes", "bytes held"), ("peak_bytes", "peak of the prefill")):
        for record in select(run.records, quantity):
            name = record.labels["contender"]
            (exact,) = select(run.records, quantity, **record.labels | {"contender": DYNAMIC})
            limit = Limit(0.26) if (quantity, name) == ("held_bytes", WILDCAT) else None
            text = f"{name}: {what} over {DYNAMIC}'s, {_place(record.labels)}"
            figures.append(Figure.of(text, record.labels | {"quantity": quantity}, ratios(record, exact), "", limit))
    return figures


def generation_ratios(run: Run) -> list[Figure]:
    """Divide the last eighth by the second: time of a token, most bytes held."""
    figures = []
    for last in select(run.records, "seconds_per_token", part=PARTS - 1):
        place = {name: last.labels[name] for name in ("dtype", "tokens")}
        (second,) = select(run.records, "seconds_per_token", **place, part=1)
        value = statistics.median(last.samples) / statistics.median(second.samples)
        low, high = min(last.samples) / max(second.samples), max(last.samples) / min(second.samples)
        what = f"generation of {place['tokens']:,} tokens, {place['dtype']}"
        text = f"{what}: time of a token, last eighth over second"
        figures.append(Figure(text, place, value, low, high, limit=SLOWER))
        held = [max(select(run.records, "held_bytes", **place, part=part)[0].samples) for part in (PARTS - 1, 1)]
        text = f"{what}: most bytes held, last eighth over second"
        figures.append(Figure.of(text, place, [held[0] / held[1]], "", Limit(1.01)))
    return figures


def call_ratios(run: Run) -> list[Figure]:
    """Divide the time of a token on a tiny model by DynamicCache's; no limit was set."""
    figures = []
    for record in select(run.records, "seconds_per_step"):
        (exact,) = select(run.records, "seconds_per_step", **record.labels | {"contender": DYNAMIC})
        what = f"{record.labels['contender']}: time of a token over {DYNAMIC}'s, {_place(record.labels)}"
        figures.append(Figure.of(what, record.labels, ratios(record, exact)))
    return figures


def _place(labels: dict[str, Label]) -> str:
    return f"{labels['tokens']:,} tokens, {labels['dtype']}"
