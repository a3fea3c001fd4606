"""What one layer holds, and how it folds and takes back: tensors and numbers, no model, no Transformers.

In one line of columns a row: padding, sink, coreset slots, exact tokens. Rows end together, so that new tokens
take the same columns in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.cache.budget import Fold, Row, plan_fold, tokens_until_fold
from wildcat_kv.cache.folding import align_right, column_mask, fold_entries
from wildcat_kv.cache.progress import Progress
from wildcat_kv.cache.query_log import QueryLog
from wildcat_kv.cache.storage import Entries, Storage
from wildcat_kv.cache.value_range import ValueRange
from wildcat_kv.compressors.base import Compressor, KVBlock, SharingCompressor
from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.config import WildCatConfig
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.tensors import ordinary_tensors


@dataclass
class _Pending:
    """A fold that is decided and not yet carried out.

    Attributes:
        rows: what the rows hold.
        folds: what becomes of them.
        end: the column as of which.
        entries: held then, rows right-aligned.
        moved: whether they were moved for that.
        block: for the method.
        folded_range: the box around the values of the tokens that are exact no longer afterwards.
        survey: of a method whose layers share a budget.
        forgotten: whether the log has folded.
    """

    rows: list[Row]
    folds: list[Fold]
    end: int
    entries: Entries
    moved: bool
    block: KVBlock
    folded_range: ValueRange
    survey: Any = None
    forgotten: bool = False

    @property
    def budget(self) -> list[int]:
        """Slots of each row."""
        return [fold.rank for fold in self.folds]


class LayerState:
    """A coreset of the past, and the newest tokens as they are.

    Args:
        settings: the budget and the exact ends.
        compressor: the method.
        index: of the layer among the model's.
        place: of the layer among those that are compressed.
        count: layers that are compressed.
        rotation: how the layer rotates by position; None where the method does not ask.
        fixed: whether to hold the same memory for good, of the columns that the budget allows.

    Attributes:
        settings: the budget and the exact ends.
        compressor: the method.
        storage: the tensors; None before the first tokens.
        log: the queries that the method learns from; None where it does not.
        progress: the numbers.
        folded_range: the box around the values of the tokens that are exact no longer; None before the
            first fold.
        value_range: the box around the values of all tokens, to which attention is clipped; likewise.
        error: the method's estimate at the last fold, float32 (rows, query_heads); None where it makes none.
    """

    def __init__(
        self,
        settings: WildCatConfig,
        compressor: Compressor,
        index: int,
        place: int,
        sharing: Sequence[int],
        rotation: Rotation | None = None,
        *,
        fixed: bool = False,
    ) -> None:
        self._fixed = fixed
        self.settings = settings
        self.compressor = compressor
        self._index = index
        self._place = place
        self._sharing = sharing
        self._rotation = rotation
        self.storage: Storage | None = None
        self.log = None if compressor.observation is None else QueryLog(compressor.observation)
        self.progress = Progress()
        self._pending: _Pending | None = None
        self.error: Tensor | None = None
        self._checked = 0  # columns whose keys are known to be finite
        self.folded_range: ValueRange | None = None
        self.value_range: ValueRange | None = None

    # Growing

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Make room for keys (rows, kv_heads, n, d) and values (rows, kv_heads, n, d_v) and for some more."""
        self.storage = Storage.empty(keys, values, self.compressor.memory, self._limit, fixed=self._fixed)
        self.progress.rows = [Row()] * keys.shape[0]

    def restore(
        self,
        progress: Progress,
        memory: Entries,
        length: int,
        folded_range: ValueRange | None,
        carried: Tensor | None = None,
        recent: Tensor | None = None,
    ) -> None:
        """Hold what another state held.

        Args:
            progress: the numbers.
            memory: entries, and free room behind them; not copied, unless the memory is to be fixed.
            length: columns in use.
            folded_range: box around the values of tokens that are exact no longer.
            carried: queries of the log; so are the recent ones.
            recent: likewise.
        """
        if self._fixed:
            self.storage = Storage([memory.slice(0, length)], self._limit, fixed=True)
        else:
            self.storage = Storage.adopt(memory, length, self._limit)
        if self.log is not None:
            self.log.restore(carried, recent)
        self.progress, self.folded_range = progress, folded_range
        self.span()

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Read exact tokens (rows, kv_heads, q, channels); `valid` is bool (rows, q), False for padding."""
        assert self.storage is not None, "allocate() comes first"
        self.storage.append(keys, values, valid)
        progress, new = self.progress, keys.shape[2]
        if new > 1 and self._checked == progress.seen:  # the layer has looked at them
            self._checked += new
        progress.seen += new
        progress.masked = progress.masked or valid is not None
        if self.value_range is None:
            return
        shown = None if valid is None else valid.unsqueeze(1)
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            with ordinary_tensors():
                self.value_range = self.value_range.extend(values, shown)
        else:
            self.value_range = self.value_range.extend(values, shown)

    def take_in(self, tokens: int) -> None:
        """Note exact tokens that were written behind the others, one a forward pass, none of them padding."""
        held = self._held
        held.length += tokens
        for _ in range(tokens):
            self.progress.read(1, masked=False)
            self.progress.end_forward(self.progress.scale)
        self.span()

    def observe(self, queries: Tensor) -> None:
        """Take the queries (rows, query_heads, q, d) of the newest columns, where the method learns from them."""
        if self.log is not None:
            self.log.append(queries)

    def keep_queries(self) -> None:
        """Make what `observe` took the state's own, before the model goes on."""
        if self.log is not None:
            self.log.keep()

    @property
    def croppable(self) -> int:
        """Newest columns that can be taken back: those since the last fold, whose queries and earlier ones are held."""
        log, exact = self.log, self.progress.exact
        if log is None or log.columns >= exact:
            return exact
        return max(0, log.columns - (log.observation.latest or 0))

    def take_back(self, columns: int) -> None:
        """Forget the newest columns, `croppable` at most, as if they had never been read."""
        if self.log is not None:
            self.log.take_back(columns)
        self._held.truncate(self._held.length - columns)
        self.progress.take_back(columns)
        self._checked = min(self._checked, self.progress.seen)
        self.span()

    def show(self, valid: Tensor) -> None:
        """Mark anew which exact tokens are padding; `valid` is bool (rows, progress.exact). `span` comes after it."""
        tail = self._held.entries.slice(self.stored - self.progress.exact, self.stored)
        tail.valid.copy_(valid.unsqueeze(1))
        tail.weights.copy_(valid.unsqueeze(1))
        self._held.hide()
        self.progress.relabel()

    @property
    def alike(self) -> bool:
        """Whether all rows hold as much as each other."""
        return len(set(self.progress.rows)) <= 1

    def select_rows(self, index: Tensor, on_host: Sequence[int] | None) -> None:
        """Keep the rows at `index`, int64 (k,), in that order; a row may be repeated.

        Args:
            index: on any device.
            on_host: the same numbers; None will do where rows are `alike`, so that nothing waits for the device.
        """
        self._held.select_rows(index)
        if self.log is not None:
            self.log.select_rows(index)
        rows = self.progress.rows
        self.progress.rows = rows[:1] * len(index) if on_host is None else [rows[row] for row in on_host]
        with ordinary_tensors():
            self.folded_range, self.value_range = (
                box and box.rows(index) for box in (self.folded_range, self.value_range)
            )
            if self.error is not None:
                self.error = self.error.index_select(0, index.to(self.error.device))

    def move(self, device: torch.device) -> None:
        """Have everything on `device`."""
        if self._held.memory.weights.device != device:  # the boxes are always beside the weights
            self.folded_range, self.value_range = (
                box and box.to(device) for box in (self.folded_range, self.value_range)
            )
            if self.log is not None:
                self.log.to(device)
        self._held.to(device)

    @property
    def entries(self) -> Entries:
        """All that is held, without free room."""
        return self._held.entries

    @property
    def stored(self) -> int:
        """Columns held."""
        return 0 if self.storage is None else self.storage.length

    def tensors(self) -> list[Tensor]:
        """All memory held, free room included."""
        if self.storage is None:
            return []
        boxes = (self.folded_range, self.value_range)
        queries = [] if self.log is None else self.log.tensors()
        return [*self.storage.memory.tensors(), *(bound for box in boxes if box for bound in box.tensors()), *queries]

    def count_rows(self, column: int) -> list[Row]:
        """What the rows held when `column` columns had been read, since the last fold."""
        progress = self.progress
        if not progress.masked:
            return [row.append(column - progress.folded_at) for row in progress.rows]
        new = self._held.entries.valid[:, 0, self._stored_at(progress.folded_at) : self._stored_at(column)]
        return [row.append(count) for row, count in zip(progress.rows, new.sum(-1).tolist(), strict=True)]

    # Folding

    def settle(self, until: int) -> None:
        """Fold, as was due at the ends of the forward passes up to column `until`, one after the other.

        Raises:
            ValueError: NaN or infinity among the keys to fold; what was not yet folded stays as it is.
        """
        while (due := self._next_fold(until)) is not None:
            pending = self._prepare(*due)
            coreset = None
            if any(pending.budget):
                with torch.no_grad(), ordinary_tensors():
                    coreset = self.compressor.compress(pending.block, pending.budget)
            self._fold(pending, coreset)
        self.trim()

    @torch.no_grad()
    def prepare(self, until: int) -> bool:
        """Get the next fold up to column `until` ready, for `settle_together`; whether there is one.

        Raises:
            ValueError: as `settle`.
        """
        if self._pending is None and (due := self._next_fold(until)) is not None:
            pending = self._prepare(*due)
            if any(pending.budget):
                assert isinstance(self.compressor, SharingCompressor)
                with ordinary_tensors():
                    pending.survey = self.compressor.survey(pending.block)
            self._fold_log(pending)
            pending.block = replace(pending.block, queries=None)
            self._pending = pending
        return self._pending is not None

    @staticmethod
    @torch.no_grad()
    def settle_together(states: Sequence[LayerState], until: int) -> None:
        """`settle` for layers whose method deals one budget out among them.

        Raises:
            ValueError: as `settle`.
        """
        compressor = states[0].compressor
        assert isinstance(compressor, SharingCompressor)
        while True:
            ready = [state.prepare(until) for state in states]  # each of them, whatever the others say
            if not all(ready):
                break
            pending = [state._pending for state in states if state._pending is not None]
            budget = pending[0].budget
            with ordinary_tensors():
                shares = compressor.deal([each.survey for each in pending], budget) if any(budget) else []
            for place, (state, each) in enumerate(zip(states, pending, strict=True)):
                coreset = None
                if shares:
                    with ordinary_tensors():
                        coreset = compressor.compress_share(each.block, budget, shares[place])
                state._pending = None
                state._fold(each, coreset)
        for state in states:
            state.trim()

    def trim(self) -> None:
        """Forget queries that no fold will ask for."""
        # Columns of padding are no queries: what is among them is known only at the fold.
        if self.log is not None and self.log.observation.latest is not None and not self.progress.masked:
            undecided = self.progress.seen - self.progress.settled
            self.log.trim(undecided + self.log.observation.latest + self.settings.window)

    def will_fold(self, until: int) -> bool:
        """Whether `settle` would fold anything; ends that fold nothing are settled on the way."""
        return self._next_fold(until) is not None

    def check_finite(self, keys: Tensor) -> None:
        """Refuse keys of any shape that hold NaN or infinity.

        Raises:
            ValueError: names the layer.
        """
        # A sum is one pass; only if it overflows is every key looked at, in the dtype that folds compute in.
        finite = bool(torch.isfinite(keys.sum(dtype=torch.float32)))
        if not finite and not bool(torch.isfinite(keys.to(torch.float32)).all()):
            raise ValueError(
                f"layer {self._index}: NaN or infinity in the keys; the model has overflowed, try bfloat16 or "
                "float32, and call cache.reset(): other layers may have read the tokens"
            )

    @property
    def _limit(self) -> int | None:
        """Columns that are enough for good, the newest token's among them, where the budget is a number."""
        return None if self.settings.max_tokens is None else self.settings.max_tokens + 1

    @property
    def _held(self) -> Storage:
        assert self.storage is not None, "allocate() comes first"
        return self.storage

    def _stored_at(self, column: int) -> int:
        """Columns held when `column` columns had been read; they must have come after the last fold."""
        return self.stored - (self.progress.seen - column)

    def _counted_at(self, column: int) -> int:
        """The same as the budget counts it, which is alike in all layers."""
        return self._stored_at(column) - self.progress.spare

    def _next_fold(self, until: int) -> tuple[list[Row], list[Fold], int] | None:
        """The rows, the folds and the column of the next fold up to `until`, None if there is none.

        Ends of forward passes that fold nothing are settled on the way.
        """
        while (end := self.progress.due(until)) is not None:
            rows = self.count_rows(end)
            if folds := self._plan(rows, self.progress.settled, end):
                return rows, folds, end
            self._decided(rows, end)
        return None

    def _decided(self, rows: Sequence[Row], end: int) -> None:
        """Note that the first end, `end`, is decided, and when to look again."""
        again = [row for row in rows if self.compressor.decodes or not row.seen]
        waits = [wait for row in again if (wait := tokens_until_fold(row, self.settings)) is not None]
        if self.settings.max_tokens is not None:  # columns of padding take room as well
            waits.append(max(1, self.settings.max_tokens + 1 - self._counted_at(end)))
        self.progress.settle(min(waits) if waits else None)

    def _plan(self, rows: Sequence[Row], start: int, end: int) -> list[Fold] | None:
        """What to fold after the forward pass over columns [start, end), None for nothing.

        Args:
            rows: the rows as of its end.
            start: where it began.
            end: where it ended.
        """
        settings = self.settings
        # A row's first tokens, several at once, are its prompt; with padding that may come in a later pass.
        prompts = [before.seen == 0 and row.seen > 1 for before, row in zip(self.count_rows(start), rows, strict=True)]
        plans = [
            plan_fold(row, settings, prefill=prompt) if prompt or self.compressor.decodes else None
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        too_wide = settings.max_tokens is not None and self._counted_at(end) > settings.max_tokens
        if not any(plans) and not too_wide:
            return None
        return [plan or Fold.nothing(row) for plan, row in zip(plans, rows, strict=True)]

    @torch.no_grad()
    def _prepare(self, rows: list[Row], folds: list[Fold], end: int) -> _Pending:
        """What a fold as of column `end` needs to know; what came after stays as it is."""
        held, cut, appended = self.progress.rows, self._stored_at(end), end - self.progress.folded_at
        entries = held_entries = self._held.entries.slice(0, cut)
        if unchecked := end - max(self._checked, self.progress.folded_at):
            self.check_finite(entries.keys[:, :, cut - unchecked :])
            self._checked = end
        queries, queried = self._queries_until(end, entries.valid[:, 0, cut - appended :])
        if any(row.counted - old.counted != appended for row, old in zip(rows, held, strict=True)):
            entries = align_right(entries, held, appended)
        with ordinary_tensors():
            folded = _range(entries, [_leaving(cut, row, fold) for row, fold in zip(rows, folds, strict=True)])
            if self.folded_range is not None:
                folded = folded.join(self.folded_range)
            seen = folded.join(_exact_range(entries, rows))
            weighted = any(map(_takes_slots, rows, folds))
            block = KVBlock(
                keys=entries.keys,
                values=entries.numerators() if weighted else entries.values,
                valid=entries.valid,
                held=[row.stored for row in rows],
                lengths=[fold.items for fold in folds],
                window=[fold.window for fold in folds],
                exact=[row.exact for row in rows],
                seen=[row.seen for row in rows],
                scale=self.progress.scale,
                layer_index=self._place,
                sharing=self._sharing,
                weights=entries.weights if weighted else None,
                value_bound=seen.squared_norm(),
                queries=queries,
                queried=queried,
                memory=entries.memory,
                rotation=self._rotation,
            )
            if self.compressor.memory:
                # Rows that do not fold go on as if nothing had happened, and keep their queries.
                folding = torch.tensor([fold.items > 0 for fold in folds]).to(entries.keys.device)[:, None, None, None]
                entries = replace(entries, memory=torch.where(folding, self.compressor.remember(block), entries.memory))
                block = replace(block, memory=entries.memory)
        return _Pending(rows, folds, end, entries, entries is not held_entries, block, folded)

    @torch.no_grad()
    def _fold(self, pending: _Pending, coreset: Coreset | None) -> None:
        """Carry a fold out, with the coreset of the rows' items."""
        folds, end, entries = pending.folds, pending.end, pending.entries
        columns = pending.budget
        if coreset is not None:
            columns = columns if coreset.columns is None else [int(taken) for taken in coreset.columns]
            _check_coreset(coreset, columns, pending.block, type(self.compressor).__name__)
        with ordinary_tensors():
            start, parts = fold_entries(entries, pending.rows, folds, coreset, columns)
            if pending.moved:  # what is held before `start` is no longer what it should be
                start, parts = 0, [entries.slice(0, start), *parts]
            later = self._held.entries.slice(self._stored_at(end), self.stored)
            self._held.rewrite(start, [*parts, later])
        self.folded_range = pending.folded_range
        if coreset is not None and coreset.error is not None:
            self._note_error(coreset.error, [fold.items > 0 for fold in folds])
        self._fold_log(pending)
        after = [fold.apply(row, taken) for fold, row, taken in zip(folds, pending.rows, columns, strict=True)]
        self.progress.fold(after, end)
        self.span()
        self._decided(self.progress.rows, end)

    def _note_error(self, error: Tensor, folding: list[bool]) -> None:
        """Keep the estimate of the rows that fold now; that of the others is still the one of their last fold."""
        if self.error is not None and not all(folding):
            there = torch.tensor(folding).to(error.device).unsqueeze(-1)
            error = torch.where(there, error, self.error.to(error.device))
        self.error = error

    def _fold_log(self, pending: _Pending) -> None:
        """Forget the queries that a fold has learned from, but for those that the next one learns from too."""
        if self.log is None or pending.forgotten:
            return
        kept = [
            count if not fold.items else min(count, self.log.observation.carried)
            for count, fold in zip(pending.block.queried or [], pending.folds, strict=True)
        ]
        self.log.fold(pending.block.queries, kept, self.progress.seen - pending.end)
        pending.rows = [replace(row, carried=count) for row, count in zip(pending.rows, kept, strict=True)]
        pending.forgotten = True

    def _queries_until(self, end: int, valid: Tensor) -> tuple[Tensor | None, list[int]]:
        """The queries to learn from as of column `end`, right-aligned, and how many each row has.

        Args:
            end: the column.
            valid: bool (rows, k), False for padding among the columns since the last fold.
        """
        if self.log is None:
            return None, [0] * len(self.progress.rows)
        carried = [row.carried for row in self.progress.rows]
        later, latest = self.progress.seen - end, self.log.observation.latest
        queries, queried = self.log.until(later, valid if self.progress.masked else None, carried)
        if latest is None or queries is None:
            return queries, queried
        return queries[:, :, max(0, queries.shape[2] - latest) :], [min(count, latest) for count in queried]

    def span(self) -> None:
        """Set the box around the values of all tokens seen, from those folded and those held."""
        if self.folded_range is None:
            return
        entries, cut = self._held.entries, self._stored_at(self.progress.folded_at)
        with ordinary_tensors():
            span = self.folded_range.join(_exact_range(entries.slice(0, cut), self.progress.rows))
            if cut < self.stored:
                later = entries.slice(cut, self.stored)
                span = span.join(ValueRange.of(later.values, later.valid if self.progress.masked else None))
            # A row that has folded nothing is attended to exactly: nothing to clip.
            self.value_range = span.unbounded_where_empty(self.folded_range)


def _check_coreset(coreset: Coreset, columns: Sequence[int], block: KVBlock, method: str) -> None:
    """Refuse what a method should not have returned, before it takes the place of anything.

    Raises:
        ValueError: names the method, and what its coreset must be.
    """
    (rows, heads, _, d), d_v, width = block.keys.shape, block.values.shape[-1], coreset.valid.shape[-1]
    shapes = [tuple(tensor.shape) for tensor in (coreset.keys, coreset.values, coreset.weights, coreset.valid)]
    wanted = [(rows, heads, width, d), (rows, heads, width, d_v), (rows, heads, width), (rows, heads, width)]
    dtypes = [tensor.dtype for tensor in (coreset.keys, coreset.values, coreset.weights, coreset.valid)]
    # Slots that are folded again come in float32; in the dtype of the cache they are as welcome.
    fit = dtypes[1] in (block.keys.dtype, block.values.dtype)
    if shapes != wanted or not fit or dtypes[::2] + dtypes[3:] != [block.keys.dtype, torch.float32, torch.bool]:
        raise ValueError(
            f"compressor={method}: its coreset has shapes {shapes} and dtypes {dtypes}; keys, values, weights, valid "
            f"must be {wanted} in {block.keys.dtype}, {block.values.dtype}, float32 and bool"
        )
    if len(columns) != rows or not 0 <= min(columns) <= max(columns) <= width:
        raise ValueError(
            f"compressor={method}: its coreset has {width} columns, and the {rows} rows take {columns} of them; return "
            "max(budget) columns, or say in `columns` how many each row takes"
        )


def _leaving(columns: int, row: Row, fold: Fold) -> tuple[int, int]:
    """Where in a right-aligned row the exact tokens are that `fold` makes into slots: [start, stop)."""
    if not fold.items:
        return columns, columns
    exact = max(row.stored - row.exact, fold.head)
    return columns - row.stored + exact, columns - fold.window


def _takes_slots(row: Row, fold: Fold) -> bool:
    """Whether some of the items are slots of an earlier coreset."""
    return row.slots > fold.kept


def _exact_range(entries: Entries, rows: Sequence[Row]) -> ValueRange:
    """The box around the values of the exact tokens in right-aligned rows."""
    end = entries.keys.shape[2]
    sinks = [(end - row.stored, end - row.stored + row.sink) for row in rows]
    return _range(entries, sinks).join(_range(entries, [(end - row.exact, end) for row in rows]))


def _range(entries: Entries, spans: Sequence[tuple[int, int]]) -> ValueRange:
    """The box around the values in columns [start, stop) of each row, exact tokens all."""
    if len(set(spans)) == 1:
        return ValueRange.of(entries.slice(*spans[0]).values)
    return ValueRange.of(entries.values, column_mask(spans, entries.values).unsqueeze(1))
