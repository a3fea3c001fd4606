"""What pydantic found wrong, as one line that names the field, its value and what it takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, JsonValue, ValidationError

_BRANCHES = ("constrained-", "literal[")


def one_line(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """The first finding of a validation, as: path.to.field=value: what is wrong; what it takes.

    Args:
        error: of the validation.
        model: whose fields' descriptions tell what they take, and whose names are known.
    """
    finding = error.errors(include_url=False)[0]
    kind, message = finding["type"], finding["msg"].removeprefix("Value error, ")
    # Which branch of a union was tried is no name of the user's.
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
        hint = did_you_mean(str(finding["loc"][-1]), known)
        return f"{given}: no such setting" + (f"; {hint}known ones are {', '.join(known)}" if known else "")
    field = model.model_fields.get(str(finding["loc"][0])) if model is not None else None
    takes = f"; {field.description}" if field is not None and field.description else ""
    return f"{given}: {message[0].lower()}{message[1:]}{takes}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask whether the known name nearest to `name` was meant: "did you mean 'x'? ", or "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def plain(value: Any) -> JsonValue:
    """As JSON would give it back: mappings with string keys, lists, numbers."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
