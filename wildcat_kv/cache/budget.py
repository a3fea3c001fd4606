"""Budget of a row, and the plan of its next fold.

Plain integers, no tensors.

A row holds, in this order: `sink` exact tokens, `slots` of the coreset, `exact` tokens not yet folded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from wildcat_kv.config import WildCatConfig

# Blocks of new tokens between two folds under max_tokens, in bins: a fold costs its bin_rank sequential
# steps however few tokens it takes in, and every slot set aside for the block is one less for the coreset.
BINS_A_BLOCK = 4


@dataclass(frozen=True)
class Row:
    """The contents of one row of one layer.

    Attributes:
        seen: valid tokens read since the start.
        sink: exact tokens at the beginning.
        slots: slots of the coreset, as many as the budget gave.
        exact: tokens not yet folded.
        seen_at_fold: `seen` at the last fold.
        spare: columns of slots beyond `slots`: more where heads share unequally, negative where a method
            leaves budget of this layer to others.
        carried: queries from before the last fold that are still at hand.
    """

    seen: int = 0
    sink: int = 0
    slots: int = 0
    exact: int = 0
    seen_at_fold: int = 0
    spare: int = 0
    carried: int = 0

    @property
    def counted(self) -> int:
        """Entries that the budget counts: the same in every layer."""
        return self.sink + self.slots + self.exact

    @property
    def stored(self) -> int:
        """Columns held."""
        return self.counted + self.spare

    def append(self, tokens: int) -> Row:
        """Give the row after `tokens` new valid tokens."""
        return replace(self, seen=self.seen + tokens, exact=self.exact + tokens)


@dataclass(frozen=True)
class FoldPlan:
    """The fold of a row: `items` become `rank` slots, the rest stays.

    In storage order: `sink` exact tokens, `kept` old slots (in `kept + spare` columns), `items` (columns of old
    slots or exact tokens) to compress into `rank` slots, `window` exact tokens. `packs` is True for a fold that makes a
    slot of each item, to be quantised.
    """

    sink: int
    kept: int
    items: int
    rank: int
    window: int
    spare: int = 0
    packs: bool = False

    @staticmethod
    def nothing(row: Row) -> FoldPlan:
        """Plan a fold that leaves `row` as it is."""
        return FoldPlan(sink=row.sink, kept=row.slots, items=0, rank=0, window=row.exact, spare=row.spare)

    @property
    def head(self) -> int:
        """Columns before the items."""
        return self.sink + self.kept + self.spare

    def apply(self, row: Row, columns: int | None = None) -> Row:
        """Give the row after this fold.

        Its items became slots in `columns` columns, in `rank` by default.
        """
        if not self.items:
            return row
        return replace(
            row,
            sink=self.sink,
            slots=self.kept + self.rank,
            exact=self.window,
            seen_at_fold=row.seen,
            spare=self.spare + (0 if columns is None else columns - self.rank),
        )


def kept_tokens(tokens: int, ratio: float) -> int:
    """Count the tokens to keep of `tokens` at `ratio`.

    They are max(1, floor(ratio * tokens + 1/2)), in exact decimals.

    Example:
        >>> kept_tokens(1000, 0.25), kept_tokens(3, 0.1), kept_tokens(10, 0.35)
        (250, 1, 4)
    """
    # str gives the decimal that the user wrote; the binary float next to it would move the halves.
    return max(1, int(Fraction(str(ratio)) * tokens + Fraction(1, 2)))


def share_budget(tokens: int, settings: WildCatConfig) -> int:
    """Count the entries that a row of `tokens` tokens keeps by its share: all of them up to the floor.

    Example:
        >>> settings = WildCatConfig(ratio=0.25, min_tokens=100)
        >>> [share_budget(tokens, settings) for tokens in (80, 200, 1000)]
        [80, 100, 250]
    """
    assert settings.share is not None
    return max(kept_tokens(tokens, settings.share), min(tokens, settings.min_tokens))


def _grows(tokens: int, settings: WildCatConfig) -> bool:
    """Tell if the budget of a row of `tokens` tokens grows with it: by a share, once that is above the floor."""
    return settings.share is not None and kept_tokens(tokens, settings.share) >= settings.min_tokens


def exact_ends(budget: int, settings: WildCatConfig) -> tuple[int, int]:
    """Choose sink and window within `budget`.

    They are as configured, or shrunk in proportion where they do not fit. The first token stays, if any does: models
    attend to it whatever they read.
    """
    need = settings.sink + settings.window + settings.bin_rank
    if budget >= need:
        return settings.sink, settings.window
    least = min(settings.sink, 1) if budget > 2 else 0
    return max(least, settings.sink * budget // need), settings.window * budget // need


def block_size(settings: WildCatConfig) -> int:
    """New tokens between two folds.

    With `ratio`, as many as make one bin's worth of budget. With `max_tokens`, room for several bins,
    but never more than half of what sink and window leave.
    """
    if settings.share is not None:
        return int(-(-settings.bin_rank // Fraction(str(settings.share))))
    assert settings.max_tokens is not None
    free = settings.max_tokens - settings.sink - settings.window
    return max(1, min(BINS_A_BLOCK * settings.bin_rank, free // 2))


def plan_fold(row: Row, settings: WildCatConfig, *, prefill: bool, slot_cost: float = 0.0) -> FoldPlan | None:
    """Plan the fold that is due now; None for none.

    Args:
        row: contents of the row, the newest tokens included.
        settings: budget and exact ends.
        slot_cost: bytes of a quantised slot over those of an entry in the dtype of the model.
        prefill: True if this forward gave the row its first tokens, several at once: the prompt is then
            brought to its budget at once, however short it is. A sink that had to shrink stays small.
    """
    if settings.share is not None:
        due = prefill or row.seen - row.seen_at_fold >= block_size(settings)
        budget = share_budget(row.seen, settings)
    else:
        assert settings.max_tokens is not None
        due = row.counted > settings.max_tokens
        budget = settings.max_tokens + 1 - block_size(settings)  # a block later it is full again
    if not due or budget >= row.seen:
        return _plan_packing(row, settings, slot_cost, prefill=prefill)

    sink, window = exact_ends(settings.max_tokens or budget, settings)
    if row.slots:  # the tokens behind a larger sink are folded already
        sink = row.sink
    # Where the budget has grown with the row since its slots were made, they need not be compressed again.
    kept, spare = (row.slots, row.spare) if _grows(row.seen_at_fold, settings) else (0, 0)
    # Something must be left to compress into, and a slot is never an exact token again.
    window = min(window, budget - sink - kept - 1, row.exact)
    rank = budget - sink - window - kept
    if not _grows(row.seen, settings) and rank > settings.bin_rank:
        # Slots are compressed again and again: a bin that is short of one loses it at every fold, always in
        # the same place. Whole bins only; the rest stays in the window.
        rest = rank % settings.bin_rank
        rank, window = rank - rest, min(window + rest, row.exact)
    if window < 0 or row.counted - sink - window - kept <= rank:
        return None
    items = row.stored - sink - window - kept - spare
    return FoldPlan(sink=sink, kept=kept, items=items, rank=rank, window=window, spare=spare)


def _plan_packing(row: Row, settings: WildCatConfig, slot_cost: float, *, prefill: bool) -> FoldPlan | None:
    """Plan to quantise the tokens behind the window where nothing is over budget; None for none.

    A prompt is quantised at once, later tokens in whole groups.
    """
    if not _packs(settings) or row.seen <= settings.min_tokens or _exact_room(row, settings, slot_cost) >= 0:
        return None
    sink, behind = _behind_window(row, settings)
    items = behind
    if row.slots:  # a group that is not whole would wait in the dtype of the model
        items -= items % settings.group
    if items < (1 if prefill else settings.group):
        return None
    return FoldPlan(sink, row.slots, items, items, settings.window + behind - items, row.spare, packs=True)


def _packs(settings: WildCatConfig) -> bool:
    """Tell if tokens become slots as they are: with `bits`, but not where most of them are to be dropped."""
    return settings.bits is not None and settings.share in (None, 1)


def _behind_window(row: Row, settings: WildCatConfig) -> tuple[int, int]:
    """Count the tokens of the sink, and the exact tokens between the slots and the window."""
    sink = row.sink if row.slots else min(settings.sink, row.sink + row.exact)
    return sink, row.counted - row.slots - sink - settings.window


def _exact_room(row: Row, settings: WildCatConfig, slot_cost: float) -> int:
    """Count the exact tokens that may come before those behind the window are quantised; negative if too many have.

    With `max_tokens` a text stays exact as long as it takes no more bytes than the full budget in slots does.
    """
    if settings.max_tokens is None:
        return settings.group - _behind_window(row, settings)[1] - 1 if row.slots else -1
    ends = settings.sink + settings.window
    full = ends + settings.group + slot_cost * (settings.max_tokens - ends)
    return int(full - row.sink - row.exact - slot_cost * row.slots)


def tokens_until_fold(row: Row, settings: WildCatConfig, slot_cost: float = 0.0) -> int | None:
    """Count the new tokens after which this row may fold.

    At least 1; None if `plan_fold` will never want a fold.
    """
    over = _tokens_until_over(row, settings)
    if not _packs(settings) or not row.seen:
        return 1 if _packs(settings) else over
    behind = row.counted - row.slots - settings.window - (row.sink if row.slots else settings.sink)
    room = _exact_room(row, settings, slot_cost)
    packing = max(1, settings.group - behind, room + 1, settings.min_tokens + 1 - row.seen)
    return packing if over is None else min(packing, over)


def _tokens_until_over(row: Row, settings: WildCatConfig) -> int | None:
    """Count the new tokens after which this row may be over budget; None for never."""
    if settings.share is not None:
        if settings.share == 1:
            return None
        if not row.seen:  # what comes next may be its prompt
            return 1
        # Each token fills the row by one and its budget by `ratio`.
        ratio, gap = Fraction(str(settings.share)), kept_tokens(row.seen, settings.share) - row.counted
        until_full = (gap - 1) // (1 - ratio) + 1 if gap > 0 else 1
        until_block = block_size(settings) - (row.seen - row.seen_at_fold)
        return max(1, until_block, int(until_full), settings.min_tokens + 1 - row.counted)
    assert settings.max_tokens is not None
    return max(1, settings.max_tokens + 1 - row.counted)
