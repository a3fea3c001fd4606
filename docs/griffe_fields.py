"""For mkdocstrings: the fields of a pydantic model are shown by their descriptions. Used by mkdocs.yml."""

from __future__ import annotations

import ast
from typing import Any

from griffe import Expr, ExprCall, ExprKeyword, Extension, Function, Parameter, ParameterKind, Parameters

# The section goes in front of the first of these.
_LATER = ("Raises:", "Example:")


class Fields(Extension):
    """Adds fields described by `Field(description=...)` to a class: its "Args:" section, and its signature."""

    def on_class(self, *, cls: Any, **kwargs: Any) -> None:
        """Describe the fields of a class that was read."""
        if cls.docstring is None:
            return
        values = {name: attribute.value for name, attribute in cls.attributes.items() if not attribute.is_alias}
        fields = {name: line for name, value in values.items() if (line := describe(name, value)) is not None}
        if fields:
            cls.docstring.value = with_args(cls.docstring.value, fields)
            cls.set_member("__init__", constructor({name: values[name] for name in fields}))


def constructor(fields: dict[str, Any]) -> Function:
    """Build the constructor that pydantic gives a class: each field a keyword.

    Args:
        fields: call of `Field` by the field's name.
    """
    keywords = [
        Parameter(name, kind=ParameterKind.keyword_only, default=default_of(call)) for name, call in fields.items()
    ]
    own = Parameter("self", kind=ParameterKind.positional_or_keyword)
    return Function("__init__", parameters=Parameters(own, *keywords))


def default_of(call: ExprCall) -> str | None:
    """Find the default in a call of `Field`, its only argument without a keyword; None for a field without one."""
    given = [str(each) for each in call.arguments if isinstance(each, (Expr, str)) and type(each) is not ExprKeyword]
    return given[0] if given else None


def describe(name: str, value: Any) -> str | None:
    """Describe a field in a line, with its default; None for anything that is no described field.

    Args:
        name: name of the field; a description that begins with it is shown without it.
        value: expression on the right side of the field's assignment.
    """
    if not isinstance(value, ExprCall) or str(value.function) != "Field":
        return None
    named = {each.name: each.value for each in value.arguments if isinstance(each, ExprKeyword)}
    if "description" not in named:
        return None
    text = ast.literal_eval(str(named["description"])).removeprefix(f"{name} is ").removeprefix(f"{name} are ")
    default = default_of(value)
    return f"{text}. Default: `{default}`." if default else f"{text}."


def with_args(text: str, fields: dict[str, str]) -> str:
    r"""Insert a section of fields into a docstring.

    Example:
        >>> print(with_args("Settings.\n\nRaises:\n    ValueError: wrong.", {"seed": "an integer."}))
        Settings.
        <BLANKLINE>
        Args:
            seed: an integer.
        <BLANKLINE>
        Raises:
            ValueError: wrong.
    """
    if not fields:
        return text
    lines = text.splitlines()
    at = next((i for i, line in enumerate(lines) if line in _LATER), None)
    section = ["Args:", *(f"    {name}: {line}" for name, line in fields.items())]
    if at is None:
        return "\n".join([*lines, "", *section])
    return "\n".join([*lines[:at], *section, "", *lines[at:]])
