"""Methods of installed packages, found by their entry points."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

Kind = TypeVar("Kind")


def installed(group: str, ours: Mapping[str, object]) -> dict[str, EntryPoint]:
    """List the entry points of a group by name; one that takes a name of ours is left out."""
    return {point.name: point for point in entry_points(group=group) if point.name not in ours}


def load(point: EntryPoint, base: type[Kind], argument: str) -> type[Kind]:
    """Load the class that an entry point names.

    Args:
        point: entry point of an installed package.
        base: class that it must derive from.
        argument: argument that took the name, for the message.

    Raises:
        ValueError: it cannot be loaded, or is another thing.
    """
    where = f"{argument}={point.name!r}: the entry point {point.value} of an installed package"
    try:
        kind = point.load()
    except Exception as error:  # whatever importing somebody else's package may raise
        raise ValueError(f"{where} cannot be loaded ({type(error).__name__}: {error}); mend or remove it") from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ValueError(f"{where} is no subclass of {_public_name(base)}")
    return kind


def _public_name(base: type) -> str:
    """Name a class as its wing exports it."""
    return f"{'.'.join(base.__module__.split('.')[:2])}.{base.__name__}"
