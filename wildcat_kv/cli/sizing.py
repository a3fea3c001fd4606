"""Bytes that a cache will hold, as `wildcat-kv size` prints them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from wildcat_kv.cache.forecast import CacheSize, cache_size
from wildcat_kv.cli.figures import size_of
from wildcat_kv.compressors.registry import name_of
from wildcat_kv.recipes.presets import preset_names
from wildcat_kv.recipes.recipe import DEFAULT_PRESET

_ALL_TOKENS = "bytes_30"


@dataclass(frozen=True)
class ShapeOptions:
    """A model's shape as it is given by hand; None for what is not given.

    Attributes:
        layers: layers of the model.
        kv_heads: key heads of a layer.
        head_dim: channels of a key, and of a value.
        heads: query heads of a layer; as many as key heads by default.
    """

    layers: int | None
    kv_heads: int | None
    head_dim: int | None
    heads: int | None

    @property
    def given(self) -> bool:
        """True if any of them is given."""
        return any(value is not None for value in vars(self).values())

    def config(self, positions: int) -> Any:
        """Make a config of this shape, in bfloat16.

        Raises:
            ValueError: some that are needed are missing, or the heads do not fit.
        """
        needed = ("layers", "kv_heads", "head_dim")
        if missing := [f"--{name.replace('_', '-')}" for name in needed if getattr(self, name) is None]:
            raise ValueError(
                f"{', '.join(missing)} missing: a shape by hand needs layers, key heads and their channels, such as "
                "--layers 28 --kv-heads 4 --head-dim 128"
            )
        if self.heads is not None and self.heads % (self.kv_heads or 1):
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        heads = self.heads or self.kv_heads or 0
        return AutoConfig.for_model(
            "llama",
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            hidden_size=heads * (self.head_dim or 0),
            max_position_embeddings=positions,
            dtype=torch.bfloat16,
        )


def print_sizes(config: Any, tokens: int, rows: int, dtype: torch.dtype | None, choice: dict[str, Any]) -> None:
    """Print the bytes of the exact cache and of compressed ones.

    These are all tokens in 4 bits, the default, and what was chosen; without a choice every preset.

    Args:
        config: config of the model.
        tokens: tokens of each row.
        rows: rows of the batch.
        dtype: dtype of the model; None for that of the config.
        choice: keyword arguments of `cache_size`, those for the default are None or missing.
    """
    chosen = any(value is not None for value in choice.values())
    with warnings.catch_warnings():
        if not chosen:  # nobody has asked for the presets whose exact layers are known for other models only
            warnings.simplefilter("ignore")
        found = [(name, cache_size(config, tokens, rows=rows, dtype=dtype, **kept)) for name, kept in _listed(choice)]
    table = Table("cache", "keeps", box=None, padding=(0, 2, 0, 0))
    for name in ("size", "of exact"):
        table.add_column(name, justify="right", no_wrap=True)
    exact = found[0][1].exact_nbytes
    held = dtype or getattr(config.get_text_config(decoder=True), "dtype", None) or torch.bfloat16
    table.add_row("exact", f"all tokens in {str(held).removeprefix('torch.')}", size_of(exact), "100 %")
    for names, size in _merged(found):
        mark = "~" if size.estimated else ""
        table.add_row(names, _kept(size), mark + size_of(size.nbytes), f"{size.share:.1%}".replace("%", " %"))
    console = Console(highlight=False)
    console.print(table)
    many = f" in each of {rows} rows" if rows > 1 else ""
    console.print(
        f"\nComputed from shapes, without reading anything: {tokens:,} tokens{many}, read at once.", soft_wrap=True
    )
    for line in _remarks(config, tokens, [size for _, size in found]):
        console.print(line, style="dim", soft_wrap=True)


def _listed(choice: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name the caches to compute, each with its keyword arguments."""
    always = [(_ALL_TOKENS, {"preset": _ALL_TOKENS}), (DEFAULT_PRESET, {})]
    if any(value is not None for value in choice.values()):
        return [*always, ("yours", choice)]
    others = [name for name in preset_names() if name not in dict(always)]
    return [*always, *((name, {"preset": name}) for name in others)]


def _merged(found: list[tuple[str, CacheSize]]) -> Iterator[tuple[str, CacheSize]]:
    """Give the caches from large to small, those of one kind under all their names."""
    first = {repr(size): place for place, (_, size) in reversed(list(enumerate(found)))}
    ordered = sorted(found, key=lambda pair: (-pair[1].nbytes, first[repr(pair[1])]))
    for _, alike in groupby(ordered, key=lambda pair: repr(pair[1])):
        names, sizes = zip(*alike, strict=True)
        yield ", ".join(names), sizes[0]


def _kept(size: CacheSize) -> str:
    """Say what a cache keeps: its settings and its method."""
    settings = size.settings.model_dump(exclude_defaults=True, exclude_none=True, exclude={"seed"})
    method = [] if size.settings.share == 1 and size.settings.bits else [name_of(size.compressor)]
    return ", ".join([*(f"{name}={value}" for name, value in settings.items()), *method])


def _remarks(config: Any, tokens: int, sizes: list[CacheSize]) -> Iterator[str]:
    """Say what a reader of the figures must know."""
    if any(size.estimated for size in sizes):
        yield "~: the text decides how many slots a head holds; computed with those that are expected."
    if missing := sizes[0].not_counted:
        yield f"Not counted, in any row: the states of {', '.join(missing)}."
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and tokens > positions:
        yield f"The model has {positions:,} positions; it reads longer texts in parts, or degrades."
