"""Compressed contexts on disk: one safetensors file, whose header says what it is. Never pickle.

All of a file is read and checked before a cache is made of it.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wildcat_kv.cache.layer import WildCatLayer
from wildcat_kv.cache.positions import RopeDeltas, Step
from wildcat_kv.cache.progress import Progress
from wildcat_kv.cache.storage import Entries
from wildcat_kv.cache.value_range import ValueRange
from wildcat_kv.compressors import Compressor, Everything, resolve
from wildcat_kv.compressors.describe import describe, rebuild
from wildcat_kv.compressors.registry import OURS
from wildcat_kv.config import WildCatConfig
from wildcat_kv.files import replacing
from wildcat_kv.models.identity import ModelIdentity
from wildcat_kv.models.support import cache_layers, decoder_config

FORMAT = "wildcat_kv context"
VERSION = 4

# Tensors of a layer of ours: its entries, and the box around folded values, where there is one.
_NAMES = ("keys", "values", "weights", "valid")
_BOUNDS = ("folded.lowest", "folded.highest")
# Only where the method remembers something of its entries, or learns from queries.
_MEMORY = "memory"
_QUERIES = ("queries.carried", "queries.recent")
# The token ids that the cache has read, where a text was saved with it.
_IDS = "input_ids"
# Positions that the model would keep on itself, by the number of the step.
_POSITIONS = "positions."
# What a layer of Transformers' learns with the first tokens; all else is as in a new one.
_LEARNT = ("cumulative_length", "conv_kernel_size")


class _Layer(BaseModel):
    """One layer: of ours with its progress and the columns in use, of Transformers' with its attributes."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    progress: Progress | None = None
    length: int | None = None
    attributes: dict[str, JsonValue] | None = None


class _Text(BaseModel):
    """The text that was read."""

    model_config = ConfigDict(extra="forbid")

    tokens: int = Field(ge=1)
    weights: dict[str, list[float]]


class _Positions(BaseModel):
    """Positions from one token on, see `Step`; the deltas, where there are any, are a tensor."""

    model_config = ConfigDict(extra="forbid")

    start: int
    known: bool
    deltas: bool


class Header(BaseModel):
    """What stands beside the tensors, as JSON in the metadata of the file."""

    model_config = ConfigDict(extra="forbid")

    model: ModelIdentity
    settings: WildCatConfig
    compressor: JsonValue
    layers: list[_Layer]
    positions: list[_Positions] = []
    text: _Text | None = None


@dataclass(frozen=True)
class SavedText:
    """What a context knows of its text, beside the cache.

    Attributes:
        ids: int64 (1, n), the tokens whose positions the cache continues.
        tokens: that were read in all.
        weights: samples of those of the model that has read it, see `weight_samples`.
    """

    ids: Tensor
    tokens: int
    weights: dict[str, list[float]]


@dataclass(frozen=True)
class _Ours:
    """A layer of ours, as read."""

    progress: Progress
    memory: Entries
    length: int
    folded_range: ValueRange | None
    queries: tuple[Tensor | None, Tensor | None]

    def unfit(self, compressor: Compressor) -> str | None:
        """What `compressor` would have kept otherwise, None for nothing."""
        observation, (carried, recent), exact = compressor.observation, self.queries, self.progress.since_fold
        if self.memory.carried_state.shape[-1] != compressor.state_size:
            return "what its method remembers does not fit the method"
        if observation is None:
            return (
                "it has queries, and its method learns from none" if carried is not None or recent is not None else None
            )
        columns = 0 if recent is None else recent.shape[2]
        least = exact if observation.latest is None else min(exact, observation.latest)
        return None if columns >= least else "queries are missing"


class _DamageError(Exception):
    """What contradicts itself in a file."""


