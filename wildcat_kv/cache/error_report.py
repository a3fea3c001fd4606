"""Report a cache's estimate of its own error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wildcat_kv.cache.state import LayerState
from wildcat_kv.compressors import Compressor


@dataclass(frozen=True)
class ErrorReport:
    """Estimated error of compressed attention.

    The error of a head is ||o' - o|| / ||o|| over reference queries: the prompt's own queries, moved behind it. It is
    measured on them and is no bound: for other queries it can be larger.

    Attributes:
        errors: float32 (rows, query_heads) for each compressed layer, by its index in the model.
        kept: share of the tokens seen that each of these layers holds.
    """

    errors: Mapping[int, Tensor]
    kept: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean error over layers, rows and heads."""
        return sum(self.layer(index) for index in self.errors) / len(self.errors)

    @property
    def worst(self) -> tuple[int, int, float]:
        """Layer, query head and error of the worst head, over all rows."""
        largest = {index: error.amax(0).max(-1) for index, error in self.errors.items()}
        index = max(largest, key=lambda layer: float(largest[layer].values))
        return index, int(largest[index].indices), float(largest[index].values)

    def layer(self, index: int) -> float:
        """Average the error of one layer over rows and heads."""
        return float(self.errors[index].mean())

    def __str__(self) -> str:
        table = Table("layer", "kept", "error", "largest", "of head")
        for index, error in self.errors.items():
            largest, head = error.amax(0).max(-1)
            numbers = (f"{self.kept[index]:.1%}", f"{self.layer(index):.3f}", f"{float(largest):.3f}", f"{int(head)}")
            table.add_row(f"{index}", *numbers)
        for column in table.columns:
            column.justify = "right"
        console = Console(width=80)
        with console.capture() as capture:
            console.print(table)
        return f"{capture.get()}mean {self.mean:.3f}"


def report(compressor: Compressor, states: Mapping[int, LayerState]) -> ErrorReport:
    """Collect the estimates of a cache's last fold.

    Args:
        compressor: method of the cache.
        states: contents of the layers that fold, by index.

    Raises:
        ValueError: the method makes no estimate, or nothing has been compressed yet.
    """
    if not compressor.estimates:
        raise ValueError(f"{type(compressor).__name__} does not estimate its error; take compressor='query_wildcat'")
    errors = {index: state.error.cpu() for index, state in states.items() if state.error is not None}
    if not errors:
        raise ValueError("nothing was compressed in this process yet: there is no error to report")
    return ErrorReport(errors, {index: _share_kept(states[index]) for index in errors})


def _share_kept(state: LayerState) -> float:
    """Compute the share of its tokens that a layer holds, over rows and heads."""
    rows = state.count_rows(state.progress.seen)  # tokens read since the last fold are held, too
    seen = torch.tensor([max(1, row.seen) for row in rows], dtype=torch.float64)
    return float((state.entries.valid.sum(-1).cpu().double().mean(1) / seen).mean())
