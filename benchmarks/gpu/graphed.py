"""A backend of torch.compile that records the traced step as one CUDA graph, as it is.

torch's own backend "cudagraphs" refuses steps that write to their inputs, as every cache of fixed shapes does; inductor
takes them, and generates kernels first, which takes half a minute or more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def graphed(module: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    """Run the first call as it is, record the second, and replay from then on."""
    held: list[Any] = []  # inputs of the recorded call
    kept: dict[str, Any] = {}
    calls = 0

    def run(*inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            return module(*inputs)
        if not held:
            held.extend(inputs)
            torch.cuda.synchronize()
            kept["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(kept["graph"]):  # records, and computes nothing
                kept["output"] = module(*inputs)
        for mine, given in zip(held, inputs, strict=True):
            # Weights and caches stay where they are; token ids and positions do not.
            if isinstance(mine, Tensor) and mine.data_ptr() != given.data_ptr():
                mine.copy_(given)
        kept["graph"].replay()
        return kept["output"]

    return run
