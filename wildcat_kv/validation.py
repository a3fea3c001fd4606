"""Messages for wrong input: pydantic's findings, and names that were meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import to_jsonable_python

_BRANCHES = ("constrained-", "literal[")
# Names that are no settings of a cache, and what takes them.
_ELSEWHERE = {"reads": "compress_context(..., reads=2)", "chunk_tokens": "compress_context(..., chunk_tokens=512)"}


def one_line(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Say the first finding of a validation in one line.

    It reads "path.to.field=value: what is wrong; what it takes".

    Args:
        error: error that pydantic raised.
        model: model that was validated; its fields' descriptions tell what they take.
    """
    finding = error.errors(include_url=False)[0]
    kind, message = finding["type"], finding["msg"].removeprefix("Value error, ")
    # The branches of a union are no names of the user's.
    names = [str(part) for part in finding["loc"] if not str(part).startswith(_BRANCHES)]
    if kind == "value_error":  # by a validator of ours, whose message begins with the field as it knows it
        above = names[:-1] if names and message.startswith(names[-1]) else names
        return ".".join([*above, message])
    path = ".".join(names)
    if kind == "missing":
        return f"{path}: missing"
    given = f"{path}={finding['input']!r}"
    known = list(model.model_fields) if model is not None else []
    if kind == "extra_forbidden":
        name = str(finding["loc"][-1])
        hint = f"{_ELSEWHERE[name]} takes it; " if name in _ELSEWHERE else did_you_mean(name, known)
        return f"{given}: no such setting" + (f"; {hint}known ones are {', '.join(known)}" if known else "")
    field = model.model_fields.get(str(finding["loc"][0])) if model is not None else None
    takes = f"; {field.description}" if field is not None and field.description else ""
    return f"{given}: {message[0].lower()}{message[1:]}{takes}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name the known name that is nearest to a wrong one.

    Args:
        name: name that was given.
        known: names that there are.

    Returns:
        "did you mean 'NAME'? " with the blank behind it, to go on from; empty where none is near.
    """
    names = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f"did you mean {names[near[0]]!r}? " if near else ""


def plain(value: Any) -> JsonValue:
    """Turn a value into JSON's mappings, lists and numbers, else its text."""
    return to_jsonable_python(value, fallback=str)
