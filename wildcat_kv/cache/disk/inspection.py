"""What a saved context holds, told from its header and without the model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from wildcat_kv.cache.disk import persistence
from wildcat_kv.config import WildCatConfig
from wildcat_kv.models.identity import ModelIdentity

# Of Transformers' own layers.
_KINDS = {"DynamicSlidingWindowLayer": "window", "LinearAttentionLayer": "linear"}


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a saved context.

    Attributes:
        kind: "compressed", or "exact" for one that has not folded, or what Transformers' own layer is.
        nbytes: of its tensors.
        seen: tokens read; None of Transformers' own layers, and so for the next two.
        stored: columns held.
        slots: of the coreset, among them.
        heads: of its keys; None where it has none, and so for the next two.
        channels: of a key.
        dtype: of its keys, as safetensors names it.
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
    """A saved context.

    Attributes:
        model: what it is for.
        compressor: the method, as one would write it.
        settings: of the cache.
        rows: of the batch.
        tokens: that were read.
        has_text: whether it can be asked with `CompressedContext.load`; otherwise it is a cache alone.
        nbytes: of the file.
        layers: one by one.
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
        """Columns held over tokens read, the mean of the layers that can be compressed."""
        stored = [layer.stored for layer in self.layers if layer.stored is not None]
        return sum(stored) / len(stored) / self.tokens


def inspect_file(path: str | os.PathLike[str]) -> ContextSummary:
    """Look into a file that `CompressedCache.save` or `CompressedContext.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file of ours, a damaged one, or one of another version.
    """
    contents = persistence.look(path)
    header = contents.header
    progress = next(layer.progress for layer in header.layers if layer.progress is not None)
    return ContextSummary(
        model=header.model,
        compressor=_written(header.compressor),
        settings=header.settings,
        rows=len(progress.rows),
        tokens=progress.seen if header.text is None else header.text.tokens,
        has_text=header.text is not None,
        nbytes=Path(path).stat().st_size,
        layers=[_layer(contents, index) for index in range(len(header.layers))],
    )


def _layer(contents: persistence.Contents, index: int) -> LayerSummary:
    layer, prefix = contents.header.layers[index], f"layers.{index}."
    nbytes = sum(tensor.nbytes for name, tensor in contents.tensors.items() if name.startswith(prefix))
    keys = contents.tensors.get(f"{prefix}keys")
    has_keys = keys is not None and len(keys.shape) == 4
    progress = layer.progress
    folded = progress is not None and progress.folded_at > 0
    return LayerSummary(
        kind=_KINDS.get(layer.kind, layer.kind) if progress is None else "compressed" if folded else "exact",
        nbytes=nbytes,
        seen=None if progress is None else progress.seen,
        stored=layer.length,
        slots=None if progress is None else max(row.slots + row.spare for row in progress.rows),
        heads=keys.shape[1] if keys is not None and has_keys else None,
        channels=keys.shape[3] if keys is not None and has_keys else None,
        dtype=keys.dtype if keys is not None and has_keys else None,
    )


def _written(description: JsonValue) -> str:
    """A described method as one would write it; see `describe`."""
    if not isinstance(description, dict) or not isinstance(parameters := description.get("parameters"), dict):
        return str(description)
    given = (
        f"{name}={_written(value) if isinstance(value, dict) else repr(value)}" for name, value in parameters.items()
    )
    return f"{description.get('name')}({', '.join(given)})"
