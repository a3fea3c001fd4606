"""Compressed contexts on disk: one safetensors file, whose header says what it is. Never pickle."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wildcat_kv.config import WildCatConfig
from wildcat_kv.identity import ModelIdentity, plain
from wildcat_kv.layer import WildCatLayer
from wildcat_kv.progress import Progress
from wildcat_kv.storage import Entries
from wildcat_kv.support import cache_layers, decoder_config
from wildcat_kv.value_range import ValueRange

FORMAT = "wildcat_kv context"
VERSION = 1

# Tensors of a layer of ours: its entries, and the box around folded values, where there is one.
_NAMES = ("keys", "values", "weights", "valid")
_BOUNDS = ("folded.lowest", "folded.highest")


class _Layer(BaseModel):
    """One layer: of ours with its progress, of Transformers' with its attributes."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    progress: Progress | None = None
    attributes: dict[str, JsonValue] | None = None


class _Header(BaseModel):
    """What stands beside the tensors, as JSON in the metadata of the file."""

    model_config = ConfigDict(extra="forbid")

    model: ModelIdentity
    settings: WildCatConfig
    compressor: JsonValue
    compressed: bool
    padded: bool
    layers: list[_Layer]


@dataclass(frozen=True)
class SavedContext:
    """A file that was read and found sound.

    Attributes:
        settings: of the cache that was saved.
        header: the rest of what the file says of itself.
        tensors: by name, "layers.0.keys" and so on.
        path: where it came from.
    """

    settings: WildCatConfig
    header: _Header
    tensors: dict[str, Tensor]
    path: str

    def check_compressor(self, compressor: Any) -> None:
        """Refuse to go on with another method than the context was compressed with.

        Raises:
            ValueError: names both.
        """
        ours, theirs = _describe(compressor), self.header.compressor
        if ours != theirs:
            raise ValueError(
                f"path={self.path!r} was compressed by {theirs}, and the cache to load it into compresses by {ours}; "
                "load it with the class and the compressor that saved it"
            )

    def restore(self, cache: Any) -> None:
        """Fill a new cache of the same model and settings."""
        cache._shared.compressed, cache._shared.padded = self.header.compressed, self.header.padded
        for index, (layer, saved) in enumerate(zip(cache.layers, self.header.layers, strict=True)):
            own = _own(self.tensors, index)
            if isinstance(layer, WildCatLayer):
                assert saved.progress is not None
                folded_range = ValueRange(*(own[name] for name in _BOUNDS)) if _BOUNDS[0] in own else None
                layer.state.restore(saved.progress, Entries(*(own[name] for name in _NAMES)), folded_range)
                layer.restored()
            else:
                assert saved.attributes is not None
                for name, value in saved.attributes.items():
                    setattr(layer, name, _decode(value, own))


