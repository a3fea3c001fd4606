"""A method as plain data, to be written beside what it compressed, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import BaseModel, JsonValue

from wildcat_kv.compressors.base import Compressor
from wildcat_kv.compressors.registry import OURS
from wildcat_kv.validation import plain


def describe(compressor: Compressor) -> JsonValue:
    """Describe a method by its class name and its parameters.

    Methods among its parameters are described too.

    Raises:
        ValueError: it has parameters that cannot be told apart when they are read again.
    """
    if dataclasses.is_dataclass(compressor):
        found = {
            field.name: getattr(compressor, field.name) for field in dataclasses.fields(compressor) if field.compare
        }
    else:
        found = vars(compressor)
    parameters = {name: _parameter(compressor, name, value) for name, value in found.items()}
    return {"name": type(compressor).__name__, "parameters": parameters}


def rebuild(description: JsonValue) -> Compressor:
    """Build the method that was described, if it is one of ours.

    Raises:
        ValueError: it is none of ours, or has other parameters.
    """
    kinds = {kind.__name__: kind for kind in OURS.values()}
    if not isinstance(description, dict) or description.get("name") not in kinds:
        raise ValueError(f"{description} is no method of this library; pass it as compressor")
    parameters = description.get("parameters")
    if not isinstance(parameters, dict):
        raise ValueError(f"{description} has no parameters")
    try:
        given = {
            name: rebuild(value) if isinstance(value, dict) and "name" in value else value
            for name, value in parameters.items()
        }
        return kinds[str(description["name"])](**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{description} does not fit this version: {error}") from None


def _parameter(compressor: Compressor, name: str, value: Any) -> JsonValue:
    if isinstance(value, Compressor):
        return describe(value)
    if value is None or isinstance(value, (bool, int, float, str, list, tuple, dict)):
        return plain(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise ValueError(
        f"compressor={type(compressor).__name__}: its parameter {name} is a {type(value).__name__}, which cannot be "
        "saved; make it a number, a text, or a field that does not compare"
    )
