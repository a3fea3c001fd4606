"""Costs of time by place of the tensors: arithmetic on a host, launches on a device.

A processor wants few numbers, in whole runs of memory. A device has a host that launches each operation, which takes
longer than most of them run: it wants few operations.
"""

from __future__ import annotations

import torch

# Types of the devices that are hosts; tests and `benchmarks/launches.py` take the CPU out to see the other way there.
HOSTS = {"cpu"}


def is_launched(device: torch.device | str) -> bool:
    """Tell if a host launches the operations on `device`: then few of them are fastest."""
    return torch.device(device).type not in HOSTS
