"""Fingerprint of a method's code: it changes when the method could answer otherwise, and not with its prose.

It covers the file of the method's class, every file of its wing (`compressors` or `attention`) and of `coreset` that
this one imports, directly or through another, and the method's parameters. A profile or a scorer counts with all its
numbers.

Left out is what all methods stand on and tests hold to the last bit, listed in `SHARED`: protocols, storage, devices.
Docstrings, comments, formatting and the texts of errors do not count: the syntax trees are hashed without them.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from wildcat_kv.compressors import Compressor
from wildcat_kv.compressors.describe import describe

ROOT = Path(__file__).resolve().parents[1]
WINGS = ("wildcat_kv.compressors.", "wildcat_kv.attention.", "wildcat_kv.coreset.")
SHARED = (
    *(f"wildcat_kv.compressors.{name}" for name in ("base", "scorer", "observation")),
    *(f"wildcat_kv.attention.{name}" for name in ("base", "inputs")),
    *(f"wildcat_kv.coreset.{name}" for name in ("wtdattn", "parts", "quantised", "fused", "tensors", "launching")),
    "wildcat_kv.coreset.kernels",
)


def compressor_code(method: Compressor) -> str | None:
    """Make the fingerprint of a compressor and of those among its parameters; None for a foreign package's."""
    kinds = {type(one) for one in _with_parts(method)}
    return fingerprint(kinds, describe(method)) if all(map(_is_known, kinds)) else None


def fingerprint(kinds: Collection[type], parameters: Any) -> str | None:
    """Make the fingerprint of classes and of their parameters.

    Args:
        kinds: classes of a method.
        parameters: plain data.

    Returns:
        16 hexadecimal digits; None if one of the classes is a foreign package's.
    """
    if not all(map(_is_known, kinds)):
        return None
    modules = sorted({module for kind in kinds for module in files_of(kind.__module__)})
    code = {module: _parsed(read_source(module))[0] for module in modules}
    whole = json.dumps([code, parameters], sort_keys=True, default=str)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


@cache
def files_of(module: str) -> frozenset[str]:
    """Name the modules that a method's module is made of, itself among them."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += [name for name in _parsed(read_source(one))[1] if _counts(name)]
    return frozenset(found)


def path_of(module: str) -> Path:
    """Find the file of a module of the project."""
    place = ROOT.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def read_source(module: str) -> str:
    """Read the source of a module of the project."""
    return path_of(module).read_text(encoding="utf-8")


def _is_known(kind: type) -> bool:
    return kind.__module__.startswith((*WINGS, "eval."))


def _counts(module: str) -> bool:
    shared = any(module == one or module.startswith(f"{one}.") for one in SHARED)
    return module.startswith(WINGS) and not shared and path_of(module).is_file()


def _with_parts(method: Compressor) -> Iterator[Compressor]:
    yield method
    if dataclasses.is_dataclass(method):
        for field in dataclasses.fields(method):
            if isinstance(part := getattr(method, field.name), Compressor):
                yield from _with_parts(part)


@cache
def _parsed(source: str) -> tuple[str, tuple[str, ...]]:
    """Parse a source: the hash of its syntax tree, and the names of modules that it may import."""
    tree = ast.parse(source)
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = [f"{node.module}.{alias.name}" for node in froms for alias in node.names]
    digest = hashlib.sha256(json.dumps(_plain(tree)).encode()).hexdigest()
    return digest, (*(str(node.module) for node in froms), *names)


def _plain(node: Any) -> Any:
    """Write a syntax tree as plain data, the same for all versions of Python: without what is empty."""
    if isinstance(node, list):
        return [_plain(one) for one in node if not _is_prose(one)]
    if isinstance(node, ast.Raise):
        return "Raise"
    if isinstance(node, ast.JoinedStr):  # Python 3.12.0 and 3.12.1 add empty texts
        return ["JoinedStr", [_plain(one) for one in node.values if getattr(one, "value", None) != ""]]
    if isinstance(node, ast.AST):
        fields = {name: _plain(value) for name, value in ast.iter_fields(node) if value not in (None, [])}
        return [type(node).__name__, fields]
    return node if isinstance(node, (str, int, float)) else repr(node)


def _is_prose(node: Any) -> bool:
    """True for a docstring: a statement that is nothing but a text."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
