"""A method of its own for every key head of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from wildcat_kv.attention.base import Attention


@dataclass(frozen=True, eq=False)
class PerHead(Attention):
    """Attend in some key heads by one method, and in others by another.

    Heads of one method are attended to together.

    Attributes:
        methods: the methods, each once.
        heads: for every key head, the place of its method in `methods`.

    Example:
        >>> from wildcat_kv.attention import Exact, Uniform
        >>> layer = PerHead((Exact(), Uniform(rank=2)), heads=(0, 1, 1, 1))
        >>> layer(torch.ones(1, 4, 9, 8), torch.ones(1, 4, 9, 8), torch.ones(1, 4, 9, 8)).shape
        torch.Size([1, 4, 9, 8])
    """

    name: ClassVar[str] = "per_head"
    complexity: ClassVar[str] = "the sum of its methods'"

    methods: tuple[Attention, ...]
    heads: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in self.methods:
            if not isinstance(method, Attention) or isinstance(method, PerHead):
                raise TypeError(f"methods: {method!r} is no Attention of whole layers; give one, such as Exact()")
        if not self.heads or set(self.heads) != set(range(len(self.methods))):
            raise ValueError(
                f"heads={self.heads} must name each of the {len(self.methods)} methods by its place, counted from 0"
            )

    @override
    def for_layer(self, layer: int) -> Self:
        return type(self)(tuple(method.for_layer(layer) for method in self.methods), self.heads)

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if key.shape[1] != len(self.heads):
            raise ValueError(f"heads names methods for {len(self.heads)} key heads, and there are {key.shape[1]}")
        of = torch.tensor(self.heads, device=key.device)
        order, parts = of.argsort(stable=True), []
        for number, method in enumerate(self.methods):
            own = (of == number).nonzero().squeeze(-1)
            part = method.attend(query[:, own], key[:, own], value[:, own], scale)
            parts.append(part.reshape(len(query), len(own), *query.shape[2:4], value.shape[-1]))
        return torch.cat(parts, dim=1)[:, order.argsort()]

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        """Count the operations of a head, the mean over heads."""
        each = [method.operations(q, n, d, d_v) for method in self.methods]
        return sum(each[number] for number in self.heads) // len(self.heads)
