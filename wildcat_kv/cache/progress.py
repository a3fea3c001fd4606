"""Progress of a layer: what it has read, folded and still to decide.

No tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from wildcat_kv.cache.budget import Row


@dataclass
class Progress:
    """The numbers behind one layer.

    Columns are counted from the first one read, padding included.

    A fold belongs to the end of a forward pass. It is decided there, or later where `record_past` makes
    folds wait; then it is carried out as of that end, so that waiting changes nothing.

    Attributes:
        rows: contents of each row as of the last fold.
        seen: columns read.
        folded_at: column of the last fold.
        masked: True if a mask came with any column since the last fold.
        ends: columns where forward passes ended whose fold is not decided yet.
        settled: column until which it is decided.
        fold_from: column from which on a row may need a fold; None for never.
        record_past: True while folds wait for a crop.
        scale: b of the last attention call, the factor of the scores.
        spare: columns stored beyond those that the budget counts, as of the last fold.
    """

    rows: list[Row] = field(default_factory=list)
    seen: int = 0
    folded_at: int = 0
    masked: bool = False
    ends: list[int] = field(default_factory=list)
    settled: int = 0
    fold_from: int | None = 0
    record_past: bool = False
    scale: float = 0.0
    spare: int = 0

    @property
    def since_fold(self) -> int:
        """Columns since the last fold: what can be taken back."""
        return self.seen - self.folded_at

    def read(self, columns: int, *, masked: bool) -> None:
        """Note that `columns` more have been read."""
        self.seen += columns
        self.masked = self.masked or masked

    def end_forward(self, scale: float) -> bool:
        """Note that a forward pass ends here; tell if a fold may be due."""
        self.scale = scale
        if not self.record_past and not self.ends and (self.fold_from is None or self.seen < self.fold_from):
            self.settled = self.seen
            return False
        self.ends.append(self.seen)
        return True

    def due(self, until: int) -> int | None:
        """Find the next end, up to column `until`, where a fold is to be decided; None if there is none.

        Ends that cannot need one are settled on the way.
        """
        while self.ends and self.ends[0] <= until:
            if self.fold_from is not None and self.ends[0] >= self.fold_from:
                return self.ends[0]
            self.settled = self.ends.pop(0)
        return None

    def mark_decided(self, wait: int | None) -> None:
        """Note that the first end is decided.

        The next look comes after `wait` columns, never if None.
        """
        self.settled = self.ends.pop(0)
        self.fold_from = None if wait is None else self.settled + wait

    def fold(self, rows: list[Row], end: int) -> None:
        """Note that the layer has folded as of column `end`."""
        self.rows, self.folded_at = rows, end
        self.spare = max(row.stored for row in rows) - max(row.counted for row in rows)
        self.masked = self.masked and end < self.seen

    def relabel(self) -> None:
        """Note that another mask came for the columns since the last fold."""
        self.masked = True
        if self.fold_from is not None:
            self.fold_from = min(self.fold_from, self.seen)

    def take_back(self, columns: int) -> None:
        """Forget the last `columns` columns, no more than `since_fold`."""
        self.seen -= columns
        # A forward pass that was cut short ended here.
        self.ends = sorted({min(end, self.seen) for end in self.ends if self.seen > self.settled})
        self.settled = min(self.settled, self.seen)
        if self.fold_from is not None:  # reckoned from columns that are gone
            self.fold_from = min(self.fold_from, self.seen)