@dataclass(frozen=True)
class SavedContext:
    """A file that was read and found sound.

    Attributes:
        settings: of the cache that was saved.
        compressor: what the file says of the method.
        layers: of ours, or the attributes of one of Transformers'.
        rope: positions that the model would keep on itself.
        text: what was saved of the text, None where a cache alone was.
        path: where it came from.
    """

    settings: WildCatConfig
    compressor: JsonValue
    layers: list[_Ours | dict[str, Any]]
    rope: RopeDeltas
    text: SavedText | None
    path: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys that our layers hold."""
        return next(layer.memory.keys.dtype for layer in self.layers if isinstance(layer, _Ours))

    def method(self, name: str | None) -> Compressor:
        """The method that compressed the context, if it is one of ours; that of `name` otherwise.

        Raises:
            ValueError: it is none of ours, and no name is given; or there is no such method.
        """
        try:
            found = rebuild(self.compressor)
        except ValueError as error:
            if name is None:
                raise ValueError(f"path={self.path!r} was compressed by {error}") from None
            return resolve(name, self.settings)
        return found if name is None or OURS.get(name) is type(found) else resolve(name, self.settings)

    def check_method(self, compressor: Compressor) -> None:
        """Refuse to go on with another method than the context was compressed with, or with what it cannot go on from.

        Raises:
            ValueError: names both methods, or the damage.
        """
        ours = describe(compressor)
        if ours != self.compressor:
            raise ValueError(
                f"path={self.path!r} was compressed by {self.compressor}, and the cache to load it into compresses by "
                f"{ours}; load it with the class and the compressor that saved it"
            )
        exact = {index % len(self.layers) for index in self.settings.exact_layers}
        for index, layer in enumerate(self.layers):
            method = Everything() if index in exact else compressor
            if isinstance(layer, _Ours) and (fault := layer.unfit(method)):
                raise ValueError(f"path={self.path!r} is damaged: layer {index}: {fault}; write it anew")

    def restore(self, cache: Any) -> None:
        """Fill a new cache of the same model and settings; nothing can go wrong any more."""
        for layer, saved in zip(cache.layers, self.layers, strict=True):
            if isinstance(saved, _Ours):
                layer.restore(saved.progress, saved.memory, saved.length, saved.folded_range, *saved.queries)
            else:
                vars(layer).update(saved)
        cache.rope.steps = self.rope.steps


def write(cache: Any, path: str | os.PathLike[str], text: SavedText | None = None) -> None:
    """Write a cache of ours to `path`, with its text if there is one; see `CompressedCache.save`."""
    if not any(isinstance(layer, WildCatLayer) and layer.stored for layer in cache.layers):
        raise ValueError("the cache is empty: read a context with the model before saving it")
    cache.check_in_step()
    tensors: dict[str, Tensor] = {}
    layers = [_layer(layer, f"layers.{index}.", tensors) for index, layer in enumerate(cache.layers)]
    steps = cache.rope.carry(cache.get_seq_length())
    tensors |= {f"{_POSITIONS}{number}": step.deltas for number, step in enumerate(steps) if step.deltas is not None}
    header = Header(
        model=cache.model.without_senses() if all(step.deltas is None for step in steps) else cache.model,
        settings=cache.settings,
        compressor=describe(cache.compressor),
        layers=layers,
        positions=[_Positions(start=one.start, known=one.known, deltas=one.deltas is not None) for one in steps],
        text=None if text is None else _Text(tokens=text.tokens, weights=text.weights),
    )
    if text is not None:
        tensors[_IDS] = text.ids
    metadata = {"format": FORMAT, "version": str(VERSION), "header": header.model_dump_json()}
    try:
        with replacing(Path(path)) as partial:
            save_file({name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        raise OSError(f"path={str(path)!r} cannot be written: {' '.join(str(error).split())}") from None


def read(path: str | os.PathLike[str], config: Any, device: torch.device | str) -> SavedContext:
    """Read and check a file, for the model of `config`; see `CompressedCache.load`."""
    decoder = decoder_config(config)
    identity, (layers, full) = ModelIdentity.of(decoder, config), cache_layers(decoder)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device={str(device)!r} cannot be used: {reason}; give that of the model") from None
    name = str(path)
    with _opened(path, str(device)) as file:
        header = _header(name, file.metadata() or {})
        if difference := header.model.difference(identity):
            raise ValueError(
                f"path={name!r} is of another model than config={type(config).__name__}: {difference}; load it "
                "with the config of the model that read the context"
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    kinds = [WildCatLayer.__name__ if index in full else type(layer).__name__ for index, layer in enumerate(layers)]
    if (found := [layer.kind for layer in header.layers]) != kinds:
        raise ValueError(
            f"path={name!r} has layers {found}, and this version of Transformers makes {kinds} for the model; use the "
            "version that wrote it, or save the context again"
        )
    try:
        text = _text(header, tensors)
        rope = _rope(header, tensors)
        checked = _check(header, layers, tensors, torch.device(device))
    except _DamageError as fault:
        raise ValueError(f"path={name!r} is damaged: {fault}; save it again") from None
    return SavedContext(header.settings, header.compressor, checked, rope, text, name)


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that was not read.

    Attributes:
        shape: its shape.
        dtype: as safetensors names it, such as "F32".
        nbytes: its size.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """What a file says of itself.

    Attributes:
        header: the checked header.
        tensors: by name.
    """

    header: Header
    tensors: dict[str, SavedTensor]


def look(path: str | os.PathLike[str]) -> Contents:
    """Read a file's header, for whatever model it is; its tensors are not read.

    Raises:
        FileNotFoundError, ValueError: as `CompressedCache.load`.
    """
    with _opened(path, "cpu") as file:
        header = _header(str(path), file.metadata() or {})
        tensors = {}
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            bits = next((int(digits) for digits in [dtype.lstrip("BFIU")] if digits.isdecimal()), 8)
            tensors[name] = SavedTensor(shape, dtype, math.prod(shape) * bits // 8)
    if not any(layer.progress is not None and layer.progress.rows for layer in header.layers):
        raise ValueError(f"path={str(path)!r} is damaged: no layer of it has read anything; save it again")
    return Contents(header, tensors)


@contextmanager
def _opened(path: str | os.PathLike[str], device: str) -> Iterator[Any]:
    """A safetensors file, whose own errors say what to do."""
    name = str(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={name!r} is no file; give one that cache.save(...) wrote")
    try:
        with safe_open(name, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path={name!r} is no whole safetensors file: {reason}; save it again") from None


def _header(name: str, metadata: dict[str, str]) -> Header:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path={name!r} holds no compressed context; give a file that cache.save(...) wrote")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"path={name!r} has format version {metadata.get('version')}, and this release reads {VERSION}; use the "
            "release of wildcat_kv that wrote it, or save the context again"
        )
    try:
        return Header.model_validate_json(metadata.get("header", ""))
    except (ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path={name!r} is damaged, its header does not fit: {reason}; save it again") from None


# Reading


def _text(header: Header, tensors: dict[str, Tensor]) -> SavedText | None:
    """What was saved of the text; its ids are taken out of `tensors`."""
    if header.text is None:
        return None
    ids = tensors.pop(_IDS, None)
    seen = {layer.progress.seen for layer in header.layers if layer.progress is not None}
    if ids is None or ids.dtype != torch.int64 or {ids.shape} != {torch.Size((1, number)) for number in seen}:
        raise _DamageError("the tokens of its text do not fit")
    return SavedText(ids, header.text.tokens, header.text.weights)


def _rope(header: Header, tensors: dict[str, Tensor]) -> RopeDeltas:
    """The positions that the model would keep on itself; their tensors are taken out of `tensors`."""
    numbers = {(layer.progress.seen, len(layer.progress.rows)) for layer in header.layers if layer.progress is not None}
    steps = []
    for number, step in enumerate(header.positions):
        deltas = tensors.pop(f"{_POSITIONS}{number}", None)
        fits = deltas is None or (step.known and {deltas.shape} == {torch.Size((rows, 1)) for _, rows in numbers})
        if (
            not fits
            or step.deltas != (deltas is not None)
            or (deltas is not None and deltas.dtype not in (torch.int64, torch.float32))
        ):
            raise _DamageError("the positions of its rows do not fit")
        steps.append(Step(step.start, deltas, step.known))
    starts = [step.start for step in steps]
    if starts[:1] != [0] or starts != sorted(set(starts)) or any(seen <= starts[-1] for seen, _ in numbers):
        raise _DamageError("its positions do not fit the tokens read")
    return RopeDeltas(steps)


def _check(
    header: Header, fresh: list[Any], tensors: dict[str, Tensor], device: torch.device
) -> list[_Ours | dict[str, Any]]:
    """The layers of a file; `fresh` are new ones of an uncompressed cache, to hold those of Transformers' against."""
    progresses = [layer.progress for layer in header.layers if layer.kind == WildCatLayer.__name__]
    numbers = {(progress.seen, len(progress.rows)) for progress in progresses if progress is not None}
    if len(numbers) != 1 or None in progresses:
        raise _DamageError("its layers have not read the same tokens")
    [(seen, rows)] = numbers
    layers: list[_Ours | dict[str, Any]] = []
    used: set[str] = set()
    for index, (saved, new) in enumerate(zip(header.layers, fresh, strict=True)):
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        used.update(prefix + name for name in own)
        try:
            if saved.kind == WildCatLayer.__name__:
                assert saved.progress is not None
                layers.append(_ours(saved.progress, saved.length or 0, own))
            else:
                layers.append(_theirs(saved.attributes or {}, new, own, seen, rows, device))
        except _DamageError as fault:
            raise _DamageError(f"layer {index}: {fault}") from None
    if strangers := sorted(tensors.keys() - used):
        raise _DamageError(f"{strangers[0]} belongs to no layer")
    return layers


