"""Marks on tensors and lengths, which lead to their cache layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, unquote

import torch
from torch import Tensor, nn

NAME = "wildcat"


@dataclass
class Forward:
    """One forward pass of the model, announced to the cache by its mask call.

    Attributes:
        seen: tokens of earlier passes.
        queries: new tokens.
        mask: bool (rows, seen + queries), False for padding tokens; None if none was passed.
        uses_fallback: True if the layers attend exactly, through the implementation that the config had before.
        relabelled: True if the mask changes which tokens since the last fold are padding.
    """

    seen: int
    queries: int
    mask: Tensor | None
    uses_fallback: bool
    relabelled: bool = False
    _new: Tensor | None = None

    def new_valid(self, device: torch.device) -> Tensor | None:
        """Return the mask of the new tokens.

        Returns:
            bool (rows, queries) on `device`, False for padding; None if no mask was passed.
        """
        if self.mask is None:
            return None
        if self._new is None or self._new.device != device:  # kept: every layer asks for it
            self._new = self.mask[:, -self.queries :].to(device)
        return self._new


class CompressedLayer(Protocol):
    """Part of a cache layer that the attention and mask functions call."""

    is_compileable: bool
    needs_module: bool  # until it has met the attention module

    def meet(self, module: nn.Module, heads: int, channels: int) -> None:
        """Take what the method needs of an attention module."""
        ...

    @property
    def uses_fallback(self) -> bool:
        """True if this forward pass attends exactly, through the fallback."""
        ...

    def get_seq_length(self) -> int:
        """Count the tokens seen, the newest included."""
        ...

    def announce(self, rows: int, queries: int, mask: Tensor | None, *, causal: bool = True) -> Forward:
        """Begin a forward pass over `queries` new tokens, for all layers of the cache."""
        ...

    def check_reading(self, query: Tensor, config: Any, options: dict[str, Any]) -> None:
        """Refuse new tokens that the cache has read before."""
        ...

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
        """Attend to the keys and values that `update` returned; gives (rows, heads, q, d_v)."""
        ...

    def after_attention(self, query: Tensor, scale: float) -> None:
        """Fold the tokens beyond the budget, once the newest have attended."""
        ...


class MarkedLength(int):
    """Key length that leads to the layer it came from.

    The mask function gets no cache, but it gets this length.
    """

    layer: CompressedLayer

    def __new__(cls, length: int, layer: CompressedLayer) -> MarkedLength:
        """Make an int of value `length`."""
        marked = super().__new__(cls, length)
        marked.layer = layer
        return marked


def switched_name(fallback: str) -> str:
    """Name the "wildcat" attention that goes back to `fallback`.

    It is `NAME` for "eager", and holds the fallback otherwise: copies of a config carry it, files do not. It is a plain
    str, because torch.compile before 2.13 takes no subclass for a constant. Transformers looks for "flash" and for "/"
    in names: neither is in this one.
    """
    return NAME if fallback == "eager" else f"{NAME}+{quote(fallback, safe='').replace('flash', 'fl%61sh')}"


def fallback_of(name: str | None) -> str | None:
    """Read the fallback in a name of `switched_name`; None for other names."""
    if name == NAME:
        return "eager"
    return unquote(name.removeprefix(f"{NAME}+")) if name is not None and name.startswith(f"{NAME}+") else None


def mark(keys: Tensor, values: Tensor, layer: CompressedLayer) -> tuple[Tensor, Tensor]:
    """Mark keys and values, so that the attention function finds `layer`.

    The same tensors reach the attention function: a copy would lose the mark.
    """
    keys._wildcat_layer = values._wildcat_layer = layer  # type: ignore[attr-defined]
    return keys, values
