"""The switch for what has not run on a GPU yet: the Triton kernels, and FlashAttention with weights in channels.

They pass their tests under Triton's interpreter and compile for GPUs, which is no proof. WILDCAT_KV_KERNELS=1 switches
them on, before the package is imported; `python -m benchmarks gpu` then says if they are right, and how fast.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import torch

VARIABLE = "WILDCAT_KV_KERNELS"


def kernel_devices(value: str, cuda: str | None, triton: bool) -> tuple[str, ...]:
    """Choose the types of devices that the kernels run on.

    Args:
        value: value of the variable; "" if it is not set.
        cuda: version of CUDA that torch was built for; None for none.
        triton: True if Triton can be imported.

    Returns:
        ("cuda",), or () with a warning where that is not what `value` asks for.
    """
    if value in ("", "0"):
        return ()
    if value != "1":
        reason = "it must be 1 or 0"
    elif cuda is None:
        reason = "this build of torch has no CUDA"
    elif not triton:
        reason = "Triton is not installed"
    else:
        return ("cuda",)
    warnings.warn(f"{VARIABLE}={value!r} switches nothing on: {reason}", stacklevel=2)
    return ()


# Types of the devices that they run on.
DEVICES = kernel_devices(os.environ.get(VARIABLE, ""), torch.version.cuda, find_spec("triton") is not None)
