"""COMPRESSKV on a GPU: one Triton program compresses one bin.

`binned.py` says what is computed; it computes everything that the kernel does not claim, and all on the CPU.

    device.py    what the kernel claims, and its launch
    slots.py     the kernel: the slots of a bin
    steps.py     its steps: Gram matrix, pivots, weights, order
    noise.py     the noise of `coreset/noise.py`, bit for bit
"""
