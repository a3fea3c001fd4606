"""The methods by name: ours, and those of installed packages.

Packages offer theirs under an entry point.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint

from wildcat_kv import plugins
from wildcat_kv.compressors.base import Compressor
from wildcat_kv.compressors.ours import OURS
from wildcat_kv.config import WildCatConfig
from wildcat_kv.validation import did_you_mean

# An entry point in this group names a subclass of `Compressor`.
GROUP = "wildcat_kv.compressors"
# The name that stands for the best method a model and its settings support; `cache.automatic` chooses it.
AUTO = "auto"


@dataclass(frozen=True)
class Method:
    """Facts about a method, to choose by.

    Attributes:
        name: name that `compressor=` takes.
        paper: source of the method.
        needs_queries: True if it learns from queries, not from keys and values alone.
        decodes: True if it compresses generated tokens, not only the prompt.
        reads_twice: True if the model must read a text a second time, as `wildcat_kv.Context` has it do.
        summary: first line of its documentation.
    """

    name: str
    paper: str
    needs_queries: bool
    decodes: bool
    reads_twice: bool
    summary: str


def available() -> list[Method]:
    """List all methods: ours, then those of installed packages by name.

    A broken one is left out with a warning.

    Example:
        >>> [method.name for method in available()][:3]
        ['wildcat', 'streaming_llm', 'snapkv']
    """
    methods = [_about(name, kind) for name, kind in OURS.items()]
    for name, point in sorted(_theirs().items()):
        try:
            methods.append(_about(name, _load(point)))
        except Exception as error:  # whatever a package of somebody else's may do
            warnings.warn(str(error), stacklevel=2)
    return methods


def resolve(compressor: str | Compressor, settings: WildCatConfig) -> Compressor:
    """Build a method by its name, with its defaults.

    A `Compressor` is returned as it is.

    Args:
        compressor: name or object.
        settings: give WildCat its parameters, and the others their seed.

    Raises:
        ValueError: there is no such method, it reads a text twice, or it is an installed package's that cannot be
            loaded.
        TypeError: neither a name nor a method.
    """
    if isinstance(compressor, Compressor):
        return compressor
    if not isinstance(compressor, str):
        raise TypeError(
            f"compressor={compressor!r} is no method; pass an instance of a subclass of wildcat_kv.compressors."
            "Compressor, or a name such as 'snapkv'"
        )
    if compressor == AUTO:
        raise ValueError(
            f"compressor={AUTO!r} is chosen for a model; build a cache, WildCatCache(model.config, ...), and take its "
            "compressor"
        )
    kind = find(compressor)
    if kind is not None and kind.reads_twice:
        raise ValueError(
            f"compressor={compressor!r} reads the context a second time, which a cache cannot do by itself; call "
            f"wildcat_kv.compress_context(model, tokenizer, text, compressor={compressor!r}, ...)"
        )
    if kind is not None:
        return kind.of(settings)
    names = [*OURS, *sorted(_theirs())]
    hint = did_you_mean(compressor, [AUTO, *names])
    raise ValueError(f"compressor={compressor!r}: no such method; {hint}there are {AUTO}, {', '.join(names)}")


def check_name(compressor: str) -> None:
    """Refuse a name that is neither a method's nor "auto".

    Raises:
        ValueError: as `resolve` does.
    """
    if compressor != AUTO:
        resolve(compressor, WildCatConfig(ratio=1.0))


def find(name: str) -> type[Compressor] | None:
    """Find the class of a method by its name, None for no such method.

    Raises:
        ValueError: it is an installed package's that cannot be loaded.
    """
    if name in OURS:
        return OURS[name]
    point = _theirs().get(name)
    return None if point is None else _load(point)


def reads_twice(compressor: str | Compressor) -> Compressor | None:
    """Build the method, if it reads a text twice; None otherwise.

    Raises:
        ValueError: it is an installed package's that cannot be loaded.
    """
    if isinstance(compressor, str):
        kind = find(compressor)
        return kind() if kind is not None and kind.reads_twice else None
    return compressor if isinstance(compressor, Compressor) and compressor.reads_twice else None


def name_of(compressor: Compressor) -> str:
    """Give the name of a method; of one that is none of ours, its class."""
    return next((name for name, kind in OURS.items() if kind is type(compressor)), type(compressor).__name__)


def _theirs() -> dict[str, EntryPoint]:
    """Methods of installed packages; one that takes a name of ours is left out."""
    return plugins.installed(GROUP, OURS)


def _load(point: EntryPoint) -> type[Compressor]:
    return plugins.load(point, Compressor, "compressor")  # type: ignore[type-abstract]


def _about(name: str, kind: type[Compressor]) -> Method:
    method = kind()
    summary = (kind.__doc__ or "").strip().split("\n", 1)[0]
    return Method(name, method.paper, method.needs_queries, method.decodes, method.reads_twice, summary)
