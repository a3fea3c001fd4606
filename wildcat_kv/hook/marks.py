"""Marks that lead from the tensors and numbers of a forward pass to the cache layer that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

NAME = "wildcat"


@dataclass
class Forward:
    """One forward pass of the model, announced to the cache by its mask call.

    Attributes:
        seen: tokens of earlier passes.
        queries: new tokens.
        mask: bool (rows, seen + queries), False for padding tokens; None if none was passed.
        uses_fallback: True if the layers attend exactly, through the implementation that the config had before.
        relabelled: True if the mask says something new of tokens since the last fold.
    """

    seen: int
    queries: int
    mask: Tensor | None
    uses_fallback: bool
    relabelled: bool = False
    _new: Tensor | None = None

    def new_valid(self, device: torch.device) -> Tensor | None:
        """Return bool (rows, queries), False for new tokens that are padding; None if no mask was passed."""
        if self.mask is None:
            return None
        if self._new is None or self._new.device != device:  # asked for by every layer
            self._new = self.mask[:, -self.queries :].to(device)
        return self._new


class CompressedLayer(Protocol):
    """The part of a cache layer that the mask and the attention function call."""

    is_compileable: bool

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
        """Attend by the newest tokens' queries to what `update` returned: (rows, heads, q, d_v)."""
        ...

    def after_attention(self, query: Tensor, scale: float) -> None:
        """Fold what no longer fits, after the newest tokens have been attended to."""
        ...


class MarkedLength(int):
    """A key length that leads the mask function, which is never given the cache, to the layer it came from."""

    layer: CompressedLayer

    def __new__(cls, length: int, layer: CompressedLayer) -> MarkedLength:
        """An int of value `length`."""
        marked = super().__new__(cls, length)
        marked.layer = layer
        return marked


class AttentionName(str):
    """The name "wildcat", carrying the implementation to use wherever nothing is compressed.

    It travels with `config._attn_implementation`, into copies of the config but not to disk.
    """

    fallback: str

    def __new__(cls, fallback: str) -> AttentionName:
        """A str equal to `NAME`."""
        name = super().__new__(cls, NAME)
        name.fallback = fallback
        return name

    def __getnewargs__(self) -> tuple[str]:
        """For copy and pickle."""
        return (self.fallback,)


def mark(keys: Tensor, values: Tensor, layer: CompressedLayer) -> tuple[Tensor, Tensor]:
    """Let keys and values lead the attention function to `layer`; they arrive there as they are."""
    keys._wildcat_layer = values._wildcat_layer = layer  # type: ignore[attr-defined]
    return keys, values
