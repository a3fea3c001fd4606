"""The shape of the package, read from its source: imports and lengths.

Nothing is imported and nothing is measured on a model; `tests/test_structure.py` holds the package to it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "wildcat_kv"
# The wings from the ground up: a wing imports lower ones, and others of its own row that do not import it.
ROWS: tuple[tuple[str, ...], ...] = (
    ("coreset", "hook"),
    ("compressors", "attention"),
    ("data", "models"),
    ("recipes",),
    ("cache",),
    ("integrations", "contexts"),
    ("lm_eval",),
    ("cli",),
)
# Modules outside the wings: they stand on coreset, and all other wings may import them.
GROUND = ("config", "extras", "files", "plugins", "validation")
LIMITS = {"class": 250, "module": 400, "function": 50}  # lines, documentation included


@dataclass(frozen=True)
class Length:
    """The length of one thing.

    Attributes:
        kind: "module", "class" or "function".
        name: dotted name.
        lines: lines from the first to the last.
    """

    kind: str
    name: str
    lines: int


class Structure:
    """The modules of a package, their imports and lengths.

    Args:
        package: folder of the package.

    Attributes:
        sources: syntax tree of every module, by dotted name without the package's.
        lines: lines of every module.
    """

    def __init__(self, package: Path = ROOT / PACKAGE) -> None:
        self.name = package.name
        self.sources: dict[str, ast.Module] = {}
        self.lines: dict[str, int] = {}
        self._folders: set[str] = set()
        for path in sorted(package.rglob("*.py")):
            if not (path.parent / "__init__.py").exists():  # a file that is copied, not imported
                continue
            parts = path.relative_to(package).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
                self._folders.add(".".join(parts))
            text = path.read_text(encoding="utf-8")
            self.sources[".".join(parts)] = ast.parse(text)
            self.lines[".".join(parts)] = text.count("\n")

    @cached_property
    def edges(self) -> dict[str, set[str]]:
        """Modules of the package that each module imports, in functions too."""
        found = {name: {other for other in self._imports(name) if other != name} for name in self.sources}
        return {name: {other for other in others if other in self.sources} for name, others in found.items()}

    @cached_property
    def outside(self) -> dict[str, set[str]]:
        """Top-level names of other packages that each module imports."""
        return {
            name: {module.split(".")[0] for module, _ in _statements(self.sources[name], self._package_of(name))}
            - {self.name}
            for name in self.sources
        }

    @cached_property
    def wings(self) -> dict[str, set[str]]:
        """Wings that each wing imports; modules outside the wings are left out."""
        found: dict[str, set[str]] = {}
        for name, others in self.edges.items():
            if (wing := wing_of(name)) is not None:
                seen = found.setdefault(wing, set())
                seen |= {other for other in map(wing_of, others) if other not in (None, wing)}
        return found

    def lengths(self) -> list[Length]:
        """Measure every module, class and function, the longest first of each kind."""
        found = [Length("module", name or self.name, lines) for name, lines in self.lines.items()]
        for name, tree in self.sources.items():
            for node, inside in _definitions(tree):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append(Length(kind, f"{name}.{inside}", lines))
        return sorted(found, key=lambda one: (one.kind, -one.lines, one.name))

    def too_long(self) -> list[Length]:
        """List everything beyond its limit."""
        return [one for one in self.lengths() if one.lines > LIMITS[one.kind]]

    def upward(self) -> list[str]:
        """List imports that go up the rows, as "importer -> imported"."""
        return [
            f"{name} -> {other or self.name}"
            for name, others in self.edges.items()
            for other in sorted(others)
            if _row_of(other) > _row_of(name)
        ]

    def _imports(self, name: str) -> Iterator[str]:
        """List the modules of the package that a module's statements may mean."""
        for module, item in _statements(self.sources[name], self._package_of(name)):
            if module.split(".")[0] != self.name:
                continue
            inside = module.removeprefix(self.name).removeprefix(".")
            whole = ".".join(part for part in (inside, item) if part)
            yield whole if whole in self.sources else inside

    def _package_of(self, name: str) -> str:
        whole = f"{self.name}.{name}" if name else self.name
        return whole if name in self._folders else whole.rpartition(".")[0]


def wing_of(module: str) -> str | None:
    """Name the wing of a module; None outside the wings.

    Example:
        >>> wing_of("cache.disk.write"), wing_of("config")
        ('cache', None)
    """
    first = module.split(".")[0]
    return first if any(first in wings for wings in ROWS) else None


def _row_of(module: str) -> float:
    """Find a module's row: the ground's beside coreset, doors and the package above all wings."""
    wing = wing_of(module)
    if wing is not None:
        return next(number for number, wings in enumerate(ROWS) if wing in wings)
    return 0 if module in GROUND else len(ROWS)


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Find groups of nodes that reach each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def levels(edges: Mapping[str, set[str]]) -> int:
    """Count the floors of a graph without circles: the longest way down, in nodes."""
    depth: dict[str, int] = {}

    def of(node: str) -> int:
        if node not in depth:
            depth[node] = 1 + max((of(other) for other in edges.get(node, ())), default=0)
        return depth[node]

    return max(map(of, edges), default=0)


def show() -> None:
    """Print the wings, what they import, and what is longest."""
    structure = Structure()
    console = Console()
    table = Table("wing", "modules", "lines", "imports", title=f"{structure.name}, from the ground up")
    for wing in (wing for wings in ROWS for wing in wings):
        own = [name for name in structure.sources if wing_of(name) == wing]
        lines = sum(structure.lines[name] for name in own)
        table.add_row(wing, str(len(own)), f"{lines:,}", ", ".join(sorted(structure.wings.get(wing, ()))))
    console.print(table)
    for what, edges in (("modules", structure.edges), ("wings", structure.wings)):
        found = circles(edges)
        floors = "with circles: " + "; ".join(map(" ".join, found)) if found else f"on {levels(edges)} levels"
        console.print(f"{len(edges)} {what}, {sum(map(len, edges.values()))} edges, {floors}", highlight=False)
    console.print(f"imports upwards: {', '.join(structure.upward()) or 'none'}", highlight=False)
    table = Table("kind", "limit", "longest", "lines", title="Lengths")
    for kind, limit in LIMITS.items():
        own_lengths = [one for one in structure.lengths() if one.kind == kind]
        for one in [one for one in own_lengths if one.lines > limit] or own_lengths[:1]:
            table.add_row(kind, str(limit), one.name, str(one.lines))
    console.print(table)


def foreign(structure: Structure, wing: str) -> set[str]:
    """List what a wing imports beside the standard library and its own package."""
    own = (names for name, names in structure.outside.items() if wing_of(name) == wing)
    return set().union(*own) - sys.stdlib_module_names


def _statements(tree: ast.Module, package: str) -> Iterator[tuple[str, str]]:
    """List module and name of every import; no name where the module itself is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def _definitions(tree: ast.AST, inside: str = "") -> Iterator[tuple[ast.ClassDef | ast.FunctionDef, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{inside}.{node.name}" if inside else node.name
            yield node, name  # type: ignore[misc]
            yield from _definitions(node, name)
        else:
            yield from _definitions(node, inside)
