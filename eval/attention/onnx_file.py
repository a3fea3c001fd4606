"""Weights out of an ONNX file, without the ONNX library.

Only what is needed is read of the protocol-buffers format: the initial tensors of a graph, and which node reads them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Field numbers of onnx.proto.
_GRAPH = 7
_NODE, _INITIALIZER = 1, 5
_NODE_INPUT, _NODE_NAME = 1, 3
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT32 = 1


def read_onnx(content: bytes) -> dict[str, Tensor]:
    """Read the float32 tensors of an ONNX model by name.

    A tensor whose own name says nothing, as exporters give to the matrices of linear layers, has the name of the node
    that reads it: "/encoder/fc1/MatMul".

    Args:
        content: bytes of the file.

    Raises:
        ValueError: the bytes are no such file.
    """
    try:
        graph = next(value for field, value in _fields(memoryview(content)) if field == _GRAPH)
        parts = list(_fields(graph))
        tensors = dict(_tensor(value) for field, value in parts if field == _INITIALIZER)
        readers = [_node(value) for field, value in parts if field == _NODE]
    except (StopIteration, IndexError, KeyError, struct.error) as error:
        raise ValueError(f"this is no ONNX file that can be read: {error!r}") from None
    for name, inputs in readers:
        for given in inputs:
            if given.startswith("onnx::") and given in tensors:
                tensors[name] = tensors.pop(given)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """List a message's field numbers and contents: numbers, or bytes of strings and of inner messages."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        if at + size > len(message):
            raise IndexError("it ends too early")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Read a number of seven bits a byte; gives it and the place behind it."""
    number = shift = 0
    while True:
        byte = message[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7


def _tensor(message: memoryview) -> tuple[str, Tensor | None]:
    """Read a tensor and its name; None for other dtypes than float32."""
    found = list(_fields(message))
    name = next(bytes(value).decode() for field, value in found if field == _TENSOR_NAME)
    if next(value for field, value in found if field == _TENSOR_TYPE) != _FLOAT32:
        return name, None
    dims = [value for field, value in found if field == _TENSOR_DIMS]
    raw = next(value for field, value in found if field == _TENSOR_RAW)
    return name, torch.frombuffer(bytearray(raw), dtype=torch.float32).view(dims)


def _node(message: memoryview) -> tuple[str, list[str]]:
    """Read a node's name and the names of its inputs."""
    found = list(_fields(message))
    name = next((bytes(value).decode() for field, value in found if field == _NODE_NAME), "")
    return name, [bytes(value).decode() for field, value in found if field == _NODE_INPUT]
