"""The protocol of a compression method: what it is given, and what it returns."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from wildcat_kv.compressors.observation import Observation
from wildcat_kv.compressors.repetition import Repetition
from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.config import WildCatConfig
from wildcat_kv.coreset.compresskv import Coreset
from wildcat_kv.coreset.slot_facts import SlotFacts


@dataclass(frozen=True)
class KVBlock:
    """The entries of one layer, and which of them must become fewer slots.

    All rows hold n entries, in the order of their positions: sinks, slots of earlier coresets, exact tokens. The last
    `window` entries stay as they are. The `items` before these are to be compressed. All others stay, too.

    Attributes:
        keys: (rows, heads, n, d), rotated as the model stores them.
        values: (rows, heads, n, d_v), those of exact tokens. With `weights`, numerators U, in float32 or float64;
            without, an earlier slot, which is none of the items, has its numerator over its weight.
        valid: bool (rows, heads, n), False for padding slots of an earlier coreset.
        items: number of entries to compress, [n - window - items, n - window).
        window: number of entries behind the items.
        exact: number of newest entries that are exact tokens, the window among them.
        seen: valid tokens that each row has read so far; never the same at two folds of a row.
        scale: b, the factor of the attention scores.
        layer_index: place of this layer among those that can be compressed.
        sharing: `layer_index` of each layer that is compressed, this one among them: they share one budget.
        weights: float32 (rows, heads, n), 1 for exact tokens; None where all items are exact.
        value_bound: float32 (rows, heads), sum over channels of the largest squared value seen; None where all items
            are exact.
        queries: (rows, query_heads, m, d), the newest queries that the method asked for: query -j belongs to the token
            which is entry -j while j <= exact. None where the method asked for none.
        carried_state: float32 (rows, heads, n, m), numbers that the method keeps of each entry; m is its `state_size`.
        rotation: rotary positions of the layer; None where the method did not ask.
        output_projection: (query_heads, d_v, hidden), the weights that bring each query head's output into the
            model's stream, in the model's dtype; None where the method did not ask.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    items: int
    window: int
    exact: int
    seen: int
    scale: float
    layer_index: int
    sharing: Sequence[int]
    weights: Tensor | None = None
    value_bound: Tensor | None = None
    queries: Tensor | None = None
    carried_state: Tensor | None = None
    rotation: Rotation | None = None
    output_projection: Tensor | None = None

    @property
    def first(self) -> int:
        """Entries before the items."""
        return self.keys.shape[2] - self.window - self.items

    @property
    def item_tokens(self) -> int:
        """Tokens that the items stand for, the same in every layer.

        Dropped tokens count too.
        """
        if self.items <= self.exact - self.window:  # no slots among them
            return self.items
        return self.seen - self.first - self.window

    def slice_items(self, entries: Tensor) -> Tensor:
        """View the items among entries (rows, heads, n, ...): (rows, heads, items, ...)."""
        return entries[:, :, self.first : self.first + self.items]

    def without_items(self, entries: Tensor) -> Tensor:
        """Copy the entries that are none of the items.

        They are (rows, heads, n, ...), and (rows, heads, n - items, ...) are left.
        """
        return torch.cat((entries[:, :, : self.first], entries[:, :, self.first + self.items :]), dim=2)

    def keep_items(self) -> Compressed:
        """Make slots of all items as they are."""
        keys, values, valid = (self.slice_items(tensor) for tensor in (self.keys, self.values, self.valid))
        weights = valid.to(torch.float32) if self.weights is None else self.slice_items(self.weights)
        state = None if self.carried_state is None else self.slice_items(self.carried_state)
        return Compressed(Coreset(keys, values, weights, valid), carried_state=state)

    def take_rows(self, rows: Sequence[int]) -> KVBlock:
        """Copy the rows at `rows`, in that order."""
        index = torch.tensor(rows, device=self.keys.device)
        taken: dict[str, Any] = {
            name: tensor.index_select(0, index)
            for name, tensor in vars(self).items()
            if isinstance(tensor, Tensor) and name != "output_projection"
        }
        return replace(self, **taken)


@dataclass(frozen=True)
class Compressed:
    """Slots made of a block's items, with notes for the cache.

    Attributes:
        coreset: slots (rows, heads, c, ...) in the order of their positions, right-aligned: padding slots come first.
        columns: columns that each row takes, of the last ones; the rank by default. A method that shares its budget
            out unequally, between heads or layers, gives them.
        carried_state: float32 (rows, heads, c, m), numbers to keep of each slot; None for zeros.
        error: float32 (rows, query_heads), estimated error of the attention, over the norm of its output; None where
            the method makes no estimate.
        facts: facts of the slots, where the method has read them; the cache reads what it needs by default.
    """

    coreset: Coreset
    columns: Sequence[int] | None = None
    carried_state: Tensor | None = None
    error: Tensor | None = None
    facts: SlotFacts | None = None


