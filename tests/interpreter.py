"""Triton's interpreter, which runs kernels on the CPU: `import tests.interpreter` before any kernel is imported.

It is mended where it falls short: scalars with numpy 2.4, bfloat16 in products, rounding to bfloat16. Kernels that call
functions run several times as fast, as these need no preparation of their own.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch, _convert = interpreter._patch_lang_tensor, interpreter._convert_float
_dot, _run = interpreter.InterpreterBuilder.create_dot, interpreter.GridExecutor.__call__


def _patch_tensor(tensor, scope):
    _patch(tensor, scope)
    # Scalars are arrays of one number, which numpy 2.4 and later does not convert by `int`.
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _convert_float(numbers, given, wanted, mode):
    if (given, wanted) == (tl.bfloat16, tl.float32):
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    if (given, wanted) == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(numbers).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)
    return _convert(numbers, given, wanted, mode)


def _create_dot(self, a, b, *others):
    sides = [self.cast_impl(side, tl.float32) if side.dtype == tl.bfloat16 else side for side in (a, b)]
    return _dot(self, *sides, *others)


_prepared: set[str] = set()  # modules whose functions the kernel under way has called


def _launch(self, *args, **kwargs):
    _prepared.clear()
    return _run(self, *args, **kwargs)


def _call(self, *args, **kwargs):
    if self.fn.__module__ not in _prepared:  # once a launch, not at every call
        _prepared.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter._patch_lang_tensor = _patch_tensor
interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpretedFunction.__call__ = _call
interpreter.GridExecutor.__call__ = _launch
