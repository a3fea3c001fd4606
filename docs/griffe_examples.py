"""For mkdocstrings: an "Example:" of a docstring is code, and is shown as code. Used by mkdocs.yml."""

from __future__ import annotations

import textwrap
from typing import Any

from griffe import Extension

_TITLE = "Example:"


class Examples(Extension):
    """Puts a fence around the example of every docstring."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for every object that was read."""
        if obj.is_alias or obj.docstring is None:
            return
        obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    r"""A docstring with its example as a fenced block.

    Example:
        >>> print(fenced("Add.\n\nExample:\n    1 + 1"))
        Add.
        <BLANKLINE>
        Example:
            ```python
            1 + 1
            ```
    """
    lines = text.splitlines()
    if _TITLE not in lines:
        return text
    start = lines.index(_TITLE) + 1
    stop = next((i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
    code = textwrap.dedent("\n".join(lines[start:stop])).strip("\n").splitlines()
    block = textwrap.indent("\n".join(["```python", *code, "```"]), "    ").splitlines()
    return "\n".join([*lines[:start], *block, "", *lines[stop:]]).rstrip("\n")
