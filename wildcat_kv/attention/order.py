"""Orders of tokens that put neighbours side by side."""

from __future__ import annotations

import torch
from torch import Tensor


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


def check_grid(grid: tuple[int, int] | None, prefix: int, n: int | None = None) -> None:
    """Refuse a grid without cells, and one that does not hold the n tokens after the prefix.

    Raises:
        ValueError: names the grid and the number of tokens.
    """
    if prefix < 0:
        raise ValueError(f"prefix={prefix} must be at least 0, the number of tokens before the grid")
    if grid is not None and (len(grid) != 2 or min(grid) < 1):
        raise ValueError(f"grid={grid} must be a height and a width, each at least 1")
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