class Compressor(ABC):
    """A compression method. Stateless: all that it knows comes with the block.

    Attributes:
        paper: source of the method.
        decodes: True if it compresses generated tokens, not only the prompt.
        reads_twice: True if the model must read a text a second time, see `reread`; `wildcat_kv.Context` does that.
        learns_from_repetition: True if the queries that it learns from are then those of the repeated tokens.
        state_size: numbers to keep of each entry from fold to fold, see `remember`.
        needs_rotation: True if it undoes and redoes the model's rotary positions.
        needs_output_projection: True if it weighs values by the weights of the layer's output projection.
        estimates: True if it estimates its error, and can keep to a tolerance.
        takes_bits: False if its slots must stay in the dtype of the model.
        fixed_slots: True if each head holds as many slots as `expect_slots` says, whatever is read.
        keeps_tokens: True if its slots are tokens as they are, which weigh 1.
        waits: True if layers fold together, when the last of them has been attended to; see `SharingCompressor`.
    """

    paper: ClassVar[str] = ""
    decodes: ClassVar[bool] = True
    reads_twice: ClassVar[bool] = False
    learns_from_repetition: ClassVar[bool] = False
    state_size: ClassVar[int] = 0
    needs_rotation: ClassVar[bool] = False
    needs_output_projection: ClassVar[bool] = False
    estimates: ClassVar[bool] = False
    waits: ClassVar[bool] = False
    takes_bits: ClassVar[bool] = True
    fixed_slots: ClassVar[bool] = True
    keeps_tokens: ClassVar[bool] = False

    @classmethod
    def of(cls, settings: WildCatConfig) -> Self:
        """Build the method with its defaults.

        Where it draws at random, it takes the settings' seed.
        """
        fields: Any = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
        return cls(**{field.name: settings.seed for field in fields if field.name == "seed"})

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"  # a dataclass writes its parameters

    @property
    def observation(self) -> Observation | None:
        """The queries that the method learns from; None for none."""
        return None

    @property
    def needs_queries(self) -> bool:
        """True if it learns from queries."""
        return self.observation is not None

    def check_model(self, decoder: Any, layers: int) -> None:
        """Refuse a model that the method does not fit, before a cache is built.

        Args:
            decoder: Transformers config of the decoder.
            layers: number of its layers that can be compressed.

        Raises:
            ValueError: names the parameter that does not fit, and the way out.
        """
        return

    def expect_slots(self, place: int, sharing: Sequence[int], heads: int, items: int, rank: int) -> list[int]:
        """Expect how many slots each head of a layer will hold, before anything is read.

        Args:
            place: place of the layer among those that can be compressed.
            sharing: `place` of each layer that is compressed.
            heads: key heads of the layer.
            items: tokens to compress.
            rank: slots of each head, as in `compress`.

        Returns:
            The slots of each head; a guess without `fixed_slots`.
        """
        return [rank] * heads

    @abstractmethod
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        """Bring the items of every row down to `rank` slots.

        Args:
            block: entries of rows that hold equally much.
            rank: slots of each row and head, at least 1 and below the number of items, except where the method itself
                keeps less than it is given (`Compressed.columns`).

        Returns:
            Slots (rows, heads, rank, ...), or as many as the row with most `columns` takes.
        """

    def remember(self, block: KVBlock) -> Tensor:
        """Bring the carried state up to date, before `compress`: float32 (rows, heads, n, state_size)."""
        assert block.carried_state is not None
        return block.carried_state

    def reread(self, repetition: Repetition) -> Tensor:
        """Give the carried state of tokens that the model has just repeated.

        For methods that read a text twice.

        Returns:
            float32 (rows, heads, stop - start, state_size).
        """
        raise NotImplementedError(f"{type(self).__name__} reads a text once")


class SharingCompressor(Compressor):
    """A method whose layers share one budget.

    Each layer's share depends on what it finds in what it holds.

    Every layer surveys its block as soon as its tokens have been attended to, and waits. When the last layer has, the
    slots are dealt out, and all of them compress. Queries are not kept for longer than the survey takes; keys and
    values are: a prompt that is read at once takes the memory of the exact cache until then.
    """

    waits: ClassVar[bool] = True
    fixed_slots: ClassVar[bool] = False

    @abstractmethod
    def survey(self, block: KVBlock) -> Any:
        """Find what the other layers, and `compress_share`, must know of this one.

        Returns:
            Tensors (rows, ...), alone or in tuples, lists and dicts; numbers and texts may be among them.
        """

    @abstractmethod
    def deal(self, surveys: Sequence[Any], rank: int) -> list[Any]:
        """Deal out the slots: a share for each survey.

        There are `rank` slots a row, layer and head on average.

        Args:
            surveys: surveys of the layers that share, in their order, all of the same rows.
            rank: slots, as in `compress`.
        """

    @abstractmethod
    def compress_share(self, block: KVBlock, rank: int, share: Any) -> Compressed:
        """Compress as `compress` does, with a share of `deal`; the block has no queries."""

    def compress(self, block: KVBlock, rank: int) -> Compressed:
        """Compress a layer that shares with none."""
        [share] = self.deal([self.survey(block)], rank)
        return self.compress_share(block, rank, share)