def _ours(progress: Progress, length: int, own: dict[str, Tensor]) -> _Ours:
    """A layer of ours with `length` columns in use; `own` has its tensors by name."""
    if missing := [name for name in _NAMES if name not in own]:
        raise _DamageError(f"{missing[0]} is missing")
    keys, values, weights, valid = (own[name] for name in _NAMES)
    if keys.dim() != 4 or values.dim() != 4 or not keys.shape[:3] == values.shape[:3] == weights.shape == valid.shape:
        raise _DamageError("the shapes of its tensors do not fit each other")
    dtypes = (keys.dtype, torch.float32, torch.bool)
    if not keys.is_floating_point() or (values.dtype, weights.dtype, valid.dtype) != dtypes:
        raise _DamageError("the dtypes of its tensors do not fit each other")
    bounds = [own[name] for name in _BOUNDS if name in own]
    box = [(*keys.shape[:2], 1, values.shape[3])] * 2
    if bounds and ([bound.shape for bound in bounds] != box or {bound.dtype for bound in bounds} != {values.dtype}):
        raise _DamageError("its value range does not fit")
    memory = own.get(_MEMORY, weights.new_zeros(*weights.shape, 0))
    if memory.shape[:3] != weights.shape or memory.dim() != 4 or memory.dtype != torch.float32:
        raise _DamageError("what its method remembers does not fit")
    carried, recent = (own.get(name) for name in _QUERIES)
    counts = [row.carried for row in progress.rows]
    queries = [tensor for tensor in (carried, recent) if tensor is not None]
    if any(
        tensor.dim() != 4
        or tensor.shape[::3] != (keys.shape[0], keys.shape[3])
        or tensor.shape[1] % keys.shape[1]
        or tensor.shape[1] != queries[0].shape[1]
        or tensor.dtype != keys.dtype
        or not bool(torch.isfinite(tensor).all())
        for tensor in queries
    ):
        raise _DamageError("its queries do not fit")
    held = [0 if tensor is None else tensor.shape[2] for tensor in (carried, recent)]
    if max(counts) > held[0] or held[1] > progress.since_fold:
        raise _DamageError("its queries do not fit its numbers")
    if set(own) - {*_NAMES, *_BOUNDS, _MEMORY, *_QUERIES}:
        raise _DamageError("it has tensors of another layer")
    ends, width = progress.ends, length
    sound = (
        0 <= length <= keys.shape[2]
        and len(progress.rows) == keys.shape[0]
        and all(
            min(row.seen, row.sink, row.slots, row.slots + row.spare, row.exact, row.seen_at_fold, row.carried) >= 0
            for row in progress.rows
        )
        and max(row.stored for row in progress.rows) + progress.since_fold <= width
        and 0 <= progress.folded_at <= progress.settled <= progress.seen
        and ends == sorted(set(ends))
        and all(progress.settled < end <= progress.seen for end in ends)
        and 0 <= progress.scale < float("inf")
        and abs(progress.spare) <= width + max(row.counted for row in progress.rows)
        and bool(bounds) == (progress.folded_at > 0)
    )
    if not sound:
        raise _DamageError("its numbers do not fit its tensors")
    # When to look again is reckoned anew.
    progress = dataclasses.replace(progress, fold_from=0)
    entries = Entries(keys, values, weights, valid, memory)
    return _Ours(progress, entries, length, ValueRange(*bounds) if bounds else None, (carried, recent))


