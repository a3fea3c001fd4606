"""Inspect a saved cache by its header alone."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from wildcat_kv.cache.disk.format import Header, LayerHeader, prefix_of
from wildcat_kv.cache.disk.read import opened, read_header
from wildcat_kv.config import WildCatConfig
from wildcat_kv.models.identity import ModelIdentity

# Short names for Transformers' own layers.
_KINDS = {"DynamicSlidingWindowLayer": "window", "LinearAttentionLayer": "linear"}


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a saved cache.

    Attributes:
        kind: "compressed", "exact" for a layer that has not folded, or the kind of one of Transformers' layers.
        nbytes: bytes of its tensors.
        seen: number of tokens read; None for one of Transformers' layers.
        stored: number of entries held; None likewise.
        slots: number of coreset slots among them; None likewise.
        heads: number of key heads; None for a layer without keys.
        channels: channels of a key; None for a layer without keys.
        dtype: dtype of the keys as safetensors names it, such as "F32"; None for a layer without keys.
    """

    kind: str
    nbytes: int
    seen: int | None = None
    stored: int | None = None
    slots: int | None = None
    heads: int | None = None
    channels: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class ContextSummary:
    """A saved cache.

    Attributes:
        model: model that it is for.
        compressor: method, written as in Python.
        settings: settings of the cache.
        rows: rows of the batch.
        tokens: number of tokens read.
        has_text: True if `CompressedContext.load` can ask it; otherwise it is a cache alone.
        nbytes: bytes of the file.
        layers: one a layer of the model.
    """

    model: ModelIdentity
    compressor: str
    settings: WildCatConfig
    rows: int
    tokens: int
    has_text: bool
    nbytes: int
    layers: list[LayerSummary]

    @property
    def stored_share(self) -> float:
        """Entries held over tokens read, the mean of the compressed layers."""
        stored = [layer.stored for layer in self.layers if layer.stored is not None]
        return sum(stored) / len(stored) / self.tokens


@dataclass(frozen=True)
class _UnreadTensor:
    """Shape, safetensors dtype and bytes of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def inspect_file(path: str | os.PathLike[str]) -> ContextSummary:
    """Look into a file that `CompressedCache.save` or `CompressedContext.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file of this library, a damaged one, or one of another version.
    """
    header, tensors = _look(path)
    progress = next((layer.progress for layer in header.layers if layer.progress and layer.progress.rows), None)
    if progress is None:
        raise ValueError(f"path={str(path)!r} is damaged: no layer of it has read anything; save it again")
    return ContextSummary(
        model=header.model,
        compressor=_written(header.compressor),
        settings=header.settings,
        rows=len(progress.rows),
        tokens=progress.seen if header.text is None else header.text.tokens,
        has_text=header.text is not None,
        nbytes=Path(path).stat().st_size,
        layers=[_layer(header, tensors, index) for index in range(len(header.layers))],
    )


def _look(path: str | os.PathLike[str]) -> tuple[Header, dict[str, _UnreadTensor]]:
    """Read a file's header and what it says of its tensors."""
    with opened(path, "cpu") as file:
        header = read_header(str(path), file.metadata() or {})
        tensors = {}
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            bits = next((int(digits) for digits in [dtype.lstrip("BFIU")] if digits.isdecimal()), 8)
            tensors[name] = _UnreadTensor(shape, dtype, math.prod(shape) * bits // 8)
    return header, tensors


def _layer(header: Header, tensors: dict[str, _UnreadTensor], index: int) -> LayerSummary:
    layer, prefix = header.layers[index], prefix_of(index)
    nbytes = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(prefix))
    keys = tensors.get(f"{prefix}bands.0.keys" if layer.bands else f"{prefix}keys")
    has_keys = keys is not None and len(keys.shape) == 4
    progress = layer.progress
    folded = progress is not None and progress.folded_at > 0
    return LayerSummary(
        kind=_KINDS.get(layer.kind, layer.kind) if progress is None else "compressed" if folded else "exact",
        nbytes=nbytes,
        seen=None if progress is None else progress.seen,
        stored=_stored(header, tensors, index) if layer.bands else layer.length,
        slots=None if progress is None else max((row.slots + row.spare for row in progress.rows), default=0),
        heads=_heads(layer, keys.shape[1]) if keys is not None and has_keys else None,
        channels=keys.shape[3] if keys is not None and has_keys else None,
        dtype=keys.dtype if keys is not None and has_keys else None,
    )


def _heads(layer: LayerHeader, heads: int) -> int:
    """Count the key heads of a layer, whose tensors have `heads` of them."""
    rows = 1 if layer.progress is None else len(layer.progress.rows)
    return sum(len(band.places) for band in layer.bands) // max(1, rows) if layer.bands else heads


def _stored(header: Header, tensors: dict[str, _UnreadTensor], index: int) -> int:
    """Count the entries of a layer in bands, on average over the heads, rounded up."""
    heads = total = 0
    for number, band in enumerate(header.layers[index].bands):
        columns, place, prefix = band.length, 0, f"{prefix_of(index)}bands.{number}."
        while (codes := tensors.get(f"{prefix}{place}.keys.codes")) is not None:
            columns += math.prod(codes.shape[1:3]) * 8 // (header.settings.bits or 8)
            place += 1
        heads, total = heads + len(band.places), total + len(band.places) * columns
    return -(-total // max(1, heads))


def _written(description: JsonValue) -> str:
    """Write a described method as in Python; see `describe`."""
    if not isinstance(description, dict) or not isinstance(parameters := description.get("parameters"), dict):
        measured = description.get("model") if isinstance(description, dict) else None
        if not isinstance(description, dict) or measured is None:
            return str(description)
        return f"{'Profile' if 'points' in description else 'FittedScorer'}({measured!r})"
    given = (
        f"{name}={_written(value) if isinstance(value, dict) else repr(value)}" for name, value in parameters.items()
    )
    return f"{description.get('name')}({', '.join(given)})"
