"""Transformers' own layers in a file: attributes as JSON, tensors by name."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from wildcat_kv.cache.disk.format import DamageError
from wildcat_kv.cache.disk.saved import ForeignLayer

# Attributes that a layer learns with its first tokens; all others are as in a new layer.
_LEARNT = ("cumulative_length", "conv_kernel_size")
# Attributes that a new layer may not have yet.
_LATE = {"dtype", "device"}


def encode(attributes: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, JsonValue]:
    """Turn a layer's attributes into JSON.

    Args:
        attributes: attributes by name.
        prefix: beginning of the names of the layer's tensors.
        tensors: tensors of the file by name; those of the layer are added.

    Raises:
        ValueError: an attribute that cannot be saved.
    """
    return {name: _encode(value, name, prefix, tensors) for name, value in attributes.items()}


def _encode(value: Any, name: str, prefix: str, tensors: dict[str, Tensor]) -> JsonValue:
    """Turn one attribute into JSON; a tensor becomes its name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[prefix + name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}  # the reader chooses it
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        return {"by_number": {str(key): _encode(item, f"{name}.{key}", prefix, tensors) for key, item in value.items()}}
    raise ValueError(f"{prefix}{name} is a {type(value).__name__}, which cannot be saved; this layer is not supported")


def foreign_layer(
    encoded: dict[str, JsonValue], new: Any, own: dict[str, Tensor], seen: int, rows: int, device: torch.device
) -> ForeignLayer:
    """Decode one layer and compare it with a new one.

    Args:
        encoded: attributes as `encode` gave them.
        new: an empty layer of the same kind.
        own: tensors of the layer by name.
        seen: number of tokens read.
        rows: rows of the batch.
        device: device of the tensors.

    Raises:
        DamageError: an attribute that such a layer cannot have.
    """
    expected = vars(new)
    if not expected.keys() <= encoded.keys() <= expected.keys() | _LATE:
        raise DamageError("its attributes are not those of this version of Transformers")
    attributes = {name: _decode(value, own, device) for name, value in encoded.items()}
    for name, value in attributes.items():
        _check_attribute(name, value, expected.get(name), seen)
    tensors = [tensor for tensor in own.values() if tensor.dim()]
    if any(tensor.shape[0] != rows or not tensor.is_floating_point() for tensor in tensors):
        raise DamageError("its tensors do not fit the other layers'")
    window = getattr(new, "sliding_window", None)
    if window is not None:
        _check_window(attributes.get("keys"), attributes.get("values"), window, seen)
    return ForeignLayer(type(new).__name__, attributes)


def _check_window(keys: Any, values: Any, window: int, seen: int) -> None:
    """Refuse keys and values that are no window of `seen` tokens."""
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.dim() != 4:
        raise DamageError("its window is missing")
    if keys.shape[:3] != values.shape[:3] or not min(seen, window - 1) <= keys.shape[2] <= seen:
        raise DamageError("its window does not fit the tokens read")


def _check_attribute(name: str, value: Any, expected: Any, seen: int) -> None:
    """Refuse a value that `expected` of a new layer cannot become."""
    if isinstance(value, dict):
        if not isinstance(expected, dict) or value.keys() != expected.keys():
            raise DamageError(f"{name} does not fit")
        for key, item in value.items():
            _check_attribute(name, item, expected[key], seen)
    elif isinstance(value, Tensor) and isinstance(expected, Tensor):
        if not torch.equal(value.cpu(), expected.cpu()):
            raise DamageError(f"{name} is another than the model's")
    elif name == "cumulative_length" and value != seen:
        raise DamageError(f"{name} is {value}, and the other layers have read {seen} tokens")
    elif name not in _LEARNT and not isinstance(value, (bool, Tensor, torch.dtype, torch.device)) and value != expected:
        raise DamageError(f"{name} is {value!r}, and the model has {expected!r}")
    elif isinstance(value, bool) != isinstance(expected, bool) and expected is not None:
        raise DamageError(f"{name} does not fit")


def _decode(value: JsonValue, own: dict[str, Tensor], device: torch.device) -> Any:
    """Undo `_encode`; `own` has the layer's tensors by name."""
    if not isinstance(value, dict):
        return value
    kind, item = next(iter(value.items()), ("nothing", None))
    if kind == "tensor" and item in own:
        return own[str(item)]
    if kind == "dtype" and isinstance(dtype := getattr(torch, str(item), None), torch.dtype):
        return dtype
    if kind == "device":
        return device
    if kind == "by_number" and isinstance(item, dict) and all(key.isdecimal() for key in item):
        return {int(key): _decode(part, own, device) for key, part in item.items()}
    raise DamageError(f"{kind} {item!r} cannot be read")
