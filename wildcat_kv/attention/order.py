"""Orders of tokens that put neighbours side by side."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

AUTO: Literal["auto"] = "auto"
Grid = tuple[int, int] | Literal["auto"] | None

# Class tokens and registers that may stand before a grid. From 8 x 8 on, one square and the next are further apart.
_MOST_BEFORE = 8


def tile_order(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Order the cells of a grid along a Z-curve (Morton order).

    Consecutive cells are neighbours, and cuts of the line are close to tiles.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        device: device of the result.

    Returns:
        int64 (height * width,), places in row-major order.

    Example:
        >>> tile_order(2, 4).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    row = torch.arange(height, device=device).unsqueeze(-1)
    column = torch.arange(width, device=device)
    code = torch.zeros(height, width, dtype=torch.int64, device=device)
    for bit in range(max(height, width).bit_length()):
        code |= (column >> bit & 1) << 2 * bit | (row >> bit & 1) << 2 * bit + 1
    return code.flatten().argsort()


def square_grid(n: int) -> tuple[tuple[int, int], int]:
    """Find the largest square grid that n tokens can end with.

    Args:
        n: number of tokens.

    Returns:
        Height and width of the grid, and the number of tokens before it, such as a class token and registers.

    Raises:
        ValueError: more than 8 tokens would stand before the grid, so it is no square.

    Example:
        >>> square_grid(4097), square_grid(261)
        (((64, 64), 1), ((16, 16), 5))
    """
    side = math.isqrt(n)
    before = n - side * side
    if before > _MOST_BEFORE:
        raise ValueError(
            f"grid='auto' finds no square grid in {n} keys with at most {_MOST_BEFORE} before it; give grid=(height, "
            "width) and prefix, or None for keys in a line"
        )
    return (side, side), before


Gridded = TypeVar("Gridded", bound=Any)


def settled(method: Gridded, n: int) -> Gridded:
    """Give a method whose `grid` is "auto" the grid and the prefix of n tokens; others as they are.

    Raises:
        ValueError: there is no such grid, see `square_grid`.
    """
    if method.grid != AUTO:
        return method
    grid, prefix = square_grid(n)
    replaced: Gridded = dataclasses.replace(method, grid=grid, prefix=prefix)
    return replaced


def check_grid(grid: Grid, prefix: int, n: int | None = None) -> None:
    """Refuse a grid without cells, and one that does not hold the n tokens after the prefix.

    Raises:
        ValueError: names the grid and the number of tokens.
    """
    if prefix < 0:
        raise ValueError(f"prefix={prefix} must be at least 0, the number of tokens before the grid")
    if grid == AUTO:
        if prefix:
            raise ValueError(f"prefix={prefix} with grid='auto', which finds the prefix itself; leave it out")
        return
    if grid is not None and (isinstance(grid, str) or len(grid) != 2 or min(grid) < 1):
        raise ValueError(f"grid={grid!r} must be a height and a width, each at least 1, or 'auto' for a square")
    if n is not None and grid is not None and grid[0] * grid[1] + prefix != n:
        raise ValueError(
            f"grid={grid} with prefix={prefix} holds {grid[0] * grid[1] + prefix} keys, and there are {n} without "
            "padding; give the grid of the tokens, or None for keys in a line"
        )


def cells(total: int, parts: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Cut a line into consecutive cells, as equal as can be, the larger first.

    Args:
        total: number of places, at least 1.
        parts: number of cells.
        device: device of the results.

    Returns:
        Places int64 (parts, longest), the last one again where unused; used bool (parts, longest); and for each place
        of the line its own among all places of the cells, int64 (total,).

    Example:
        >>> places, used, line = cells(5, 2)
        >>> places.tolist(), used.tolist(), line.tolist()
        ([[0, 1, 2], [3, 4, 4]], [[True, True, True], [True, True, False]], [0, 1, 2, 3, 4])
    """
    size, longer = divmod(total, parts)
    bounds = torch.arange(parts + 1, device=device)
    bounds = bounds * size + bounds.clamp_max(longer)
    places = bounds[:-1].unsqueeze(-1) + torch.arange(-(-total // parts), device=device)
    used = places < bounds[1:].unsqueeze(-1)
    return places.clamp_max(total - 1), used, used.flatten().nonzero().squeeze(-1)