def write(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write a cache of ours to `path`; see `CompressedCache.save`."""
    if not cache.layers or not cache.get_seq_length():
        raise ValueError("the cache is empty: read a context with the model before saving it")
    cache.check_consistent()
    tensors: dict[str, Tensor] = {}
    layers = [_layer(layer, f"layers.{index}.", tensors) for index, layer in enumerate(cache.layers)]
    header = _Header(
        model=cache.model,
        settings=cache.settings,
        compressor=_describe(cache.compressor),
        compressed=cache._shared.compressed,
        padded=cache._shared.padded,
        layers=layers,
    )
    metadata = {"format": FORMAT, "version": str(VERSION), "header": header.model_dump_json()}
    target = Path(path)
    # Written beside the target and moved into place, so that a file is complete or not there.
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        permissions = partial.stat().st_mode  # the user's; safetensors makes a file for its owner alone
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.chmod(permissions)
        partial.replace(target)
    except SafetensorError as error:
        raise OSError(f"path={str(path)!r} cannot be written: {' '.join(str(error).split())}") from None
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], config: Any, device: torch.device | str) -> SavedContext:
    """Read and check a file, for the model of `config`; see `CompressedCache.load`."""
    decoder = decoder_config(config)
    identity, (layers, full) = ModelIdentity.of(decoder), cache_layers(decoder)
    name = str(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={name!r} is no file; give one that cache.save(...) wrote")
    try:
        with safe_open(name, framework="pt", device=str(device)) as file:
            header = _header(name, file.metadata() or {})
            if difference := header.model.difference(identity):
                raise ValueError(
                    f"path={name!r} is of another model than config={type(config).__name__}: {difference}; load it "
                    "with the config of the model that read the context"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path={name!r} is no whole safetensors file: {reason}; save it again") from None
    kinds = [WildCatLayer.__name__ if index in full else type(layer).__name__ for index, layer in enumerate(layers)]
    if (found := [layer.kind for layer in header.layers]) != kinds:
        raise ValueError(
            f"path={name!r} has layers {found}, and this version of Transformers makes {kinds} for the model; use the "
            "version that wrote it, or save the context again"
        )
    saved = SavedContext(header.settings, header, tensors, name)
    if fault := _fault(saved):
        raise ValueError(f"path={name!r} is damaged: {fault}; save it again")
    return saved


def _header(name: str, metadata: dict[str, str]) -> _Header:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path={name!r} holds no compressed context; give a file that cache.save(...) wrote")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"path={name!r} has format version {metadata.get('version')}, and this release reads {VERSION}; use the "
            "release of wildcat_kv that wrote it, or save the context again"
        )
    try:
        return _Header.model_validate_json(metadata.get("header", ""))
    except (ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path={name!r} is damaged, its header does not fit: {reason}; save it again") from None


def _fault(saved: SavedContext) -> str | None:
    """What contradicts itself in a file, None for nothing."""
    ours = [(index, layer.progress) for index, layer in enumerate(saved.header.layers) if layer.progress is not None]
    numbers = {(progress.seen, len(progress.rows)) for _, progress in ours}
    if len(numbers) != 1:
        return "its layers have not read the same tokens"
    faults = (_layer_fault(progress, _own(saved.tensors, index)) for index, progress in ours)
    return next((f"layer {index}: {fault}" for (index, _), fault in zip(ours, faults, strict=True) if fault), None)


def _layer_fault(progress: Progress, own: dict[str, Tensor]) -> str | None:
    """What contradicts itself in a layer of ours; `own` has its tensors by name."""
    if missing := [name for name in _NAMES if name not in own]:
        return f"{missing[0]} is missing"
    keys, values, weights, valid = (own[name] for name in _NAMES)
    if keys.dim() != 4 or values.dim() != 4 or not keys.shape[:3] == values.shape[:3] == weights.shape == valid.shape:
        return "the shapes of its tensors do not fit each other"
    if not keys.is_floating_point() or (values.dtype, weights.dtype, valid.dtype) != (
        keys.dtype,
        torch.float32,
        torch.bool,
    ):
        return "the dtypes of its tensors do not fit each other"
    bounds = [own[name].shape for name in _BOUNDS if name in own]
    if bounds not in ([], [(*keys.shape[:2], 1, values.shape[3])] * 2):
        return "its value range does not fit"
    stored = max((row.stored for row in progress.rows), default=0) + progress.exact
    if len(progress.rows) != keys.shape[0] or not 0 <= progress.exact <= stored <= keys.shape[2]:
        return "its numbers do not fit its tensors"
    return None


def _own(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """The tensors of one layer, by their names in it."""
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _layer(layer: Any, prefix: str, tensors: dict[str, Tensor]) -> _Layer:
    """What to write of one layer; its tensors are added to `tensors`."""
    if not isinstance(layer, WildCatLayer):
        attributes = {name: _encode(value, name, prefix, tensors) for name, value in vars(layer).items()}
        return _Layer(kind=type(layer).__name__, attributes=attributes)
    assert layer.state.storage is not None
    named = dict(zip(_NAMES, layer.state.storage.entries.tensors(), strict=True))
    if layer.state.folded_range is not None:
        named |= zip(_BOUNDS, layer.state.folded_range.tensors(), strict=True)
    tensors.update({prefix + name: tensor for name, tensor in named.items()})
    return _Layer(kind=type(layer).__name__, progress=layer.state.progress)


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


def _decode(value: JsonValue, own: dict[str, Tensor]) -> Any:
    """Back from `_encode`; `own` has the layer's tensors by name."""
    if not isinstance(value, dict):
        return value
    [(kind, item)] = value.items()
    if kind == "tensor":
        return own[str(item)]
    if kind == "dtype":
        return getattr(torch, str(item))
    if kind == "device":
        return next(iter(own.values())).device if own else torch.device("cpu")
    assert kind == "by_number" and isinstance(item, dict)
    return {int(key): _decode(part, own) for key, part in item.items()}


def _describe(compressor: Any) -> JsonValue:
    """A method by its name and parameters."""
    fields = dataclasses.fields(compressor) if dataclasses.is_dataclass(compressor) else ()
    parameters = {field.name: plain(getattr(compressor, field.name)) for field in fields}
    return {"name": type(compressor).__name__, "parameters": parameters}
