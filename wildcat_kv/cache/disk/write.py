"""Write a cache to a file: safetensors, never pickle."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from wildcat_kv.cache.disk import format as layout
from wildcat_kv.cache.disk.banded_layers import name_bands, name_entries
from wildcat_kv.cache.disk.foreign_layers import encode
from wildcat_kv.cache.disk.saved import ForeignLayer, SavedCache, SavedLayer
from wildcat_kv.files import replacing


def write(path: str | os.PathLike[str], saved: SavedCache) -> None:
    """Write a cache to `path`: a complete file, or none.

    Raises:
        ValueError: a layer of a kind that cannot be saved.
        OSError: the file cannot be written.
    """
    header, tensors = _content(saved)
    metadata = {"format": layout.FORMAT, "version": str(layout.VERSION), "header": header.model_dump_json()}
    try:
        with replacing(Path(path)) as partial:
            save_file({name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        raise OSError(f"path={str(path)!r} cannot be written: {' '.join(str(error).split())}") from None


def _content(saved: SavedCache) -> tuple[layout.Header, dict[str, Tensor]]:
    """Split a cache into its header and its tensors by name."""
    tensors: dict[str, Tensor] = {}
    layers = [_layer(layer, layout.prefix_of(index), tensors) for index, layer in enumerate(saved.layers)]
    steps = saved.rope.steps
    for number, step in enumerate(steps):
        if step.deltas is not None:
            tensors[f"{layout.POSITIONS}{number}"] = step.deltas
    if saved.text is not None:
        tensors[layout.IDS] = saved.text.ids
    text = None if saved.text is None else layout.TextHeader(tokens=saved.text.tokens, weights=saved.text.weights)
    header = layout.Header(
        # Vision and audio parts do not matter to a cache that has read text alone.
        model=saved.model.without_senses() if all(step.deltas is None for step in steps) else saved.model,
        settings=saved.settings,
        compressor=saved.compressor,
        layers=layers,
        positions=[
            layout.PositionsHeader(start=step.start, known=step.known, deltas=step.deltas is not None) for step in steps
        ],
        text=text,
    )
    return header, tensors


def _layer(layer: SavedLayer | ForeignLayer, prefix: str, tensors: dict[str, Tensor]) -> layout.LayerHeader:
    """Describe one layer; its tensors are added to `tensors`."""
    if isinstance(layer, ForeignLayer):
        return layout.LayerHeader(kind=layer.kind, attributes=encode(layer.attributes, prefix, tensors))
    # With the free room: a file is mapped into memory as it is, and then has room for the first new tokens.
    named: dict[str, Tensor] = {}
    bands = name_bands(layer.bands, named)
    if not bands:
        named |= name_entries(layer.entries)
    queries = zip(layout.QUERIES, (layer.carried, layer.recent), strict=True)
    named |= {name: tensor for name, tensor in queries if tensor is not None}
    if layer.folded_range is not None:
        named |= zip(layout.BOUNDS, layer.folded_range.tensors(), strict=True)
    tensors.update({prefix + name: tensor for name, tensor in named.items()})
    return layout.LayerHeader(kind=layout.COMPRESSED, progress=layer.progress, length=layer.length, bands=bands)
