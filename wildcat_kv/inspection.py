"""What a saved context holds, told from its header and without the model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wildcat_kv import persistence

_MIB = 2**20


@dataclass(frozen=True)
class Inspection:
    """A table of the layers, and what there is to say of the whole.

    Attributes:
        about: what is said of the file, by name.
        columns: names of the table's columns.
        rows: the cells of each layer.
    """

    about: dict[str, str]
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def inspect_file(path: str | os.PathLike[str]) -> Inspection:
    """Look into a file that `CompressedCache.save` or `CompressedContext.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file of ours, a damaged one, or one of another version.
    """
    contents = persistence.look(path)
    header = contents.header
    total = None if header.text is None else header.text.tokens
    rows: list[tuple[str, ...]] = []
    shares = []
    for index, layer in enumerate(header.layers):
        tensors = {
            name.split(".", 2)[2]: tensor
            for name, tensor in contents.tensors.items()
            if name.startswith(f"layers.{index}.")
        }
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        keys = tensors.get("keys")
        shape = f"{keys.shape[1]} x {keys.shape[3]}" if keys is not None and len(keys.shape) == 4 else ""
        dtype = keys.dtype if keys is not None else ""
        numbers = ("", "", "", "")
        if layer.progress is not None and layer.length is not None:
            slots = max(row.slots + row.spare for row in layer.progress.rows)
            numbers = (
                f"{layer.progress.seen:,}",
                f"{layer.length:,}",
                f"{slots:,}",
                f"{layer.length - slots:,}",
            )
            shares.append(layer.length / (total or layer.progress.seen))
        kind = "compressed" if layer.progress is not None and layer.progress.folded_at else "exact"
        named = kind if layer.progress is not None else layer.kind
        rows.append((str(index), named, *numbers, shape, dtype, f"{nbytes / _MIB:.2f}"))
    model, progress = header.model, next(layer.progress for layer in header.layers if layer.progress is not None)
    about = {
        "model": f"{model.model_type}, {model.num_hidden_layers} layers, hidden size {model.hidden_size}",
        "compressor": _method(header.compressor),
        "settings": ", ".join(f"{key}={value}" for key, value in header.settings.model_dump(exclude_none=True).items()),
        "rows": str(len(progress.rows)),
        "stored": f"{sum(shares) / len(shares):.1%} of the tokens read, on average over layers",
        "size": f"{Path(path).stat().st_size / _MIB:.1f} MiB, format version {persistence.VERSION}",
    }
    if total is not None:
        about["text"] = f"{total:,} tokens, to be asked with CompressedContext.load or wildcat-kv chat"
    columns = ("layer", "kind", "seen", "stored", "slots", "exact", "heads x d", "dtype", "MiB")
    return Inspection(about, columns, rows)


def _method(description: Any) -> str:
    """A described method as one would write it; see `describe`."""
    if not isinstance(description, dict) or not isinstance(description.get("parameters"), dict):
        return str(description)
    given = (
        f"{name}={_method(value) if isinstance(value, dict) else repr(value)}"
        for name, value in description["parameters"].items()
    )
    return f"{description.get('name')}({', '.join(given)})"
