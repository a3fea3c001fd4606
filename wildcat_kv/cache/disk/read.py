"""Read a file and check all of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wildcat_kv.cache.disk.foreign_layers import foreign_layer
from wildcat_kv.cache.disk.format import COMPRESSED, FORMAT, IDS, POSITIONS, READ, DamageError, Header, prefix_of
from wildcat_kv.cache.disk.saved import ForeignLayer, SavedCache, SavedLayer, SavedText
from wildcat_kv.cache.disk.wildcat_layers import wildcat_layer
from wildcat_kv.cache.positions import RopeDeltas, Step
from wildcat_kv.models.identity import ModelIdentity
from wildcat_kv.models.support import cache_layers, decoder_config


def read(path: str | os.PathLike[str], config: Any, device: torch.device | str) -> SavedCache:
    """Read and check a file, for the model of `config`; see `CompressedCache.load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file of this library, a damaged one, one of another version or model, or a device that is not
            there.
    """
    decoder = decoder_config(config)
    identity, (layers, full) = ModelIdentity.of(decoder, config), cache_layers(decoder)
    _check_device(device)
    name = str(path)
    with opened(path, str(device)) as file:
        header = read_header(name, file.metadata() or {})
        if difference := header.model.difference(identity):
            raise ValueError(
                f"path={name!r} is of another model than config={type(config).__name__}: {difference}; load it "
                "with the config of the model that read the context"
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    kinds = [COMPRESSED if index in full else type(layer).__name__ for index, layer in enumerate(layers)]
    if (found := [layer.kind for layer in header.layers]) != kinds:
        raise ValueError(
            f"path={name!r} has layers {found}, and this version of Transformers makes {kinds} for the model; use the "
            "version that wrote it, or save the context again"
        )
    try:
        text = _text(header, tensors)
        rope = _rope(header, tensors)
        checked = _layers(header, layers, tensors, torch.device(device))
    except DamageError as fault:
        raise ValueError(f"path={name!r} is damaged: {fault}; save it again") from None
    return SavedCache(header.model, header.settings, header.compressor, checked, rope, text, name)


@contextmanager
def opened(path: str | os.PathLike[str], device: str) -> Iterator[Any]:
    """Open a safetensors file; its errors say what to do.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no safetensors file.
    """
    name = str(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={name!r} is no file; give one that cache.save(...) wrote")
    try:
        with safe_open(name, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"path={name!r} is no whole safetensors file: {reason}; save it again, or give one that cache.save(...) "
            "wrote"
        ) from None


def read_header(name: str, metadata: dict[str, str]) -> Header:
    """Check the metadata of a file and return its header.

    Args:
        name: path of the file, for messages.
        metadata: metadata as safetensors gives it.

    Raises:
        ValueError: no file of this library, one of another version, or a damaged one.
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path={name!r} holds no compressed context; give a file that cache.save(...) wrote")
    if metadata.get("version") not in [str(version) for version in READ]:
        raise ValueError(
            f"path={name!r} has format version {metadata.get('version')}, and this release reads "
            f"{' and '.join(map(str, READ))}; use the release of wildcat_kv that wrote it, or save the context again"
        )
    try:
        return Header.model_validate_json(metadata.get("header", ""))
    except (ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path={name!r} is damaged, its header does not fit: {reason}; save it again") from None


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"device={str(device)!r} cannot be used: {reason}; give that of the model") from None


def _text(header: Header, tensors: dict[str, Tensor]) -> SavedText | None:
    """Take the text and its ids out of `tensors`."""
    if header.text is None:
        return None
    ids = tensors.pop(IDS, None)
    seen = {layer.progress.seen for layer in header.layers if layer.progress is not None}
    if ids is None or ids.dtype != torch.int64 or {ids.shape} != {torch.Size((1, number)) for number in seen}:
        raise DamageError("the tokens of its text do not fit")
    return SavedText(ids, header.text.tokens, header.text.weights)


def _rope(header: Header, tensors: dict[str, Tensor]) -> RopeDeltas:
    """Take the positions out of `tensors`."""
    numbers = {(layer.progress.seen, len(layer.progress.rows)) for layer in header.layers if layer.progress is not None}
    steps = []
    for number, step in enumerate(header.positions):
        deltas = tensors.pop(f"{POSITIONS}{number}", None)
        if step.deltas != (deltas is not None):
            raise DamageError("the positions of its rows do not fit")
        if deltas is not None:
            shapes = {torch.Size((rows, 1)) for _, rows in numbers}
            if not step.known or {deltas.shape} != shapes or deltas.dtype not in (torch.int64, torch.float32):
                raise DamageError("the positions of its rows do not fit")
        steps.append(Step(step.start, deltas, step.known))
    starts = [step.start for step in steps]
    if starts[:1] != [0] or starts != sorted(set(starts)) or any(seen <= starts[-1] for seen, _ in numbers):
        raise DamageError("its positions do not fit the tokens read")
    return RopeDeltas(steps)


def _layers(
    header: Header, fresh: list[Any], tensors: dict[str, Tensor], device: torch.device
) -> list[SavedLayer | ForeignLayer]:
    """Check all layers; `fresh` are new ones of an uncompressed cache."""
    progresses = [layer.progress for layer in header.layers if layer.kind == COMPRESSED]
    numbers = {(progress.seen, len(progress.rows)) for progress in progresses if progress is not None}
    if len(numbers) != 1 or None in progresses:
        raise DamageError("its layers have not read the same tokens")
    [(seen, rows)] = numbers
    layers: list[SavedLayer | ForeignLayer] = []
    used: set[str] = set()
    for index, (described, new) in enumerate(zip(header.layers, fresh, strict=True)):
        prefix = prefix_of(index)
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        used.update(prefix + name for name in own)
        try:
            if described.progress is not None and described.kind == COMPRESSED:
                layers.append(wildcat_layer(described, own, header.settings.bits))
            else:
                layers.append(foreign_layer(described.attributes or {}, new, own, seen, rows, device))
        except DamageError as fault:
            raise DamageError(f"layer {index}: {fault}") from None
    if strangers := sorted(tensors.keys() - used):
        raise DamageError(f"{strangers[0]} belongs to no layer")
    return layers
