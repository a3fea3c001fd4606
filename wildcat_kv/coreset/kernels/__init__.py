"""Triton kernels for GPUs, to be switched on by WILDCAT_KV_KERNELS=1, see `switch.py`.

Only what launches them imports them: Triton is not installed everywhere.

COMPRESSKV, a program a bin; `binned.py` says what is computed, and computes all that the kernel does not claim:

    device.py    what the kernel claims, and its launch
    slots.py     the slots of a bin
    steps.py     its steps: kernel matrix, pivots, weights, order
    noise.py     the noise of `coreset/noise.py`, bit for bit

WTDATTN of one query a row; `decoding.py` launches it, and plain functions serve where it does not:

    decode.py    attention to weighted entries, some of them quantised
"""
