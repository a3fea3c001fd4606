"""The switch for what has not run on a GPU yet: the Triton kernels, and FlashAttention with weights in channels.

They pass their tests under Triton's interpreter and compile for GPUs, which is no proof. WILDCAT_KV_KERNELS=1 switches
them on, before the package is imported; `python -m benchmarks gpu` then says if they are right, and how fast.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

VARIABLE = "WILDCAT_KV_KERNELS"

# Types of the devices that they run on.
DEVICES: tuple[str, ...] = (
    ("cuda",)
    if os.environ.get(VARIABLE) == "1" and torch.version.cuda is not None and find_spec("triton") is not None
    else ()
)
