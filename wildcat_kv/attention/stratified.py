"""Stratified sampling: plain attention to one random key of each cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.attention.base import Attention, at_least, function_form, wide
from wildcat_kv.attention.kernels import softmax_attention, take
from wildcat_kv.attention.order import Grid, cells, check_grid, settled, tile_order
from wildcat_kv.coreset.noise import uniform_rows


@dataclass(frozen=True, eq=False)
class Stratified(Attention):
    """Attend to one random key of each cell, which weighs as much as the cell has keys.

    Cells are consecutive keys, or tiles of a grid: what is sampled covers all of an image.

    Attributes:
        rank: r, the number of cells; all keys where there are no more.
        grid: height and width of the patches of an image, to cut into tiles; "auto" for the largest square that the
            keys can end with, those before it being the prefix; None for keys in a line.
        prefix: tokens before the grid, such as a class token, which are kept besides.
        seed: seed of the draw.
    """

    name: ClassVar[str] = "stratified"
    complexity: ClassVar[str] = "O(n r d)"

    rank: int = 512
    grid: Grid = None
    prefix: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, rank=self.rank)
        check_grid(self.grid, self.prefix)

    @override
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        heads, n = key.shape[1:3]
        own = settled(self, n)
        check_grid(own.grid, own.prefix, n)
        if own.rank + own.prefix >= n:
            return softmax_attention(query, key, value, scale)
        chosen, sizes = self.draw(heads, n, key.device)
        query, keys, values = wide(query), wide(take(key, chosen)), wide(take(value, chosen))
        return softmax_attention(query, keys, values, scale, sizes.to(query.dtype).log())

    def draw(self, heads: int, n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Draw the keys of every head, int64 (1, heads, prefix + r), and what they weigh, (prefix + r,)."""
        own = settled(self, n)
        places, used, _ = cells(n - own.prefix, self.rank, device)
        sizes = used.sum(-1)
        noise = uniform_rows(self.seed, torch.arange(heads, device=device).view(1, -1), columns=self.rank)
        # Rounding may reach the size itself, and no more.
        chosen = places[:, 0] + torch.minimum((noise * sizes).long(), sizes - 1)
        if own.grid is not None:
            assert not isinstance(own.grid, str)
            chosen = tile_order(*own.grid, device)[chosen]
        first = torch.arange(own.prefix, device=device)
        chosen = torch.cat((first.expand(1, heads, -1), chosen + own.prefix), dim=-1)
        return chosen, torch.cat((torch.ones_like(first), sizes))

    @override
    def operations(self, q: int, n: int, d: int, d_v: int) -> int:
        kept = self.rank + settled(self, n).prefix
        return q * n * (d + d_v + 1) if kept >= n else q * kept * (d + d_v + 1)


stratified_attention = function_form(Stratified, "stratified_attention")
