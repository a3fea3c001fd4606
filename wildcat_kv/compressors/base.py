"""What every compression method implements, and what it is given."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.config import WildCatConfig
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.tensors import take_columns


@dataclass(frozen=True)
class KVBlock:
    """What one layer holds when it is over its budget, and which part of it must become fewer slots.

    Rows are right-aligned: row b holds `held[b]` entries in the last columns, in the order of their positions:
    sinks, slots of earlier coresets, exact tokens. Columns before them are arbitrary. Of these entries the last
    `window[b]` stay as they are, and so do those before the `lengths[b]` items in front of the window.

    Attributes:
        keys: (rows, heads, n, d), rotated as the model stores them.
        values: (rows, heads, n, d_v), those of exact tokens. With `weights`, numerators U, in float32 or
            float64; without, an earlier slot, which is none of the items, has its numerator over its weight.
        valid: bool (rows, heads, n), False for padding slots of an earlier coreset.
        held: entries of each row.
        lengths: items of each row, the entries to compress.
        window: entries behind the items.
        exact: newest entries that are exact tokens, the window among them.
        seen: valid tokens that each row has read so far; never the same at two folds of a row.
        scale: b, the factor of the attention scores.
        layer_index: of this layer among those that can be compressed.
        sharing: the `layer_index` of each layer that is compressed, this one among them: they share one budget.
        weights: float32 (rows, heads, n), 1 for exact tokens; None where all items are exact.
        value_bound: float32 (rows, heads), sum over channels of the largest squared value seen.
        queries: (rows, query_heads, m, d), the newest queries that the method asked for, right-aligned: query -j
            is that of the token which is entry -j while j <= exact. None where the method asked for none.
        queried: queries of each row.
        memory: float32 (rows, heads, n, m), what the method remembers of each entry; m is its `memory`.
        rotation: how the layer rotates by position; None where the method did not ask.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    held: Sequence[int]
    lengths: Sequence[int]
    window: Sequence[int]
    exact: Sequence[int]
    seen: Sequence[int]
    scale: float
    layer_index: int
    sharing: Sequence[int]
    weights: Tensor | None = None
    value_bound: Tensor | None = None
    queries: Tensor | None = None
    queried: Sequence[int] | None = None
    memory: Tensor | None = None
    rotation: Rotation | None = None

    def items(self, entries: Tensor) -> Tensor:
        """The items among entries (rows, heads, n, ...), right-aligned: (rows, heads, max(lengths), ...)."""
        length = max(self.lengths)
        if len(set(self.window)) == 1:
            stop = entries.shape[2] - self.window[0]
            return entries[:, :, stop - length : stop]
        stops = entries.shape[2] - torch.tensor(self.window)
        index = stops.unsqueeze(-1) + torch.arange(length) - length
        return take_columns(entries, index.clamp_min(0).to(entries.device).unsqueeze(1))

    def others(self, entries: Tensor) -> Tensor:
        """What is none of the items among entries (rows, heads, n, ...), right-aligned, zeros before it.

        Returns:
            (rows, heads, c, ...), c the largest number of such entries of a row.
        """
        n, columns = entries.shape[2], []
        for held, length, window in zip(self.held, self.lengths, self.window, strict=True):
            columns.append([*range(n - held, n - window - length), *range(n - window, n)])
        width = max(map(len, columns))
        index = torch.tensor([[0] * (width - len(row)) + row for row in columns], dtype=torch.int64).to(entries.device)
        taken = take_columns(entries, index.unsqueeze(1))
        there = torch.arange(width) >= width - torch.tensor([len(row) for row in columns]).unsqueeze(-1)
        there = there.to(entries.device).view(len(columns), 1, width, *[1] * (entries.dim() - 3))
        return taken.masked_fill_(~there, 0)

    def tokens(self, row: int) -> int:
        """Tokens that the items of a row stand for, as if none had been dropped: the same in every layer."""
        if self.lengths[row] <= self.exact[row] - self.window[row]:  # no slots among them
            return self.lengths[row]
        return self.seen[row] - (self.held[row] - self.lengths[row])

    def map_rows(self, function: Callable[[KVBlock], Tensor]) -> Tensor:
        """Apply `function` to rows that hold equally much, without the columns that are none of theirs.

        Args:
            function: takes a block whose `held` are all n and whose `queried` are all m, to (rows, heads, n, ...).

        Returns:
            The rows' results, right-aligned and 0 where nothing is held.
        """
        alike: dict[tuple[int, ...], list[int]] = {}
        queried = self.queried or [0] * len(self.held)
        for row, numbers in enumerate(zip(self.held, self.exact, queried, strict=True)):
            alike.setdefault(numbers, []).append(row)
        n = self.keys.shape[2]
        if len(alike) == 1 and self.held[0] == n and (self.queries is None or queried[0] == self.queries.shape[2]):
            return function(self)
        result: Tensor | None = None
        for (held, _, seen_queries), rows in alike.items():
            if not held:
                continue
            part = function(self._rows(rows, held, seen_queries))
            if result is None:
                result = part.new_zeros(len(self.held), part.shape[1], n, *part.shape[3:])
            result[torch.tensor(rows, device=part.device), :, n - held :] = part
        assert result is not None, "a block holds something"
        return result

    def _rows(self, rows: list[int], held: int, queried: int) -> KVBlock:
        """The rows at `rows`, which hold `held` entries and have `queried` queries."""
        index = torch.tensor(rows, device=self.keys.device)

        def entries(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, index)[:, :, tensor.shape[2] - held :]

        def numbers(of: Sequence[int]) -> list[int]:
            return [of[row] for row in rows]

        queries = None if self.queries is None else self.queries.index_select(0, index)
        keys, values, valid = entries(self.keys), entries(self.values), entries(self.valid)
        assert keys is not None and values is not None and valid is not None
        return replace(
            self,
            keys=keys,
            values=values,
            valid=valid,
            weights=entries(self.weights),
            memory=entries(self.memory),
            value_bound=None if self.value_bound is None else self.value_bound.index_select(0, index),
            queries=None if queries is None else queries[:, :, queries.shape[2] - queried :],
            held=numbers(self.held),
            lengths=numbers(self.lengths),
            window=numbers(self.window),
            exact=numbers(self.exact),
            seen=numbers(self.seen),
            queried=None if self.queried is None else numbers(self.queried),
        )


