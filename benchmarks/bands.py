"""Time attention to unequal heads and to quantised slots: `python -m benchmarks.bands`, a minute.

Layers of one shape are filled with random entries: all heads of a layer alike, or with the same sum and unequal; slots
in the model's dtype, or in a few bits. A turn attends once in every layer, as one decoded token does, and appends one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from benchmarks.tables import Table
from benchmarks.turns import Stopwatch, take_turns
from wildcat_kv.cache.banding import Line, sort_into_bands
from wildcat_kv.cache.bands import BandedStorage
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.storage import Storage
from wildcat_kv.coreset.wtdattn import AttentionOptions

_SINK, _WINDOW = 32, 32
# Share of the slots of a head with equal ones that each of three heads has.
_UNEQUAL = (1.5, 1.0, 0.5)


def main(
    slots: Annotated[int, typer.Option(help="Slots of a head, on average.")] = 1984,
    rows: Annotated[int, typer.Option(help="Rows of the batch.")] = 1,
    layers: Annotated[int, typer.Option(help="Layers.")] = 30,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    turns: Annotated[int, typer.Option(help="Turns to count.")] = 15,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
) -> None:
    """Print milliseconds a token for three key heads of 64 channels and nine query heads."""
    torch.set_num_threads(threads)
    equal, unequal = [slots] * 3, [int(slots * share) for share in _UNEQUAL]
    kinds: dict[str, tuple[list[int], int | None, bool]] = {
        "equal heads": (equal, None, False),
        "unequal heads, the same sum": (unequal, None, True),
        **{f"equal heads, {bits} bits": (equal, bits, True) for bits in (8, 4, 3, 2)},
        "unequal heads, 4 bits": (unequal, 4, True),
    }
    kind = getattr(torch, dtype)
    with torch.no_grad():
        made = {
            name: [_layer(counts, rows, kind, torch.device(device), bits, banded) for _ in range(layers)]
            for name, (counts, bits, banded) in kinds.items()
        }
        runs = {name: _Token(storages) for name, storages in made.items()}
        found = take_turns(runs, turns, warm_ups=2, title=f"attention, {dtype}, {rows} rows")
    first = found["equal heads"]["seconds"]
    table = []
    for name, quantities in found.items():
        seconds = quantities["seconds"]
        ratios = [one / other for one, other in zip(seconds, first, strict=True)]
        spread = f"{1000 * min(seconds):.2f} to {1000 * max(seconds):.2f}"
        table.append((name, f"{1000 * statistics.median(seconds):.2f}", spread, f"{statistics.median(ratios):.2f}"))
    about = f"{layers} layers, {rows} rows, {slots} slots a head on average, {dtype}, {turns} turns."
    header = ("slots", "ms a token", "least to most", "over equal heads")
    print(Table("Attention", about, header, table).markdown())


class _Token:
    """The attention of one decoded token, in all layers."""

    def __init__(self, storages: Sequence[Storage | BandedStorage]) -> None:
        self._storages = storages
        like = storages[0].allocated.keys
        rows, heads, _, d = like.shape
        self._query = torch.randn(rows, 3 * heads, 1, d, dtype=like.dtype, device=like.device)
        self._new = torch.randn(rows, heads, 1, d, dtype=like.dtype, device=like.device)
        box = torch.full_like(self._new, 9.0)
        self._options = AttentionOptions(d**-0.5, None, True, (-box, box))

    def __call__(self) -> dict[str, float]:
        with torch.no_grad(), Stopwatch(self._new.device) as watch:
            for storage in self._storages:
                storage.append(self._new, self._new, None)
                storage.attend(self._query, *storage.shown(self._new, self._new), self._options)
        return {"seconds": watch.seconds}


def _layer(
    counts: Sequence[int], rows: int, dtype: torch.dtype, device: torch.device, bits: int | None, banded: bool
) -> Storage | BandedStorage:
    """Fill a layer whose heads hold `counts` slots, with weights."""
    heads, most = len(counts), max(counts)
    n = _SINK + most + _WINDOW
    keys, values = (torch.randn(rows, heads, n, 64, device=device).to(dtype) for _ in range(2))
    lacking = most - torch.tensor(counts, device=device)
    place = torch.arange(n, device=device) - _SINK
    valid = ((place < 0) | (place >= lacking.unsqueeze(-1))).expand(rows, -1, -1).clone()
    exact = (place < 0) | (place >= most)
    weights = torch.where(exact, 1.0, 0.5 + torch.rand(rows, heads, n, device=device)) * valid
    held = Storage([Entries(keys, values, weights, valid, keys.new_zeros(rows, heads, n, 0, dtype=torch.float32))])
    if not banded:
        return held
    return sort_into_bands(held.entries, [Line(_SINK, 0, most, _WINDOW)] * rows, held, bits, 64)


if __name__ == "__main__":
    typer.run(main)
