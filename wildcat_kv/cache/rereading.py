"""Notice a forward pass that reads the same tokens again.

Plain caches take them for new text, and say nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def rereading_fault(
    options: dict[str, Any], config: Any, queries: int, before: list[int], valid: Tensor | None
) -> str | None:
    """Say why a forward pass does not continue the text of a cache.

    Args:
        options: keyword arguments of the attention call. Most families pass on `position_ids`, int64 (rows or 1, q),
            and `use_cache`.
        config: config of the decoder.
        queries: number of new tokens, q.
        before: tokens that each row has read before this pass, without padding.
        valid: bool (rows, q), False for new tokens that are padding; None if no mask was passed.

    Returns:
        The text of the error, or None if the pass continues the text.
    """
    seen, positions = max(before), options.get("position_ids")
    if not seen:
        return None
    start = None
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == queries:
        grids = "mrope_section" in (getattr(config, "rope_parameters", None) or {})
        start = _find_restart(positions, before, valid, least=1 if grids else None)
    elif options.get("use_cache") is False and queries == seen + 1:  # as `generate()` reads without a cache
        start = 0
    if start is None:
        return None
    if options.get("use_cache") is False:
        return (
            f"use_cache=False, so the model reads all tokens again in each step, and the cache has read {seen}; call "
            "cache.reset() and set use_cache=True in the call or in model.generation_config, or leave the cache out"
        )
    return (
        f"the new tokens have positions from {start} on, and the cache has read {seen} tokens: they would be read "
        "twice. Pass generate() the whole text with at least one token more than was read, without prompt lookup or an "
        "assistant, which read all of it again; or pass position_ids that go on from there; or call cache.reset() to "
        "read a text anew"
    )


def _find_restart(positions: Tensor, before: list[int], valid: Tensor | None, least: int | None) -> int | None:
    """Find a row that starts again at a position that it has read.

    Args:
        positions: int64 (rows or 1, q).
        before: tokens that each row has read.
        valid: bool (rows, q), False for padding.
        least: position that a row must start from; by default the number of its tokens. Images count positions in a
            grid, so these fall behind the number of tokens.

    Returns:
        The position, or None if all rows go on.
    """
    positions = positions.expand(len(before), -1)
    starts = positions[:, :1]
    if valid is not None:
        starts = positions.gather(1, valid.to(positions.device).int().argmax(-1, keepdim=True))
    for start, read in zip(starts[:, 0].tolist(), before, strict=True):
        if start < (read if least is None else min(least, read)):
            return int(start)
    return None
