"""Export a compressed context to a folder that vLLM can load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.contexts.compressed_context import CompressedContext
from wildcat_kv.contexts.context import Context
from wildcat_kv.integrations.vllm.entries import LayerEntries, entries_of
from wildcat_kv.integrations.vllm.folder import FoldingCost, StoredContext, check_name, write_context
from wildcat_kv.integrations.vllm.folding import direction, folded, folding_error
from wildcat_kv.integrations.vllm.placeholders import spelling_length
from wildcat_kv.integrations.vllm.positions import fixed_rotations, moved
from wildcat_kv.models.identity import ADAPTER
from wildcat_kv.models.support import decoder_config

BLOCK = 32
# Queries of a head to fit a direction to, and as many to measure its cost on.
_QUERIES = 256


@dataclass(frozen=True)
class Exported:
    """An exported context, with what its shape costs.

    Attributes:
        stored: the context in its folder.
        padding: share of the entries that are padding.
    """

    stored: StoredContext
    padding: float


def export_context(
    context: CompressedContext, folder: Path, *, stock: bool = False, block_size: int = BLOCK
) -> Exported:
    """Write a context as a folder that vLLM's connector loads.

    The entries are padded to one length, since an engine has one table of slots for all layers and heads; keys move to
    the positions of a prefix of that length.

    Args:
        context: compressed text.
        folder: folder to write; its name is the context's.
        stock: True to fold weights into keys, for attention backends without weights. The text is then read again, for
            its queries, if there are weights or lengths to fold.
        block_size: tokens of a block of the engine's cache; the length is a multiple of it unless `stock`.

    Raises:
        ValueError: a name with other characters, a model whose positions or layers an engine's prefix cannot hold, or
            a context that is too small. Nothing is written then.
        FileNotFoundError: the parent of the folder is not there.
    """
    check_name(folder.name)
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be a positive number of tokens")
    _check_sinks(context.model)
    _check_adapters(context)
    config = decoder_config(context.model.config)
    layers = entries_of(context.cache)
    rotations = fixed_rotations(config, range(len(layers)))
    longest = max(layer.longest for layer in layers)
    # Padding is free of weight; attention without weights has none to spare, so that the last block stays part-filled.
    slots = longest if stock else -(-longest // block_size) * block_size
    slots = max(slots, spelling_length(config.vocab_size))
    level = all(len(head.weights) == slots for layer in layers for head in layer.heads)
    plain, cost = level and not any(layer.is_weighted for layer in layers), None
    if stock and not plain:
        tensors, cost = _folded(context, layers, rotations, slots)
    else:
        tensors = _padded(layers, slots, weighted=not plain)
    by = slots - context.cache.get_seq_length()
    for index in range(len(layers)):
        name = f"layers.{index}.keys"
        tensors[name] = moved(tensors[name], rotations[index], by)
    header = _described(context, layers, slots)
    weighted = not stock and not plain
    made = write_context(folder, {**header, "weighted": weighted, "folding": cost}, tensors)
    return Exported(made, 1 - header["stored"] / slots)


def _padded(layers: list[LayerEntries], slots: int, *, weighted: bool) -> dict[str, Tensor]:
    """Pad the entries of all layers to one length."""
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        keys, values, weights = layer.padded(slots)
        tensors |= {f"layers.{index}.keys": keys, f"layers.{index}.values": values}
        if weighted:
            tensors[f"layers.{index}.weights"] = weights
    return tensors


def _described(context: CompressedContext, layers: list[LayerEntries], slots: int) -> dict[str, Any]:
    """Give the fields of the header that do not depend on how weights are told."""
    heads, first = len(layers[0].heads), layers[0].heads[0]
    count = sum(len(head.weights) for layer in layers for head in layer.heads)
    return {
        "model": context.cache.model,
        "samples": context.weights.samples,
        "method": type(context.cache.compressor).__name__,
        "tokens": context.tokens,
        "slots": slots,
        "stored": count / (len(layers) * heads),
        "layers": len(layers),
        "heads": heads,
        "key_channels": first.keys.shape[1],
        "value_channels": first.numerators.shape[1],
        "dtype": str(first.keys.dtype).removeprefix("torch."),
    }


def _check_sinks(model: Any) -> None:
    """Refuse a model whose attention has learned sinks, which divide by more than the entries' weights.

    Raises:
        ValueError: names the parameter.
    """
    name = next((name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] == "sinks"), None)
    if name is not None:
        raise ValueError(
            f"model={type(model).__name__} has attention sinks ({name}), whose share is lost where weights ride in "
            "value channels; ask the context through Transformers"
        )


def _check_adapters(context: CompressedContext) -> None:
    """Refuse a context that an adapter has read: the engine's checkpoint has none.

    Raises:
        ValueError: names a parameter of it.
    """
    name = next((name for name in context.weights.samples if name.startswith(ADAPTER)), None)
    if name is not None:
        raise ValueError(
            f"the context was read with an adapter ({name}), and an engine loads a checkpoint alone; merge the "
            "adapter, save the model, and compress the text with that"
        )


def _folded(
    context: CompressedContext, layers: list[LayerEntries], rotations: dict[int, Rotation], slots: int
) -> tuple[dict[str, Tensor], FoldingCost]:
    """Fold the weights of all layers; the keys stay where they are."""
    tensors: dict[str, Tensor] = {}
    squares, worst, count = 0.0, 0.0, 0
    for index, queries in enumerate(_queries(context, rotations)):
        layer = layers[index]
        groups = queries.reshape(len(layer.heads), -1, *queries.shape[1:])  # (heads, group, m, d)
        made, error = [], 0.0
        for head, own in zip(layer.heads, groups, strict=True):
            fitted, held_out = (own[:, half::2].flatten(0, 1) for half in (0, 1))
            keys, values = folded(head, direction(fitted, layer.scale), slots)
            error += folding_error(head, keys, values, held_out, layer.scale) ** 2
            made.append((keys, values))
        squares, worst, count = squares + error, max(worst, (error / len(made)) ** 0.5), count + len(made)
        keys, values = (torch.stack(column).to(layer.dtype) for column in zip(*made, strict=True))
        tensors |= {f"layers.{index}.keys": keys, f"layers.{index}.values": values}
    return tensors, FoldingCost(error=(squares / count) ** 0.5, worst=worst, queries=_QUERIES)


def _queries(context: CompressedContext, rotations: dict[int, Rotation]) -> Iterator[Tensor]:
    """Read the text for its queries, (query_heads, m, d) a layer, moved to the positions after it."""
    read = Context(context.model, context.ids).exact
    seen = read.get_seq_length()
    at = torch.linspace(0, seen - 1, min(seen, 2 * _QUERIES)).long()
    by = (seen + torch.arange(len(at)) - at).unsqueeze(0)
    for index, layer in enumerate(read.layers):
        found = layer.state.log.recent()
        yield rotations[index].forward(found[:, :, at.to(found.device)].float().cpu(), by)[0]