def _theirs(
    attributes: dict[str, JsonValue], new: Any, own: dict[str, Tensor], seen: int, rows: int, device: torch.device
) -> dict[str, Any]:
    """The attributes of a layer of Transformers', held against those of a new one."""
    expected = vars(new)
    if not expected.keys() <= attributes.keys() <= expected.keys() | {"dtype", "device"}:
        raise _DamageError("its attributes are not those of this version of Transformers")
    values = {name: _decode(value, own, device) for name, value in attributes.items()}
    for name, value in values.items():
        _check_attribute(name, value, expected.get(name), seen)
    tensors = [tensor for tensor in own.values() if tensor.dim()]
    if any(tensor.shape[0] != rows or not tensor.is_floating_point() for tensor in tensors):
        raise _DamageError("its tensors do not fit the other layers'")
    window, keys, held = getattr(new, "sliding_window", None), values.get("keys"), values.get("values")
    if window is not None:
        if not isinstance(keys, Tensor) or not isinstance(held, Tensor) or keys.dim() != 4:
            raise _DamageError("its window is missing")
        if keys.shape[:3] != held.shape[:3] or not min(seen, window - 1) <= keys.shape[2] <= seen:
            raise _DamageError("its window does not fit the tokens read")
    return values


def _check_attribute(name: str, value: Any, expected: Any, seen: int) -> None:
    """Refuse what an attribute that is `expected` in a new layer cannot have become."""
    if isinstance(value, dict):
        if not isinstance(expected, dict) or value.keys() != expected.keys():
            raise _DamageError(f"{name} does not fit")
        for key, item in value.items():
            _check_attribute(name, item, expected[key], seen)
    elif isinstance(value, Tensor) and isinstance(expected, Tensor):
        if not torch.equal(value.cpu(), expected.cpu()):
            raise _DamageError(f"{name} is another than the model's")
    elif name == "cumulative_length" and value != seen:
        raise _DamageError(f"{name} is {value}, and the other layers have read {seen} tokens")
    elif name not in _LEARNT and not isinstance(value, (bool, Tensor, torch.dtype, torch.device)) and value != expected:
        raise _DamageError(f"{name} is {value!r}, and the model has {expected!r}")
    elif isinstance(value, bool) != isinstance(expected, bool) and expected is not None:
        raise _DamageError(f"{name} does not fit")


