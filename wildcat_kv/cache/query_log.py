"""Queries that a method learns from, logged from fold to fold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wildcat_kv.compressors.observation import Observation
from wildcat_kv.coreset.tensors import ordinary_tensors

# Parts that are held before they are joined: one a forward pass.
PARTS = 64


class QueryLog:
    """The queries of one layer, column by column like its exact tokens.

    Args:
        observation: queries to keep.

    Attributes:
        carried: (rows, heads, c, d) from before the last fold, right-aligned; None when there are none.
    """

    def __init__(self, observation: Observation) -> None:
        self.observation = observation
        self.carried: Tensor | None = None
        self._parts: list[Tensor] = []
        self._borrowed = False  # whether the last part is the model's own memory

    @property
    def columns(self) -> int:
        """Columns held, the newest ones read."""
        return sum(part.shape[2] for part in self._parts)

    def append(self, queries: Tensor) -> None:
        """Take queries (rows, heads, q, d) of the newest columns.

        `keep` follows when the model goes on.
        """
        self._parts.append(queries.detach())
        self._borrowed = True

    def keep(self) -> None:
        """Copy what `append` took, unless a fold is done with it.

        A whole prompt's queries are large, and a fold often needs them no longer.
        """
        if self._borrowed:
            with ordinary_tensors():  # the model may reuse the memory, or it may hold keys and values as well
                self._parts[-1] = self._parts[-1].clone()
            self._borrowed = False
        if len(self._parts) > PARTS:
            self._join()

    def recent(self) -> Tensor | None:
        """Give all queries but the carried ones; None where there are none.

        They are (rows, heads, columns, d).
        """
        self._join()
        return self._parts[0] if self._parts else None

    def restore(self, carried: Tensor | None, recent: Tensor | None) -> None:
        """Hold what another log held."""
        self.carried, self._parts = carried, [] if recent is None else [recent]

    def take_back(self, columns: int) -> None:
        """Forget the newest columns."""
        while columns and self._parts:
            last = self._parts.pop()
            if last.shape[2] > columns:
                self._parts.append(last[:, :, : last.shape[2] - columns])
            columns -= min(columns, last.shape[2])

    def trim(self, columns: int) -> None:
        """Forget all but the newest `columns`, once there are many more."""
        if self.columns > columns + PARTS:
            queries = self.recent()
            assert queries is not None
            with ordinary_tensors():
                self._parts = [queries[:, :, -columns:].clone()]
            self._borrowed = False

    def until(self, later: int, valid: Tensor | None, counts: Sequence[int]) -> tuple[Tensor | None, list[int]]:
        """Give the queries that count, right-aligned.

        Args:
            later: newest columns to leave out.
            valid: bool (rows, k), False for padding among the last k columns before those, k >= `columns - later`;
                None where there is none.
            counts: carried queries of each row.

        Returns:
            (rows, heads, m, d), and how many of the last columns are queries of each row.
        """
        recent = self.recent()
        parts = [] if self.carried is None else [self.carried]
        if recent is not None:
            recent = recent[:, :, : recent.shape[2] - later]
            parts.append(recent)
        if not parts:
            return None, [0] * len(counts)
        queries = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        new = 0 if recent is None else recent.shape[2]
        if valid is None and len(set(counts)) == 1:
            return queries, [counts[0] + new] * len(counts)
        carried = torch.tensor(counts).to(queries.device)
        width = queries.shape[2] - new
        shown = torch.arange(width, device=queries.device) >= width - carried.unsqueeze(-1)
        fresh = shown.new_ones(len(counts), new) if valid is None else valid[:, valid.shape[1] - new :]
        shown = torch.cat((shown, fresh), dim=-1)
        order = shown.to(torch.int8).argsort(dim=-1, stable=True)
        rows = torch.arange(len(counts), device=queries.device)
        return queries.transpose(1, 2)[rows[:, None], order].transpose(1, 2), shown.sum(-1).tolist()

    def fold(self, queries: Tensor | None, kept: Sequence[int], later: int) -> None:
        """Carry the newest `kept[b]` of each row's queries over a fold.

        `later` columns came after that fold.
        """
        recent, width = self.recent(), max(kept)
        with ordinary_tensors():  # copies: a view would hold on to the queries of the whole prompt
            self.carried = queries[:, :, -width:].clone() if width and queries is not None else None
            self._parts = [recent[:, :, -later:].clone()] if later and recent is not None else []
        self._borrowed = False

    def select_rows(self, index: Tensor) -> None:
        """Keep the rows at `index`, int64 (k,), in that order."""
        self._join()
        self._map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def to(self, device: torch.device) -> None:
        """Take everything to `device`."""
        self._map(lambda tensor: tensor.to(device))

    def tensors(self) -> list[Tensor]:
        """List all memory held."""
        return [*([] if self.carried is None else [self.carried]), *self._parts]

    def _join(self) -> None:
        if len(self._parts) > 1:
            with ordinary_tensors():
                self._parts = [torch.cat(self._parts, dim=2)]
            self._borrowed = False

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        with ordinary_tensors():
            self.carried = None if self.carried is None else change(self.carried)
            self._parts = [change(part) for part in self._parts]