class Compressor(ABC):
    """A compression method. Stateless: all that it knows comes with the block.

    Attributes:
        paper: where it was published.
        decodes: whether it can compress what is generated, not only the prompt.
        memory: numbers to remember of each entry from fold to fold, see `remember`.
        needs_rotation: whether it undoes and redoes the model's rotary positions.
        estimates: whether its coresets say how large their error is, and it can keep to a tolerance.
        waits: whether layers fold together, when the last of them has been attended to; see `SharingCompressor`.
    """

    paper: ClassVar[str] = ""
    decodes: ClassVar[bool] = True
    memory: ClassVar[int] = 0
    needs_rotation: ClassVar[bool] = False
    estimates: ClassVar[bool] = False
    waits: ClassVar[bool] = False

    @classmethod
    def of(cls, settings: WildCatConfig) -> Self:
        """The method as it is by default, with the settings' seed where it draws at random."""
        fields: Any = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
        return cls(**{field.name: settings.seed for field in fields if field.name == "seed"})

    @property
    def observation(self) -> Observation | None:
        """The queries that the method learns from; None for none."""
        return None

    @property
    def needs_queries(self) -> bool:
        """Whether it learns from queries."""
        return self.observation is not None

    @abstractmethod
    def compress(self, block: KVBlock, budget: Sequence[int]) -> Coreset:
        """Bring the items of each row of `block` down to `budget[row]` slots.

        A row that is not to be compressed now has length and budget 0. Budgets are below the lengths, except
        where the method itself keeps less than it is given (`Coreset.columns`).

        Returns:
            A Coreset of (rows, heads, max(budget), ...), each row right-aligned, its slots in the order of
            their positions and the columns before them padding slots. A method that deals its budget out
            unequally, between heads or layers, says in `columns` how many columns each row takes.
        """

    def remember(self, block: KVBlock) -> Tensor:
        """What to remember of every entry held, before `compress`: float32 (rows, heads, n, memory)."""
        assert block.memory is not None
        return block.memory


class SharingCompressor(Compressor):
    """A method whose layers share one budget by what they find in what they hold.

    Every layer surveys its block as soon as its tokens have been attended to, and waits. When the last layer has, the
    slots are dealt out, and all of them compress. Queries are not kept for longer than the survey takes; keys and
    values are: a prompt that is read at once takes the memory of the exact cache until then.
    """

    waits: ClassVar[bool] = True

    @abstractmethod
    def survey(self, block: KVBlock) -> Any:
        """What the other layers, and `compress_share`, must know of this one."""

    @abstractmethod
    def deal(self, surveys: Sequence[Any], budget: Sequence[int]) -> list[Any]:
        """Shares of the layers, one a survey: `budget[row]` slots a layer and head on average.

        Args:
            surveys: of the layers that share, in their order.
            budget: as in `compress`.
        """

    @abstractmethod
    def compress_share(self, block: KVBlock, budget: Sequence[int], share: Any) -> Coreset:
        """`compress` with a share of `deal`; the block has no queries any more."""

    def compress(self, block: KVBlock, budget: Sequence[int]) -> Coreset:
        """See `Compressor`; a layer that shares with none."""
        [share] = self.deal([self.survey(block)], budget)
        return self.compress_share(block, budget, share)
