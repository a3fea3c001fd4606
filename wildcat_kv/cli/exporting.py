"""Export a saved context for a serving engine, and say what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wildcat_kv.cache.disk.inspection import inspect_file
from wildcat_kv.contexts.compressed_context import CompressedContext
from wildcat_kv.data.downloads import progress
from wildcat_kv.integrations.vllm.export import export_context
from wildcat_kv.integrations.vllm.folder import check_name

# A share of padding that is worth a word, and an error of folded weights that is worth a warning.
_MUCH_PADDING = 0.1
_MUCH_ERROR = 0.1


def check_export(file: Path, output: Path) -> None:
    """Refuse what cannot be exported, before a model is loaded.

    Args:
        file: saved context.
        output: folder to write.

    Raises:
        FileNotFoundError: there is no such file, or no folder to write into.
        ValueError: a file that is no context, or a folder whose name is none of a context.
    """
    check_name(output.name)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output={str(output)!r}: there is no folder {str(output.parent)!r}; make it first")
    if not inspect_file(file).has_text:
        raise ValueError(f"file={str(file)!r} holds a cache without its text; save a compressed context")


def write_export(model: Any, tokenizer: Any, file: Path, output: Path, *, stock: bool, block_size: int) -> None:
    """Export a context, and print what it holds and costs.

    Args:
        model: model that read the text.
        tokenizer: tokenizer of the model.
        file: saved context.
        output: folder to write.
        stock: True to fold weights into keys.
        block_size: tokens of a block of the engine's cache.
    """
    context = CompressedContext.load(file, model, tokenizer)
    with progress(f"Exporting {file}"):
        made = export_context(context, output, stock=stock, block_size=block_size)
    header = made.stored.header
    size = made.stored.path.stat().st_size / 2**20
    held = "weights in value channels" if header.weighted else "no weights to tell"
    if header.folding is not None:
        held = "weights folded into keys"
    print(f"{output}: {header.tokens} tokens as a prefix of {header.slots}, {size:.1f} MiB, {held}")
    if made.padding > _MUCH_PADDING:
        print(
            f"{made.padding:.0%} of it is padding: heads hold {header.stored:.0f} entries on average, and an engine "
            "has one length for all; wildcat and QueryWildCat(share='equal') have equal heads and need none"
        )
    if (cost := header.folding) is not None:
        print(
            f"Folding changes attention to the entries by {cost.error:.1%}, in one layer by {cost.worst:.1%}, measured "
            f"on {cost.queries} queries of the text"
        )
        if cost.worst > _MUCH_ERROR:
            print("That is much: export without --stock, and serve with weights")