def _decode(value: JsonValue, own: dict[str, Tensor], device: torch.device) -> Any:
    """Back from `_encode`; `own` has the layer's tensors by name."""
    if not isinstance(value, dict):
        return value
    kind, item = next(iter(value.items()), ("nothing", None))
    if kind == "tensor" and item in own:
        return own[str(item)]
    if kind == "dtype" and isinstance(dtype := getattr(torch, str(item), None), torch.dtype):
        return dtype
    if kind == "device":
        return device
    if kind == "by_number" and isinstance(item, dict) and all(key.isdecimal() for key in item):
        return {int(key): _decode(part, own, device) for key, part in item.items()}
    raise _DamageError(f"{kind} {item!r} cannot be read")


# Writing


def _layer(layer: Any, prefix: str, tensors: dict[str, Tensor]) -> _Layer:
    """What to write of one layer; its tensors are added to `tensors`."""
    if not isinstance(layer, WildCatLayer):
        attributes = {name: _encode(value, name, prefix, tensors) for name, value in vars(layer).items()}
        return _Layer(kind=type(layer).__name__, attributes=attributes)
    state = layer.state
    assert state.storage is not None
    # With the free room: a file is mapped into memory as it is, and then has room for the first new tokens.
    *held, memory = state.storage.snapshot().tensors()
    named = dict(zip(_NAMES, held, strict=True))
    if memory.shape[-1]:
        named[_MEMORY] = memory
    if state.log is not None:
        queries = zip(_QUERIES, (state.log.carried, state.log.recent()), strict=True)
        named |= {name: tensor for name, tensor in queries if tensor is not None}
    if state.folded_range is not None:
        named |= zip(_BOUNDS, state.folded_range.tensors(), strict=True)
    tensors.update({prefix + name: tensor for name, tensor in named.items()})
    return _Layer(kind=WildCatLayer.__name__, progress=state.progress, length=state.storage.length)


def _encode(value: Any, name: str, prefix: str, tensors: dict[str, Tensor]) -> JsonValue:
    """An attribute of one of Transformers' layers as JSON, its tensors set aside under their names."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[prefix + name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}  # that of the tensors, wherever they are read to
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        return {"by_number": {str(key): _encode(item, f"{name}.{key}", prefix, tensors) for key, item in value.items()}}
    raise ValueError(f"{prefix}{name} is a {type(value).__name__}, which cannot be saved; this layer is not supported")
