"""Contents of one layer, which grow and are taken back.

Tensors and numbers, no model, no Transformers.

In one line of columns a row: padding, sink, coreset slots, exact tokens. Rows end together, so that new tokens
take the same columns in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wildcat_kv.cache.bands import Band, BandedStorage
from wildcat_kv.cache.budget import Row
from wildcat_kv.cache.entries import Entries
from wildcat_kv.cache.model_layer import ModelLayer
from wildcat_kv.cache.pending import PendingFold
from wildcat_kv.cache.progress import Progress
from wildcat_kv.cache.query_log import QueryLog
from wildcat_kv.cache.storage import Room, Storage
from wildcat_kv.cache.value_range import ValueRange
from wildcat_kv.compressors.base import Compressor
from wildcat_kv.config import WildCatConfig
from wildcat_kv.coreset.launching import is_launched
from wildcat_kv.coreset.tensors import ordinary_tensors


class LayerState:
    """A coreset of the past, and the newest tokens as they are.

    Args:
        settings: budget and exact ends.
        compressor: method.
        index: index of the layer in the model.
        place: place of the layer among those that can be compressed.
        sharing: places of the layers that are compressed; they share one budget.
        model: facts about the model's own layer.
        fixed: True to keep the same memory, of as many columns as the budget allows.

    Attributes:
        storage: tensors; None before the first tokens.
        log: queries that the method learns from; None if it learns from none.
        progress: numbers of columns and rows.
        pending: fold that waits for other layers; None for none.
        checked: columns whose keys are known to be finite.
        folded_range: box around the values of folded tokens; None before the first fold.
        value_range: box around all values, to clip attention to; None before the first fold.
        error: the method's estimate at the last fold, float32 (rows, query_heads); None if it makes none.
    """

    def __init__(
        self,
        settings: WildCatConfig,
        compressor: Compressor,
        index: int,
        place: int,
        sharing: Sequence[int],
        model: ModelLayer,
        *,
        fixed: bool = False,
    ) -> None:
        self.fixed = fixed
        self.settings = settings
        self.compressor = compressor
        self.index = index
        self.place = place
        self.sharing = sharing
        self.model = model
        self.storage: Storage | BandedStorage | None = None
        self.log = None if compressor.observation is None else QueryLog(compressor.observation)
        self.progress = Progress()
        self.pending: PendingFold | None = None
        self.error: Tensor | None = None
        self.checked = 0
        self.folded_range: ValueRange | None = None
        self.value_range: ValueRange | None = None

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Make room for keys and values (rows, kv_heads, n, channels), and some more."""
        self.storage = Storage.empty(keys, values, self.compressor.state_size, self._room)
        self.progress.rows = [Row()] * keys.shape[0]

    def restore(
        self,
        progress: Progress,
        memory: Entries,
        length: int,
        folded_range: ValueRange | None,
        carried: Tensor | None = None,
        recent: Tensor | None = None,
        bands: Sequence[Band] = (),
    ) -> None:
        """Hold what another state held.

        Args:
            progress: numbers.
            memory: entries with free columns behind them; copied only if the memory is fixed.
            length: columns in use.
            folded_range: box around the values of folded tokens.
            carried: queries from before the last fold.
            recent: queries since then.
            bands: bands, in place of `memory`.
        """
        if bands:
            self.storage = BandedStorage.whole(bands, len(progress.rows))
        elif self.fixed:
            self.storage = Storage([memory.slice(0, length)], self._room)
        else:
            self.storage = Storage.adopt(memory, length, self._room)
        if self.log is not None:
            self.log.restore(carried, recent)
        self.progress, self.folded_range = progress, folded_range
        self.span()

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Append exact tokens (rows, kv_heads, q, channels); bool `valid` (rows, q), False for padding."""
        assert self.storage is not None, "allocate() comes first"
        self.storage.append(keys, values, valid)
        progress, new = self.progress, keys.shape[2]
        if new > 1 and self.checked == progress.seen and not is_launched(keys.device):  # the layer has looked at them
            self.checked += new
        progress.seen += new  # as `Progress.read` does, without a call on the path of one token
        progress.masked = progress.masked or valid is not None
        if self.value_range is None:
            return
        shown = None if valid is None else valid.unsqueeze(1)
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            with ordinary_tensors():
                self.value_range = self.value_range.extend(values, shown)
        else:
            self.value_range = self.value_range.extend(values, shown)

    def carry(self, state: Tensor) -> None:
        """Keep the newest tokens' carried state, float32 (rows, kv_heads, k, state_size)."""
        self.held.carry(state)

    def take_in(self, tokens: int) -> None:
        """Count tokens of traced steps: one a forward pass, never padding."""
        self.held.length += tokens
        for _ in range(tokens):
            self.progress.read(1, masked=False)
            self.progress.end_forward(self.progress.scale)
        self.span()

    def observe(self, queries: Tensor) -> None:
        """Log the newest queries (rows, query_heads, q, d), if the method learns from queries."""
        if self.log is not None:
            self.log.append(queries)

    def keep_queries(self) -> None:
        """Copy what `observe` took, before the model goes on."""
        if self.log is not None:
            self.log.keep()

    @property
    def croppable(self) -> int:
        """Newest columns since the last fold, with queries held, to take back."""
        log, exact = self.log, self.progress.since_fold
        if log is None or log.columns >= exact:
            return exact
        return max(0, log.columns - (log.observation.latest or 0))

    def take_back(self, columns: int) -> None:
        """Forget the newest columns, `croppable` at most, as if they had never been read."""
        if self.log is not None:
            self.log.take_back(columns)
        self.held.truncate(self.held.length - columns)
        self.progress.take_back(columns)
        self.checked = min(self.checked, self.progress.seen)
        self.span()

    def show(self, valid: Tensor) -> None:
        """Mark anew which exact tokens are valid, bool (rows, progress.since_fold). Call `span` afterwards."""
        self.held.relabel(valid)
        self.progress.relabel()

    @property
    def alike(self) -> bool:
        """True if all rows hold equally much."""
        return len(set(self.progress.rows)) <= 1

    def select_rows(self, index: Tensor, on_host: Sequence[int] | None) -> None:
        """Keep the rows at `index`, int64 (k,), in that order; repeats are allowed.

        Args:
            index: rows to keep, on any device.
            on_host: the same numbers; None if the rows are `alike`, so that nothing waits for the device.
        """
        before = self.stored
        self.held.select_rows(index, on_host)
        self.progress.spare += self.stored - before  # what the budget counts stays alike in all layers
        if self.log is not None:
            self.log.select_rows(index)
        self.progress.rows = [self.progress.rows[row] for row in on_host or [0] * len(index)]
        with ordinary_tensors():
            self.folded_range = self.folded_range and self.folded_range.rows(index)
            self.value_range = self.value_range and self.value_range.rows(index)
            self.error = None if self.error is None else self.error.index_select(0, index.to(self.error.device))

    def move(self, device: torch.device) -> None:
        """Move everything to `device`."""
        if self.held.device != device:  # the boxes are always beside the weights
            self.folded_range = self.folded_range and self.folded_range.to(device)
            self.value_range = self.value_range and self.value_range.to(device)
            if self.log is not None:
                self.log.to(device)
        self.held.to(device)

    @property
    def entries(self) -> Entries:
        """Entries held; a copy of those in bands."""
        return self.held.entries

    @property
    def stored(self) -> int:
        """Columns held."""
        return 0 if self.storage is None else self.storage.length

    def tensors(self) -> list[Tensor]:
        """List all tensors held, free columns included."""
        if self.storage is None:
            return []
        queries = [] if self.log is None else self.log.tensors()
        bounds = [bound for box in (self.folded_range, self.value_range) if box for bound in box.tensors()]
        return [*self.storage.tensors(), *bounds, *queries]

    def count_rows(self, column: int) -> list[Row]:
        """Count what each row held at `column`, which is after the last fold."""
        progress = self.progress
        if not progress.masked:
            return [row.append(column - progress.folded_at) for row in progress.rows]
        new = self.held.newest(progress.since_fold).valid[:, 0, : column - progress.folded_at]
        return [row.append(count) for row, count in zip(progress.rows, new.sum(-1).tolist(), strict=True)]

    @property
    def _room(self) -> Room:
        return Room.under(self.settings.max_tokens, fixed=self.fixed)

    @property
    def held(self) -> Storage | BandedStorage:
        """Storage, once there is one."""
        assert self.storage is not None, "allocate() comes first"
        return self.storage

    @property
    def plain(self) -> Storage:
        """Storage of a layer that is not held in bands."""
        assert isinstance(self.storage, Storage)
        return self.storage

    def stored_at(self, column: int) -> int:
        """Count the columns held when `column` columns had been read, after the last fold."""
        return self.stored - (self.progress.seen - column)

    def check_finite(self, keys: Tensor) -> None:
        """Refuse keys of any shape that hold NaN or infinity.

        Raises:
            ValueError: names the layer.
        """
        if not finite(keys):
            raise ValueError(
                f"layer {self.index}: NaN or infinity in the keys; the model has overflowed, try bfloat16 or "
                "float32, and call cache.reset(): other layers may have read the tokens"
            )

    def span(self) -> None:
        """Set the box around the values of all tokens seen, folded and held."""
        if self.folded_range is None:
            return
        progress = self.progress
        with ordinary_tensors():
            span = self.folded_range.join(self.held.exact_box(progress.rows, progress.since_fold, progress.masked))
            # A row that has folded nothing is attended to exactly: nothing to clip.
            self.value_range = span.unbounded_where_empty(self.folded_range)


def finite(keys: Tensor) -> bool:
    """Tell if keys of any shape hold neither NaN nor infinity."""
    # A sum is one pass. Only if it overflows is every key looked at, in the dtype that folds compute in.
    return math.isfinite(keys.sum(dtype=torch.float32).item()) or bool(torch.isfinite(keys.to(torch.float32)).all())
