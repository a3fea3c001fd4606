"""Lists of methods, presets, and what a saved file holds."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from wildcat_kv.config import WildCatConfig
from wildcat_kv.recipes.presets import preset_schema, shipped_presets

_MIB = 2**20


def list_methods() -> None:
    """Print the compression methods, ours and those of installed packages."""
    from wildcat_kv.compressors import available

    table = Table("name", "what it does", "paper", "queries", "decodes", box=None, padding=(0, 2, 0, 0))
    for method in available():
        marks = ("yes" if has else "no" for has in (method.needs_queries, method.decodes))
        table.add_row(method.name, method.summary, method.paper.removeprefix("arXiv "), *marks)
    console = Console()
    console.print(table)
    console.print(
        "\npaper: on arXiv. queries: learns from queries, not from keys and values alone. decodes: compresses what is "
        "generated, too; one that does not reads a context by wildcat_kv.compress_context()."
    )


def list_presets() -> None:
    """Print the presets that come with the package. Imports no torch."""
    table = Table("name", "method", "settings", "what it is good for", box=None, padding=(0, 2, 0, 0))
    for name, fields in shipped_presets().items():
        settings = WildCatConfig(**fields["settings"]).model_dump(exclude_defaults=True, exclude_none=True)
        shown = ", ".join(f"{field}={value}" for field, value in settings.items())
        table.add_row(name, fields["compressor"], shown, fields["description"])
    Console().print(table)


def print_schema() -> None:
    """Print the JSON schema of a preset's file."""
    print(json.dumps(preset_schema(), indent=2))


def show_file(file: Path) -> None:
    """Print what a saved context or cache holds, layer by layer.

    Args:
        file: the .safetensors file.

    Raises:
        ValueError: a file that holds neither.
    """
    from wildcat_kv.cache.disk.inspection import inspect_file

    found = inspect_file(file)
    console, model = Console(highlight=False), found.model
    settings = ", ".join(f"{name}={value}" for name, value in found.settings.model_dump(exclude_none=True).items())
    asked = "CompressedContext.load, wildcat-kv chat" if found.has_text else "WildCatCache.load or CompressedCache.load"
    for name, value in (
        ("file", f"{file}, {found.nbytes / _MIB:.1f} MiB"),
        ("model", f"{model.model_type}, {model.num_hidden_layers} layers, hidden size {model.hidden_size}"),
        ("method", found.compressor),
        ("settings", settings),
        ("read", f"{found.tokens:,} tokens in {found.rows} row{'s' if found.rows > 1 else ''}"),
        ("stored", f"{found.stored_share:.1%} of them"),
        ("opened by", asked),
    ):
        console.print(f"[dim]{name:<9}[/dim]", value, soft_wrap=True)
    table = Table("layer", "kind", box=None, padding=(0, 2, 0, 0))
    for name in ("seen", "stored", "slots", "exact", "heads x d", "dtype", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, layer in enumerate(found.layers):
        exact = None if layer.stored is None or layer.slots is None else layer.stored - layer.slots
        counts = ("" if count is None else f"{count:,}" for count in (layer.seen, layer.stored, layer.slots, exact))
        shape = "" if layer.heads is None else f"{layer.heads} x {layer.channels}"
        table.add_row(str(index), layer.kind, *counts, shape, layer.dtype or "", f"{layer.nbytes / _MIB:.2f}")
    console.print()
    console.print(table)
