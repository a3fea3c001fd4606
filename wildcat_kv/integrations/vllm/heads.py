"""Key heads of one process, where several share a layer's heads (tensor parallelism)."""

from __future__ import annotations


def heads_of_rank(heads: int, rank: int, ranks: int) -> slice:
    """Choose the key heads of a rank, as vLLM splits them.

    With more ranks than heads, neighbouring ranks hold copies of one head.

    Args:
        heads: key heads of the model's layer.
        rank: number of the process.
        ranks: number of processes.

    Raises:
        ValueError: the numbers do not divide, or there is no such rank.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank={rank} must be one of {ranks}, from 0 on")
    if ranks <= heads:
        if heads % ranks:
            raise ValueError(f"ranks={ranks} do not divide {heads} key heads; take a divisor")
        own = heads // ranks
        return slice(rank * own, (rank + 1) * own)
    if ranks % heads:
        raise ValueError(f"ranks={ranks} are no multiple of {heads} key heads; take one")
    own = rank // (ranks // heads)
    return slice(own, own + 1)
