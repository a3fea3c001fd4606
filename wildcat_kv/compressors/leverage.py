"""Leverage: the keys that the others cannot stand in for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.fitting import solve_ridge
from wildcat_kv.compressors.scorer import Scorer
from wildcat_kv.coreset.noise import uniform_noise

# Added to the squared singular values of the keys; 0.01 as in the reference library.
_RIDGE = 1e-2


@dataclass(frozen=True)
class Leverage(Scorer):
    """Keep the keys that no mixture of others replaces.

    By their leverage scores, those of the centred key matrix before positions rotate it. A random projection to
    fewer channels comes first. Compactor adds attention to it.

    Needs keys, their positions and the model's rotary positions. The position of each token is its carried state.
    Costs O(n sketch^2).

    Attributes:
        sketch: channels of the projection; 48 as in the reference library. Keys with no more stay as they are.
        sink: first tokens, which are kept and left out; 8 as in the reference library.
        seed: of the projection.

    Source: Chari and Van Durme, arXiv 2507.08143.
    """

    paper: ClassVar[str] = "arXiv 2507.08143"
    needs_rotation: ClassVar[bool] = True
    state_size: ClassVar[int] = 1  # position

    sketch: int = 48
    sink: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sketch < 1:
            raise ValueError(f"sketch={self.sketch} must be at least 1, the channels of the projection")
        if self.sink < 0:
            raise ValueError(f"sink={self.sink} must be at least 0, the first tokens to keep")

    @override
    def remember(self, block: KVBlock) -> Tensor:
        return positions_of(block).unsqueeze(-1)

    @override
    def score(self, block: KVBlock) -> Tensor:
        return keep_first(self.middle(block), block.valid.shape[-1])

    def middle(self, block: KVBlock) -> Tensor:
        """Compute the leverage of all entries but the sinks, float32 (rows, heads, n - sink)."""
        keys = unrotated_keys(block)[:, :, self.sink :]
        return leverage_scores(keys, block.valid[..., self.sink :], self.sketch, self.seed)


def keep_first(scores: Tensor, n: int) -> Tensor:
    """Put infinite scores before (rows, heads, m), for the first n - m entries."""
    first = scores.new_full((*scores.shape[:2], n - scores.shape[-1]), torch.inf)
    return torch.cat((first, scores), dim=-1)


def positions_of(block: KVBlock) -> Tensor:
    """Give the positions of the entries, float32 (rows, heads, n).

    Exact tokens are counted back from the newest; slots have theirs as the first number of their carried state.
    """
    assert block.carried_state is not None
    behind = block.keys.shape[2] - torch.arange(block.keys.shape[2], device=block.keys.device)
    return torch.where(behind <= block.exact, (block.seen - behind).to(torch.float32), block.carried_state[..., 0])


def unrotated_keys(block: KVBlock) -> Tensor:
    """Undo the rotation of the keys, float32 (rows, heads, n, d); slots of two heads have two positions."""
    assert block.rotation is not None
    keys = block.keys.to(torch.float32).flatten(0, 1).unsqueeze(1)
    positions = positions_of(block).round().to(torch.int64).flatten(0, 1)
    return block.rotation.back(keys, positions).squeeze(1).unflatten(0, block.valid.shape[:2])


def leverage_scores(keys: Tensor, valid: Tensor, sketch: int, seed: int) -> Tensor:
    """Compute the leverage scores of centred, projected keys.

    They are diag(X (X^T X + r I)^-1 X^T), with a ridge r.

    Args:
        keys: float32 (rows, heads, n, d).
        valid: bool (rows, heads, n); others have no part in it.
        sketch: channels to project to.
        seed: of the projection.

    Returns:
        float32 (rows, heads, n), in [0, 1), 0 for padding.
    """
    absent, channels = ~valid.unsqueeze(-1), keys.shape[-1]
    counts = valid.sum(-1).clamp_min(1)[..., None, None]
    centred = keys - keys.masked_fill(absent, 0.0).sum(2, keepdim=True) / counts
    if sketch < channels:
        centred = torch.matmul(centred, projection(channels, sketch, seed, keys.device))
    # The squares of the keys have the square of their condition number: double precision where the device has it.
    precision = torch.float32 if keys.device.type == "mps" else torch.float64
    centred = centred.masked_fill(absent, 0.0).to(precision)
    solved = solve_ridge(centred.mT @ centred, centred.mT, _RIDGE)
    return (centred * solved.mT).sum(-1).to(torch.float32)


def projection(channels: int, sketch: int, seed: int, device: torch.device) -> Tensor:
    """Draw the projection, float32 (channels, sketch); it keeps squared lengths on average."""
    row, column = torch.arange(channels, device=device).unsqueeze(-1), torch.arange(sketch, device=device)
    return torch.special.ndtri(uniform_noise(seed, row, column)) / sketch**0.5
