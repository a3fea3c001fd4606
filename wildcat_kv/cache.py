"""The cache: what each layer keeps, how it grows, and when it folds. State only; the method is a compressor.

A layer stores, in one line of columns a row: padding, sink, coreset slots, exact tokens. Rows end together,
so that new tokens take the same columns in all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from wildcat_kv.accounting import cache_bytes, stored_entries
from wildcat_kv.attention import NAME, AttentionName, Forward, MarkedLength, mark, weighted_attention
from wildcat_kv.budget import Fold, Row, block_size, plan_fold, tokens_until_fold
from wildcat_kv.compress import Coreset
from wildcat_kv.compressors import Compressor, KVBlock, WildCat
from wildcat_kv.config import WildCatConfig
from wildcat_kv.folding import align_right, fold_entries
from wildcat_kv.storage import Entries, Storage

# Most free columns behind what is stored, where a block is larger or nothing is ever folded.
_ROOM = 64


@dataclass
class Shared:
    """What the layers of one cache have in common. They hold this and not the cache: without a reference
    cycle, a deleted cache gives its memory back at once.

    Attributes:
        settings: the budget.
        compressor: the method.
        positions: tokens that the model has positions for, None if unknown.
        forward: the forward pass under way or the last one, None before the first.
        waiting: the layer whose keys have not reached the attention function yet.
        compressed: whether any layer has folded anything.
        padded: whether any prompt had padding.
        warned: whether the user knows that the text is longer than the model's positions.
    """

    settings: WildCatConfig
    compressor: Compressor
    positions: int | None
    forward: Forward | None = None
    waiting: int | None = None
    compressed: bool = False
    padded: bool = False
    warned: bool = False

    def reset(self) -> None:
        """Back to before the first forward pass."""
        self.forward = self.waiting = None
        self.compressed = self.padded = self.warned = False


class WildCatLayer(CacheLayerMixin):
    """One full-attention layer: a coreset of the past, and the newest tokens as they are.

    Attributes:
        keys: (rows, kv_heads, stored, d), a view of what is stored, in the model's dtype; None when empty.
        values: (rows, kv_heads, stored, d_v), likewise; numerators U for coreset slots.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, shared: Shared, index: int, count: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index
        self._count = count
        self._clear()

    def _clear(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self._storage: Storage | None = None
        self._seen = 0  # columns, padding included
        self._rows: list[Row] = []  # as of the last fold
        self._appended = 0  # columns since the last fold
        self._masked = False  # whether a mask came with any of them
        self._fold_after: int | None = 0  # appended columns from which a row may need a fold; None: never
        self._value_range: tuple[Tensor, Tensor] | None = None  # of all values seen, once compressed
        self._forward: Forward | None = None  # the last one that was served

    # What Transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values of these shapes; called by the first `update`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        room = min(block_size(self._shared.settings), _ROOM) if self._shared.settings.ratio != 1 else _ROOM
        self._storage = Storage.empty(key_states, value_states, room)
        self._rows = [Row()] * key_states.shape[0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append exact tokens and return what this forward pass attends to.

        Args:
            key_states: (rows, kv_heads, q, d), rotated.
            value_states: (rows, kv_heads, q, d_v).
            *args: ignored.
            **kwargs: ignored.

        Returns:
            Views of all stored keys and values; they lead the "wildcat" attention to this layer.

        Raises:
            RuntimeError: the forward pass did not come through the "wildcat" attention.
            ValueError: shapes that do not fit, another batch size than before, or NaN or infinity in the
                keys of a prompt. The layer is left as it was.
        """
        forward = self._check(key_states, value_states)
        if self._storage is None:
            self.lazy_initialization(key_states, value_states)
        assert self._storage is not None
        valid = forward.new_valid(key_states.device)
        self._storage.append(key_states, value_states, valid)
        self._seen += forward.queries
        self._appended += forward.queries
        self._masked = self._masked or valid is not None
        self._forward, self._shared.waiting = forward, self._index
        if self._value_range is not None:
            self._value_range = _widen(self._value_range, value_states, valid)
        self._expose()
        keys, values = self._storage.view()
        return mark(keys, self), mark(values, self)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: positions continue from it. What is stored is `stored`."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for the mask function; the length leads it to the cache."""
        return MarkedLength(self._seen + query_length, self), 0

    def get_max_length(self) -> int:
        """-1: any number of tokens can be read."""
        return -1

    def reset(self) -> None:
        """Forget everything, as if new."""
        self._clear()
        self._shared.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: folded tokens cannot be taken back.

        Raises:
            ValueError: always, unless there is nothing to remove.
        """
        if tokens_to_remove:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: a compressed cache cannot take tokens back; "
                "use DynamicCache where generation rolls back (assisted decoding, prompt lookup)"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; int64 (rows,)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self.batch_select_indices(torch.arange(len(self._rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, int64 (k,) or a bool mask over rows, in that order."""
        if self._storage is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(-1)
        self._storage.select_rows(indices)
        # The host reads the indices only where rows differ in what they hold.
        alike = len(set(self._rows)) == 1
        self._rows = self._rows[:1] * len(indices) if alike else [self._rows[index] for index in indices.tolist()]
        if self._value_range is not None:
            lowest, highest = self._value_range
            indices = indices.to(lowest.device)
            self._value_range = lowest.index_select(0, indices), highest.index_select(0, indices)
        self._expose()

    # What the "wildcat" attention and mask functions call

    def announce(self, queries: int, mask: Tensor | None) -> Forward:
        """Take note, for all layers of the cache, that a forward pass has begun.

        Args:
            queries: new tokens.
            mask: bool (rows, seen + queries), False for padding, or None.

        Raises:
            ValueError: a mask that contradicts what was passed before.
        """
        shared = self._shared
        if queries > 1:  # reading the mask would stall the path of one token
            self._check_mask(queries, mask)
            shared.padded = shared.padded or (mask is not None and not bool(mask.all()))
        if shared.positions is not None and self._seen + queries > shared.positions and not shared.warned:
            warnings.warn(
                f"the text is {self._seen + queries} tokens long and the model has {shared.positions} positions "
                "(max_position_embeddings): answers will degrade; shorten the prompt or use a longer model",
                stacklevel=2,
            )
            shared.warned = True
        if mask is None and shared.padded and not shared.compressed:
            raise ValueError("attention_mask=None, but earlier tokens were padding; pass the mask of all tokens so far")
        shared.forward = Forward(self._seen, queries, mask, exact=not shared.compressed)
        return shared.forward

    @property
    def exact(self) -> bool:
        """Whether this forward pass attends exactly, through the fallback."""
        assert self._forward is not None
        return self._forward.exact

    def attend(self, query: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
        """Weighted attention of the newest tokens' queries.

        Args:
            query: (rows, heads, q, d).
            scale: b.
            options: of the attention call; `softcap` and `s_aux` are honoured.

        Returns:
            (rows, heads, q, d_v).
        """
        assert self._storage is not None
        entries = self._storage.entries
        return weighted_attention(
            query,
            entries.keys,
            entries.values,
            entries.weights,
            scale=scale,
            valid=entries.valid,
            causal=True,
            value_range=self._value_range,
            softcap=options.get("softcap"),
            sink_logits=options.get("s_aux"),
        )

    @torch.no_grad()
    def after_attention(self, scale: float) -> None:
        """Fold where a row is over its budget, now that the newest tokens have been attended to.

        Args:
            scale: b, the factor of the attention scores.

        Raises:
            ValueError: NaN or infinity among the keys to fold; they stay as they are.
        """
        self._shared.waiting = None
        if self._fold_after is None or self._appended < self._fold_after:
            return
        rows = self._fold(self._count_rows(), scale)
        settings = self._shared.settings
        waits = [wait for row in rows if (wait := tokens_until_fold(row, settings)) is not None]
        if settings.max_tokens is not None:  # columns of padding take room as well
            waits.append(max(1, settings.max_tokens + 1 - self.stored))
        self._fold_after = self._appended + min(waits) if waits else None

    # What the cache reports

    def tensors(self) -> list[Tensor]:
        """All memory that the layer holds, free room included."""
        if self._storage is None:
            return []
        return [*self._storage.memory.tensors(), *(self._value_range or ())]

    @property
    def stored(self) -> int:
        """Entries held a row: slots and exact tokens, and the padding among them."""
        return 0 if self._storage is None else self._storage.length

    # Inside

    def _check(self, keys: Tensor, values: Tensor) -> Forward:
        """Refuse what cannot be served, before anything changes."""
        forward = self._shared.forward
        if forward is None or forward is self._forward:
            raise RuntimeError(
                f"layer {self._index}: these keys did not come through the '{NAME}' attention. Build the cache from "
                "the model's own config, WildCatCache(model.config, ...), keep its attention implementation as it is "
                "then, and pass a 2D attention mask"
            )
        if self._shared.waiting is not None:
            raise RuntimeError(
                f"layer {self._shared.waiting}: its keys never reached the '{NAME}' attention. Either the forward pass "
                "failed, then call cache.reset(); or this model attends in a way of its own (ALiBi, multi-head latent "
                "attention), then use DynamicCache"
            )
        if forward.seen != self._seen:
            raise RuntimeError(
                f"layer {self._index} has seen {self._seen} tokens and others {forward.seen}: an earlier forward pass "
                "failed half-way; call cache.reset() and read the text again"
            )
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] != forward.queries:
            raise ValueError(
                f"layer {self._index}: key_states {tuple(keys.shape)} and value_states {tuple(values.shape)} must be "
                f"(rows, kv_heads, {forward.queries} new tokens, channels), alike but for the channels"
            )
        if self._storage is not None:
            held = self._storage.entries.keys
            if keys.shape[0] != held.shape[0]:
                raise ValueError(
                    f"layer {self._index}: the batch has {keys.shape[0]} rows and the cache holds {held.shape[0]}; "
                    "call cache.batch_repeat_interleave(n) to ask several questions of one context"
                )
            if keys.shape[1] != held.shape[1] or keys.shape[3] != held.shape[3]:
                raise ValueError(
                    f"layer {self._index}: key_states {tuple(keys.shape)} have other heads or channels than the "
                    f"{tuple(held.shape)} held; call cache.reset(), or build a cache for this model"
                )
        if forward.queries > 1:  # one new token is checked when it is folded: reading it would stall the device
            self._check_finite(keys)
        return forward

    def _check_finite(self, keys: Tensor) -> None:
        # A sum is one pass; only if it overflows is every key looked at.
        if not bool(torch.isfinite(keys.sum(dtype=torch.float32))) and not bool(torch.isfinite(keys).all()):
            raise ValueError(
                f"layer {self._index}: NaN or infinity in the keys; the model has overflowed, try bfloat16 or "
                "float32, and call cache.reset(): other layers may have read the tokens"
            )

    def _check_mask(self, queries: int, mask: Tensor | None) -> None:
        """Refuse a mask that hides tokens which the cache holds, or shows padding which it dropped."""
        if mask is None or self._storage is None or mask.shape[0] != len(self._rows):
            return
        before = mask[:, : mask.shape[-1] - queries].sum(-1).tolist()
        if before != (held := [row.seen for row in self._count_rows()]):
            raise ValueError(
                f"attention_mask shows {before} of the {self._seen} earlier tokens of each row, and {held} were shown "
                "when they were read; what was read cannot be masked later, call cache.reset() for another text"
            )

    def _expose(self) -> None:
        """Let `keys` and `values` show what is stored; not the marked tensors, that would be a cycle."""
        assert self._storage is not None
        self.keys, self.values = self._storage.view()

    def _count_rows(self) -> list[Row]:
        """The rows with the tokens since the last fold."""
        if not self._masked:
            return [row.append(self._appended) for row in self._rows]
        assert self._storage is not None
        new = self._storage.entries.valid[:, 0, self._storage.length - self._appended :]
        return [row.append(count) for row, count in zip(self._rows, new.sum(-1).tolist(), strict=True)]

    def _fold(self, rows: list[Row], scale: float) -> list[Row]:
        """Fold the rows that are due; returns what all of them hold then."""
        assert self._storage is not None and self._forward is not None
        settings = self._shared.settings
        plans = [
            plan_fold(row, settings, prefill=old.seen == 0 and self._seen == self._forward.queries and row.seen > 1)
            for old, row in zip(self._rows, rows, strict=True)
        ]
        too_wide = settings.max_tokens is not None and self.stored > settings.max_tokens
        if not any(plans) and not too_wide:
            return rows
        entries = self._storage.entries
        self._check_finite(entries.keys[:, :, self.stored - self._appended :])
        gaps = any(row.stored - old.stored != self._appended for row, old in zip(rows, self._rows, strict=True))
        if gaps:
            entries = align_right(entries, self._rows, self._appended)
        value_range = self._value_range or _first_range(entries.values, entries.valid if gaps else None)
        lowest, highest = (bound.to(torch.float32).square() for bound in value_range)
        folds = [plan or Fold.nothing(row) for plan, row in zip(plans, rows, strict=True)]
        weighted = any(row.slots > fold.kept for row, fold in zip(rows, folds, strict=True))

        def compress(items: Entries, lengths: Sequence[int], ranks: Sequence[int]) -> Coreset:
            block = KVBlock(
                keys=items.keys,
                values=items.values,
                valid=items.valid,
                lengths=lengths,
                seen=[row.seen for row in rows],
                scale=scale,
                layer_index=self._index,
                layer_count=self._count,
                weights=items.weights if weighted else None,
                value_bound=torch.maximum(lowest, highest).sum((-2, -1)),
            )
            return self._shared.compressor.compress(block, ranks)

        parts = fold_entries(entries, rows, folds, compress)
        self._storage = Storage(parts, room=self._storage.room)
        self._rows = [fold.apply(row) for fold, row in zip(folds, rows, strict=True)]
        self._value_range = value_range
        self._appended = 0
        self._masked = False
        self._shared.compressed = True
        self._expose()
        return self._rows


class CompressedCache(Cache):
    """A Transformers cache that keeps its full-attention layers within a budget, by any method.

    Pass it to `generate(past_key_values=...)` or to the model. Constructing it switches the config's
    attention implementation to "wildcat", which does what the previous one did wherever nothing is
    compressed, with other caches too; the switch can stay.

    Args:
        config: the model's own config, `model.config`; a copy of it never reaches the model.
        settings: the budget and the exact ends; or give its fields by name.
        compressor: the method.
        **fields: of `WildCatConfig`: `ratio` or `max_tokens`, `sink`, `window` and so on.

    Raises:
        TypeError: config is no Transformers config.
        ValueError: settings that do not fit, or a model with nothing to compress.
    """

    def __init__(
        self,
        config: Any,
        settings: WildCatConfig | None = None,
        *,
        compressor: Compressor,
        **fields: Any,
    ) -> None:
        settings = _settings(settings, fields)
        decoder = _decoder_config(config)
        layers = DynamicCache(config=decoder).layers
        # Exactly this class: its subclasses (sliding windows, indexers) keep what they need by themselves.
        full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
            raise ValueError(
                f"config={type(config).__name__}: no full-attention layer to compress, all layers are {kinds}; "
                "use DynamicCache(config=model.config), it is bounded already"
            )
        self._shared = Shared(settings, compressor, getattr(decoder, "max_position_embeddings", None))
        for index in full:
            layers[index] = WildCatLayer(self._shared, index, len(layers))
        super().__init__(layers=layers)
        current = decoder._attn_implementation
        if not isinstance(current, AttentionName):
            decoder._attn_implementation = AttentionName("eager" if current in (None, NAME) else str(current))

    @property
    def settings(self) -> WildCatConfig:
        """The budget and the exact ends."""
        return self._shared.settings

    @property
    def compressor(self) -> Compressor:
        """The method."""
        return self._shared.compressor

    def stored_length(self, layer_idx: int = 0) -> int:
        """Entries that layer `layer_idx` holds a row: slots and exact tokens, and the padding among them."""
        return stored_entries(self.layers[layer_idx])

    def memory_bytes(self) -> int:
        """Bytes of all tensors that the cache holds, free room included."""
        return cache_bytes(self)

    def __repr__(self) -> str:
        layers = self._compressed_layers()
        budget = {name: value for name, value in self.settings.model_dump().items() if value is not None}
        mebibytes = self.memory_bytes() / 2**20
        settings = ", ".join(f"{name}={value!r}" for name, value in budget.items())
        return (
            f"{type(self).__name__}({settings}; {len(layers)} of {len(self.layers)} layers compressed; "
            f"{layers[0].get_seq_length()} tokens seen, {layers[0].stored} stored, {mebibytes:.1f} MiB)"
        )

    def _compressed_layers(self) -> list[WildCatLayer]:
        return [layer for layer in self.layers if isinstance(layer, WildCatLayer)]


class WildCatCache(CompressedCache):
    """A Transformers cache that compresses keys and values by WildCat (arXiv 2602.10056).

    Args:
        config: the model's own config, `model.config`.
        settings: a `WildCatConfig`; or give its fields by name.
        **fields: `ratio=0.25` to keep a quarter of the tokens, or `max_tokens=1024` to bound them, and
            further fields of `WildCatConfig`.

    Raises:
        TypeError: config is no Transformers config.
        ValueError: settings that do not fit, or a model with nothing to compress.

    Example:
        cache = WildCatCache(model.config, ratio=0.25)
        out = model.generate(**inputs, past_key_values=cache)
    """

    def __init__(self, config: Any, settings: WildCatConfig | None = None, **fields: Any) -> None:
        settings = _settings(settings, fields)
        compressor = WildCat(settings.bin_rank, settings.temperature, settings.weights, settings.seed)
        super().__init__(config, settings, compressor=compressor)


def _settings(settings: WildCatConfig | None, fields: dict[str, Any]) -> WildCatConfig:
    if settings is None:
        return WildCatConfig(**fields)
    if not isinstance(settings, WildCatConfig):
        raise ValueError(f"settings={settings!r} is no WildCatConfig; pass ratio=... or max_tokens=... by name")
    if fields:
        raise ValueError(f"{', '.join(fields)} given beside settings; put them into the WildCatConfig")
    return settings


def _decoder_config(config: Any) -> Any:
    """The config of the decoder, which alone is switched: a vision tower keeps its attention."""
    if not hasattr(config, "get_text_config"):
        hint = "; pass model.config" if hasattr(config, "config") else ""
        raise TypeError(f"config={type(config).__name__} is no Transformers config{hint}")
    decoder = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"config={type(config).__name__}: encoder-decoder models attend across to the encoder, which is not "
            "supported; use a decoder-only model"
        )
    if getattr(decoder, "num_kv_shared_layers", 0) or "reuse" in (getattr(decoder, "kv_sharing_modes", None) or ()):
        raise ValueError(
            f"config={type(config).__name__}: layers that share keys and values are not supported; use DynamicCache"
        )
    return decoder


def _value_range(values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The smallest and largest valid value of each channel, (rows, kv_heads, 1, d_v)."""
    if valid is None:
        return values.amin(-2, keepdim=True), values.amax(-2, keepdim=True)
    limit = torch.finfo(values.dtype)
    hidden = ~valid.unsqueeze(-1)
    lowest = values.masked_fill(hidden, limit.max).amin(-2, keepdim=True)
    highest = values.masked_fill(hidden, limit.min).amax(-2, keepdim=True)
    return lowest, highest


def _first_range(values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_value_range`, with (0, 0) for rows that hold padding only."""
    lowest, highest = _value_range(values, valid)
    nothing = lowest > highest
    return lowest.masked_fill(nothing, 0.0), highest.masked_fill(nothing, 0.0)


def _widen(bounds: tuple[Tensor, Tensor], values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """`bounds` with new values (rows, kv_heads, q, d_v) taken in; `valid` is bool (rows, q)."""
    lowest, highest = _value_range(values, None if valid is None else valid.unsqueeze(1))
    return torch.minimum(bounds[0], lowest), torch.maximum(bounds[1], highest)
