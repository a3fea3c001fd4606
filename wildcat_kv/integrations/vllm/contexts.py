"""Contexts of a folder, found by name or by digest while the folder changes."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from wildcat_kv.integrations.vllm.folder import HEADER, StoredContext, check_name, is_name, read_context
from wildcat_kv.integrations.vllm.identity import ServedModel

# Facts that change with a file: device, inode, bytes, time of the last change.
_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Seen:
    """A context that was read, with the stamps of its files."""

    stamps: tuple[_Stamp, _Stamp]
    context: StoredContext


class ContextFolder:
    """A folder of exported contexts, for one model.

    A context is checked whole when it is first asked for, and again when a file of it has changed.

    Args:
        root: folder of the contexts.
        model: model that is served.
        weighted: True if attention knows weights; a context that has some is refused otherwise.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, root: Path, model: ServedModel, *, weighted: bool = True) -> None:
        if not root.is_dir():
            raise ValueError(f"contexts={str(root)!r} is no folder; make one, and export contexts into it")
        self.root = root.resolve()
        self.model = model
        self.weighted = weighted
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """List the names of all contexts, checked or not, in order."""
        return sorted(path.name for path in self.root.iterdir() if is_name(path.name) and (path / HEADER).is_file())

    def get(self, name: str) -> StoredContext:
        """Give a context that is whole and of the served model.

        Args:
            name: name of the context.

        Raises:
            FileNotFoundError: there is no such context.
            ValueError: no name, a link out of the folder, a damaged context, one of another version or model.
        """
        folder = self.root / check_name(name)
        self._check_inside(name, folder)
        context = read_context(folder)
        self._check_inside(name, folder / HEADER)
        self._check_inside(name, context.path)
        with self._lock:
            try:
                stamps = (_stamp(folder / HEADER), _stamp(context.path))
            except OSError:
                context.check_tensors()  # says what is missing
                raise
            seen = self._seen.get(name)
            if seen is None or seen.stamps != stamps or seen.context.digest != context.digest:
                self._seen.pop(name, None)
                self._check_fits(name, context)
                context.check_tensors()
                self._seen[name] = _Seen(stamps, context)
            return self._seen[name].context

    def find(self, digest: bytes) -> StoredContext:
        """Give the context with a digest, whole and of the served model.

        Raises:
            FileNotFoundError: there is none.
            ValueError: see `get`.
        """
        known = [name for name, seen in list(self._seen.items()) if seen.context.digest == digest]
        for name in [*known, *(name for name in self.names() if name not in known)]:
            try:
                if read_context(self.root / name).digest == digest:
                    return self.get(name)
            except FileNotFoundError:
                continue
            except ValueError:
                if name in known:
                    raise
        raise FileNotFoundError(
            f"no context of {str(self.root)!r} has digest {digest.hex()}; it has changed or is gone"
        )

    def _check_fits(self, name: str, context: StoredContext) -> None:
        """Refuse a context of another model, or one whose weights have no place."""
        self.model.check(name, context.header)
        if context.header.weighted and not self.weighted:
            raise ValueError(
                f"context={name!r} has weights, and the engine's attention knows none; export it with --stock, or "
                "serve with weights"
            )

    def _check_inside(self, name: str, path: Path) -> None:
        """Refuse a path that leads out of the folder."""
        if not path.resolve().is_relative_to(self.root):
            raise ValueError(f"context={name!r} is a link out of the folder of contexts; copy it there")


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
