"""What a prefill makes a device do: operations that launch a kernel, and reads that the host waits for.

Counted at torch's dispatcher, on any device alike. Views, allocations and other work of the host alone do not count; an
operation counts once, whatever number of kernels it takes on a device. What the host does in tensors of its own, like
the lengths of bins, counts too: the numbers are upper bounds. Models of two depths tell apart what every layer takes
and what a pass takes once; what the exact cache takes is subtracted.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import wildcat_kv

TOKENS = (4096,)
DEPTHS = (2, 4)
METHODS = ("wildcat", "query_wildcat")
_SOURCE = str(Path(wildcat_kv.__file__).parent)
# No kernel, though the schema says neither view nor allocation.
_FREE = {"_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "resize_", "detach_"}
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


class Launches(TorchDispatchMode):
    """Counts operations while it is entered.

    Attributes:
        operations: operations by name.
        reads: places in the package that made the host wait, "file:line".
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, and run it."""
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITING or (name.startswith(("index", "_index")) and _by_mask(args)):
            self.reads[_place()] += 1
        if not _is_free(func, name):
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(args: Any) -> bool:
    """Tell if a mask indexes, whose True places the host must count."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _is_free(func: Any, name: str) -> bool:
    if name in _FREE or name in _WAITING or "empty" in name:
        return True
    aliases = [one.alias_info for one in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _place() -> str:
    """Name the line of the package that is running."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(_SOURCE):
            return f"{Path(frame.filename).relative_to(_SOURCE)}:{frame.lineno}"
    return "elsewhere"
