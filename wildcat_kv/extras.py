"""Libraries that only some uses of the package need: the extras of pyproject.toml."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class MissingExtraError(ImportError):
    """A library of an extra is not installed; the message is one line with the command that installs it."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module that an extra of the package brings.

    Args:
        module: dotted name.
        extra: name of the extra, such as "demo".

    Raises:
        MissingExtraError: it cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        # pip keeps the package that is installed, from wherever it came, and adds the extra's libraries.
        raise MissingExtraError(f"{error}; pip install 'wildcat-kv[{extra}]'") from error
