"""`wildcat-kv patch` and `custom-generate`: folders on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wildcat_kv.cli import options
from wildcat_kv.integrations.hub_folder import write_folder
from wildcat_kv.integrations.model_folder import patch_folder, unpatch_folder


def patch(
    model_dir: Annotated[Path, typer.Argument(help="A model's folder, as save_pretrained writes it.")],
    preset: options.PresetOption = None,
    method: options.MethodOption = None,
    ratio: options.RatioOption = None,
    compression_ratio: options.DropOption = None,
    max_tokens: options.MaxTokensOption = None,
    seed: options.SeedOption = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take back what an earlier patch did.")] = False,
) -> None:
    """Write into a model's config.json how its cache is to be compressed; wildcat_kv.enable(model) obeys it."""
    fields = {"ratio": ratio, "compression_ratio": compression_ratio, "max_tokens": max_tokens, "seed": seed}
    given = {"preset": preset, "method": method, **fields}
    if undo:
        if name := next((name for name, value in given.items() if value is not None), None):
            raise ValueError(f"{name}={given[name]!r} given beside undo; leave one of them out")
        unpatch_folder(model_dir)
        print(f"{model_dir}: as it was before it was patched")
        return
    if not any(value is not None for value in given.values()):
        raise ValueError("nothing to write; give a preset, such as --preset balanced, or --ratio, or --undo")
    choice = options.chosen(preset, method, **fields)
    recipe = patch_folder(model_dir, **choice)
    print(f"{model_dir}: {recipe.compressor}, {recipe.settings}")


def custom_generate(
    folder: Annotated[Path, typer.Argument(help="To write to; may be a model's folder.")],
) -> None:
    """Write a folder for generate(custom_generate=FOLDER, trust_remote_code=True), ready to be pushed to the Hub."""
    for path in write_folder(folder):
        print(path)
