"""Triton kernels for GPUs. Only what launches them imports them: Triton is not installed everywhere.

    decode.py    one query's attention to weighted entries, some of them quantised; launched by `coreset/decoding.py`

Where a kernel does not serve, and on CPUs, plain functions compute the same.
"""
