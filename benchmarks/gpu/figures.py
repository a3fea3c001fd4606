"""Goals, ratios, and the figure of a whole model, from the rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.shapes import LLAMA, QWEN, TINY

Row = dict[str, Any]
EXACT, DYNAMIC = "exact", "DynamicCache"
# The length that the project set its limits for, and the most that folds may take of such a prefill, in percent.
_LENGTH = 32768
_SHARES = {"wildcat": 3.0, "query_wildcat": 6.0}
_DEPTHS = {shape.name: shape.layers for shape in (LLAMA, QWEN, TINY)}


def pick(rows: Sequence[Row], /, **labels: Any) -> list[Row]:
    """Pick the rows that have all of these labels and no error."""
    return [row for row in rows if "error" not in row and labels.items() <= row.items()]


@dataclass(frozen=True)
class Goal:
    """A figure with a limit.

    Attributes:
        what: what is measured.
        value: figure.
        limit: limit.
        most: True if the limit is the most that is welcome, False if it is the least.
        unit: what stands behind the numbers.
    """

    what: str
    value: float
    limit: float
    most: bool
    unit: str = ""

    @property
    def ratio(self) -> float:
        """The figure over its limit."""
        return self.value / self.limit if self.limit else self.value

    @property
    def met(self) -> bool:
        """True if the figure is within its limit."""
        return self.value <= self.limit if self.most else self.value >= self.limit


@dataclass(frozen=True)
class Prefill:
    """One cache's prefill.

    Attributes:
        row: what was measured.
        seconds: median of the turns.
        share: seconds in folds over the rest of the same prefill, the median.
        over_exact: seconds over those of the exact cache; None if that was not measured.
        whole: seconds of all layers of the model, reckoned by layer.
    """

    row: Row
    seconds: float
    share: float
    over_exact: float | None
    whole: float


def prefills(rows: Sequence[Row], layers: int) -> list[Prefill]:
    """Reckon shares and whole models of all prefills."""
    found = []
    for row in (row for row in pick(rows, part="prefill") if row.get("seconds")):
        exact = pick(rows, part="prefill", shape=row["shape"], tokens=row["tokens"], cache=EXACT)
        seconds = statistics.median(row["seconds"])
        shares = [fold / (whole - fold) for whole, fold in zip(row["seconds"], row["fold_seconds"], strict=True)]
        over = seconds / statistics.median(exact[0]["seconds"]) if exact and exact[0].get("seconds") else None
        factor = _depth(row["shape"], layers) / layers
        found.append(Prefill(row, seconds, statistics.median(shares), over, seconds * factor))
    return found


@dataclass(frozen=True)
class Decoding:
    """One cache's decoding.

    Attributes:
        row: what was measured.
        seconds: of a step of the layers that were built, folds included.
        whole: seconds of a step of all layers of the model, reckoned by layer.
        speed: speed over that of `DynamicCache`, of the whole model; None without one.
        bytes_ratio: bytes that a step of `DynamicCache` reads over those that this one reads, of the whole model.
    """

    row: Row
    seconds: float
    whole: float
    speed: float | None
    bytes_ratio: float | None


def decodings(rows: Sequence[Row], layers: int) -> list[Decoding]:
    """Reckon speeds and bytes of all decoding, folds spread over the tokens between two."""
    found = []
    for row in (row for row in pick(rows) if "step_seconds" in row):
        place = {name: row[name] for name in ("shape", "tokens", "kept", "rows")}
        costs, exact = (
            pick(rows, part="decoding", cache="", **place),
            pick(rows, part="decoding", cache=DYNAMIC, **place),
        )
        whole = _whole(row, costs[0], layers) if costs else row["step_seconds"]
        speed = ratio = None
        if costs and exact:
            speed = _whole(exact[0], costs[0], layers) / whole
            ratio = _read(exact[0], costs[0], layers) / _read(row, costs[0], layers)
        found.append(Decoding(row, row["step_seconds"], whole, speed, ratio))
    return found


def bandwidth(rows: Sequence[Row]) -> float | None:
    """Give the bytes that a copy moves in a second; None if it was not measured."""
    copies = pick(rows, part="kernels", kernel="copy")
    return copies[0]["bytes"] / copies[0]["seconds"] if copies else None


def own_seconds(row: Row) -> float:
    """Give an operation's time on the device: as a graph where it could be one, launches included otherwise."""
    return float(row.get("graph_seconds") or row["seconds"])


def fold_limit(row: Row) -> float | None:
    """Give the limit of the folds' share of a prefill, in percent; None where there is none."""
    return _SHARES.get(row["cache"]) if row["tokens"] == _LENGTH else None


def goals(rows: Sequence[Row], layers: int) -> list[Goal]:
    """List the figures that the project set limits for."""
    found = []
    for each in prefills(rows, layers):
        if (limit := fold_limit(each.row)) is not None:
            what = f"compressing, share of the prefill at 32k, {each.row['cache']}, {each.row['shape']}"
            found.append(Goal(what, 100 * each.share, limit, most=True, unit=" %"))
    every = decodings(rows, layers)
    for one in every:
        row = one.row
        ours = row["part"] == "decoding" and row["cache"].startswith(("wildcat", "query_wildcat"))
        if ours and row["tokens"] == _LENGTH and row["kept"] == 0.25 and one.speed and one.bytes_ratio:
            what = f"decoding at 32k, speed over the ratio of the bytes, {row['cache']}, {rows_of(row)}, {row['shape']}"
            found.append(Goal(what, one.speed / one.bytes_ratio, 0.8, most=False))
    found += _bits(every)
    for row in pick(rows, part="decoding"):
        if "stalls" in row:
            what = (
                f"waits of the host in a step, {row['cache']}, {row['tokens']:,} tokens, {rows_of(row)}, {row['shape']}"
            )
            found.append(Goal(what, row["stalls"], 0, most=True))
    return found


def _bits(every: Sequence[Decoding]) -> list[Goal]:
    """Compare slots of 4 bits with those of the same method in the model's dtype."""
    found = []
    place = ("shape", "tokens", "kept", "rows")
    for quantised in every:
        method = quantised.row["cache"].removesuffix(", 4 bits")
        same = [
            one
            for one in every
            if one.row["cache"] == method and all(one.row[name] == quantised.row[name] for name in place)
        ]
        if same and method != quantised.row["cache"]:
            row = quantised.row
            told = f"{method}, {row['tokens']:,} tokens to {100 * row['kept']:g} %, {rows_of(row)}, {row['shape']}"
            what = f"slots of 4 bits, speed over plain slots, {told}"
            found.append(Goal(what, same[0].whole / quantised.whole, 1.0, most=False))
    return found


def _whole(row: Row, costs: Row, layers: int) -> float:
    """Reckon a step of the whole model: what grows with the layers by layer, the rest once."""
    grows = max(0.0, row["step_seconds"] - costs["fixed_seconds"])
    return float(costs["fixed_seconds"] + grows * _depth(row["shape"], layers) / layers)


def _read(row: Row, costs: Row, layers: int) -> float:
    """Count the bytes that a step of the whole model reads: weights and cache."""
    depth = _depth(row["shape"], layers)
    return float(costs["fixed_bytes"] + depth * (costs["layer_bytes"] + row["cache_bytes"] / layers))


def _depth(shape: str, layers: int) -> int:
    """Number of layers of the whole model."""
    return _DEPTHS.get(shape, layers)


def rows_of(row: Row) -> str:
    """Write the number of rows."""
    return f"{row['rows']} row{'s'[: row['rows'] > 1]}"
